"""Which axes of a kernel index its neurons, and which index whole layers.

The conventions are those of ``jax.nn.initializers.variance_scaling``: out axes index neurons
(output units), batch axes index kernels that are stacked into one array (``nn.scan``, ``nn.vmap``,
``jax.lax.scan`` over layers), all other axes, a convolution's window among them, are incoming.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt_jax.patterns import matches, matching
from sparseopt_jax.settings import kind_of

Array: TypeAlias = jax.Array
Axes: TypeAlias = int | Sequence[int]
AxesByPath: TypeAlias = "Axes | Mapping[str, Axes] | AxesOfTree"

# More dimensions than any kernel has; bounds the axes that a setting may name.
_MAX_NDIM = 32


@dataclass(frozen=True)
class AxesOfTree:
    """A setting for the leaves of one tree: by pattern where one matches, else by path."""

    patterns: Mapping[str, Axes]
    paths: Mapping[str, Axes]


class KernelAxes(NamedTuple):
    """The axes of one kernel, counted from 0; together they are all of its axes.

    Attributes:
      incoming: axes summed over for the fan-in.
      out: axes that index neurons.
      batch: axes that index the layers of a stack.
    """

    incoming: tuple[int, ...]
    out: tuple[int, ...]
    batch: tuple[int, ...]


def kernel_axes(
    path: str, ndim: int, out_axes: AxesByPath = -1, batch_axes: AxesByPath = ()
) -> KernelAxes:
    """The axes of the kernel at ``path``.

    Args:
      path: its path, for settings that go by pattern.
      ndim: its number of dimensions.
      out_axes: an axis, several, or a mapping from glob patterns over paths to either; the first
        pattern that matches counts, and where none does it is the last axis. What a tree tells of
        its own kernels is in an ``AxesOfTree``.
      batch_axes: likewise; none where no pattern matches.

    Raises:
      ValueError: axes out of range, repeated, in both settings, or no out axis.
    """
    out = _positive("out_axes", _at(path, out_axes, -1), path, ndim)
    batch = axes_of_stack(path, ndim, batch_axes)
    if not out:
        raise ValueError(f"out_axes must name at least one axis, got {out_axes!r}{_of(path)}")
    both = sorted(set(out) & set(batch))
    if both:
        raise ValueError(
            f"out_axes and batch_axes must name different axes, got {out_axes!r} and "
            f"{batch_axes!r}, which share axis {both[0]}{_of(path)}"
        )
    incoming = tuple(axis for axis in range(ndim) if axis not in out and axis not in batch)
    return KernelAxes(incoming, out, batch)


def axes_of_stack(path: str, ndim: int, batch_axes: AxesByPath) -> tuple[int, ...]:
    """The batch axes of the leaf at ``path``, which may be no kernel and have no other axes."""
    return _positive("batch_axes", _at(path, batch_axes, ()), path, ndim) if ndim else ()


def check_axes(name: str, axes: AxesByPath | None) -> None:
    """Raise unless ``axes`` is an axis, several, a mapping from patterns to either, or None."""
    if axes is None:
        return
    values: Iterable[Any] = [axes]
    if isinstance(axes, Mapping):
        for pattern in axes:
            if not isinstance(pattern, str):
                raise TypeError(f"{name} patterns must be strings, got {pattern!r}")
        values = axes.values()
    for value in values:
        _positive(name, value, "", _MAX_NDIM)


def check_patterns(name: str, axes: AxesByPath | None, paths: Iterable[str]) -> None:
    """Raise where a pattern of ``axes`` matches none of ``paths``."""
    if not isinstance(axes, Mapping):
        return
    paths = list(paths)
    for pattern in axes:
        if not matching(paths, pattern):
            raise ValueError(
                f"{name} pattern {pattern!r} matches none of the leaves: {', '.join(paths)}"
            )


def layers_of(shape: Sequence[int], batch: Sequence[int]) -> int:
    """How many layers an array of ``shape`` stacks along its ``batch`` axes."""
    return math.prod(shape[axis] for axis in batch)


def layer_shape(shape: Sequence[int], batch: Sequence[int]) -> tuple[int, ...]:
    """The shape of one of them."""
    return tuple(size for axis, size in enumerate(shape) if axis not in batch)


def window_in_out(shape: Sequence[int], axes: KernelAxes) -> tuple[int, ...]:
    """A kernel's sizes without its batch axes in Flax's order: window, inputs, neurons."""
    incoming = axes.incoming
    if incoming and min(axes.out) < incoming[0]:  # (out, in, window)
        incoming = (*incoming[1:], incoming[0])
    return tuple(shape[axis] for axis in incoming + axes.out)


def to_layers(array: Array, batch: Sequence[int]) -> Array:
    """An array as (layers, *layer_shape); a single layer gets a leading axis of 1."""
    array = jnp.moveaxis(array, batch, range(len(batch)))
    return array.reshape(layers_of(array.shape, range(len(batch))), *array.shape[len(batch) :])


def from_layers(layers: Array, shape: Sequence[int], batch: Sequence[int]) -> Array:
    """The inverse of ``to_layers`` for an array of ``shape``."""
    sizes = [shape[axis] for axis in batch]
    return jnp.moveaxis(layers.reshape(*sizes, *layers.shape[1:]), range(len(batch)), batch)


def is_given(path: str, axes: AxesByPath | None) -> bool:
    """Whether a setting says something of the leaf at ``path``."""
    if isinstance(axes, Mapping):
        return any(matches(path, pattern) for pattern in axes)
    return axes is not None


def _at(path: str, axes: AxesByPath, default: Axes) -> Axes:
    if isinstance(axes, AxesOfTree):
        return _at(path, axes.patterns, axes.paths.get(path, default))
    if not isinstance(axes, Mapping):
        return axes
    return next((a for pattern, a in axes.items() if matches(path, pattern)), default)


def _positive(name: str, axes: Any, path: str, ndim: int) -> tuple[int, ...]:
    several = isinstance(axes, Sequence) and not isinstance(axes, str)
    if isinstance(axes, np.ndarray | jax.Array) and not isinstance(axes, jax.core.Tracer):
        several = axes.ndim == 1
    given = axes if several else (axes,)
    for axis in given:
        if kind_of(name, axis) is not int:
            raise TypeError(
                f"{name} must be an int, a sequence of ints, or a mapping from path patterns to "
                f"either, got {axes!r}{_of(path)}"
            )
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"{name} must lie in [-{ndim}, {ndim}) for an array of {ndim} dimensions, "
                f"got {axes!r}{_of(path)}"
            )
    positive = tuple(int(axis) % ndim for axis in given)
    if len(set(positive)) != len(positive):
        raise ValueError(f"{name} must name different axes, got {axes!r}{_of(path)}")
    return positive


def _of(path: str) -> str:
    return f" for {path!r}" if path else ""
