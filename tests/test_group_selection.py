"""The largest of each group, against a sort of every group in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt_jax.group_selection import largest_of_groups
from tests import oracles
from tests.helpers import chi_square_bound, subset_chi_square

# What ordering gets wrong first, and many ties.
VALUES = np.array(
    [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, 3e38, -3e38], np.float32
)

select = functools.partial(jax.jit, static_argnames="by_magnitude")(largest_of_groups)


def expected(scores, k, where, by_magnitude):
    """Group by group, by the oracle's sort; the lowest index first among equals."""
    values = oracles.rank_key(scores)
    values = np.abs(values) if by_magnitude else values
    chosen = np.zeros(scores.shape, bool)
    for group in np.ndindex(scores.shape[:-1]):
        chosen[group] = oracles.top_k_mask(values[group], max(0, k[group]), where[group])
    return chosen


def hostile(shape, dtype, seed):
    """Half of the groups of a few values, half of numbers that are all different."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=shape).astype(dtype)
    few = rng.choice(VALUES, shape).astype(dtype)
    return np.where(rng.random((*shape[:-1], 1)) < 0.5, few, scores)


# Up to eight members are compared with each other; the search takes what is larger.
@pytest.mark.parametrize("members", [2, 4, 8, 9, 64])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_against_a_sort_of_each_group(members, dtype):
    """Any number of axes of groups; k from 0 to more than there are, of each group another."""
    shape = 2, 3, 9, members
    rng = np.random.default_rng(members)
    scores = hostile(shape, dtype, 0)
    k = rng.integers(0, members + 3, shape[:-1]).astype(np.int32)
    k[0, 0, :2] = 0, members
    where = rng.random(shape) < 0.6
    where[0, 1, 0] = False
    everywhere = np.ones(shape, bool)
    for by_magnitude in (False, True):
        (mask,) = select([scores], [k], None, [where], by_magnitude=by_magnitude)
        assert mask.dtype == jnp.bool_
        np.testing.assert_array_equal(mask, expected(scores, k, where, by_magnitude))
        (mask,) = select([scores], [k], None, by_magnitude=by_magnitude)
        np.testing.assert_array_equal(mask, expected(scores, k, everywhere, by_magnitude))


@pytest.mark.parametrize("members", [3, 5, 6, 7])
def test_groups_of_other_sizes(members):
    scores = hostile((1, 40, members), np.float32, members)
    k = np.arange(40, dtype=np.int32)[None] % (members + 1)
    (mask,) = select([scores], [k], None)
    np.testing.assert_array_equal(mask, expected(scores, k, np.ones(scores.shape, bool), True))


@pytest.mark.parametrize("sizes", [(4, 6), (4, 12)])
def test_stacks_of_several_sizes_are_chosen_from_together(sizes):
    scores = [hostile((2, 5, n), np.float32, n) for n in sizes]
    k = [np.full((2, 5), n // 2, np.int32) for n in sizes]
    for mask, own, count in zip(select(scores, k, None), scores, k, strict=True):
        np.testing.assert_array_equal(mask, expected(own, count, np.ones(own.shape, bool), True))


@pytest.mark.parametrize("members", [4, 12])
def test_a_key_only_breaks_ties(members):
    rng = np.random.default_rng(0)
    scores = rng.choice(VALUES, (2, 30, members))
    k = rng.integers(0, members + 1, (2, 30)).astype(np.int32)
    (mask,) = select([scores], [k], jax.random.key(0))
    mask = np.asarray(mask)
    np.testing.assert_array_equal(mask.sum(-1), k)
    values = np.abs(oracles.rank_key(scores))
    values = np.where(np.isnan(values), -1, values)
    lowest = np.where(mask, values, np.inf).min(-1)
    highest = np.where(mask, -np.inf, values).max(-1)
    assert (lowest >= highest).all()


@pytest.mark.parametrize("width", [5, 10])
def test_ties_are_broken_uniformly(width):
    """Members 0, 2, 3 and 4 tie for two places in each of 4,000 groups: six pairs."""
    scores = np.zeros((1, 4000, width), np.float32)
    scores[..., [0, 2, 3, 4]] = 1
    where = [np.ones(scores.shape, bool)]
    k = [np.full((1, 4000), 2, np.int32)]
    for given in ([scores], [-scores]):
        (mask,) = select(given, k, jax.random.key(1), where)
        chosen = np.asarray(mask)[0]
        assert not chosen[:, 1].any()
        statistic, freedom = subset_chi_square(chosen[:, [0, 2, 3, 4]], 4, 2)
        assert statistic < chi_square_bound(freedom)


@pytest.mark.parametrize("members", [5, 10])
def test_choosing_at_random_is_uniform(members):
    """Without scores, among five members that ``where`` names."""
    where = np.zeros((1, 4000, members), bool)
    where[..., :5] = True
    k = [np.full((1, 4000), 2, np.int32)]
    (mask,) = select(None, k, jax.random.key(2), [where])
    assert not np.asarray(mask)[..., 5:].any()
    statistic, freedom = subset_chi_square(np.asarray(mask)[0, :, :5], 5, 2)
    assert statistic < chi_square_bound(freedom)


def test_no_groups_and_vmap():
    assert select([jnp.zeros((1, 0, 4))], [jnp.zeros((1, 0), jnp.int32)], None)[0].size == 0
    scores = hostile((3, 2, 7, 4), np.float32, 0)
    k = np.full((3, 2, 7), 2, np.int32)
    masks = jax.vmap(lambda s, k: largest_of_groups([s], [k], None)[0])(scores, k)
    np.testing.assert_array_equal(masks, expected(scores, k, np.ones(scores.shape, bool), True))
