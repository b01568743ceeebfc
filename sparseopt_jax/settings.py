"""Checks that settings share: numbers and flags as Python's own, and functions of a path.

A setting is part of the program, so it has its value when the program is made. NumPy's and JAX's
scalars have one and are taken; they are kept as Python's numbers, which hash, compare and print.
"""

from __future__ import annotations

import inspect
import numbers
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

MOST_STEPS = 2**31 - 1
"""Steps are counted in int32."""

Kind: TypeAlias = type[bool] | type[int] | type[float]

_OF_NUMBER: tuple[tuple[Kind, type], ...] = (
    (bool, bool),
    (int, numbers.Integral),
    (float, numbers.Real),
)
_OF_DTYPE: tuple[tuple[Kind, Any], ...] = (
    (bool, np.bool_),
    (int, np.integer),
    (float, np.floating),
)


def kind_of(name: str, value: Any) -> Kind | None:
    """Of which of Python's kinds a scalar is, Python's own, NumPy's or JAX's; None of another.

    Raises:
      TypeError: the value is traced.
    """
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} is traced, got {value!r}: a setting must have its value when the program is "
            "made. Set it outside of jax.jit, or make the argument that it comes from static "
            "(static_argnames; static_args of optax.inject_hyperparams)"
        )
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        if value.shape != ():
            return None
        return next((kind for kind, own in _OF_DTYPE if jnp.issubdtype(value.dtype, own)), None)
    return next((kind for kind, own in _OF_NUMBER if isinstance(value, own)), None)


def as_int(name: str, value: Any, at_least: int | None = None, at_most: int | None = None) -> int:
    """``value`` as an int; TypeError where it is none, ValueError where it is out of range."""
    if kind_of(name, value) is not int:
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    number = int(value)
    if at_least is not None and number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {number}")
    if at_most is not None and number > at_most:
        raise ValueError(f"{name} must be at most {at_most}, got {number}")
    return number


def as_number(name: str, value: Any, wanted: str = "a number") -> float:
    """``value`` as an int or float; TypeError where it is neither."""
    kind = kind_of(name, value)
    if kind is None or kind is bool:
        raise TypeError(f"{name} must be {wanted}, got {value!r} of type {type(value).__name__}")
    return kind(value)


def as_bool(name: str, value: Any) -> bool:
    """``value`` as a bool; TypeError where it is none."""
    if kind_of(name, value) is not bool:
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def keep(frozen: Any, **values: Any) -> None:
    """Keep settings of a frozen dataclass in the types that they were checked to have."""
    for name, value in values.items():
        object.__setattr__(frozen, name, value)


def check_function(name: str, function: Any, *arguments: str, or_none: bool = False) -> None:
    """Raise TypeError unless ``function`` can be called with these arguments.

    A pattern is what is given most often in the place of a function, so the message has one.
    """
    if or_none and function is None:
        return
    wanted = f"of ({', '.join(arguments)})" if arguments[1:] else "of a leaf's path"
    wanted = f"a function {wanted}" + (", or None" if or_none else "")
    if not callable(function):
        hint = ""
        if isinstance(function, bool | np.bool_ | np.ndarray | jax.Array):
            hint = f"; optax.inject_hyperparams calls what is not named in static_args=({name!r},)"
        if isinstance(function, str):
            parameters = ", ".join(arguments)
            hint = f"; for a pattern: lambda {parameters}: fnmatch.fnmatchcase(path, {function!r})"
        raise TypeError(f"{name} must be {wanted}, got {function!r}{hint}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # Some functions that are written in C have none.
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise TypeError(f"{name} must be {wanted}, got {function!r}: {error}") from None


def as_total_steps(value: Any) -> int | None:
    """``total_steps`` as an int from 1, or None."""
    return None if value is None else as_int("total_steps", value, 1, MOST_STEPS)


def as_step(name: str, value: Any, total_steps: int | None = None, at_least: int = 0) -> int:
    """A step, which is counted in int32; a float is a share of ``total_steps``.

    Raises:
      TypeError: neither an int nor a float, or a float without ``total_steps``.
      ValueError: out of range.
    """
    if kind_of(name, value) is float:
        share = float(value)
        if total_steps is None:
            raise TypeError(
                f"{name} must be an int, got {value!r}; a share of a run needs total_steps"
            )
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name} as a share of total_steps must lie in [0, 1], got {share}")
        value = round(share * total_steps)
    return as_int(name, value, at_least, at_most=MOST_STEPS)
