"""The per-weight slots of an optimizer's state, found without a list of state classes.

An optimizer's ``init`` copies the tree of parameters that it is given, so the path of a slot ends
with the path of its parameter. Those that have their parameter's shape are kept per weight
(momentum, second moments, averages); others (factored, row statistics, memories) are shared by many
weights and are left alone. ``optax.tree.map_params`` would need an ``init`` that works on a tree
without leaves, which those of L-BFGS, line searches and ``optax.flatten`` do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from sparseopt_jax.masks import is_hidden

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


def owners(tree: PyTree) -> Callable[[tuple[Any, ...]], Any]:
    """A function that finds the leaf of ``tree`` whose slot lies at a path in a state, or None."""
    by_path = dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_hidden))

    def owner(path: tuple[Any, ...]) -> Any:
        # The longest end that is a leaf's path: a shorter one may be another leaf's.
        ends = (path[start:] for start in range(len(path) + 1))
        return next((by_path[end] for end in ends if end in by_path), None)

    return owner


def _slot_masks(masks: PyTree) -> Callable[[tuple[Any, ...], Any], Any]:
    """A function of path and slot: the slot's mask, or None where it is not kept per weight."""
    mask_at = owners(masks)

    def slot_mask(path: tuple[Any, ...], slot: Any) -> Any:
        mask = mask_at(path)
        per_weight = mask is not None and not is_hidden(mask) and jnp.shape(slot) == mask.shape
        return mask if per_weight else None

    return slot_mask


def reset_inactive(state: PyTree, initial: PyTree, masks: PyTree) -> PyTree:
    """Put per-weight slots of inactive weights back to their value in ``initial``.

    What is not in it stays: ``optax.monitor`` adds its measurements on the first step.
    """
    slot_mask, start_at = _slot_masks(masks), dict(jax.tree_util.tree_leaves_with_path(initial))

    def reset(path: tuple[Any, ...], slot: Any) -> Any:
        mask = slot_mask(path, slot)
        if mask is None or path not in start_at:
            return slot
        return jnp.where(mask, slot, start_at[path])

    return jax.tree_util.tree_map_with_path(reset, state)


def keep_per_weight(keep: Array, old: PyTree, new: PyTree, masks: PyTree) -> PyTree:
    """Per-weight slots of ``old`` where ``keep``; schedules and counters of ``new`` always."""
    slot_mask, before = _slot_masks(masks), dict(jax.tree_util.tree_leaves_with_path(old))

    def pick(path: tuple[Any, ...], after: Any) -> Any:
        if slot_mask(path, after) is None or path not in before:
            return after
        return jnp.where(keep, before[path], after)

    return jax.tree_util.tree_map_with_path(pick, new)
