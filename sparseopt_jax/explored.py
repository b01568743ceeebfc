"""The explored set: which weights have been active at any time, one bit a weight.

Eight neighbours along one axis share a byte. The axis is one that needs little padding, and the
others keep their size, so that the bits can be sharded as their parameter is.
"""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from sparseopt_jax.explicit import in_auto_mode

Array: TypeAlias = jax.Array


def packed_axis(shape: tuple[int, ...]) -> int:
    """The axis that is packed: the least padding; of those the longest, of those the last."""

    def padding(axis: int) -> float:
        return -(-shape[axis] // 8) * 8 / shape[axis]

    return min(range(len(shape)), key=lambda axis: (padding(axis), -shape[axis], -axis))


def pack(mask: Array) -> Array:
    """A bool array as uint8, one bit an element."""
    axis = packed_axis(mask.shape)
    shape = list(mask.shape)
    shape[axis] = -(-shape[axis] // 8)

    def packed(mask: Array) -> Array:
        return jnp.packbits(mask, axis=axis, bitorder="little")

    result = jax.ShapeDtypeStruct(tuple(shape), jnp.uint8)  # type: ignore[no-untyped-call]
    return in_auto_mode(packed, mask, result)(mask)


def unpack(bits: Array, like: Array) -> Array:
    """The bool array, shaped and sharded as ``like``, that ``pack`` was given."""
    axis = packed_axis(like.shape)
    size = like.shape[axis]

    def unpacked(bits: Array) -> Array:
        return jnp.unpackbits(bits, axis=axis, count=size, bitorder="little").astype(jnp.bool_)

    return in_auto_mode(unpacked, like)(bits)


def count_explored(bits: Array) -> Array:
    """How many bits are set, int32."""
    return jnp.sum(lax.population_count(bits), dtype=jnp.int32)
