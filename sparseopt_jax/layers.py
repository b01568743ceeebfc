"""What a topology may know of a layer besides its weights: axes, structure and target count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from sparseopt_jax.axes import AxesByPath, KernelAxes, check_axes, check_patterns, kernel_axes
from sparseopt_jax.by_path import ByPath, grouped
from sparseopt_jax.layout import out_axes_of
from sparseopt_jax.structures import Structure, check_is_structure
from sparseopt_jax.trees import is_absent, named_leaves, path_str, unboxed

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


@dataclass(frozen=True, eq=False)
class Layer:
    """What ``Topology.update`` is told of one leaf; for ``jax.tree.map`` it is a leaf itself.

    Attributes:
      path: of the parameter, ``"Dense_0/kernel"``.
      axes: which axes of the leaf are incoming, index neurons, and index the layers of a stack;
        each a tuple of ints.
      structure: the pattern that its mask is to have, or None.
      planned: how many weights each of its layers is to have at this step, int32 of the shape of
        the stack's axes, which is () for a single layer; or None, as many as it has.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> masks = {"kernel": jnp.eye(3, dtype=bool)}
      >>> layer = sx.describe_layers(masks)["kernel"]
      >>> layer.axes.incoming, layer.axes.out, int(layer.count(masks["kernel"]))
      ((0,), (1,), 3)
    """

    path: str
    axes: KernelAxes
    structure: Structure | None = None
    planned: Array | None = None

    def count(self, mask: Array) -> Array:
        """How many weights each of its layers is to have: as planned, or as many as ``mask``.

        Args:
          mask: bool, the leaf's.

        Returns:
          int32 of the shape of the stack's axes.
        """
        if self.planned is not None:
            return self.planned
        axes = tuple(axis for axis in range(mask.ndim) if axis not in self.axes.batch)
        return jnp.sum(mask, axis=axes, dtype=jnp.int32)


def describe_layers(
    masks: PyTree,
    *,
    structure: ByPath[Structure] | None = None,
    out_axes: AxesByPath | None = None,
    batch_axes: AxesByPath = (),
) -> PyTree:
    """What ``Topology.update`` takes as ``layers``, for calling it by hand.

    Args:
      masks: bool arrays; or anything of their shapes.
      structure: the pattern of all of them, or a mapping from glob patterns over paths to patterns.
      out_axes: see ``scale_by_sparseopt``.
      batch_axes: see ``scale_by_sparseopt``.

    Returns:
      A ``Layer`` in the place of each array.

    Raises:
      TypeError: axes or a structure of the wrong type.
      ValueError: axes or a pattern that does not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> masks = {"kernel": jnp.arange(16).reshape(2, 4, 2) < 6}  # two layers of 4 x 2
      >>> grads = {"kernel": jnp.ones((2, 4, 2))}
      >>> topology = sx.RigL(interval=1, drop_fraction=0.5, end_step=10)
      >>> layers = sx.describe_layers(masks, batch_axes=0)
      >>> masks = topology.update(jax.random.key(0), 1, masks, grads, grads, layers)
      >>> masks["kernel"].sum(axis=(1, 2)).tolist()
      [6, 0]
    """
    check_axes("out_axes", out_axes)
    check_axes("batch_axes", batch_axes)
    masks = unboxed(masks)
    leaves = {p: m for p, m in named_leaves(masks).items() if not is_absent(m)}
    check_patterns("out_axes", out_axes, leaves)
    check_patterns("batch_axes", batch_axes, leaves)
    axes = out_axes_of(masks, out_axes, batch_axes, concerns=lambda path, _: structure is not None)
    structures = structure_of("structure", structure, list(leaves))

    def describe(path: tuple[Any, ...], mask: Any) -> Any:
        if is_absent(mask):
            return mask
        name = path_str(path)
        return Layer(name, kernel_axes(name, mask.ndim, axes, batch_axes), structures.get(name))

    return jax.tree_util.tree_map_with_path(describe, masks, is_leaf=is_absent)


def structure_of(
    name: str, structure: ByPath[Structure] | None, paths: list[str]
) -> dict[str, Structure]:
    """The structure of each path that has one.

    Raises:
      TypeError: it is none.
      ValueError: a pattern matches no path.
    """
    check_is_structure(structure)
    if structure is None:
        return {}
    return {paths[i]: one for one, numbers in grouped(name, structure, paths) for i in numbers}
