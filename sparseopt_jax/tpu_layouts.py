"""The layouts in which a TPU's compiler keeps a program's own arrays, for the bodies of loops.

The compiler lays a program's arguments out so that tiles of 8 x 128 are padded least, but the
arguments of a loop's body by rows: without a word, arrays of some shapes are copied on each step on
which the loop is not even entered.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TypeAlias

import jax
from jax import lax

Array: TypeAlias = jax.Array

_TILE = (8, 128)


def as_arguments_lie(arrays: Sequence[Array]) -> list[Array]:
    """The arrays, in a program for a single TPU in the layouts of its arguments; else as they are.

    Other layouts would be right as well; an array is copied then. Where arrays may be sharded they
    are left alone: the partitioner gathers some of those whose layout is constrained.
    """
    if jax.device_count() > 1:
        return list(arrays)
    return [_as_argument_lies(array) for array in arrays]


def _as_argument_lies(array: Array) -> Array:
    order = least_padded(array.shape)
    if order == tuple(range(array.ndim)) or not isinstance(array, jax.core.Tracer):
        return array

    # `import jax` leaves it out.
    from jax.experimental.layout import Layout, with_layout_constraint

    def laid_out(array: Array) -> Array:
        same: Array = with_layout_constraint(  # type: ignore[no-untyped-call]
            array, Layout(order)
        )
        return same

    constrained: Array = lax.platform_dependent(array, tpu=laid_out, default=lambda array: array)
    return constrained


def least_padded(shape: Sequence[int]) -> tuple[int, ...]:
    """The axes from major to minor that a TPU's compiler chooses for an argument of this shape.

    Its last two are those that pad to the fewest whole tiles; among equal ones the axes stay in
    order where they can.

    Example:
      >>> least_padded((2048, 1000)), least_padded((3, 3, 64, 64))
      ((1, 0), (0, 1, 2, 3))
    """
    axes = range(len(shape))
    if len(shape) < 2 or not math.prod(shape):
        return tuple(axes)

    def cost(last: tuple[int, int]) -> tuple[int, bool, int, int]:
        padded = [-(-shape[axis] // tile) * tile for axis, tile in zip(last, _TILE, strict=True)]
        others = [shape[axis] for axis in axes if axis not in last]
        return math.prod([*padded, *others]), last != tuple(axes[-2:]), -last[1], -last[0]

    last = min(itertools.permutations(axes, 2), key=cost)
    return (*(axis for axis in axes if axis not in last), *last)
