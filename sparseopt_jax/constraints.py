"""Chain links that keep a model on its masks, for chains of one's own.

``sparse_training`` consists of them, and of what must own state: masks that move, and slots of the
optimizer that start again. Whoever keeps masks elsewhere chains the links and passes ``masks``.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from sparseopt_jax.masks import fitting
from sparseopt_jax.preconditioner import MissingMasksError
from sparseopt_jax.trees import aligned, boxed_like, is_absent, unboxed

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


def zero_inactive() -> optax.GradientTransformationExtraArgs:
    """Zero the gradient of inactive weights; the first link of a chain.

    Returns:
      A stateless transformation. Its ``update`` reads the extra argument ``masks``: bool arrays in
      the structure and shapes of the updates. Dtypes stay. Infinities and NaNs of inactive weights
      become 0, too.

    Raises:
      MissingMasksError: from ``update``, without ``masks``.
      TypeError, ValueError: from ``update``, for masks that do not fit.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> tx = optax.chain(sx.zero_inactive(), optax.sgd(0.5, momentum=0.9))
      >>> params = {"kernel": jnp.array([[1.0, 0.0]])}
      >>> masks = {"kernel": jnp.array([[True, False]])}
      >>> grads = {"kernel": jnp.array([[2.0, 4.0]])}
      >>> updates, _ = tx.update(grads, tx.init(params), params, masks=masks)
      >>> (-updates["kernel"]).tolist()
      [[1.0, 0.0]]
    """

    def update_fn(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree | None = None,
        *,
        masks: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, optax.EmptyState]:
        del params, extra_args
        grads = unboxed(updates)
        masks = _given("zero_inactive", masks, grads)
        return boxed_like(where_active(masks, grads), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def keep_params_masked() -> optax.GradientTransformationExtraArgs:
    """Keep inactive weights at exactly 0: their update is ``-w``. It should be the last of a chain.

    ``w + (-w)`` is 0 in floating point, so inactive weights are exactly 0 after
    ``optax.apply_updates``, whatever they were before.

    Returns:
      A stateless transformation. Its ``update`` needs ``params`` and reads the extra argument
      ``masks``: bool arrays in the structure and shapes of the updates. Updates come out in the
      promoted dtype of update and parameter, which holds ``-w``.

    Raises:
      MissingMasksError: from ``update``, without ``masks``.
      TypeError, ValueError: from ``update``, without ``params``, and for masks that do not fit.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> tx = optax.chain(
      ...     sx.zero_inactive(), sx.scale_by_sparseopt(), optax.add_decayed_weights(1e-4),
      ...     optax.sgd(0.1, momentum=0.9), sx.keep_params_masked())
      >>> params = {"kernel": jnp.array([[1.0, 3.0]])}
      >>> masks = {"kernel": jnp.array([[True, False]])}
      >>> updates, _ = tx.update(params, tx.init(params), params, masks=masks)
      >>> optax.apply_updates(params, updates)["kernel"][0, 1].item()
      0.0
    """

    def update_fn(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree | None = None,
        *,
        masks: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra_args
        if params is None:
            raise ValueError(
                "params is missing: keep_params_masked needs update(grads, opt_state, params)"
            )
        steps = unboxed(updates)
        masks = _given("keep_params_masked", masks, steps)
        params = aligned(params, steps, ("params", "updates"), surplus=True)
        return boxed_like(kept_masked(masks, steps, params), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def where_active(masks: PyTree, tree: PyTree) -> PyTree:
    """``tree`` with zeros where masks are False; leaves without a mask as they are."""
    return jax.tree.map(
        lambda m, a: a if is_absent(m) else jnp.where(m, a, jnp.zeros_like(a)),
        masks,
        tree,
        is_leaf=is_absent,
    )


def kept_masked(masks: PyTree, updates: PyTree, params: PyTree) -> PyTree:
    """``updates`` that take inactive weights to exactly 0, in a dtype that holds ``-w``."""

    def keep(mask: Any, update: Any, weight: Any) -> Any:
        if is_absent(mask) or is_absent(update):
            return update
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.promote_types(update.dtype, weight.dtype)
        return jnp.where(mask, update.astype(dtype), -weight.astype(dtype))

    return jax.tree.map(keep, masks, updates, params, is_leaf=is_absent)


def _given(name: str, masks: PyTree | None, updates: PyTree) -> PyTree:
    """The masks of the updates, checked; none where ``optax.masked`` hides the update."""
    if masks is None:
        raise MissingMasksError(
            f"masks is missing: {name} needs the masks of the weights, "
            "update(grads, state, params, masks=masks)"
        )
    return fitting(masks, updates)
