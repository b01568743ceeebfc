"""What the models share: initialisation, normalisation, and the checks of their arguments."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from sparseopt_jax.explicit import in_auto_mode

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


class _GroupedBatchNorm(nn.Module):
    """Batch normalisation in training, within groups of consecutive examples.

    Its variables have the names, shapes and dtypes of ``nn.BatchNorm``'s.

    Attributes:
      groups: number of groups; it must divide the batch.
      options: arguments of ``nn.BatchNorm``; ``scale_init`` and ``param_dtype`` are among them.
    """

    groups: int
    options: Mapping[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x of shape (batch, ..., channels)."""
        batch, channels = x.shape[0], x.shape[-1:]
        if batch % self.groups:
            raise ValueError(
                "bn_groups must divide the number of examples in a training batch; got"
                f" bn_groups={self.groups} and a batch of {batch}"
            )
        dtype = self.options["param_dtype"]
        params = {
            "scale": self.param("scale", self.options["scale_init"], channels, dtype),
            "bias": self.param("bias", nn.initializers.zeros, channels, dtype),
        }
        running = {
            "mean": self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32),
            "var": self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32),
        }
        stats = {name: variable.value for name, variable in running.items()}
        normalize = functools.partial(_normalize_groups, self.groups, self.options)
        y, new = in_auto_mode(normalize, like=(x, stats))(x, params, stats)
        if not self.is_initializing():
            for name, variable in running.items():
                variable.value = new[name]
        return y


def _normalize_groups(
    groups: int, options: Mapping[str, Any], x: jax.Array, params: Any, stats: Any
) -> tuple[jax.Array, Any]:
    """``x`` normalised within groups of consecutive examples, and the new running statistics."""
    # Flax is shown each channel of each group as a channel. The groups are a leading axis, so that
    # devices which hold whole groups need nothing of each other to normalise them.
    variables = jax.tree.map(
        lambda value: jnp.broadcast_to(value[None], (groups, *value.shape)),
        {"params": params, "batch_stats": stats},
    )
    norm = nn.BatchNorm(
        use_running_average=False,
        axis=(0, -1),  # type: ignore[arg-type]  # it takes several and is annotated with one
        parent=None,  # its variables are given, it has none of its own
        **options,
    )
    grouped = x.reshape(groups, x.shape[0] // groups, *x.shape[1:])
    y, new = norm.apply(variables, grouped, mutable=["batch_stats"])
    return y.reshape(x.shape), jax.tree.map(lambda s: s.mean(axis=0), new["batch_stats"])


def batch_norm(
    x: jax.Array,
    *,
    train: bool,
    name: str,
    dtype: Dtype,
    param_dtype: Dtype,
    zero_scale: bool = False,
    groups: int = 1,
) -> jax.Array:
    """Batch normalisation over all axes but the last, as a submodule of the calling module.

    Statistics are computed and kept in float32. The running ones move by 0.1 towards those of the
    batch, whose variance is the biased one, and epsilon is 1e-5 (Ioffe and Szegedy, 2015).
    Under ``jit`` with a batch sharded over devices the statistics are those of the whole batch.

    With more than one group, a training batch is cut into that many parts of consecutive examples
    and each is normalised by its own statistics; the running ones move towards the means of these
    over the groups. The variables are the same for any number of groups.

    Args:
      x: array of shape ``(batch, ..., channels)``.
      train: normalise by the batch's statistics and update the running ones, or by the latter.
      name: name of the submodule.
      dtype: dtype of the result.
      param_dtype: dtype of scale and bias.
      zero_scale: start with scale 0 instead of 1.
      groups: number of groups, a divisor of a training batch; without effect in evaluation.

    Returns:
      Array of the shape of ``x``.

    Raises:
      ValueError: ``groups`` does not divide the batch, in training.
    """
    options: dict[str, Any] = {
        "momentum": 0.9,
        "epsilon": 1e-5,
        "dtype": dtype,
        "param_dtype": param_dtype,
        "scale_init": nn.initializers.zeros if zero_scale else nn.initializers.ones,
    }
    norm: nn.Module
    if train and groups > 1:
        norm = _GroupedBatchNorm(groups, options, name=name)
    else:
        norm = nn.BatchNorm(use_running_average=not train, name=name, **options)
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


def check_choice(argument: str, value: Any, choices: Collection[str]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{argument} must be one of {listed}; got {value!r}")


def check_common(dtype: Any, param_dtype: Any, kernel_init: Any) -> None:
    """Checks arguments that all models have; raises TypeError or ValueError."""
    for argument, value in (("dtype", dtype), ("param_dtype", param_dtype)):
        # None would be read as float64 by NumPy and as "any" by Flax.
        if value is None or jnp.dtype(value).name not in _FLOATS:
            raise ValueError(f"{argument} must be one of {', '.join(_FLOATS)}; got {value!r}")
    if not callable(kernel_init):
        raise TypeError(
            "kernel_init must be a function (key, shape, dtype) -> array such as"
            f" flax.linen.initializers.he_normal(), got {kernel_init!r}"
        )
