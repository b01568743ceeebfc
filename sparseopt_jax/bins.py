"""Leaves of any shape, a few at a time, in the rows of one array: one program serves all of them.

What is compiled grows with neither the number of layers nor that of their shapes; at run time each
leaf is copied once into the rows, and its result once out of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparseopt_jax.outlining import outlined
from sparseopt_jax.stacks import Rows

Array: TypeAlias = jax.Array

# Of the rows; each layer begins one, so the padding is half a row a layer.
_WIDTH = 1024
# Rows of a bin, or more where a leaf has more.
_HEIGHT = 1024


class _Bin(NamedTuple):
    """Leaves that are in the rows at the same time.

    Attributes:
      leaves: their numbers.
      heights: in rows of each layer, leaf after leaf.
      sizes: of each layer.
    """

    leaves: tuple[int, ...]
    heights: tuple[int, ...]
    sizes: tuple[int, ...]


def in_bins(
    function: Callable[..., Array],
    trees: Sequence[Sequence[Array]],
    order: Sequence[Sequence[int]],
    drawn: int,
    numbers: Sequence[Array] | None = None,
) -> list[Array]:
    """``function(layout, numbers, *arrays)`` of a bin of leaves after the other.

    Args:
      function: of ``Rows``, the numbers of its layers, and an array of rows for each of ``trees``,
        to an array of their shape.
      trees: leaves, each (layers, *shape), in all trees of the same shapes.
      order: for each leaf the numbers of the layers' random words, of ``drawn``.
      drawn: see ``Layout``.
      numbers: for each leaf one of each of its layers, int32 (layers,); or None.

    Returns:
      The results in the shapes of the leaves.
    """
    shapes = [leaf.shape for leaf in trees[0]]
    bins = _packed(shapes)
    height = max(sum(own.heights) for own in bins)
    n_layers = max(len(own.sizes) for own in bins)
    layouts = [
        _layout(own, height, n_layers, [n for i in own.leaves for n in order[i]], drawn)
        for own in bins
    ]
    rows = [[_rows_of(leaf) for leaf in tree] for tree in trees]

    def fill(own: _Bin) -> Callable[..., list[Array]]:
        missing = height - sum(own.heights)

        def filled(tree: Sequence[Array]) -> Array:
            padding = jnp.zeros((missing, _WIDTH), tree[0].dtype)
            return jnp.concatenate([*(tree[i] for i in own.leaves), padding])

        return lambda: [filled(tree) for tree in rows]

    def one(carry: None, own: tuple[Array, Rows, Array | None]) -> tuple[None, Array]:
        number, layout, of_layers = own
        filled = lax.switch(number, [fill(own) for own in bins])
        return carry, function(layout, of_layers, *filled)

    of_bins = None if numbers is None else _of_bins(bins, numbers, n_layers)
    every = jax.tree.map(lambda *arrays: np.stack(arrays), *layouts)
    _, new = lax.scan(one, None, (jnp.arange(len(bins), dtype=jnp.int32), every, of_bins))
    new = new.reshape(-1, _WIDTH)
    found: dict[int, Array] = {}
    for number, own in enumerate(bins):
        start = number * height
        for i in own.leaves:
            n = len(rows[0][i])
            layers = outlined(_slice, new, jnp.int32(start), n=n).reshape(shapes[i][0], -1)
            found[i] = layers[:, : math.prod(shapes[i][1:])].reshape(shapes[i])
            start += n
    return [found[i] for i in range(len(shapes))]


def _of_bins(bins: Sequence[_Bin], numbers: Sequence[Array], n_layers: int) -> Array:
    """The numbers of the layers of each bin, (bins, n_layers), 0 of those that there are not."""
    own = [jnp.concatenate([numbers[i] for i in one.leaves]) for one in bins]
    return jnp.stack([jnp.pad(one, (0, n_layers - len(one))) for one in own])


def end_to_end(leaves: Sequence[Array]) -> tuple[Array, Rows]:
    """Leaves, each (layers, *shape), one after the other in the rows of one array."""
    rows = [_rows_of(leaf) for leaf in leaves]
    shapes = [leaf.shape for leaf in leaves]
    sizes = tuple(math.prod(shape[1:]) for shape in shapes for _ in range(shape[0]))
    heights = tuple(-(-size // _WIDTH) for size in sizes)
    own = _Bin(tuple(range(len(leaves))), heights, sizes)
    layout = _layout(own, sum(heights), len(sizes), range(len(sizes)), len(sizes))
    return jnp.concatenate(rows), layout


def padded_size(n: int, size: int) -> int:
    """Of a leaf of ``n`` layers of ``size`` elements, in rows."""
    return n * -(-size // _WIDTH) * _WIDTH


def _slice(array: Array, start: Array, n: int) -> Array:
    return lax.dynamic_slice_in_dim(array, start, n)


def _rows_of(leaf: Array) -> Array:
    """A leaf (layers, *shape) as (rows, width)."""
    layers = leaf.reshape(leaf.shape[0], -1)
    return jnp.pad(layers, ((0, 0), (0, -layers.shape[1] % _WIDTH))).reshape(-1, _WIDTH)


def _packed(shapes: Sequence[tuple[int, ...]]) -> list[_Bin]:
    """Each leaf in the first bin in which it fits, the largest first."""
    sizes = [math.prod(shape[1:]) for shape in shapes]
    heights = [-(-size // _WIDTH) for size in sizes]
    rows = [shape[0] * height for shape, height in zip(shapes, heights, strict=True)]
    most = max(_HEIGHT, *rows)
    bins: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: -rows[i]):
        for own in bins:
            if sum(rows[j] for j in own) + rows[i] <= most:
                own.append(i)
                break
        else:
            bins.append([i])

    def of_layers(own: list[int], numbers: list[int]) -> tuple[int, ...]:
        return tuple(numbers[i] for i in own for _ in range(shapes[i][0]))

    return [_Bin(tuple(own), of_layers(own, heights), of_layers(own, sizes)) for own in bins]


def _layout(own: _Bin, height: int, n_layers: int, order: Sequence[int], drawn: int) -> Rows:
    """Of NumPy arrays, filled up with empty rows of the last layer and layers of no rows."""
    n, missing = len(own.sizes), n_layers - len(own.sizes)
    empty = height - sum(own.heights)
    starts = [np.arange(rows) * _WIDTH for rows in own.heights]
    starts.append(np.full(empty, own.sizes[-1]))
    heights = (*own.heights[:-1], own.heights[-1] + empty)
    return Rows(
        layers=np.repeat(np.arange(n, dtype=np.int32), heights),
        starts=np.concatenate(starts).astype(np.int32)[:, None],
        sizes=np.array((*own.sizes, *[0] * missing), np.int32),
        order=np.array((*order, *[0] * missing), np.int32),
        width=_WIDTH,
        drawn=drawn,
    )
