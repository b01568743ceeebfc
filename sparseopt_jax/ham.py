"""Hyperbolic aware minimisation (HAM): a multiplicative step after any optimizer's own.

HAM alternates the optimizer's step, which can take a weight through zero, with one that multiplies
each weight by the exponential of its gradient: weights that the gradient pulls towards zero shrink,
the others grow, each in proportion to its size. That step biases training towards sparse weights.
It changes no sign, and a weight of exactly zero stays zero.
"""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparseopt_jax.trees import is_absent

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any

_MAX_EXPONENT = 5.0


class HamState(NamedTuple):
    """State of ``ham``.

    Attributes:
      step: int32 scalar, the number of updates so far, at which a schedule is read.
      inner_state: state of the inner optimizer.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> state = sx.ham(optax.sgd(0.1), 0.1).init({"kernel": jnp.ones((4, 2))})
      >>> int(state.step)
      0
    """

    step: Array
    inner_state: optax.OptState


def ham(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    alpha: float = 200.0,
    beta: float = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """Hyperbolic aware minimisation around any optax optimizer.

    With w' the weights after the inner optimizer's step, g the gradient that ``update`` receives
    and eta the learning rate, the new weights are

        w' * exp(clip(eta * (-alpha * sign(w') * g - beta), -5, 5)).

    Only tensors of two and more dimensions are multiplied; all others take the inner step alone.
    ``alpha = beta = 0`` is the inner optimizer, bit for bit.

    A tensor takes the inner step alone for one update where its gradient or its stepped weights
    contain a NaN, or where an infinite gradient leaves an exponent undefined (infinity times zero).
    The authors' wrapper clips each tensor's weight norm at 1000 as well. That is left to optax
    here: ``optax.projections.projection_l2_ball(weight, 1000.0)`` after ``optax.apply_updates``.

    Args:
      inner: the optimizer, learning rate and all. It gets the extra arguments of ``update``, such
        as the ``masks`` that ``sparseopt`` reads.
      learning_rate: a number or an optax schedule, the same as ``inner``'s. A schedule is read at
        this transformation's own step count, which runs like that of ``inner``.
      alpha: strength of the multiplicative step, not negative: 200 in the authors' experiments.
      beta: rate of the decay towards zero, not negative: 1e-3 on ImageNet, 16e-3 on CIFAR-100.

    Returns:
      A transformation with state ``HamState``, to be used in place of ``inner``. ``update`` needs
      ``params``. It computes in float32 (float64 for float64 weights), and its updates have the
      dtypes of ``inner``'s.

    Raises:
      TypeError: ``inner`` is not a gradient transformation, or another argument is not a number.
      ValueError: ``alpha`` or ``beta`` is negative or not finite; from ``update``: ``params`` is
        missing.

    Source: HAM (arXiv 2506.02630), the update rule of hyperbolic aware minimisation.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> params = {"kernel": jnp.array([[1.0, -1.0, 0.0]])}
      >>> grads = {"kernel": jnp.array([[0.1, 0.1, 0.0]])}
      >>> tx = sx.ham(optax.sgd(0.1), 0.1)
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> [round(float(w), 3) for w in params["kernel"][0]]  # 0.99 / e**2, -1.01 * e**2, 0
      [0.134, -7.462, 0.0]
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(f"inner must be an optax gradient transformation, got {inner!r}")
    _check_scalar("learning_rate", learning_rate, allow_schedule=True)
    _check_strength("alpha", alpha)
    _check_strength("beta", beta)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> HamState:
        return HamState(step=jnp.zeros((), jnp.int32), inner_state=inner.init(params))

    def update_fn(
        updates: PyTree, state: HamState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, HamState]:
        if params is None:
            raise ValueError("params is missing: ham needs update(grads, opt_state, params)")
        steps, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate

        def multiply(step: Any, weight: Any, grad: Any) -> Any:
            if (
                is_absent(step)
                or jnp.ndim(step) < 2
                or not jnp.issubdtype(step.dtype, jnp.floating)
            ):
                return step
            return _multiplied(step, weight, grad, rate, alpha, beta)

        steps = jax.tree.map(multiply, steps, params, updates, is_leaf=is_absent)
        return steps, HamState(optax.safe_increment(state.step), inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _multiplied(step: Array, weight: Array, grad: Array, rate: Any, alpha: Any, beta: Any) -> Array:
    """The update of one tensor: the inner ``step`` and what the multiplication adds to it."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(jnp.promote_types(step.dtype, weight.dtype), jnp.float32)
    u, w, g = step.astype(dtype), weight.astype(dtype), grad.astype(dtype)
    eta, a, b = (jnp.asarray(x).astype(dtype) for x in (rate, alpha, beta))
    stepped = w + u
    exponent = eta * (-a * jnp.sign(stepped) * g - b)
    # A NaN in the gradient or the stepped weights is one in the exponent too, whatever eta and
    # alpha are.
    skip = jnp.any(jnp.isnan(exponent))
    change = stepped * jnp.expm1(jnp.clip(exponent, -_MAX_EXPONENT, _MAX_EXPONENT))
    # u + change is stepped * exp(e) - w without the cancellation that costs u its last digits where
    # e is small. Where stepped or e is 0 it is u with its sign, also that of -0. An infinite weight
    # stays what it is, for inf + change could be NaN.
    moves = jnp.isfinite(stepped) & (change != 0) & ~skip
    return jnp.where(moves, u + change, u).astype(step.dtype)


def _check_scalar(name: str, value: Any, *, allow_schedule: bool = False) -> None:
    kind = "a number or an optax schedule" if allow_schedule else "a number"
    if allow_schedule and callable(value):
        return
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    # Arrays and tracers are what optax.inject_hyperparams passes.
    if not is_number and not (hasattr(value, "dtype") and np.shape(value) == ()):
        raise TypeError(f"{name} must be {kind}, got {value!r}")


def _check_strength(name: str, value: Any) -> None:
    _check_scalar(name, value)
    if isinstance(value, numbers.Real) and not 0 <= float(value) < float("inf"):
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")
