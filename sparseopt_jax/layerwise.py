"""One function over all layers of a model, so that its searches are shared by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparseopt_jax.axes import (
    AxesByPath,
    axes_of_stack,
    from_layers,
    layer_shape,
    layers_of,
    to_layers,
)
from sparseopt_jax.explicit import in_auto_mode
from sparseopt_jax.masks import fitting
from sparseopt_jax.stacks import Layout, Rows, Stacks
from sparseopt_jax.trees import aligned, boxed_like, named_leaves, unboxed

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any

# Leaves of up to this size share a stack where their layers have one shape: each stack adds to the
# time of compilation, and one of several leaves is a copy.
_LARGEST_STACKED = 2**18

# Of the rows in which small layers lie end to end: the padding is half a row a layer.
_WIDTH = 1024

Update: TypeAlias = Callable[[Array, Any, Stacks, Stacks, Stacks, Layout], Stacks]


def update_layerwise(
    update_layers: Update,
    key: Array,
    step: Any,
    masks: PyTree,
    params: PyTree,
    scores: PyTree,
    batch_axes: AxesByPath,
) -> PyTree:
    """Apply ``update_layers`` to the leaves as ``Stacks`` of layers.

    Small leaves with layers of one shape share a stack; a large one is a stack of its own. On a
    single CPU device, where nothing can be sharded, all small layers lie in the rows of one array,
    which compiles faster. The masks are the same, bit for bit.
    """
    boxed, masks = masks, unboxed(masks)
    params = aligned(params, masks, ("params", "masks"), surplus=True)
    scores = aligned(scores, masks, ("scores", "masks"))
    fitting(masks, params)
    leaves, structure = jax.tree.flatten(masks)
    paths = list(named_leaves(masks))
    batches = [
        axes_of_stack(path, mask.ndim, batch_axes) for path, mask in zip(paths, leaves, strict=True)
    ]
    trees = leaves, jax.tree.leaves(params), jax.tree.leaves(scores)
    for path, mask, score in zip(paths, leaves, trees[2], strict=True):
        if jnp.shape(score) != mask.shape:
            raise ValueError(
                f"scores leaf {path!r} has shape {jnp.shape(score)}, its mask {mask.shape}"
            )
    if not leaves:
        return boxed

    stacked = _stacked(*trees, batches)

    def update(key: Array, step: Array, trees: Any) -> list[Array]:
        found: list[Array]
        if jax.device_count() > 1 or not isinstance(key, jax.core.Tracer):
            found = stacked.update(update_layers, key, step, trees)
        else:
            found = lax.platform_dependent(
                key,
                step,
                trees,
                cpu=partial(_in_rows(stacked, *trees).update, update_layers),
                default=partial(stacked.update, update_layers),
            )
        return found

    updated = in_auto_mode(update, like=leaves)(key, jnp.asarray(step), trees)
    return boxed_like(jax.tree.unflatten(structure, updated), boxed)


@dataclass(frozen=True)
class _Arrangement:
    """Which leaves share an array, and how the layers lie in it.

    Attributes:
      groups: the numbers of the leaves in each array.
      batches: the batch axes of each leaf.
      layout: of the arrays.
    """

    groups: Sequence[Sequence[int]]
    batches: Sequence[tuple[int, ...]]
    layout: Layout

    def update(
        self, update_layers: Update, key: Array, step: Any, trees: Sequence[Sequence[Any]]
    ) -> list[Array]:
        masks, weights, scores = (self._arrange([jnp.asarray(a) for a in tree]) for tree in trees)
        new = update_layers(key, step, masks, weights, scores, self.layout)
        found: dict[int, Array] = {}
        for group, rows, stack in zip(self.groups, self.layout.rows, new, strict=True):
            if rows is None:
                n = [layers_of(trees[0][i].shape, self.batches[i]) for i in group]
                parts = jnp.split(stack, np.cumsum(n)[:-1])
            else:
                parts = rows.from_rows(stack)
            found.update(zip(group, parts, strict=True))
        return [
            _to_leaf(found[i], leaf.shape, batch)
            for i, (leaf, batch) in enumerate(zip(trees[0], self.batches, strict=True))
        ]

    def _arrange(self, arrays: list[Array]) -> Stacks:
        layers = [to_layers(a, b) for a, b in zip(arrays, self.batches, strict=True)]
        groups = [[layers[i] for i in group] for group in self.groups]
        return [
            jnp.concatenate(group) if rows is None else rows.to_rows(group)
            for group, rows in zip(groups, self.layout.rows, strict=True)
        ]


def _to_leaf(layers: Array, shape: Sequence[int], batch: Sequence[int]) -> Array:
    n, own = layers_of(shape, batch), layer_shape(shape, batch)
    return from_layers(layers.reshape(n, *own), shape, batch)


def _stacked(
    masks: Sequence[Any], params: Sequence[Any], scores: Sequence[Any], batches: Sequence[Any]
) -> _Arrangement:
    """Leaves of one kind share a stack where they are small."""
    groups = _alike(masks, params, scores, batches)
    shapes = tuple(
        (
            sum(layers_of(masks[i].shape, batches[i]) for i in group),
            *layer_shape(masks[group[0]].shape, batches[group[0]]),
        )
        for group in groups
    )
    return _Arrangement(groups, batches, Layout(shapes, (None,) * len(groups)))


def _in_rows(
    stacked: _Arrangement, masks: Sequence[Any], params: Sequence[Any], scores: Sequence[Any]
) -> _Arrangement:
    """Small leaves of the same dtypes share an array; layers keep the random words of stacks."""
    words = iter(range(len(stacked.layout.sizes)))
    of_leaf: dict[int, list[int]] = {}
    small: dict[Any, list[int]] = {}
    arrays: list[tuple[Sequence[int], tuple[int, ...], Rows | None]] = []
    for group, shape in zip(stacked.groups, stacked.layout.shapes, strict=True):
        for i in group:
            n = layers_of(masks[i].shape, stacked.batches[i])
            of_leaf[i] = [next(words) for _ in range(n)]
        if masks[group[0]].size <= _LARGEST_STACKED:
            kind = jnp.result_type(params[group[0]]), jnp.result_type(scores[group[0]])
            small.setdefault(kind, []).extend(group)
        else:
            arrays.append((group, shape, None))
    for group in small.values():
        leaves = tuple((len(of_leaf[i]), masks[i].size // len(of_leaf[i])) for i in group)
        rows = Rows(leaves, _WIDTH)
        arrays.append((group, rows.shape, rows))
    groups, shapes, in_rows = zip(*arrays, strict=True)
    order = tuple(word for group in groups for i in group for word in of_leaf[i])
    return _Arrangement(groups, stacked.batches, Layout(shapes, in_rows, order))


def _alike(
    masks: Sequence[Any], params: Sequence[Any], scores: Sequence[Any], batches: Sequence[Any]
) -> list[list[int]]:
    """The numbers of the leaves, the small ones together with others of their kind."""
    groups: dict[Any, list[int]] = {}
    for i, (mask, weight, score, batch) in enumerate(
        zip(masks, params, scores, batches, strict=True)
    ):
        shape = layer_shape(mask.shape, batch)
        kind = shape, jnp.result_type(weight), jnp.result_type(score)
        groups.setdefault(kind if mask.size <= _LARGEST_STACKED else i, []).append(i)
    return list(groups.values())
