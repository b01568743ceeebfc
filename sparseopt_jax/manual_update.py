"""Topology updates by hand, for loops that schedule them themselves."""

from __future__ import annotations

from typing import Any, TypeAlias

import optax

from sparseopt_jax.containers import as_at_init, part_of
from sparseopt_jax.inner_optimizer import map_copies
from sparseopt_jax.masks import apply_masks
from sparseopt_jax.state import find_states, get_masks, replace_states
from sparseopt_jax.trees import boxed_like, unboxed

PyTree: TypeAlias = Any


def update_topology(
    tx: optax.GradientTransformation, opt_state: optax.OptState, params: PyTree, grads: PyTree
) -> tuple[PyTree, optax.OptState]:
    """One topology update, now, for loops that schedule it themselves.

    Args:
      tx: what ``sparse_training`` returned (usually with ``automatic=False``), or an
        ``optax.partition`` with several of them; also where ``opt_state`` is the state of something
        wrapped around it.
      opt_state: the optimizer state; the drop fraction follows the number of steps in it.
      params: the parameters.
      grads: their gradient with respect to all weights, or a sum of it over several steps.

    Returns:
      ``(params, opt_state)``: the parameters with dropped weights at exactly zero, and the state
      with the new masks. Slots of weights that changed return to their initial value on the next
      ``update``. Nothing else in the state changes.

    Raises:
      TypeError: ``opt_state`` holds no state of ``tx``, or ``tx`` skips steps.
      ValueError: there is no state of ``sparse_training``, or masks do not fit ``params`` or
        ``grads``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
      >>> tx = sx.sparse_training(
      ...     optax.sgd(0.1), distribution=sx.ERK(0.5), automatic=False,
      ...     topology=sx.RigL(interval=1, drop_fraction=0.3, end_step=10))
      >>> opt_state = tx.init(params)
      >>> params = sx.apply_masks(params, sx.get_masks(opt_state))
      >>> params, opt_state = sx.update_topology(tx, opt_state, params, params)
      >>> int(sx.get_masks(opt_state)["kernel"].sum())
      16
    """
    masks = get_masks(opt_state)
    weights = map_copies(lambda p: as_at_init(p, masks), params)
    own = part_of(tx, opt_state, weights)
    tx = optax.with_extra_args_support(tx)
    _, new = tx.update(unboxed(grads), own, weights, update_topology_only=True)
    masks = get_masks(new)
    states = map(boxed_like, find_states(new), find_states(opt_state))
    return map_copies(lambda p: apply_masks(p, masks), params), replace_states(opt_state, states)
