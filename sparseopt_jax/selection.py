"""Exact top-k masks of an array of any shape, without a sort, a flatten or a gather.

Scores are mapped to integers of the same order, and the k-th largest is found two bits at a time:
each pass counts the scores that reach each of three candidates. That is elementwise work and sums,
so it runs on a sharded array and communicates counts only, and the mask does not depend on how the
array is laid out over devices. It takes at most 16 passes for 32 bits, and ends earlier where
exactly k scores reach the threshold; nothing of the array's size is kept between them. Three
bits a pass would run a little faster, and compile longer: that goes with the size of the program.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparseopt_jax.explicit import varying_as
from sparseopt_jax.stacks import Layout, Stacked, Stacks

Array: TypeAlias = jax.Array

_BITS = 2
INT32_MAX = 2**31 - 1
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
    return random_masks(key, Stacked.of((1, *shape)), k[None], only)[0][0]


@partial(jax.jit, static_argnames="by_magnitude")
def top_k_masks(
    scores: Stacks,
    k: Array,
    key: Array | None,
    where: Stacks | None = None,
    *,
    by_magnitude: bool = False,
    layout: Layout | None = None,
) -> Stacks:
    """``top_k_mask`` of many arrays in one search.

    Args:
      scores: stacks of arrays of one shape, each (n, *shape), or as ``layout`` says; N arrays in
        all.
      k: int32 (N,), each in the range of its array's size.
      key: as in ``top_k_mask``.
      where: bool stacks of the shapes of ``scores``, or None.
      by_magnitude: rank absolute values.
      layout: how the arrays lie in the stacks.

    Returns:
      Bool stacks of the shapes of ``scores``.
    """
    layout = layout or Stacked.of(*(a.shape for a in scores))
    to_bits = magnitude_bits if by_magnitude else ordered_bits
    unsigned = _widest(scores)

    def bits(scores: Stacks, where: Stacks | None) -> Stacks:
        return _only(where, [to_bits(a).astype(unsigned) for a in scores], layout)

    words = None if key is None else layout.random_words(key)
    return _largest(bits, (scores, where), k, words, layout)


@jax.jit
def drop_and_grow(
    key: Array,
    masks: Stacks,
    weights: Stacks,
    scores: Stacks,
    n_keep: Array,
    n_grow: Array,
    layout: Layout,
) -> Stacks:
    """Masks in which the smallest weights have given way to the largest scores.

    That is ``top_k_masks`` of the weights' magnitudes among ``masks``, and then of the scores'
    among all others, what was dropped included. Both go through one search, as two passes of a
    loop: it is compiled once.

    Args:
      key: a JAX random key, for ties.
      masks: bool stacks, of N arrays in all.
      weights: floating stacks of these shapes.
      scores: likewise.
      n_keep: int32 (N,), how many that are True in each of ``masks`` stay.
      n_grow: int32 (N,), how many of the others become True.
      layout: how the arrays lie in the stacks.

    Returns:
      Bool stacks of these shapes.
    """
    unsigned = _widest([*weights, *scores])
    keys, impl = jax.random.key_data(jax.random.split(key)), jax.random.key_impl(key)
    words = lax.map(
        lambda data: layout.random_words(jax.random.wrap_key_data(data, impl=impl)), keys
    )

    def bits(masks: Stacks, weights: Stacks, scores: Stacks, growing: Array) -> Stacks:
        ranked = [
            jnp.where(
                growing, magnitude_bits(s).astype(unsigned), magnitude_bits(w).astype(unsigned)
            )
            for w, s in zip(weights, scores, strict=True)
        ]
        return _only([m ^ growing for m in masks], ranked, layout)

    def stage(i: Array, masks: Stacks) -> Stacks:
        growing = i > 0
        k = jnp.where(growing, n_grow, n_keep)
        chosen = _largest(bits, (masks, weights, scores, growing), k, words[i], layout)
        return [c | (m & growing) for m, c in zip(masks, chosen, strict=True)]

    start = varying_as(masks, masks, weights, scores, n_keep, n_grow, words)
    return lax.fori_loop(0, 2, stage, start)


@partial(jax.jit, static_argnames="without")
def random_masks(
    key: Array,
    layout: Layout,
    k: Array,
    where: Stacks | None = None,
    *,
    without: bool = False,
) -> Stacks:
    """``random_mask`` of many arrays in one search; arguments as those of ``top_k_masks``."""
    words = layout.random_words(key)

    def ranks(where: Stacks | None, words: Array) -> Stacks:
        return _only(where, shuffled_indices(words, layout), layout, without)

    words, k = _where_read((words, k))
    threshold, _, _ = _search(ranks, (where, words), k, layout)
    # A rank may be 0, as what is no candidate is, or all ones, as the threshold at k = 0.
    found = layout.paired(ranks(None, words), threshold, k > 0)
    chosen = [(a >= t) & is_any for a, t, is_any in found]
    return _only(where, chosen, layout, without)


def _largest(
    keys: Callable[..., Stacks], of: Any, k: Array, words: Array | None, layout: Layout
) -> Stacks:
    """Bool stacks, True at the ``k`` (N,) largest of ``keys(*of)``; never where a key is 0.

    ``words`` (2, N) are random, for ties; with None the lowest indices win.
    """
    start = jnp.uint32(0) if words is None else words
    of, k, start = _where_read((of, k, start))

    def ranks(start: Array) -> Stacks:
        choice = _reversed_indices if words is None else shuffled_indices
        return choice(start, layout)

    def tied(of: Any, level: Array, start: Array) -> Stacks:
        equal = [a == t for a, t in layout.paired(keys(*of), level)]
        return _only(equal, ranks(start), layout)

    level, reached, above = _search(keys, of, k, layout)
    # Among equal keys at the threshold the search goes on by rank; where there is nothing to
    # choose it ends at once, and all ranks will do.
    choose = (reached > k) & (level > 0)
    rank, _, _ = _search(tied, (of, level, start), jnp.where(choose, k - above, 0), layout)
    rank = jnp.where(choose, rank, 0)
    found = layout.paired(keys(*of), jnp.maximum(level, 1), rank)
    return [
        (a > t) | ((a == t) & (b >= r)) for (a, t, r), b in zip(found, ranks(start), strict=True)
    ]


def _where_read(values: Any) -> Any:
    """The values, as if they were new on each pass of a loop that any of them changes in.

    What is computed from them is then computed where it is read. Taken out of the loop, as a
    compiler would like to, keys and ranks take as much memory as the scores.
    """
    return lax.optimization_barrier(values)  # type: ignore[no-untyped-call]


def _widest(scores: Stacks) -> Any:
    """The unsigned type that takes the bits of all of them."""
    return _UNSIGNED[max(4, *(array.dtype.itemsize for array in scores))]


def is_selectable(dtype: Any) -> bool:
    """Whether numbers of this dtype can be ranked: floats of 16, 32 or 64 bits."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.dtype(dtype).itemsize in _UNSIGNED


