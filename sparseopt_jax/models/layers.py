"""What the models share: initialisation, normalisation, and the checks of their arguments."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

_FLOATS = ("float16", "bfloat16", "float32")


def he_normal(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
    """Normal weights of mean 0 and variance 2 / fan-in, not truncated (He et al., 2015, sec. 2.2).

    ``flax.linen.initializers.he_normal()`` has the same variance and cuts the tails off at two
    standard deviations. The fan-in counts all incoming weights. To account for a mask, scale the
    parameters once after ``init``: ``sx.scale_to_fan_in(params, masks)``.

    Args:
      key: a JAX random key.
      shape: shape of a kernel, output channels last; the fan-in is the product of the others.
      dtype: a floating dtype.

    Returns:
      Array of shape ``shape``, the same as
      ``variance_scaling(2.0, "fan_in", "normal")(key, shape, dtype)`` of JAX gives.

    Example:
      >>> import jax
      >>> from sparseopt_jax import models
      >>> models.he_normal(jax.random.key(0), (3, 3, 16, 32)).shape
      (3, 3, 16, 32)
    """
    # Drawn flat and reshaped: the numbers are the same, and XLA's CPU compiler is done sooner, with
    # all of ResNet-20's init in 4 s instead of 16 s (jax 0.10.2).
    flat = jax.random.normal(key, (math.prod(shape),), dtype)
    return flat.reshape(shape) * math.sqrt(2.0 / math.prod(shape[:-1]))


def batch_norm(
    x: jax.Array,
    *,
    train: bool,
    name: str,
    dtype: Dtype,
    param_dtype: Dtype,
    zero_scale: bool = False,
) -> jax.Array:
    """Batch normalisation over all axes but the last, as a submodule of the calling module.

    Statistics are computed and kept in float32. The running ones move by 0.1 towards those of the
    batch, whose variance is the biased one, and epsilon is 1e-5 (Ioffe and Szegedy, 2015).
    Under ``jit`` with a batch sharded over devices the statistics are those of the whole batch.

    Args:
      x: array of shape ``(..., channels)``.
      train: normalise by the batch's statistics and update the running ones, or by the latter.
      name: name of the submodule.
      dtype: dtype of the result.
      param_dtype: dtype of scale and bias.
      zero_scale: start with scale 0 instead of 1.

    Returns:
      Array of the shape of ``x``.
    """
    norm = nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        param_dtype=param_dtype,
        scale_init=nn.initializers.zeros if zero_scale else nn.initializers.ones,
        name=name,
    )
    # Flax lets half-precision inputs and float32 statistics meet by implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        y: jax.Array = norm(x)
    return y


def layer_norm(x: jax.Array, *, name: str, dtype: Dtype, param_dtype: Dtype) -> jax.Array:
    """Layer normalisation over the last axis (Ba et al., 2016), as a submodule of the caller.

    Args:
      x: array of shape ``(..., channels)``.
      name: name of the submodule.
      dtype: dtype of the result; the statistics are computed in float32.
      param_dtype: dtype of scale and bias.

    Returns:
      Array of the shape of ``x``.
    """
    norm = nn.LayerNorm(epsilon=1e-5, dtype=dtype, param_dtype=param_dtype, name=name)
    with jax.numpy_dtype_promotion("standard"):  # as in batch_norm
        y: jax.Array = norm(x)
    return y


def check_positive(argument: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is an integer, ValueError unless it is at least 1."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{argument} must be an int of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{argument} must be at least 1, got {value!r}")


def check_choice(argument: str, value: Any, choices: Collection[str]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{argument} must be one of {listed}; got {value!r}")


def check_common(num_classes: Any, dtype: Any, param_dtype: Any, kernel_init: Any) -> None:
    """Checks the arguments that all models have; raises TypeError or ValueError."""
    check_positive("num_classes", num_classes)
    for argument, value in (("dtype", dtype), ("param_dtype", param_dtype)):
        # None would be read as float64 by NumPy and as "any" by Flax.
        if value is None or jnp.dtype(value).name not in _FLOATS:
            raise ValueError(f"{argument} must be one of {', '.join(_FLOATS)}; got {value!r}")
    if not callable(kernel_init):
        raise TypeError(
            "kernel_init must be a function (key, shape, dtype) -> array such as"
            f" flax.linen.initializers.he_normal(), got {kernel_init!r}"
        )
