"""One function over all layers of a model, so that its searches are shared by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt_jax.bins import in_bins, padded_size
from sparseopt_jax.explicit import in_auto_mode
from sparseopt_jax.layers import describe_layers
from sparseopt_jax.masks import fitting
from sparseopt_jax.outlining import on_one_cpu
from sparseopt_jax.stacks import Layout, Rows, Stacked, Stacks
from sparseopt_jax.structures import Structure
from sparseopt_jax.trees import aligned, boxed_like, unboxed
from sparseopt_jax.units import Units

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any

# Leaves of up to this size share a stack where their layers have one shape: each stack adds to the
# time of compilation, and one of several leaves is a copy.
_LARGEST_STACKED = 2**18

# Leaves of up to this size, padding included, are copied into rows where they can be.
_LARGEST_IN_BINS = 2**22


class Operands(NamedTuple):
    """What an update works on, as ``Stacks`` of N layers in all.

    Attributes:
      masks: bool.
      weights: what to drop by, floating.
      scores: what to grow by, floating.
      layout: how the layers lie in the stacks.
      planned: int32 (N,), how many members each layer is to have, or how many weights where layers
        are more than one group; None: as many as it has.
    """

    masks: Stacks
    weights: Stacks
    scores: Stacks
    layout: Layout
    planned: Array | None


class Update(Protocol):
    """What is applied to the layers; it returns masks as it got them."""

    def drop_scores(self, weight: Array, score: Array) -> Array:
        """What to drop by, of one leaf."""
        ...

    def update_layers(self, key: Array, step: Any, of: Operands) -> Stacks:
        """Of layers that are one group each."""
        ...

    def update_groups(self, key: Array, step: Any, of: Operands, structure: Structure) -> Stacks:
        """Of layers that are several groups each: stacks (n, groups, members)."""
        ...


def update_layerwise(
    own: Update,
    key: Array,
    step: Any,
    masks: PyTree,
    params: PyTree,
    scores: PyTree,
    layers: PyTree | None,
) -> PyTree:
    """Apply an update to the leaves as ``Stacks`` of layers.

    Small leaves with layers of one shape share a stack; a large one is a stack of its own. On a
    single CPU device, where nothing can be sharded, leaves take turns in the rows of one array,
    which compiles faster. The masks are the same, bit for bit.
    """
    boxed, masks = masks, unboxed(masks)
    params = aligned(params, masks, ("params", "masks"), surplus=True)
    scores = aligned(scores, masks, ("scores", "masks"))
    fitting(masks, params)
    told = describe_layers(masks) if layers is None else layers
    told = jax.tree.leaves(aligned(told, masks, ("layers", "masks")))
    leaves, structure = jax.tree.flatten(masks)
    trees = leaves, jax.tree.leaves(params), jax.tree.leaves(scores)
    for layer, mask, score in zip(told, leaves, trees[2], strict=True):
        if jnp.shape(score) != mask.shape:
            raise ValueError(
                f"scores leaf {layer.path!r} has shape {jnp.shape(score)}, its mask {mask.shape}"
            )
    if not leaves:
        return boxed
    units = [Units.of(layer, mask.shape) for layer, mask in zip(told, leaves, strict=True)]
    by_structure: dict[Structure | None, list[int]] = {}
    for i, unit in enumerate(units):
        by_structure.setdefault(unit.grouped_by, []).append(i)

    def update(key: Array, step: Array, trees: Any, planned: Any) -> list[Array]:
        as_units = _as_units(own, units, *trees)
        counts = [None if p is None else u.members(p) for u, p in zip(units, planned, strict=True)]
        new: dict[int, Array] = {}
        for number, (grouped, leaves) in enumerate(by_structure.items()):
            new |= zip(
                leaves,
                _update(
                    own,
                    key if len(by_structure) == 1 else jax.random.fold_in(key, number),
                    step,
                    [[tree[i] for i in leaves] for tree in as_units],
                    [counts[i] for i in leaves],
                    grouped,
                ),
                strict=True,
            )
        return [unit.restored(new[i]) for i, unit in enumerate(units)]

    planned = [layer.planned for layer in told]
    # A member of several weights may be active in part, where masks do not have the pattern yet.
    in_part = any(unit.split is not None and unit.split.sizes[2] > 1 for unit in units)
    if in_part or any(count is not None for count in planned):
        planned = [layer.count(mask) for layer, mask in zip(told, leaves, strict=True)]
    updated = in_auto_mode(update, like=leaves)(key, jnp.asarray(step), trees, planned)
    return boxed_like(jax.tree.unflatten(structure, updated), boxed)


def _as_units(
    own: Update,
    units: Sequence[Units],
    masks: Sequence[Any],
    weights: Sequence[Any],
    scores: Sequence[Any],
) -> tuple[Stacks, Stacks, Stacks]:
    drop = [
        own.drop_scores(jnp.asarray(w), jnp.asarray(s))
        for w, s in zip(weights, scores, strict=True)
    ]
    return (
        [unit.of_mask(mask) for unit, mask in zip(units, masks, strict=True)],
        [unit.of_scores(score) for unit, score in zip(units, drop, strict=True)],
        [unit.of_scores(score) for unit, score in zip(units, scores, strict=True)],
    )


def _update(
    own: Update,
    key: Array,
    step: Any,
    trees: Sequence[Stacks],
    planned: Sequence[Array | None],
    grouped: Structure | None,
) -> list[Array]:
    """The new masks of leaves (n, ...) that are of one kind."""
    stacked = _stacked(*trees)
    if grouped is not None:
        update = partial(own.update_groups, structure=grouped)
        return stacked.update(update, key, step, trees, planned)
    new: list[Array] = on_one_cpu(
        partial(_update_in_bins, own.update_layers, stacked),
        partial(stacked.update, own.update_layers),
        key,
        step,
        trees,
        planned,
        traced=key,
    )
    return new


@dataclass(frozen=True)
class _Arrangement:
    """Which leaves (n, ...) share a stack.

    Attributes:
      groups: the numbers of the leaves in each stack.
      layout: of the stacks.
    """

    groups: Sequence[Sequence[int]]
    layout: Stacked

    def update(
        self,
        update: Callable[[Array, Any, Operands], Stacks],
        key: Array,
        step: Any,
        trees: Sequence[Stacks],
        planned: Sequence[Array | None],
    ) -> list[Array]:
        """The leaves of the groups after an update, in the order of their numbers."""
        counts = [planned[i] for group in self.groups for i in group]
        given = [count for count in counts if count is not None]
        masks, weights, scores = map(self._arrange, trees)
        of = Operands(
            masks, weights, scores, self.layout, jnp.concatenate(given) if given else None
        )
        new: dict[int, Array] = {}
        for group, stack in zip(self.groups, update(key, step, of), strict=True):
            n = [trees[0][i].shape[0] for i in group]
            new |= zip(group, jnp.split(stack, np.cumsum(n)[:-1]), strict=True)
        return [new[i] for i in sorted(new)]

    def _arrange(self, leaves: Stacks) -> Stacks:
        return [jnp.concatenate([leaves[i] for i in group]) for group in self.groups]


def _stacked(masks: Stacks, weights: Stacks, scores: Stacks) -> _Arrangement:
    """Leaves of one kind share a stack where they are small."""
    groups: dict[Any, list[int]] = {}
    for i, (mask, weight, score) in enumerate(zip(masks, weights, scores, strict=True)):
        kind = mask.shape[1:], weight.dtype, score.dtype
        groups.setdefault(kind if mask.size <= _LARGEST_STACKED else i, []).append(i)
    shapes = (
        (sum(masks[i].shape[0] for i in group), *masks[group[0]].shape[1:])
        for group in groups.values()
    )
    return _Arrangement(list(groups.values()), Stacked.of(*shapes))


def _update_in_bins(
    update_layers: Callable[[Array, Any, Operands], Stacks],
    stacked: _Arrangement,
    key: Array,
    step: Any,
    trees: Sequence[Stacks],
    planned: Sequence[Array | None],
) -> list[Array]:
    """``stacked.update``, compiled once for all but the largest leaves.

    Layers have the random words that they have in stacks.
    """
    masks, weights, scores = trees
    drawn = stacked.layout.drawn
    words = iter(range(drawn))
    of_leaf: dict[int, list[int]] = {}
    kinds: dict[Any, list[int]] = {}
    large = []
    for i in (i for group in stacked.groups for i in group):
        n = masks[i].shape[0]
        of_leaf[i] = [next(words) for _ in range(n)]
        if padded_size(n, masks[i].size // n) > _LARGEST_IN_BINS:
            large.append(i)
        else:
            kinds.setdefault((weights[i].dtype, scores[i].dtype), []).append(i)
    new: dict[int, Array] = {}
    if large:
        order = tuple(word for i in large for word in of_leaf[i])
        layout = Stacked(tuple(masks[i].shape for i in large), drawn, order)
        alone = _Arrangement([[i] for i in large], layout)
        leaves = alone.update(update_layers, key, step, trees, planned)
        new |= zip(sorted(large), leaves, strict=True)
    # The body of a loop may not consume a key from outside of it.
    data, impl = jax.random.key_data(key), jax.random.key_impl(key)

    def update(
        layout: Rows, planned: Array | None, masks: Array, weights: Array, scores: Array
    ) -> Array:
        own = jax.random.wrap_key_data(data, impl=impl)
        (after,) = update_layers(own, step, Operands([masks], [weights], [scores], layout, planned))
        return after

    for numbers in kinds.values():
        counts = [count for i in numbers if (count := planned[i]) is not None]
        leaves = in_bins(
            update,
            [[tree[i] for i in numbers] for tree in trees],
            [of_leaf[i] for i in numbers],
            drawn,
            counts or None,
        )
        new |= zip(numbers, leaves, strict=True)
    return [new[i] for i in range(len(masks))]
