"""Exact top-k masks of an array of any shape, without a sort, a flatten or a gather.

The k-th largest score is found by narrowing a bracket of candidate thresholds and counting, at
each step, the scores that reach the threshold. That is elementwise work and a sum, so it runs on a
sharded array with scalar all-reduces only, and the mask does not depend on how the array is laid
out over devices. Each step guesses the threshold by interpolating between the two counts known so
far, and bisects after a guess that did not halve the bracket: some 10 passes for smooth scores,
and never more than twice as many as the scores have bits.
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


@jax.jit
def top_k_masks(scores: Stacks, k: Array, key: Array | None, where: Stacks | None = None) -> Stacks:
    """``top_k_mask`` of many arrays in one search.

    Args:
      scores: stacks of arrays of one shape, each (n, *shape); N arrays in all.
      k: int32 (N,), each in the range of its array's size.
      key: as in ``top_k_mask``.
      where: bool stacks of the shapes of ``scores``, or None.

    Returns:
      Bool stacks of the shapes of ``scores``.
    """
    width = max(array.dtype.itemsize for array in scores)
    keys = [_ordered_bits(array).astype(_UNSIGNED[max(width, 4)]) for array in scores]
    keys = _only(where, keys)
    # The smallest candidate; 0, which is none, wraps around to the largest integer.
    none = ~jnp.zeros((), keys[0].dtype)
    low = _each(keys, lambda a, axes: jnp.min(a - 1, axes, initial=none)) + 1
    high = _each(keys, lambda a, axes: jnp.max(a, axes, initial=0)) + 1
    # k = 0 needs no search: no key reaches high.
    low = jnp.where(k == 0, high, jnp.maximum(low, 1))
    candidates = jnp.where(k == 0, 0, _each([a > 0 for a in keys], _count))
    threshold, reached = _search(keys, k, low, high, candidates)

    def without_ties() -> Stacks:
        return [a >= t for a, t in _paired(keys, threshold)]

    def with_ties() -> Stacks:
        above = [a > t for a, t in _paired(keys, threshold)]
        n_above = _each(above, _count)
        shapes = [a.shape for a in keys]
        ranks = _reversed_indices(shapes) if key is None else _shuffled_indices(key, shapes)
        ranks = _only([a == t for a, t in _paired(keys, threshold)], ranks)
        chosen = _mark_distinct(ranks, k - n_above, reached - n_above)
        return [a | b for a, b in zip(above, chosen, strict=True)]

    return lax.cond(jnp.all(reached <= k), without_ties, with_ties)


@partial(jax.jit, static_argnames="shapes")
def random_masks(
    key: Array, shapes: tuple[tuple[int, ...], ...], k: Array, where: Stacks | None = None
) -> Stacks:
    """``random_mask`` of many arrays in one search; arguments as those of ``top_k_masks``."""
    ranks = _only(where, _shuffled_indices(key, shapes))
    candidates = _each([a > 0 for a in ranks], _count)
    return _mark_distinct(ranks, k, candidates)


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


def _only(where: Stacks | None, keys: Stacks) -> Stacks:
    """Give the key 0, which is never chosen, to positions that are no candidates."""
    if where is None:
        return keys
    # A product, because a select would want both to be sharded alike in Explicit mesh mode.
    return [a * w.astype(a.dtype) for w, a in zip(where, keys, strict=True)]


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


def _flat_index(shape: tuple[int, ...]) -> Array:
    """Row-major index within each array of a stack, from per-axis iotas: nothing is flattened."""
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(1, len(shape))):
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    return index


def _reversed_indices(shapes: Sequence[tuple[int, ...]]) -> Stacks:
    """Ranks under which the lowest flat index comes first."""
    return [jnp.uint32(math.prod(shape[1:])) - _flat_index(shape) for shape in shapes]


def _shuffled_indices(key: Array, shapes: Sequence[tuple[int, ...]]) -> Stacks:
    """Distinct random ranks: a random bijection of the 31-bit integers, applied to the flat index.

    Adding a constant, xoring a number with its own upper half and multiplying by an odd number are
    each invertible modulo a power of two, so no two positions share a rank, which random bits
    would not promise. Each array and each of the rounds has its own random words.
    """
    arrays = sum(shape[0] for shape in shapes)
    words = jax.random.bits(key, (arrays * _ROUNDS * 2,), jnp.uint32).reshape(arrays, _ROUNDS, 2)
    stacks, start = [], 0
    for shape in shapes:
        own = words[start : start + shape[0]].reshape(shape[0], *[1] * (len(shape) - 1), _ROUNDS, 2)
        start += shape[0]
        ranks = _flat_index(shape)
        for i in range(_ROUNDS):
            ranks = (ranks + own[..., i, 0]) & _INT32_MAX
            ranks = ranks ^ (ranks >> 16)
            ranks = (ranks * (own[..., i, 1] | 1)) & _INT32_MAX
            ranks = ranks ^ (ranks >> 15)
        stacks.append(ranks + 1)
    return stacks


def _count(condition: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sum(condition, axis=axes, dtype=jnp.int32)


def _each(stacks: Stacks, reduce: Callable[[Array, tuple[int, ...]], Array]) -> Array:
    """One number per array, (N,) in all."""
    return jnp.concatenate([reduce(a, tuple(range(1, a.ndim))) for a in stacks])


def _paired(stacks: Stacks, numbers: Array) -> list[tuple[Array, Array]]:
    """Each stack with its arrays' numbers, in a shape that broadcasts against it."""
    pairs, start = [], 0
    for a in stacks:
        own = numbers[start : start + a.shape[0]]
        pairs.append((a, own.reshape(-1, *[1] * (a.ndim - 1))))
        start += a.shape[0]
    return pairs


