"""Convolutions that CPUs compute fast, gradients of kernels above all.

For two things XLA's CPU backend takes longer than its own matrix products would (jax 0.10 to 0.12):
the gradient of a kernel, and, several times as long, convolutions whose window is larger than their
result. Here both are such products. On other platforms programs are those of
``lax.conv_general_dilated``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from sparseopt_jax.explicit import in_auto_mode

# Of the arrays that are multiplied for a part of the batch: half of the cache of many a core.
_BLOCK_BYTES = 500_000


class _Geometry(NamedTuple):
    """Of a convolution: what it does down and across, in this order."""

    window: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    size: tuple[int, ...]  # Height and width of the result.


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **defaults: Any,
) -> jax.Array:
    """The convolution of images that ``flax.linen.Conv`` asks for.

    Equal to ``lax.conv_general_dilated`` up to rounding, and so are derivatives of any order, in
    forward and in reverse mode. Sums are in float32 at least.

    Args:
      x: images, ``(batch, height, width, c_in)``.
      kernel: ``(height, width, c_in, c_out)``, of the dtype of ``x``.
      strides: of the window, down and across.
      padding: ``"SAME"``, ``"VALID"``, or how much is added before and after, down and across.
      **defaults: what ``flax.linen.Conv`` passes besides: no dilation, one group of features, no
        precision.

    Returns:
      An array ``(batch, new height, new width, c_out)`` of the dtype of ``x``.
    """
    del defaults
    image, window = x.shape[1:3], kernel.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(image, window, tuple(strides), padding)
    pads = tuple((int(before), int(after)) for before, after in padding)
    dimensions = zip(image, pads, window, strides, strict=True)
    size = tuple(max(0, (n + sum(pad) - w) // stride + 1) for n, pad, w, stride in dimensions)
    geometry = _Geometry(window, tuple(strides), pads, size)
    if x.size == 0 or 0 in size:
        return _by_xla(geometry, x, kernel)
    if window == (1, 1) or math.prod(window) <= math.prod(size):
        return _convolution(geometry, x, kernel)
    by_xla = functools.partial(_by_xla, geometry)
    return lax.platform_dependent(
        x, kernel, cpu=_keeping_nothing(_at_once, geometry), default=by_xla
    )


# With a rule for forward mode there are derivatives of all kinds. The tangent is linear in that of
# the kernel; JAX transposes it, and gets products of the same size for the gradient.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _convolution(geometry: _Geometry, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _by_xla(geometry, x, kernel)


def _jvp(geometry: _Geometry, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    by_xla = functools.partial(_by_xla, geometry)
    (x, kernel), (dx, dkernel) = primals, tangents
    y = by_xla(x, kernel)
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(by_xla(dx, kernel))
    if not isinstance(dkernel, SymbolicZero):
        in_blocks = in_auto_mode(_keeping_nothing(_in_blocks, geometry), like=y)
        terms.append(lax.platform_dependent(x, dkernel, cpu=in_blocks, default=by_xla))
    return y, functools.reduce(jnp.add, terms)


_convolution.defjvp(_jvp, symbolic_zeros=True)


def _by_xla(geometry: _Geometry, x: jax.Array, kernel: jax.Array) -> jax.Array:
    layouts = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, geometry.strides, geometry.pads, dimension_numbers=layouts
    )


def _keeping_nothing(function: Callable[..., jax.Array], *first: Any) -> Callable[..., jax.Array]:
    """``function`` with its first arguments, of which a gradient computes again what it needs.

    Windows are larger than x, and slower to read than to make. And what a program keeps for CPUs
    would be there on other platforms too, as zeros.
    """
    return jax.checkpoint(functools.partial(function, *first), prevent_cse=False)


def _at_once(geometry: _Geometry, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """One product of the whole batch."""
    windows, columns = _windows(geometry, _in_float32(x)), _columns(_in_float32(kernel))
    return lax.dot_general(windows, columns, (((3,), (0,)), ((), ()))).astype(x.dtype)


def _in_blocks(geometry: _Geometry, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Products of a block of the batch after the other, for the gradient of ``kernel``.

    One product of the whole batch goes through memory several times, and is slower than XLA.
    """
    (kh, kw), strides, _, size = geometry
    batch, image, (c_in, c_out) = x.shape[0], x.shape[1:], kernel.shape[2:]
    if strides[0] == 1:
        multiply, of_example = _by_rows, image[0] * size[1] * (kw * c_in + kh * c_out)
    else:
        multiply, of_example = _by_windows, math.prod(size) * (kh * kw * c_in + c_out)
    # Devices that share a batch each have whole groups, and take blocks of these without a look at
    # what others have. How many share it is not known where a program is traced in Auto mode.
    groups = math.gcd(batch, jax.device_count())
    in_group = batch // groups
    # One window of 1x1 is x itself, of which nothing is made that would have to be kept small.
    most = in_group if kh * kw == 1 else _BLOCK_BYTES // (4 * of_example)
    block = max(n for n in range(1, in_group + 1) if in_group % n == 0 and n <= max(most, 1))

    @_keeping_nothing
    def of_block(index: jax.Array, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return multiply(geometry, lax.dynamic_slice_in_dim(x, index * block, block), kernel)

    def of_group(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.map(lambda index: of_block(index, x, kernel), jnp.arange(in_group // block))

    # Without barriers XLA computes what makes x, or the gradient of y, once for each shift of it.
    x = _barrier(x).reshape(groups, in_group, *image)
    # Each group has its kernel, whose gradient is summed over blocks, in float32; over groups, and
    # with that over devices, it is summed once, after the loop.
    kernels = jnp.broadcast_to(_in_float32(kernel)[None], (groups, *kernel.shape))
    y = jax.vmap(of_group)(x, kernels)
    return _barrier(y.reshape(batch, *size, c_out))


def _by_windows(geometry: _Geometry, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A product with all that each window covers."""
    return _product(_windows(geometry, x), _columns(kernel)).astype(x.dtype)


def _by_rows(geometry: _Geometry, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same where windows move down by 1, from windows that are one row high.

    A product with all rows of the kernel side by side; of its results, each belongs a row higher
    than the one before.
    """
    height, width, c_in, c_out = kernel.shape
    rows = _side_by_side(geometry, x, axis=2)
    sums = _product(rows, kernel.transpose(1, 2, 0, 3).reshape(width * c_in, height * c_out))
    placed = [
        _pad(part, 1, height - 1 - i, i)
        for i, part in enumerate(lax.split(sums, [c_out] * height, 3))
    ]
    # With the barrier the gradient is padded once, and not for each of its slices.
    y = _barrier(functools.reduce(jnp.add, placed))
    before = geometry.pads[0][0] - (height - 1)
    return _pad(y, 1, before, geometry.size[0] - y.shape[1] - before).astype(x.dtype)


def _product(windows: jax.Array, columns: jax.Array) -> jax.Array:
    """(batch, height, width, n), (n, c_out) -> (batch, height, width, c_out)."""
    # The other way round, so that the gradient is a product that transposes no large array.
    windows = windows.astype(columns.dtype)
    return jnp.moveaxis(lax.dot_general(columns, windows, (((0,), (3,)), ((), ()))), 0, 3)


def _columns(kernel: jax.Array) -> jax.Array:
    """(height, width, c_in, c_out) -> (height * width * c_in, c_out)."""
    return kernel.reshape(-1, kernel.shape[3])


def _windows(geometry: _Geometry, x: jax.Array) -> jax.Array:
    """(batch, height, width, c_in) -> (batch, *size, height * width * c_in of the window)."""
    rows = _side_by_side(geometry, x, axis=2)
    return _side_by_side(geometry, rows, axis=1)


def _side_by_side(geometry: _Geometry, x: jax.Array, axis: int) -> jax.Array:
    """All that the window covers along an axis, as channels."""
    stride, pad = geometry.strides[axis - 1], geometry.pads[axis - 1]
    x, reach = _pad(x, axis, *pad), stride * (geometry.size[axis - 1] - 1) + 1
    shifts = range(geometry.window[axis - 1])
    return lax.concatenate([lax.slice_in_dim(x, i, i + reach, stride, axis) for i in shifts], 3)


def _pad(x: jax.Array, axis: int, before: int, after: int) -> jax.Array:
    """With zeros before and after along an axis, or with less where a number is below 0."""
    config = [(0, 0, 0)] * x.ndim
    config[axis] = before, after, 0
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _in_float32(x: jax.Array) -> jax.Array:
    """Half precision as float32, in which sums are rounded once."""
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def _barrier(x: jax.Array) -> jax.Array:
    kept: jax.Array = lax.optimization_barrier(x)  # type: ignore[no-untyped-call]
    return kept
