"""How many layers lie in few arrays, so that one program serves all of them.

Layers of one shape are stacked, (n, *shape). Where no array is sharded, layers of any shape can
also lie end to end in the rows of one array, each layer in rows of its own. Which layer a row is of
is then data: a program for such rows serves any layers that fit into them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array: TypeAlias = jax.Array
Stacks: TypeAlias = list[Array]


class Layout(ABC):
    """What is in each array of ``Stacks``; N layers in all, numbered in the order of the arrays.

    It is a pytree, to be handed to compiled functions beside the arrays.

    Attributes:
      order: which of the random words are each layer's, (N,); in order where it is None. Layers
        keep theirs however they are laid out.
      drawn: for how many layers random words are drawn.
    """

    order: Any
    drawn: int

    @abstractmethod
    def layer_sizes(self) -> Any:
        """Number of elements of each layer, int32 (N,)."""

    @abstractmethod
    def own(self, numbers: Array) -> Stacks:
        """Numbers of the layers (N,), for each array in a shape that broadcasts against it."""

    @abstractmethod
    def total(self, counts: Sequence[Array]) -> Array:
        """Counts along the first axis of each array, int32, added up by layer: (N,)."""

    @abstractmethod
    def indices(self, start: Array) -> Stacks:
        """``start``, a number or one a layer, plus the row-major index within each layer, uint32.

        The sum begins with ``start``: where that may not be taken out of a loop, no index is
        either, and the iotas, which are constants, need no communication where arrays are sharded.
        """

    @abstractmethod
    def within(self) -> list[Array | None]:
        """Where arrays of rows hold a layer and no padding; None for stacks, which have none."""

    def paired(self, stacks: Stacks, *numbers: Array) -> list[tuple[Array, ...]]:
        """Each array with the numbers of its layers."""
        return list(zip(stacks, *map(self.own, numbers), strict=True))

    def own_sizes(self) -> Stacks:
        """The size of the layer of each element, uint32."""
        return self.own(jnp.asarray(self.layer_sizes()).astype(jnp.uint32))

    def random_words(self, key: Array) -> Array:
        """Two for each layer, uint32 (2, N)."""
        # Of one axis: a CPU's compiler unrolls the loop over a last axis of a few elements.
        words = jax.random.bits(key, (2 * self.drawn,), jnp.uint32).reshape(2, -1)
        return words if self.order is None else words[:, jnp.asarray(self.order)]


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["shapes", "drawn", "order"])
@dataclass(frozen=True)
class Stacked(Layout):
    """Stacks of layers, each (n, *shape).

    Attributes:
      shapes: of the arrays.
    """

    shapes: tuple[tuple[int, ...], ...]
    drawn: int
    order: tuple[int, ...] | None = None

    @staticmethod
    def of(*shapes: tuple[int, ...]) -> Stacked:
        """Stacks of these shapes."""
        return Stacked(shapes, sum(n for n, *_ in shapes))

    def layer_sizes(self) -> Any:
        return np.array([math.prod(layer) for n, *layer in self.shapes for _ in range(n)], np.int32)

    def own(self, numbers: Array) -> Stacks:
        ends = np.cumsum([shape[0] for shape in self.shapes])
        parts = jnp.split(numbers, ends[:-1])
        return [
            own.reshape(-1, *[1] * (len(shape) - 1))
            for own, shape in zip(parts, self.shapes, strict=True)
        ]

    def total(self, counts: Sequence[Array]) -> Array:
        return jnp.concatenate(counts)

    def indices(self, start: Array) -> Stacks:
        starts = self.own(start) if start.ndim else [start] * len(self.shapes)
        found = []
        for shape, own in zip(self.shapes, starts, strict=True):
            index, stride = jnp.broadcast_to(own, shape), 1
            for axis in reversed(range(1, len(shape))):
                index += lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
                stride *= shape[axis]
            found.append(index)
        return found

    def within(self) -> list[Array | None]:
        return [None] * len(self.shapes)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["layers", "starts", "sizes", "order"],
    meta_fields=["width", "drawn"],
)
@dataclass(frozen=True)
class Rows(Layout):
    """Layers in an array (rows, width); what no layer fills is zeros.

    Attributes:
      layers: the number of the layer of each row, int32 (rows,), sorted.
      starts: the flat index in its layer at which each row begins, int32 (rows, 1).
      sizes: of the layers, 0 of those that there are not.
      width: of a row.
    """

    layers: Any
    starts: Any
    sizes: Any
    order: Any
    width: int
    drawn: int

    def layer_sizes(self) -> Any:
        return self.sizes

    def own(self, numbers: Array) -> Stacks:
        return [numbers[self.layers][:, None]]

    def total(self, counts: Sequence[Array]) -> Array:
        (count,) = counts
        return jax.ops.segment_sum(count, self.layers, self.sizes.shape[0], indices_are_sorted=True)

    def indices(self, start: Array) -> Stacks:
        (own,) = self.own(start) if start.ndim else [start]
        index = jnp.broadcast_to(own, (self.starts.shape[0], self.width))
        index += self.starts.astype(jnp.uint32)
        return [index + lax.broadcasted_iota(jnp.uint32, index.shape, 1)]

    def within(self) -> list[Array | None]:
        (sizes,) = self.own(self.sizes)
        left = sizes - self.starts
        return [lax.broadcasted_iota(jnp.int32, (left.shape[0], self.width), 1) < left]
