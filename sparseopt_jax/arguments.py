"""Checks of what ``sparse_training`` is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparseopt_jax.settings import as_bool, as_int, check_function
from sparseopt_jax.topology import Topology

Array: TypeAlias = jax.Array


def check_arguments(
    inner: Any,
    distribution: Any,
    masks: Any,
    topology: Any,
    seed: Any,
    prunable: Any,
    automatic: Any,
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
    if distribution is not None:
        check_distribution(distribution)
    check_topology(topology)
    check_function("prunable", prunable, "path", "leaf")
    automatic = as_bool("automatic", automatic)
    for one in topology.values() if isinstance(topology, Mapping) else (topology,):
        if not automatic and one.accumulate_steps > 1:
            raise ValueError(
                f"accumulate_steps={one.accumulate_steps} needs automatic=True; a loop that "
                "schedules updates itself passes the gradients it accumulated to update_topology"
            )
        if automatic and type(one).is_update_step is Topology.is_update_step:
            as_int(f"interval of {one}", getattr(one, "interval", None), at_least=1)
    _check_seed(seed)


def check_distribution(distribution: Any) -> None:
    _check_values("distribution", distribution, "ERK(0.9)", _is_distribution)


def check_topology(topology: Any) -> None:
    _check_values("topology", topology, "Static()", lambda one: isinstance(one, Topology))


def _is_distribution(value: Any) -> bool:
    return not isinstance(value, type) and hasattr(value, "layer_counts")


def _check_values(name: str, given: Any, example: str, is_one: Callable[[Any], bool]) -> None:
    """Raise unless ``given`` is such a value, or a mapping from patterns to such."""
    if isinstance(given, Mapping) and not given:
        raise ValueError(f"{name} must name at least one pattern, got an empty mapping")
    for pattern, value in given.items() if isinstance(given, Mapping) else [("", given)]:
        if not isinstance(pattern, str):
            raise TypeError(f"{name} patterns must be strings, got {pattern!r}")
        if not is_one(value):
            where = f" for {pattern!r}" if pattern else ""
            raise TypeError(f"{name} must be a value such as {example}, got {value!r}{where}")


def as_key(seed: Any) -> Array:
    """A typed key from an int, a key of either kind, or a traced one; ``seed`` was checked."""
    if not isinstance(seed, int) and _is_typed_key(seed):
        return cast(Array, seed)
    return jax.random.key(seed) if np.ndim(seed) == 0 else jax.random.wrap_key_data(seed)


def key_impl(seed: Any) -> Any:
    """The implementation of ``as_key(seed)``, without an array."""
    if not isinstance(seed, int) and _is_typed_key(seed):
        return jax.random.key_impl(seed)
    return jax.config.jax_default_prng_impl  # type: ignore[attr-defined]


def _is_typed_key(seed: Any) -> bool:
    return jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not (isinstance(seed, int) or hasattr(seed, "dtype")):
        raise TypeError(f"seed must be an int or a JAX random key, got {seed!r}")
    if isinstance(seed, int):
        return
    if seed.ndim == 0 and (_is_typed_key(seed) or jnp.issubdtype(seed.dtype, jnp.integer)):
        return
    if not (seed.dtype == jnp.uint32 and seed.ndim == 1):
        raise TypeError(
            "seed must be an int or one JAX random key, got an array of "
            f"dtype {seed.dtype} and shape {seed.shape}"
        )