def _checked_scores(scores: Any) -> Array:
    scores = jnp.asarray(scores)
    if not is_selectable(scores.dtype):
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
    if size > INT32_MAX:
        raise ValueError(
            f"an array of shape {shape} has {size} elements; selection counts in int32 and takes "
            f"at most {INT32_MAX}: split the layer"
        )
    return size


def _checked_where(where: Any, shape: tuple[int, ...]) -> Array:
    where = jnp.asarray(where)
    if where.dtype != jnp.bool_:
        raise TypeError(f"where must be a bool array, got {where.dtype}")
    if where.shape != shape:
        raise ValueError(f"where must have the shape of the scores, {shape}, got {where.shape}")
    return where


def _only(where: Stacks | None, keys: Stacks, layout: Layout, without: bool = False) -> Stacks:
    """Give the key 0, which is never chosen, to positions that are no candidates."""
    # A product, because a select would want both to be sharded alike in Explicit mesh mode.
    if where is not None:
        keys = [a * (w ^ without).astype(a.dtype) for w, a in zip(where, keys, strict=True)]
    return [
        a if within is None else a * within.astype(a.dtype)
        for a, within in zip(keys, layout.within(), strict=True)
    ]


@jax.jit
def magnitude_bits(scores: Array) -> Array:
    """Likewise, the magnitudes of floats: NaN to 1, everything else above."""
    width = scores.dtype.itemsize * 8
    unsigned = _UNSIGNED[scores.dtype.itemsize]
    magnitude = lax.bitcast_convert_type(scores, unsigned) & unsigned((1 << (width - 1)) - 1)
    inf = unsigned(np.array(np.inf, scores.dtype).view(np.dtype(unsigned)))
    ordered = jnp.where(magnitude > inf, unsigned(1), magnitude + unsigned(2))
    return ordered if width == 64 else ordered.astype(jnp.uint32)


@jax.jit
def ordered_bits(scores: Array) -> Array:
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


def _reversed_indices(zero: Array, layout: Layout) -> Stacks:
    """Ranks under which the lowest flat index comes first."""
    return [
        own - index for own, index in zip(layout.own_sizes(), layout.indices(zero), strict=True)
    ]


