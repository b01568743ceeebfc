"""Sparse forward, dense gradient: for who keeps dense weights and trains all of them."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from sparseopt_jax.explicit import in_auto_mode
from sparseopt_jax.masks import fitting
from sparseopt_jax.settings import as_number
from sparseopt_jax.trees import boxed_like, is_absent, unboxed

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


def straight_through(params: PyTree, masks: PyTree, decay: Any = 0.0) -> PyTree:
    """The masked weights, through which gradients pass as if there were no masks.

    Called within a loss, before the model: its forward pass is sparse, and the gradient with
    respect to ``params`` is that of the sparse model by each weight, active or not. With ``decay``
    the gradient of inactive weights has ``decay * w`` added, SR-STE's pull to zero, so that masks
    settle; like weight decay it knows nothing of the loss. A loss that is scaled, or summed over
    several calls, needs a decay that is scaled, or divided by their number.

    Masks may be made within the loss from the weights of the step, as N:M ones usually are.

    Args:
      params: pytree of arrays, or a whole Equinox model; dense weights.
      masks: bool arrays of the same paths and shapes, held in any way; None or
        ``optax.MaskedNode`` for leaves that stay as they are.
      decay: at least 0; may be traced. SR-STE's experiments take 2e-4. Differentiable in reverse
        alone, where it is not 0.

    Returns:
      ``params`` with exact zeros where masks are False, also where a weight is NaN or infinite;
      active weights bit for bit.

    Raises:
      TypeError: a mask is not bool, or ``decay`` is no number.
      ValueError: structure or shapes differ, or ``decay`` is negative.

    Source: Bengio et al. (arXiv 1308.3432); with decay SR-STE, Zhou et al. (arXiv 2102.04010).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> masks = {"kernel": jnp.array([[True, False]])}
      >>> def loss(params):
      ...     sparse = sx.straight_through(params, masks, decay=0.5)
      ...     return jnp.sum(sparse["kernel"] * jnp.array([[3.0, 7.0]]))
      >>> value, grads = jax.value_and_grad(loss)({"kernel": jnp.array([[1.0, 2.0]])})
      >>> float(value), grads["kernel"].tolist()
      (3.0, [[3.0, 8.0]])
    """
    if not isinstance(decay, jax.core.Tracer):
        decay = as_number("decay", decay)
        if not decay >= 0:
            raise ValueError(f"decay must be at least 0, got {decay}")
    elif decay.shape or not jnp.issubdtype(decay.dtype, jnp.floating):
        raise TypeError(f"decay must be a number, got {decay}")
    weights = unboxed(params)
    decays = isinstance(decay, jax.core.Tracer) or decay > 0

    def sparse(weight: Array, mask: Array, decay: Array) -> Array:
        if decays and jnp.issubdtype(weight.dtype, jnp.floating):
            weight = _decayed(weight, mask, decay.astype(weight.dtype))
        return _masked(weight, mask)

    def apply(weight: Any, mask: Any) -> Any:
        if is_absent(mask):
            return weight
        weight = jnp.asarray(weight)
        # Masks that get_masks makes of leaves that are never sparse know nothing of a mesh.
        return in_auto_mode(sparse, like=weight)(weight, mask, jnp.asarray(decay))

    return boxed_like(jax.tree.map(apply, weights, fitting(masks, weights)), params)


@jax.custom_jvp
def _masked(weight: Array, mask: Array) -> Array:
    return jnp.where(mask, weight, jnp.zeros_like(weight))


@_masked.defjvp
def _masked_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _masked(*primals), tangents[0]


@jax.custom_vjp
def _decayed(weight: Array, mask: Array, decay: Array) -> Array:
    """The weight; ``decay`` times an inactive one is added to what its gradient is."""
    return weight


def _decayed_forward(weight: Array, mask: Array, decay: Array) -> tuple[Array, Any]:
    return weight, (weight, mask, decay)


def _decayed_backward(saved: Any, gradient: Array) -> tuple[Array, None, Array]:
    weight, mask, decay = saved
    # By _masked: an inactive weight that is not finite must not reach the active ones' gradient.
    return gradient + decay * _masked(weight, ~mask), None, jnp.zeros_like(decay)


_decayed.defvjp(_decayed_forward, _decayed_backward)
