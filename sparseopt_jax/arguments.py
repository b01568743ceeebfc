"""Checks of what ``sparse_training`` is given."""

from __future__ import annotations

from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax

Array: TypeAlias = jax.Array


def check_arguments(
    inner: Any, distribution: Any, masks: Any, topology: Any, static_layers: Any, automatic: Any
) -> None:
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"inner must be an optax gradient transformation, got {inner!r}"
            + ("; MultiSteps goes around sparse_training" if hasattr(inner, "has_updated") else "")
        )
    if (distribution is None) == (masks is None):
        raise ValueError(
            "sparse_training needs either distribution, for example ERK(0.9), or masks to start "
            f"from, got {'neither' if masks is None else 'both'}"
        )
    if distribution is not None and (
        isinstance(distribution, type) or not hasattr(distribution, "layer_counts")
    ):
        raise TypeError(f"distribution must be a value such as ERK(0.9), got {distribution!r}")
    if static_layers is not None and not callable(static_layers):
        raise TypeError(
            f"static_layers must be a function of a leaf's path, or None, got {static_layers!r}"
        )
    if isinstance(topology, type) or not hasattr(topology, "is_update_step"):
        raise TypeError(f"topology must be a value such as Static(), got {topology!r}")
    if not isinstance(automatic, bool):
        raise TypeError(f"automatic must be True or False, got {automatic!r}")
    if not automatic and topology.accumulate_steps > 1:
        raise ValueError(
            f"accumulate_steps={topology.accumulate_steps} needs automatic=True; a loop that "
            "schedules updates itself passes the gradients it accumulated to update_topology"
        )


def as_key(seed: Any) -> Array:
    """A typed key from an int, a key of either kind, or a traced one."""
    if isinstance(seed, bool) or not (isinstance(seed, int) or hasattr(seed, "dtype")):
        raise TypeError(f"seed must be an int or a JAX random key, got {seed!r}")
    if isinstance(seed, int):
        return jax.random.key(seed)
    if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) and seed.ndim == 0:
        return cast(Array, seed)
    if jnp.issubdtype(seed.dtype, jnp.integer) and seed.ndim == 0:
        return jax.random.key(seed)
    if seed.dtype == jnp.uint32 and seed.ndim == 1:
        return jax.random.wrap_key_data(seed)
    raise TypeError(
        "seed must be an int or one JAX random key, got an array of "
        f"dtype {seed.dtype} and shape {seed.shape}"
    )
