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
import optax

from sparseopt_jax.trees import boxed_like, is_masked_node, unboxed

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


def owners(tree: PyTree) -> Callable[[tuple[Any, ...]], Any]:
    """A function that finds the leaf of ``tree`` whose slot lies at a path in a state, or None."""
    by_path = dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_masked_node))

    def owner(path: tuple[Any, ...]) -> Any:
        # The longest end that is a leaf's path: a shorter one may be another leaf's.
        ends = (path[start:] for start in range(len(path) + 1))
        return next((by_path[end] for end in ends if end in by_path), None)

    return owner


def shared_slots(init: Callable[[PyTree], PyTree], params: PyTree) -> frozenset[Any]:
    """Paths of slots that have their parameter's shape by chance, and are not kept per weight.

    GaLore's projector is (rows, rank) with a rank of at most the columns, so that of a small matrix
    has the matrix's shape. Of a matrix of another shape it has not, which ``init`` is asked for.
    """

    def altered(param: Any) -> Any:
        shape = jnp.shape(param)
        if len(shape) == 2 and shape[0] > 1:
            shape = shape[::-1] if shape[0] != shape[1] else (shape[0] - 1, shape[1])
        return jax.ShapeDtypeStruct(shape, param.dtype)  # type: ignore[no-untyped-call]

    others = jax.tree.map(altered, params)
    try:
        state = unboxed(jax.eval_shape(init, others))
    except (TypeError, ValueError):  # It takes parameters of the given shapes only.
        return frozenset()
    owner = owners(others.fast if isinstance(others, optax.LookaheadParams) else others)
    return frozenset(
        path
        for path, slot in jax.tree_util.tree_leaves_with_path(state)
        if owner(path) is not None and slot.shape != owner(path).shape
    )


def _slot_masks(masks: PyTree, shared: frozenset[Any]) -> Callable[[tuple[Any, ...], Any], Any]:
    """A function of path and slot: the slot's mask, or None where it is not kept per weight."""
    mask_at = owners(masks)

    def slot_mask(path: tuple[Any, ...], slot: Any) -> Any:
        mask = mask_at(path)
        if mask is None or is_masked_node(mask) or path in shared or jnp.shape(slot) != mask.shape:
            return None
        return mask

    return slot_mask


def reset_inactive(state: PyTree, initial: PyTree, masks: PyTree, shared: frozenset[Any]) -> PyTree:
    """Put per-weight slots of inactive weights back to their value in ``initial``.

    What is not in it stays: ``optax.monitor`` adds its measurements on the first step. States may
    hold their slots in boxes; the masks have none.
    """
    slot_mask = _slot_masks(masks, shared)
    start_at = dict(jax.tree_util.tree_leaves_with_path(unboxed(initial)))

    def reset(path: tuple[Any, ...], slot: Any) -> Any:
        mask = slot_mask(path, slot)
        if mask is None or path not in start_at:
            return slot
        return jnp.where(mask, slot, start_at[path])

    return boxed_like(jax.tree_util.tree_map_with_path(reset, unboxed(state)), state)


def keep_per_weight(
    keep: Array, old: PyTree, new: PyTree, masks: PyTree, shared: frozenset[Any]
) -> PyTree:
    """Per-weight slots of ``old`` where ``keep``; schedules and counters of ``new`` always."""
    slot_mask = _slot_masks(masks, shared)
    before = dict(jax.tree_util.tree_leaves_with_path(unboxed(old)))

    def pick(path: tuple[Any, ...], after: Any) -> Any:
        if slot_mask(path, after) is None or path not in before:
            return after
        return jnp.where(keep, before[path], after)

    return boxed_like(jax.tree_util.tree_map_with_path(pick, unboxed(new)), new)
