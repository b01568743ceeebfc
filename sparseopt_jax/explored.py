"""The explored set: which weights have been active at any time, one bit a weight.

One axis is cut into eight parts of n elements, and the elements at the same place of each share a
byte: element i is bit i // n of byte i % n. Were the eight neighbours instead, a TPU's compiler
would lay out weights, gradients and masks anew for them, on every step. The axis is one that is
seldom sharded, and the others keep their size, so that the bits can be sharded as their parameter
is. A layer that has no other axis with a multiple of eight, such as a first convolution, takes up
to three bits a weight.
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from sparseopt_jax.explicit import in_auto_mode

Array: TypeAlias = jax.Array


def packed_axis(shape: tuple[int, ...]) -> int:
    """The axis that is packed: the least padding; of those the shortest, of those the first.

    The longest axis, of those the last, is the one to shard. It is packed only where all others are
    shorter than 3: bytes whose bits are on two devices would need communication.
    """
    longest = max(range(len(shape)), key=lambda axis: (shape[axis], axis))

    def cost(axis: int) -> tuple[bool, bool, float, int, int]:
        padding = -(-shape[axis] // 8) * 8 / shape[axis]
        return shape[axis] < 3, axis == longest, padding, shape[axis], axis

    return min(range(len(shape)), key=cost)


def pack(mask: Array) -> Array:
    """A bool array as uint8, one bit an element."""
    axis = packed_axis(mask.shape)
    shape = list(mask.shape)
    shape[axis] = -(-shape[axis] // 8)

    def packed(mask: Array) -> Array:
        padding = [(0, 0)] * mask.ndim
        padding[axis] = (0, 8 * shape[axis] - mask.shape[axis])
        planes = jnp.split(jnp.pad(mask.astype(jnp.uint8), padding), 8, axis)
        return functools.reduce(jnp.bitwise_or, [p << bit for bit, p in enumerate(planes)])

    result = jax.ShapeDtypeStruct(tuple(shape), jnp.uint8)  # type: ignore[no-untyped-call]
    return in_auto_mode(packed, mask, result)(mask)


def unpack(bits: Array, like: Array) -> Array:
    """The bool array, shaped and sharded as ``like``, that ``pack`` was given."""
    axis = packed_axis(like.shape)
    size = like.shape[axis]

    def unpacked(bits: Array) -> Array:
        shape = (*bits.shape[:axis], 8, *bits.shape[axis:])
        place = lax.broadcasted_iota(jnp.uint8, shape, axis)
        planes = (jnp.expand_dims(bits, axis) >> place) & 1
        joined = planes.reshape(*bits.shape[:axis], -1, *bits.shape[axis + 1 :])
        return lax.slice_in_dim(joined, 0, size, axis=axis).astype(jnp.bool_)

    return in_auto_mode(unpacked, like)(bits)


def count_explored(bits: Array) -> Array:
    """How many bits are set, int32."""
    return jnp.sum(lax.population_count(bits), dtype=jnp.int32)
