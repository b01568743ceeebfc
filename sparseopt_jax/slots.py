"""The per-weight slots of an optimizer's state, found without a list of state classes.

``optax.tree.map_params`` tells which arrays of a state stand for parameters, because an optimizer's
``init`` copies the structure of what it is given. Those of them that have their parameter's shape
are kept per weight (momentum, second moments, averages); others (factored or row statistics) are
shared by many weights and are left alone.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from sparseopt_jax.masks import is_hidden

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any

# Stands in a state for a slot that is not kept per weight.
_SHARED = object()


def _slot_masks(inner: optax.GradientTransformation, state: PyTree, masks: PyTree) -> PyTree:
    """The inner state with each per-weight slot replaced by its mask, all others by ``_SHARED``."""

    def slot_mask(slot: Any, mask: Any) -> Any:
        if is_hidden(slot):
            return slot
        per_weight = not is_hidden(mask) and jnp.shape(slot) == mask.shape
        return mask if per_weight else _SHARED

    return optax.tree.map_params(
        inner,
        slot_mask,
        state,
        masks,
        transform_non_params=lambda _: _SHARED,
        is_leaf=is_hidden,
    )


def reset_inactive(
    inner: optax.GradientTransformation, state: PyTree, initial: PyTree, masks: PyTree
) -> PyTree:
    """Put per-weight slots of inactive weights back to the value that ``inner.init`` gives."""
    return jax.tree.map(
        lambda slot, start, m: slot if m is _SHARED else jnp.where(m, slot, start),
        state,
        initial,
        _slot_masks(inner, state, masks),
    )


def keep_per_weight(
    inner: optax.GradientTransformation, keep: Array, old: PyTree, new: PyTree, masks: PyTree
) -> PyTree:
    """Per-weight slots of ``old`` where ``keep``; schedules and counters of ``new`` always."""
    return jax.tree.map(
        lambda before, after, m: after if m is _SHARED else jnp.where(keep, before, after),
        old,
        new,
        _slot_masks(inner, new, masks),
    )
