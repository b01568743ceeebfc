"""Exact top-k masks of an array of any shape, without a sort, a flatten or a gather.

Scores are mapped to integers of the same order, and the k-th largest is found three bits at a time:
each pass counts the scores that reach each of seven candidates. That is elementwise work and sums,
so it runs on a sharded array and communicates counts only, and the mask does not depend on how the
array is laid out over devices. It takes at most 11 passes for 32 bits, and ends earlier where
exactly k scores reach the threshold; nothing of the array's size is kept between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array: TypeAlias = jax.Array
Stacks: TypeAlias = list[Array]

_ROUNDS = 3
_BITS = 3
_INT32_MAX = 2**31 - 1
_UNSIGNED = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def top_k_mask(scores: Any, k: Any, key: Array | None = None, where: Array | None = None) -> Array:
    """Mark the ``k`` largest scores.

    The order is that of the reals with ``-inf`` below and ``+inf`` above all numbers, ``-0.0``
    equal to ``+0.0``, and NaN below ``-inf``.

    Args:
      scores: floating array of any shape with at most ``2**31 - 1`` elements.
      k: how many to mark, ``0 <= k <= scores.size``; an int, or an integer scalar array, which may
        be traced. A traced ``k`` out of that range is clipped to it.
      key: a JAX random key. With a key, the choice among equal scores at the threshold is
        uniformly random; without, the lowest flat (row-major) indices win.
      where: boolean array of the shape of ``scores``. Only positions where it is True can be
        chosen; if there are fewer than ``k`` of them, all of them are.

    Returns:
      A bool array of the shape of ``scores`` with exactly ``k`` True elements.

    Raises:
      TypeError: ``scores`` is not floating, ``k`` is not an integer, or ``where`` is not bool.
      ValueError: ``k`` is out of range, ``where`` has another shape, or ``scores`` is too large.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> sx.top_k_mask(jnp.array([0.5, -2.0, 3.0, 0.5]), 2).tolist()
      [True, False, True, False]
    """
    scores = _checked_scores(scores)
    k = _checked_k(k, scores.shape)
    only = None if where is None else [_checked_where(where, scores.shape)[None]]
    return top_k_masks([scores[None]], k[None], key, only)[0][0]


def random_mask(key: Array, shape: tuple[int, ...], k: Any, where: Array | None = None) -> Array:
    """Mark ``k`` positions chosen uniformly at random without replacement.

    Args:
      key: a JAX random key.
      shape: shape of the mask, at most ``2**31 - 1`` elements.
      k: how many to mark, an int or an integer scalar array (may be traced, and is then clipped
        to its range).
      where: bool array of that shape; only positions where it is True can be chosen.

    Returns:
      A bool array of shape ``shape`` with exactly ``k`` True elements (or all of ``where``, if
      there are fewer).

    Raises:
      TypeError: ``k`` is not an integer or ``where`` is not bool.
      ValueError: ``k`` is out of range, ``where`` has another shape, or the shape is too large.

    Example:
      >>> import jax
      >>> import sparseopt_jax as sx
      >>> int(sx.random_mask(jax.random.key(0), (3, 4), 5).sum())
      5
    """
    shape = tuple(shape)
    k = _checked_k(k, shape)
    only = None if where is None else [_checked_where(where, shape)[None]]
    return random_masks(key, ((1, *shape),), k[None], only)[0][0]


@partial(jax.jit, static_argnames=("by_magnitude", "without"))
def top_k_masks(
    scores: Stacks,
    k: Array,
    key: Array | None,
    where: Stacks | None = None,
    *,
    by_magnitude: bool = False,
    without: bool = False,
) -> Stacks:
    """``top_k_mask`` of many arrays in one search.

    Args:
      scores: stacks of arrays of one shape, each (n, *shape); N arrays in all.
      k: int32 (N,), each in the range of its array's size.
      key: as in ``top_k_mask``.
      where: bool stacks of the shapes of ``scores``, or None.
      by_magnitude: rank absolute values.
      without: whether ``where`` says what can not be chosen.

    Returns:
      Bool stacks of the shapes of ``scores``.
    """
    unsigned = _UNSIGNED[max(4, *(array.dtype.itemsize for array in scores))]
    shapes = tuple(array.shape for array in scores)
    words = None if key is None else _random_words(key, shapes)

    def bits(scores: Stacks, where: Stacks | None) -> Stacks:
        found = [_ordered_bits(jnp.abs(a) if by_magnitude else a) for a in scores]
        return _only(where, [a.astype(unsigned) for a in found], without)

    def ranks(words: Array | None, zero: Array) -> Stacks:
        if words is None:
            return _reversed_indices(shapes, zero)
        return _shuffled_indices(words, shapes, zero)

    def tied(
        scores: Stacks, where: Stacks | None, level: Array, words: Array | None, zero: Array
    ) -> Stacks:
        return _only([a == t for a, t in _paired(bits(scores, where), level)], ranks(words, zero))

    level, reached, above = _search(bits, (scores, where), k)
    # Among equal scores at the threshold the search goes on by rank; where there is nothing to
    # choose it ends at once, and all ranks will do.
    choose = (reached > k) & (level > 0)
    zero = jnp.uint32(0)
    of = scores, where, level, words, zero
    rank, _, _ = _search(tied, of, jnp.where(choose, k - above, 0))
    rank = jnp.where(choose, rank, 0)
    # What is no candidate has the bits 0, and does not reach 1.
    keys = _paired(bits(scores, where), jnp.maximum(level, 1))
    return [
        (a > t) | ((a == t) & (b >= r))
        for (a, t), (b, r) in zip(keys, _paired(ranks(words, zero), rank), strict=True)
    ]


@partial(jax.jit, static_argnames=("shapes", "without"))
def random_masks(
    key: Array,
    shapes: tuple[tuple[int, ...], ...],
    k: Array,
    where: Stacks | None = None,
    *,
    without: bool = False,
) -> Stacks:
    """``random_mask`` of many arrays in one search; arguments as those of ``top_k_masks``."""
    words = _random_words(key, shapes)

    def ranks(where: Stacks | None, words: Array, zero: Array) -> Stacks:
        return _only(where, _shuffled_indices(words, shapes, zero), without)

    of = where, words, jnp.uint32(0)
    threshold, _, _ = _search(ranks, of, k)
    return [a >= t for a, t in _paired(ranks(*of), jnp.maximum(threshold, 1))]


def _checked_scores(scores: Any) -> Array:
    scores = jnp.asarray(scores)
    if not jnp.issubdtype(scores.dtype, jnp.floating) or scores.dtype.itemsize not in _UNSIGNED:
        raise TypeError(
            f"scores must be a float16, bfloat16, float32 or float64 array, got {scores.dtype}"
        )
    return scores


def _checked_k(k: Any, shape: tuple[int, ...]) -> Array:
    size = checked_size(shape)
    if isinstance(k, bool) or not (
        isinstance(k, int) or (hasattr(k, "dtype") and jnp.issubdtype(k.dtype, jnp.integer))
    ):
        raise TypeError(f"k must be an integer, got {k!r} of type {type(k).__name__}")
    if np.ndim(k):
        raise ValueError(f"k must be a scalar, got shape {np.shape(k)}; use jax.vmap for several")
    if not isinstance(k, jax.core.Tracer) and not 0 <= int(k) <= size:
        raise ValueError(f"k must be between 0 and the number of elements, {size}, got {int(k)}")
    return jnp.clip(k, 0, size).astype(jnp.int32)


def checked_size(shape: tuple[int, ...]) -> int:
    """Number of elements of ``shape``; ValueError where int32 could not count them."""
    size = math.prod(shape)
    if size > _INT32_MAX:
        raise ValueError(
            f"an array of shape {shape} has {size} elements; selection counts in int32 and takes "
            f"at most {_INT32_MAX}: split the layer"
        )
    return size


def _checked_where(where: Any, shape: tuple[int, ...]) -> Array:
    where = jnp.asarray(where)
    if where.dtype != jnp.bool_:
        raise TypeError(f"where must be a bool array, got {where.dtype}")
    if where.shape != shape:
        raise ValueError(f"where must have the shape of the scores, {shape}, got {where.shape}")
    return where


def _only(where: Stacks | None, keys: Stacks, without: bool = False) -> Stacks:
    """Give the key 0, which is never chosen, to positions that are no candidates."""
    if where is None:
        return keys
    # A product, because a select would want both to be sharded alike in Explicit mesh mode.
    return [a * (w ^ without).astype(a.dtype) for w, a in zip(where, keys, strict=True)]


def _ordered_bits(scores: Array) -> Array:
    """Map floats to unsigned integers of the same order: NaN to 1, everything else above.

    All tests are on the bits, because backends flush subnormal numbers to zero in floating-point
    comparisons.
    """
    width = scores.dtype.itemsize * 8
    unsigned = _UNSIGNED[scores.dtype.itemsize]
    bits = lax.bitcast_convert_type(scores, unsigned)
    sign = unsigned(1 << (width - 1))
    magnitude = bits & unsigned((1 << (width - 1)) - 1)
    inf = unsigned(np.array(np.inf, scores.dtype).view(np.dtype(unsigned)))
    negative = (bits >= sign) & (magnitude != 0)
    ordered = jnp.where(negative, ~bits, magnitude | sign)
    ordered = jnp.where(magnitude > inf, unsigned(1), ordered)
    return ordered if width == 64 else ordered.astype(jnp.uint32)


def _flat_index(shape: tuple[int, ...], zero: Array) -> Array:
    """Row-major index within each array of a stack, from per-axis iotas: nothing is flattened.

    Everything starts from ``zero``, a uint32 scalar, so that a compiler that may not take it out of
    a loop takes no index out either.
    """
    index = jnp.broadcast_to(zero, shape)
    stride = 1
    for axis in reversed(range(1, len(shape))):
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * (jnp.uint32(stride) + zero)
        stride *= shape[axis]
    return index


def _reversed_indices(shapes: Sequence[tuple[int, ...]], zero: Array) -> Stacks:
    """Ranks under which the lowest flat index comes first."""
    return [jnp.uint32(math.prod(shape[1:])) - _flat_index(shape, zero) for shape in shapes]


def _random_words(key: Array, shapes: Sequence[tuple[int, ...]]) -> Array:
    """Two for each array and round, (N, rounds, 2) uint32."""
    arrays = sum(shape[0] for shape in shapes)
    return jax.random.bits(key, (arrays * _ROUNDS * 2,), jnp.uint32).reshape(arrays, _ROUNDS, 2)


def _shuffled_indices(words: Array, shapes: Sequence[tuple[int, ...]], zero: Array) -> Stacks:
    """Distinct random ranks: a random bijection of the 31-bit integers, applied to the flat index.

    Adding a constant, xoring a number with its own upper half and multiplying by an odd number are
    each invertible modulo a power of two, so no two positions share a rank, which random bits
    would not promise. Each array and each of the rounds has its own random words.
    """
    stacks, start = [], 0
    for shape in shapes:
        own = words[start : start + shape[0]].reshape(shape[0], *[1] * (len(shape) - 1), _ROUNDS, 2)
        start += shape[0]
        ranks = _flat_index(shape, zero)
        for i in range(_ROUNDS):
            ranks = (ranks + own[..., i, 0]) & _INT32_MAX
            ranks = ranks ^ (ranks >> 16)
            ranks = (ranks * (own[..., i, 1] | 1)) & _INT32_MAX
            ranks = ranks ^ (ranks >> 15)
        stacks.append(ranks + 1)
    return stacks


def _paired(stacks: Stacks, numbers: Array) -> list[tuple[Array, Array]]:
    """Each stack with its arrays' numbers, in a shape that broadcasts against it."""
    pairs, start = [], 0
    for a in stacks:
        own = numbers[start : start + a.shape[0]]
        pairs.append((a, own.reshape(-1, *[1] * (a.ndim - 1))))
        start += a.shape[0]
    return pairs