def _mark_distinct(ranks: Stacks, k: Array, candidates: Array) -> Stacks:
    """Mark in each array the ``k`` largest of distinct positive ranks up to 2**31."""
    low = jnp.ones(k.shape, jnp.uint32)
    threshold, _ = _search(ranks, k, low, jnp.full(k.shape, 2**31 + 1, jnp.uint32), candidates)
    # At k = 0 the search ends on the largest rank.
    return [
        (a >= t) & (n > 0)
        for (a, t), (_, n) in zip(_paired(ranks, threshold), _paired(ranks, k), strict=True)
    ]


def _search(
    keys: Stacks, k: Array, low: Array, high: Array, above_low: Array
) -> tuple[Array, Array]:
    """A threshold for each array, and how many of its keys reach it, both (N,).

    That is ``k`` keys, or all candidates if there are fewer, or more than ``k`` where the k-th
    largest key, which the threshold then is, occurs several times. The brackets keep
    ``count(keys >= low) >= k > count(keys >= high)``; one closes when exactly ``k`` keys reach
    ``low``, and its array is not read any more.
    """

    def is_open(low: Array, high: Array, above_low: Array) -> Array:
        return (above_low > k) & (high - low > 1)

    def narrow(state: Any) -> Any:
        low, high, above_low, above_high, bisect = state
        going_on = is_open(low, high, above_low)
        width = high - low
        share = (above_low - k).astype(jnp.float32) / (above_low - above_high).astype(jnp.float32)
        # At most 0.99 of the width, so that rounding to float32 can never leave the bracket.
        guess = (width.astype(jnp.float32) * jnp.clip(share, 0.0, 0.99)).astype(low.dtype)
        step = jnp.where(bisect, width // 2, jnp.clip(guess, 1, width - 1))
        middle = low + step
        above = jnp.concatenate(
            [
                lax.cond(
                    jnp.any(active),
                    lambda a=a, m=m: _count(a >= m, tuple(range(1, a.ndim))),
                    lambda a=a: jnp.zeros(a.shape[:1], jnp.int32),
                )
                for (a, m), (_, active) in zip(
                    _paired(keys, middle), _paired(keys, going_on), strict=True
                )
            ]
        )
        enough = above >= k
        narrowed = (
            jnp.where(enough, middle, low),
            jnp.where(enough, high, middle),
            jnp.where(enough, above, above_low),
            jnp.where(enough, above_high, above),
            ~bisect & (jnp.where(enough, high - middle, step) > width // 2),
        )
        return tuple(
            jnp.where(going_on, new, old) for new, old in zip(narrowed, state, strict=True)
        )

    start = (low, high, above_low, jnp.zeros_like(k), jnp.zeros(k.shape, jnp.bool_))
    low, _, above_low, _, _ = lax.while_loop(lambda s: jnp.any(is_open(*s[:3])), narrow, start)
    return low, above_low
