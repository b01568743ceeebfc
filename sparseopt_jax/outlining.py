"""What a CPU's compiler compiles once, where it would compile it for each layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType


def on_one_cpu(
    cpu: Callable[..., Any], default: Callable[..., Any], *arguments: Any, traced: Any
) -> Any:
    """``cpu(*arguments)`` in a program for a single CPU device, else ``default(*arguments)``.

    On one device nothing is sharded, but in Explicit mode types may say so. Without ``jax.jit``,
    where ``traced`` is an array and no tracer, each operation is compiled by itself and there is
    nothing to gain.
    """
    explicit = AxisType.Explicit in jax.typeof(traced).sharding.mesh.axis_types
    if jax.device_count() > 1 or explicit or not isinstance(traced, jax.core.Tracer):
        return default(*arguments)
    return lax.platform_dependent(*arguments, cpu=cpu, default=default)


def outlined(function: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """``function(*arguments, **settings)``, from a call that the compiler leaves a call.

    It compiles equal kernels once. What it inlines it fuses with what is around it, constants
    included, and then no two layers' kernels are equal.
    """
    from jax.experimental.xla_metadata import set_xla_metadata  # `import jax` leaves it out.

    # Without the barrier constants among the arguments become part of what is called.
    arguments = lax.optimization_barrier(arguments)  # type: ignore[no-untyped-call]
    with set_xla_metadata(inlineable="false"):  # type: ignore[no-untyped-call]
        return _jitted(function, tuple(sorted(settings.items())))(*arguments)


@functools.cache
def _jitted(function: Callable[..., Any], settings: tuple[tuple[str, Any], ...]) -> Any:
    from jax.experimental.xla_metadata import set_xla_metadata

    def inlining(*arguments: Any) -> Any:
        with set_xla_metadata(inlineable=None):  # type: ignore[no-untyped-call]
            return function(*arguments, **dict(settings))

    return jax.jit(inlining)