def shuffled_indices(words: Array, layout: Layout) -> Stacks:
    """Distinct random ranks: a random bijection of the 32-bit integers, applied to the flat index.

    Adding a constant, xoring a number with its own upper half and multiplying by an odd number are
    each invertible modulo a power of two, so no two positions share a rank, which random bits
    would not promise. Each array has its own random summand and multiplier; what follows is the
    finalizer of MurmurHash3. (With it alone, some pairs of positions are chosen together 0.6 %
    too often.)
    """
    return [
        _shuffled(index, multiplier)
        for index, multiplier in zip(layout.indices(words[0]), layout.own(words[1]), strict=True)
    ]


@jax.jit
def _shuffled(index: Array, multiplier: Array) -> Array:
    ranks = index * (multiplier | 1)
    ranks = (ranks ^ (ranks >> 16)) * jnp.uint32(0x85EBCA6B)
    ranks = (ranks ^ (ranks >> 13)) * jnp.uint32(0xC2B2AE35)
    return ranks ^ (ranks >> 16)


def _search(
    keys: Callable[..., Stacks], of: Any, k: Array, layout: Layout
) -> tuple[Array, Array, Array]:
    """A threshold for each array, how many of its keys reach it, and how many exceed it, all (N,).

    The keys are ``keys(*of)``.

    ``k`` keys reach it, or more than ``k`` where the k-th largest key, which the threshold then is,
    occurs several times; only then the third number is of use. At ``k = 0`` no key reaches it.
    """
    unsigned = jax.eval_shape(keys, *of)[0].dtype

    def narrow(state: Any) -> Any:
        threshold, reached, above, shift = state
        own, start, place = _where_read((of, threshold, shift))
        found = _counts(keys(*own), start, place.astype(unsigned), layout)
        digit = jnp.zeros(k.shape, unsigned)
        # Counts fall with the digit: the last that is enough, and the first that is not.
        for count in found:
            reached = jnp.where(count >= k, count, reached)
            digit += (count >= k).astype(unsigned)
        for count in found[::-1]:
            above = jnp.where(count >= k, above, count)
        return threshold + (digit << shift.astype(unsigned)), reached, above, shift - _BITS

    def is_open(state: Any) -> Array:
        _, reached, _, shift = state
        return (shift >= 0) & jnp.any((reached > k) & (k > 0))

    start = (
        jnp.zeros(k.shape, unsigned),
        jnp.asarray(layout.layer_sizes()),
        jnp.zeros(k.shape, jnp.int32),
        jnp.int32(unsigned.itemsize * 8 - _BITS),
    )
    start = varying_as(start, of, k)
    threshold, reached, above, _ = lax.while_loop(is_open, narrow, start)
    return jnp.where(k > 0, threshold, ~unsigned.type(0)), reached, above


def _counts(stacks: Stacks, thresholds: Array, shift: Array, layout: Layout) -> list[Array]:
    """How many numbers of each array reach its threshold (N,) with 1, 2, ... added at a place.

    Returns:
      int32 (N,) for each digit that may be added.
    """
    found = [_count_digits(a, t, shift) for a, t in layout.paired(stacks, thresholds)]
    return [layout.total(of_digit) for of_digit in zip(*found, strict=True)]


@jax.jit
def _count_digits(a: Array, t: Array, shift: Array) -> list[Array]:
    digit = (jnp.maximum(a, t) - t) >> shift
    return counts(*(digit >= i for i in range(1, 2**_BITS)))


@jax.jit
def counts(*conditions: Array) -> list[Array]:
    """How many elements of each row are True: int32 (n,), for bool stacks (n, *shape)."""
    axes = tuple(range(1, conditions[0].ndim))

    def one_by_one(*conditions: Array) -> list[Array]:
        return [jnp.sum(one, axis=axes, dtype=jnp.int32) for one in conditions]

    def together(*conditions: Array) -> list[Array]:
        ones = tuple(one.astype(jnp.int32) for one in conditions)
        zeros = (jnp.int32(0),) * len(ones)
        return list(lax.reduce(ones, zeros, lambda x, y: jax.tree.map(jnp.add, x, y), axes))

    conditions = varying_as(conditions, conditions)
    # A CPU would write out the conditions and read them again, for each sum by itself. Together the
    # partial sums of sharded arrays are gathered, not added up, which other devices need not do.
    found: list[Array] = lax.platform_dependent(*conditions, cpu=together, default=one_by_one)
    return found