def _search(keys: Callable[..., Stacks], of: Any, k: Array) -> tuple[Array, Array, Array]:
    """A threshold for each array, how many of its keys reach it, and how many exceed it, all (N,).

    The keys are ``keys(*of)``.

    ``k`` keys reach it, or more than ``k`` where the k-th largest key, which the threshold then is,
    occurs several times; only then the third number is of use. At ``k = 0`` no key reaches it.
    """
    arrays = jax.eval_shape(keys, *of)
    unsigned = arrays[0].dtype
    sizes = [math.prod(a.shape[1:]) for a in arrays for _ in range(a.shape[0])]

    def narrow(state: Any) -> Any:
        threshold, reached, above, shift = state
        digits = jnp.arange(1, 2**_BITS, dtype=unsigned)[:, None]
        candidates = threshold[None] + (digits << shift.astype(unsigned))
        # Computed anew on each pass: taken out of the loop, as a compiler would like to, the keys
        # take as much memory as the scores.
        own, candidates = lax.optimization_barrier((of, candidates))  # type: ignore[no-untyped-call]
        found = _counts(keys(*own), candidates)
        enough = found >= k[None]
        # Counts fall with the digit: the last that is enough, and the first that is not.
        for count, is_enough in zip(found, enough, strict=True):
            reached = jnp.where(is_enough, count, reached)
        for count, is_enough in zip(found[::-1], enough[::-1], strict=True):
            above = jnp.where(is_enough, above, count)
        digit = jnp.sum(enough, axis=0, dtype=unsigned)
        # The last digit may share bits with the one before; its candidates beyond are not enough.
        following = jnp.where(shift > 0, jnp.maximum(shift - _BITS, 0), -1)
        return threshold + (digit << shift.astype(unsigned)), reached, above, following

    def is_open(state: Any) -> Array:
        _, reached, _, shift = state
        return (shift >= 0) & jnp.any((reached > k) & (k > 0))

    start = (
        jnp.zeros(k.shape, unsigned),
        jnp.array(sizes, jnp.int32),
        jnp.zeros(k.shape, jnp.int32),
        jnp.int32(unsigned.itemsize * 8 - _BITS),
    )
    threshold, reached, above, _ = lax.while_loop(is_open, narrow, start)
    return jnp.where(k > 0, threshold, ~unsigned.type(0)), reached, above


