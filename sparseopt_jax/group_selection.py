"""The largest of each group of a layer: rows of N:M patterns, the incoming weights of a neuron.

Stacks here are (n, groups, members). In groups of few members each is compared with each other one,
which is one pass over the array; larger groups are further layers of the search of ``selection``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from sparseopt_jax.explicit import varying_as
from sparseopt_jax.selection import (
    magnitude_bits,
    ordered_bits,
    random_masks,
    shuffled_indices,
    top_k_masks,
)
from sparseopt_jax.stacks import Stacked, Stacks
from sparseopt_jax.structures import ConstantFanIn, Structure

Array: TypeAlias = jax.Array

_FEW = 8
"""So many members are compared with each other; a program grows with the square."""


def largest_of_groups(
    scores: Stacks | None,
    k: Sequence[Array],
    key: Array | None,
    where: Stacks,
    *,
    by_magnitude: bool = True,
) -> Stacks:
    """The members with the largest scores of each group.

    Args:
      scores: floating stacks (n, groups, members), or None to choose at random.
      k: for each of them how many, int32 (n, groups).
      key: a JAX random key, for ties; with None, which is for stacks with scores, the lowest index
        wins.
      where: bool stacks; only members where it is True are chosen, all where there are fewer.
      by_magnitude: rank absolute values.

    Returns:
      Bool stacks.
    """
    to_bits = magnitude_bits if by_magnitude else ordered_bits
    if all(stack.shape[2] <= _FEW for stack in where):
        ranks = _random_ranks(key, where)
        return [
            _by_comparison(None if scores is None else to_bits(scores[i]), rank, k[i], w)
            for i, (w, rank) in enumerate(zip(where, ranks, strict=True))
        ]
    rows = [stack.reshape(-1, stack.shape[2]) for stack in where]
    counts = jnp.concatenate([jnp.maximum(each, 0).reshape(-1) for each in k])
    layout = Stacked.of(*(row.shape for row in rows))
    if scores is None:
        assert key is not None
        chosen = random_masks(key, layout, counts, rows)
    else:
        flat = [s.reshape(r.shape) for s, r in zip(scores, rows, strict=True)]
        chosen = top_k_masks(flat, counts, key, rows, by_magnitude=by_magnitude, layout=layout)
    return [c.reshape(w.shape) for c, w in zip(chosen, where, strict=True)]


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
      masks: bool stacks (n, groups, members).
      weights: what to drop by.
      scores: what to grow by.
      amounts: how many.
      structure: the pattern of all of them.
      grow: by ``"scores"``, at ``"random"``, or None: nothing grows, and what a layer has too much
        is dropped within its groups alone.
    """
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
        salient = [
            jnp.sum(k | g, axis=2, dtype=jnp.int32) for k, g in zip(kept, large, strict=True)
        ]
        limits = _ablated(structure, masks, salient, limits, amounts.n_total)
        kept = kept_of([m & (limit > 0)[..., None] for m, limit in zip(masks, limits, strict=True)])
    kept = _at_most(kept, limits, weights, cut_key)
    new = kept
    if grow is not None:
        missing = [
            limit - jnp.sum(k, axis=2, dtype=jnp.int32)
            for k, limit in zip(kept, limits, strict=True)
        ]
        free = [~k for k in kept]
        by = scores if grow == "scores" else None
        grown = largest_of_groups(by, missing, grow_key, free)
        new = [k | g for k, g in zip(kept, grown, strict=True)]
    return [
        jnp.where(stay, m, n)
        for (m, stay), n in zip(layout.paired(masks, amounts.stay), new, strict=True)
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


def _at_most(kept: Stacks, limits: Sequence[Array], weights: Stacks, key: Array) -> Stacks:
    """``kept`` without the smallest of the groups that have more than their limit.

    A group has more only after its limit fell, or where masks from outside do not have the pattern.
    """
    over = [jnp.any(jnp.sum(k, axis=2) > limit) for k, limit in zip(kept, limits, strict=True)]
    start = varying_as(kept, kept, limits, weights, key)

    def cut(kept: Stacks) -> Stacks:
        return largest_of_groups(weights, limits, key, kept)

    cut_if: Stacks = lax.cond(jnp.any(jnp.stack(over)), cut, lambda kept: kept, start)
    return cut_if


def _random_ranks(key: Array | None, where: Stacks) -> Sequence[Array | None]:
    if key is None:
        return [None] * len(where)
    layout = Stacked.of(*(stack.shape for stack in where))
    return shuffled_indices(layout.random_words(key), layout)


def _by_comparison(bits: Array | None, ranks: Array | None, k: Array, where: Array) -> Array:
    """The ``k`` largest by the order of the bits, then of random ranks, then of the index."""
    n = where.shape[2]

    def members(stack: Array) -> list[Array]:
        return [stack[..., i] for i in range(n)]

    allowed = members(where)
    keys = None if bits is None else members(bits)
    ties = None if ranks is None else members(ranks)
    better = [jnp.zeros(k.shape, jnp.int32)] * n
    for i in range(n):
        for j in range(i + 1, n):
            first = jnp.ones(k.shape, jnp.bool_) if ties is None else ties[i] > ties[j]
            if keys is not None:
                first = (keys[i] > keys[j]) | ((keys[i] == keys[j]) & first)
            first = allowed[i] & (first | ~allowed[j])
            better[j] += first.astype(jnp.int32)
            better[i] += 1 - first.astype(jnp.int32)
    return jnp.stack([a & (b < k) for a, b in zip(allowed, better, strict=True)], axis=-1)
