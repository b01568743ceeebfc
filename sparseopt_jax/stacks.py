"""How many layers lie in few arrays, so that one program serves all of them.

Layers of one shape are stacked, (n, *shape). Where no array is sharded, small layers of any shape
can also lie end to end in rows of one width, each layer in rows of its own: what is compiled grows
with the number of arrays, not with what is in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array: TypeAlias = jax.Array
Stacks: TypeAlias = list[Array]


class Rows(NamedTuple):
    """Layers end to end in an array (rows, width); the last row of each is padded with zeros.

    Attributes:
      leaves: for each leaf how many layers it stacks, and the size of one.
      width: of a row.
    """

    leaves: tuple[tuple[int, int], ...]
    width: int

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each layer."""
        return [size for n, size in self.leaves for _ in range(n)]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the array."""
        return len(self.layers), self.width

    @property
    def layers(self) -> np.ndarray:
        """The number of the layer of each row."""
        return np.repeat(np.arange(len(self.sizes)), [-(-n // self.width) for n in self.sizes])

    @property
    def starts(self) -> np.ndarray:
        """The flat index in its layer at which each row begins, int32 (rows, 1)."""
        starts = [np.arange(0, size, self.width) for size in self.sizes]
        return np.concatenate(starts).astype(np.int32)[:, None]

    def to_rows(self, leaves: Sequence[Array]) -> Array:
        """The array of these leaves, each (layers, *shape)."""
        parts = []
        for leaf, (n, size) in zip(leaves, self.leaves, strict=True):
            padding = jnp.zeros((n, -size % self.width), leaf.dtype)
            parts.append(jnp.concatenate([leaf.reshape(n, size), padding], 1).reshape(-1))
        return jnp.concatenate(parts).reshape(self.shape)

    def from_rows(self, rows: Array) -> list[Array]:
        """The leaves, each (layers, size)."""
        flat, start, found = rows.reshape(-1), 0, []
        for n, size in self.leaves:
            padded = size + -size % self.width
            found.append(flat[start : start + n * padded].reshape(n, padded)[:, :size])
            start += n * padded
        return found


@dataclass(frozen=True)
class Layout:
    """What is in each array of ``Stacks``; N layers in all, numbered in the order of the arrays.

    Attributes:
      shapes: of the arrays.
      rows: for each array what its rows hold, or None: a layer for each index of its first axis.
      order: which of N random words are each layer's; in order by default. Layers keep theirs
        however they are laid out.
    """

    shapes: tuple[tuple[int, ...], ...]
    rows: tuple[Rows | None, ...]
    order: tuple[int, ...] | None = None

    @staticmethod
    def of(stacks: Sequence[Array]) -> Layout:
        """Stacks without rows."""
        return Layout(tuple(a.shape for a in stacks), (None,) * len(stacks))

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each layer."""
        found: list[int] = []
        for shape, rows in zip(self.shapes, self.rows, strict=True):
            found += [math.prod(shape[1:])] * shape[0] if rows is None else rows.sizes
        return found

    def random_words(self, key: Array) -> Array:
        """Two for each layer, uint32 (2, N)."""
        words = jax.random.bits(key, (2, len(self.sizes)), jnp.uint32)
        return words if self.order is None else words[:, np.array(self.order)]

    def own(self, numbers: Array) -> Stacks:
        """Numbers of the layers (N,), for each array in a shape that broadcasts against it."""
        found, start = [], 0
        for shape, rows in zip(self.shapes, self.rows, strict=True):
            n = shape[0] if rows is None else len(rows.sizes)
            own = numbers[start : start + n]
            own = own if rows is None else own[rows.layers]
            found.append(own.reshape(-1, *[1] * (len(shape) - 1)))
            start += n
        return found

    def paired(self, stacks: Stacks, *numbers: Array) -> list[tuple[Array, ...]]:
        """Each array with the numbers of its layers."""
        return list(zip(stacks, *map(self.own, numbers), strict=True))

    def total(self, counts: Sequence[Array]) -> Array:
        """Counts along the first axis of each array, int32, added up by layer: (N,)."""
        return jnp.concatenate(
            [
                c
                if rows is None
                else jax.ops.segment_sum(c, rows.layers, len(rows.sizes), indices_are_sorted=True)
                for c, rows in zip(counts, self.rows, strict=True)
            ]
        )

    def indices(self, start: Array) -> Stacks:
        """``start``, a number or one a layer, plus the row-major index within each layer.

        The sum begins with ``start``: where that may not be taken out of a loop, no index is
        either, and the iotas, which are constants, need no communication where arrays are sharded.
        """
        starts = self.own(start) if start.ndim else [start] * len(self.shapes)
        found = []
        for shape, rows, own in zip(self.shapes, self.rows, starts, strict=True):
            index = jnp.broadcast_to(own, shape)
            if rows is not None:
                index += rows.starts.astype(np.uint32)
            stride = 1
            for axis in reversed(range(1, len(shape))):
                index += lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
                stride *= shape[axis]
            found.append(index)
        return found

    def own_sizes(self) -> list[Array]:
        """The size of the layer of each element, uint32."""
        return self.own(jnp.array(self.sizes, jnp.uint32))

    def within(self) -> list[Array | None]:
        """Where arrays of rows hold a layer and no padding; None for stacks, which have none."""
        found: list[Array | None] = []
        for shape, rows in zip(self.shapes, self.rows, strict=True):
            if rows is None:
                found.append(None)
                continue
            left = np.array(rows.sizes, np.int32)[rows.layers][:, None] - rows.starts
            found.append(lax.broadcasted_iota(jnp.int32, shape, 1) < left)
        return found