def _counts(stacks: Stacks, thresholds: Array) -> Array:
    """How many numbers of each array reach each of its thresholds (M, N): int32 (M, N)."""
    found, start = [], 0
    for a in stacks:
        own = thresholds[:, start : start + a.shape[0]]
        reach = [a >= t.reshape(-1, *[1] * (a.ndim - 1)) for t in own]
        found.append(jnp.stack(counts(*reach)))
        start += a.shape[0]
    return jnp.concatenate(found, axis=1)


def counts(*conditions: Array) -> list[Array]:
    """How many elements of each array are True: int32 (n,), for bool stacks (n, *shape)."""
    axes = tuple(range(1, conditions[0].ndim))

    def one_by_one(*conditions: Array) -> list[Array]:
        return [jnp.sum(one, axis=axes, dtype=jnp.int32) for one in conditions]

    def together(*conditions: Array) -> list[Array]:
        ones = tuple(one.astype(jnp.int32) for one in conditions)
        zeros = (jnp.int32(0),) * len(ones)
        return list(lax.reduce(ones, zeros, lambda x, y: jax.tree.map(jnp.add, x, y), axes))

    # A CPU would write out the conditions and read them again, for each sum by itself. Together the
    # partial sums of sharded arrays are gathered, not added up, which other devices need not do.
    found: list[Array] = lax.platform_dependent(*conditions, cpu=together, default=one_by_one)
    return found
