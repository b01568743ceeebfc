"""What of a leaf becomes active together: its weights, or where a structure says so, more.

Selection works on members: single weights, or blocks and neurons, which then count by the sum of
the magnitudes of their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt_jax.axes import from_layers, layer_shape, layers_of, to_layers
from sparseopt_jax.layers import Layer
from sparseopt_jax.structures import Split, Structure, layer_axes, named

Array: TypeAlias = jax.Array


@dataclass(frozen=True, eq=False)
class Units:
    """How the layers of one leaf lie as (n, members), or as (n, *groups, members).

    Axes of groups are not made one: that would keep the compiler from reading the leaf as it lies.

    Without a structure a layer keeps its shape, (n, *shape).

    Attributes:
      shape: of the leaf.
      batch: its axes that index the layers of a stack.
      structure: of its layers, or None.
      split: what the structure says of a layer's kernel, or None.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    structure: Structure | None
    split: Split | None

    @staticmethod
    def of(layer: Layer, shape: tuple[int, ...]) -> Units:
        """Of the leaf that ``layer`` describes.

        Raises:
          ValueError: its structure does not fit.
        """
        batch = layer.axes.batch
        split = None
        if layer.structure is not None:
            with named(layer.path):
                split = layer.structure.split(layer_shape(shape, batch), layer_axes(layer.axes))
        return Units(shape, batch, layer.structure, split)

    @property
    def grouped_by(self) -> Structure | None:
        """The structure, where each layer is more than one group."""
        return self.structure if self.split is not None and self.split.sizes[0] > 1 else None

    @property
    def n_layers(self) -> int:
        """How many layers the leaf has."""
        return layers_of(self.shape, self.batch)

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """The shape of one layer's members."""
        if self.split is None:
            return layer_shape(self.shape, self.batch)
        n_groups, n_members, _ = self.split.sizes
        if n_groups == 1:
            return (n_members,)
        return (*(self.split.shape[axis] for axis in self.split.groups), n_members)

    def of_mask(self, mask: Array) -> Array:
        """Whether members are active: as soon as one of their weights is."""
        return self._arranged(mask, lambda parts: parts.any(axis=-1))

    def of_scores(self, scores: Array, by_magnitude: bool = True) -> Array:
        """The scores of members: of several weights the sum, by default of their magnitudes."""

        def summed(parts: Array) -> Array:
            wide = jnp.promote_types(parts.dtype, jnp.float32)
            return jnp.sum(jnp.abs(parts) if by_magnitude else parts, axis=-1, dtype=wide)

        return self._arranged(scores, summed)

    def members(self, planned: Array) -> Array:
        """How many members each layer is to have, int32 (n,), not rounded to its groups.

        Args:
          planned: how many weights, int32 of the shape of the stack's axes.
        """
        planned = planned.reshape(self.n_layers)
        if self.split is None:
            return planned
        n_groups, _, n_weights = self.split.sizes
        members: Array = planned // n_weights if n_groups > 1 else self.split.members_of(planned)
        return members

    def limits(self, planned: Array) -> Array:
        """How many members each group is to have, int32 (n, *groups); ``planned`` as above."""
        assert self.split is not None
        groups = self.unit_shape[:-1]
        members: Array = self.split.members_of(planned.reshape(-1, *[1] * len(groups)))
        return jnp.broadcast_to(members, (self.n_layers, *groups))

    def restored(self, units: Array) -> Array:
        """The leaf's mask from that of its members."""
        if self.split is None:
            layers = units.reshape(self.n_layers, *layer_shape(self.shape, self.batch))
        else:
            arranged = units.reshape(self.n_layers, *self.split.sizes[:2])
            layers = self.split.restored(arranged, layer_shape(self.shape, self.batch))
        return from_layers(layers, self.shape, self.batch)

    def check(self, path: str, mask: Array) -> None:
        """Raise where a mask, which is not traced, does not have the pattern."""
        if self.split is None:
            return
        with jax.ensure_compile_time_eval():
            active = self.of_mask(mask)
            in_part = jnp.any(self.restored(active) != mask)
            counts = np.asarray(jnp.sum(active, axis=-1, dtype=jnp.int32))
            counts = counts.reshape(self.n_layers, -1)
        what = None
        if in_part:
            what = "weights that are active together are active in part"
        elif self.grouped_by is not None:
            for own in counts:
                # Neurons that were left out have none.
                own = own[own > 0] if getattr(self.structure, "ablate", None) else own
                if len(set(own.tolist())) > 1:
                    what = (
                        f"of each {active.shape[-1]} between {own.min()} and {own.max()} are "
                        "active, where all are to have the same number"
                    )
        if what is not None:
            raise ValueError(
                f"masks leaf {path!r} must have the pattern of {self.structure}: {what}; "
                "init_masks and masks_from_scores make such masks"
            )

    def _arranged(self, leaf: Array, pooled: Callable[[Array], Array]) -> Array:
        layers = to_layers(jnp.asarray(leaf), self.batch)
        if self.split is None:
            return layers
        parts = self.split.arranged(layers)
        parts = pooled(parts) if self.split.sizes[2] > 1 else parts[..., 0]
        return parts.reshape(self.n_layers, *self.unit_shape)
