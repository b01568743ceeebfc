"""The largest of each group of a layer: rows of N:M patterns, the incoming weights of a neuron.

Stacks here are (n, *groups, members). In groups of few members each is compared with each other
one, which is one pass over the array; larger groups are further layers of the search of
``selection``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparseopt_jax.explicit import varying_as
from sparseopt_jax.selection import counts, random_masks, shuffled_indices, top_k_masks
from sparseopt_jax.stacks import Stacked, Stacks
from sparseopt_jax.structures import ConstantFanIn, Structure

Array: TypeAlias = jax.Array

_FEW = 8
"""So many members are compared with each other, and have a bit each in a byte."""


def largest_of_groups(
    scores: Stacks | None,
    k: Sequence[Array],
    key: Array | None,
    where: Stacks | None = None,
    *,
    by_magnitude: bool = True,
) -> Stacks:
    """The members with the largest scores of each group.

    Args:
      scores: floating stacks (n, *groups, members), or None to choose at random among ``where``.
      k: for each of them how many, int32 (n, *groups).
      key: a JAX random key, for ties; with None, which is for stacks with scores, the lowest index
        wins.
      where: bool stacks; only members where it is True are chosen, all where there are fewer. None:
        all are candidates.
      by_magnitude: rank absolute values.

    Returns:
      Bool stacks.
    """
    stacks = where if scores is None else scores
    assert stacks is not None
    if all(stack.shape[-1] <= _FEW for stack in stacks):
        ranks = _random_ranks(key, stacks)
        return [
            _by_comparison(
                None if scores is None else scores[i],
                by_magnitude,
                rank,
                k[i],
                None if where is None else where[i],
            )
            for i, (stack, rank) in enumerate(zip(stacks, ranks, strict=True))
        ]
    rows = None if where is None else [stack.reshape(-1, stack.shape[-1]) for stack in where]
    how_many = jnp.concatenate([each.reshape(-1) for each in k])
    if scores is None:
        assert key is not None
        assert rows is not None
        chosen = random_masks(key, Stacked.of(*(row.shape for row in rows)), how_many, rows)
    else:
        flat = [stack.reshape(-1, stack.shape[-1]) for stack in scores]
        chosen = top_k_masks(flat, how_many, key, rows, by_magnitude=by_magnitude)
    return [c.reshape(s.shape) for c, s in zip(chosen, stacks, strict=True)]


class Amounts(NamedTuple):
    """How many members each of N layers keeps and gets, int32 (N,) but for ``stay``.

    Attributes:
      n_keep: how many of those that are active stay.
      n_drop: how many go, because their places are for others.
      n_total: how many there are to be in all, before that is rounded to groups.
      stay: bool, which layers keep their masks.
    """

    n_keep: Array
    n_drop: Array
    n_total: Array
    stay: Array


def update_groups(
    key: Array,
    masks: Stacks,
    weights: Stacks,
    scores: Stacks,
    amounts: Amounts,
    structure: Structure,
    *,
    grow: str | None,
) -> Stacks:
    """Masks after dropping over whole layers, and filling each group up.

    Args:
      key: a JAX random key, for ties and for growing at random.
      masks: bool stacks (n, *groups, members).
      weights: what to drop by.
      scores: what to grow by.
      amounts: how many.
      structure: the pattern of all of them.
      grow: by ``"scores"``, at ``"random"``, or None: nothing grows, and what a layer has too much
        is dropped within its groups alone.
    """
    shapes = [mask.shape for mask in masks]
    masks, weights, scores = (
        [stack.reshape(stack.shape[0], -1, stack.shape[-1]) for stack in stacks]
        for stacks in (masks, weights, scores)
    )
    layout = Stacked.of(*(mask.shape for mask in masks))
    keep_key, salient_key, cut_key, grow_key = jax.random.split(key, 4)

    def kept_of(among: Stacks) -> Stacks:
        if grow is None:
            return among
        return top_k_masks(
            weights, amounts.n_keep, keep_key, among, by_magnitude=True, layout=layout
        )

    kept = kept_of(masks)
    limits = [
        jnp.broadcast_to(jnp.clip(n[..., 0] // m.shape[1], 1, m.shape[2]), m.shape[:2])
        for m, n in layout.paired(masks, amounts.n_total)
    ]
    if isinstance(structure, ConstantFanIn) and structure.ablate is not None:
        large = top_k_masks(scores, amounts.n_drop, salient_key, by_magnitude=True, layout=layout)
        salient = [_counted(k | g) for k, g in zip(kept, large, strict=True)]
        limits = _ablated(structure, masks, salient, limits, amounts.n_total)
        kept = kept_of([m & (limit > 0)[..., None] for m, limit in zip(masks, limits, strict=True)])
    n_kept = [_counted(k) for k in kept]
    kept = _at_most(kept, n_kept, limits, weights, cut_key)
    new = kept
    if grow is not None:
        missing = [jnp.maximum(limit - n, 0) for n, limit in zip(n_kept, limits, strict=True)]
        free = [~k for k in kept]
        by = scores if grow == "scores" else None
        grown = largest_of_groups(by, missing, grow_key, free)
        new = [k | g for k, g in zip(kept, grown, strict=True)]
    return [
        jnp.where(stay, m, n).reshape(shape)
        for (m, stay), n, shape in zip(layout.paired(masks, amounts.stay), new, shapes, strict=True)
    ]


def _ablated(
    structure: ConstantFanIn,
    masks: Stacks,
    salient: Sequence[Array],
    limits: Sequence[Array],
    n_total: Array,
) -> list[Array]:
    """The fan-in of each neuron, (n, neurons), which is 0 of those that are left out."""
    found, start = [], 0
    for mask, own, limit in zip(masks, salient, limits, strict=True):
        n, _, dense = mask.shape
        total = n_total[start : start + n, None]
        start += n
        needed = structure.salient_needed(limit[:, :1], dense)
        # So many neurons hold the weights, if those neurons are dense.
        fewest = jnp.clip(total // dense, 1, own.shape[1])
        falling = -jnp.sort(-own, axis=1)
        needed = jnp.minimum(needed, jnp.take_along_axis(falling, fewest - 1, axis=1))
        left = own >= needed
        n_left = jnp.sum(left, axis=1, keepdims=True, dtype=jnp.int32)
        found.append(jnp.where(left, jnp.clip(total // n_left, 1, dense), 0))
    return found


def _at_most(
    kept: Stacks,
    n_kept: Sequence[Array],
    limits: Sequence[Array],
    weights: Stacks,
    key: Array,
) -> Stacks:
    """``kept`` without the smallest of the groups that have more than their limit.

    A group has more only after its limit fell, or where masks from outside do not have the pattern.
    """
    over = [jnp.any(n > limit) for n, limit in zip(n_kept, limits, strict=True)]
    start = varying_as(kept, kept, limits, weights, key)

    def cut(kept: Stacks) -> Stacks:
        return largest_of_groups(weights, limits, key, kept)

    cut_if: Stacks = lax.cond(jnp.any(jnp.stack(over)), cut, lambda kept: kept, start)
    return cut_if


def _counted(mask: Array) -> Array:
    """How many members of each group are True, int32 (n, groups)."""
    rows = mask.reshape(-1, mask.shape[2])
    # Two sums at once are one pass; a CPU would write out what a single one is of.
    return counts(rows, ~rows)[0].reshape(mask.shape[:2])


def _random_ranks(key: Array | None, where: Stacks) -> Sequence[Array | None]:
    if key is None:
        return [None] * len(where)
    layout = Stacked.of(*(stack.shape for stack in where))
    return shuffled_indices(layout.random_words(key), layout)


def _ordered(scores: Array, by_magnitude: bool) -> Array:
    """Signed integers of the order of the scores, or of their magnitudes; NaN is below all.

    ``selection`` has unsigned ones, which take processors longer to compare.
    """
    signed = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[scores.dtype.itemsize]
    bounds = np.iinfo(np.dtype(signed))
    bits = lax.bitcast_convert_type(scores, signed)
    magnitude = bits & signed(bounds.max)
    inf = signed(np.array(np.inf, scores.dtype).view(np.dtype(signed)))
    order = magnitude if by_magnitude else jnp.where(bits < 0, -magnitude, magnitude)
    return jnp.where(magnitude > inf, signed(bounds.min), order)


def _by_comparison(
    scores: Array | None,
    by_magnitude: bool,
    ranks: Array | None,
    k: Array,
    where: Array | None,
) -> Array:
    """The ``k`` largest by scores, then by random ranks, then by the index."""

    def members(stack: Array) -> list[Array]:
        return [stack[..., i] for i in range(stack.shape[-1])]

    allowed = None if where is None else members(where)
    keys = None if scores is None else members(_ordered(scores, by_magnitude))
    ties = None if ranks is None else members(ranks)
    n = len(keys or ties or allowed or [])
    better = [jnp.zeros(k.shape, jnp.uint8)] * n
    for i in range(n):
        for j in range(i + 1, n):
            first = jnp.ones(k.shape, jnp.bool_) if ties is None else ties[i] > ties[j]
            if keys is not None:
                first = (keys[i] > keys[j]) | ((keys[i] == keys[j]) & first)
            if allowed is not None:
                first = allowed[i] & (first | ~allowed[j])
            better[j] += first.astype(jnp.uint8)
            better[i] += (~first).astype(jnp.uint8)
    limit = jnp.clip(k, 0, n).astype(jnp.uint8)
    byte = jnp.zeros(k.shape, jnp.uint8)
    for i, those in enumerate(better):
        byte |= (those < limit).astype(jnp.uint8) << i
    place = lax.broadcasted_iota(jnp.uint8, (*[1] * k.ndim, n), k.ndim)
    chosen = (_once(byte, scores, ranks, where)[..., None] >> place) & 1 > 0
    return chosen if where is None else chosen & where


def _once(byte: Array, *of: Array | None) -> Array:
    """The bytes, computed from ``of``, once for all that read them.

    A compiler fuses a cheap computation into what reads it, here once for each of the members, but
    not into a conditional. Both branches of this one give the bytes as they are.
    """
    if byte.size == 0:
        return byte
    first = next(array for array in of if array is not None).reshape(-1)[0]
    zero = (first != first).astype(jnp.uint8)
    once: Array = lax.cond(zero > 0, lambda a, one: a | (one - 1), lambda a, _: a, byte, zero)
    return once
