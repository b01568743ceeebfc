"""`top_k_mask` and `random_mask` against a sort in NumPy."""

import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparseopt_jax as sx
from experiments.hlo import Collective, collectives
from tests import oracles
from tests.helpers import chi_square_bound, subset_chi_square

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
# One compilation each, k traced. Ranks 0 to 4, an empty array, and sizes on either side of the
# powers of two at which an index gets one bit longer.
SHAPES = ((), (0,), (1,), (7,), (8, 1), (3, 11), (2, 3, 5), (3, 2, 4, 3))
KINDS = [(shape, np.float32) for shape in SHAPES]
KINDS += [((3, 11), dtype) for dtype in DTYPES[1:]]
FEW_KINDS = [((3, 11), np.float32), ((3, 2, 4, 3), ml_dtypes.bfloat16), ((0,), np.float32)]
# What ordering gets wrong first: both zeros, both infinities, NaN, the smallest denormal of
# float32 and of float16, the largest finite float16, and neighbours of 1.
SPECIAL = (
    0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1.0, -1.0, 1.4e-45, -1.4e-45, 1e-40, 6e-8, -6e-8,
    65504.0, -65504.0, 3e38, -3e38, 1.0078125, 1.0009765625, 1.1920929e-07,
)  # fmt: skip

select = jax.jit(sx.top_k_mask)


@st.composite
def scores_and_k(draw, kinds=FEW_KINDS):
    shape, dtype = draw(st.sampled_from(kinds))
    size = int(np.prod(shape))
    value = st.sampled_from(SPECIAL) | st.floats(width=32)
    if draw(st.booleans()):
        value = st.sampled_from(draw(st.lists(value, min_size=1, max_size=3)))  # many ties
    values = draw(st.lists(value, min_size=size, max_size=size))
    with np.errstate(over="ignore", under="ignore"):
        scores = np.array(values, np.float32).astype(dtype).reshape(shape)
    return scores, draw(st.integers(0, size))


@given(scores_and_k(KINDS))
def test_equals_a_stable_sort(case):
    scores, k = case
    mask = select(scores, np.int32(k))
    assert mask.dtype == jnp.bool_
    np.testing.assert_array_equal(mask, oracles.top_k_mask(scores, k))


@given(scores_and_k(), st.integers(0, 2**32 - 1))
def test_where_names_the_candidates(case, bits):
    scores, k = case
    where = np.random.default_rng(bits).random(scores.shape) < 0.6
    mask = np.asarray(select(scores, np.int32(k), where=where))
    np.testing.assert_array_equal(mask, oracles.top_k_mask(scores, k, where))
    assert mask.sum() == min(k, where.sum())


@given(scores_and_k(), st.integers(0, 2**32 - 1))
def test_a_key_only_breaks_ties(case, seed):
    """Exactly k; everything above the threshold is chosen and nothing below it."""
    scores, k = case
    mask = np.asarray(select(scores, np.int32(k), jax.random.key(seed)))
    assert mask.sum() == k
    # NaN to the very end: below -inf, and all NaN tied.
    values = oracles.rank_key(scores)
    _, level = np.unique(values.ravel(), return_inverse=True, equal_nan=True)
    level = np.where(np.isnan(values), -1, level.reshape(values.shape))
    if 0 < k < scores.size:
        threshold = np.sort(level.ravel())[::-1][k - 1]
        assert mask[level > threshold].all()
        assert not mask[level < threshold].any()


def test_by_hand():
    nan, inf = np.nan, np.inf
    scores = jnp.array([-inf, 2.0, nan, -0.0, 0.0, inf, 2.0, -3.0])
    # From the best: inf (5), the two 2.0 (1, 6), the two zeros (3, 4), -3 (7), -inf (0), NaN (2).
    order = [5, 1, 6, 3, 4, 7, 0, 2]
    for k in range(9):
        mask = select(scores, np.int32(k))
        assert sorted(order[:k]) == np.flatnonzero(mask).tolist(), k


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbouring_values_are_told_apart(dtype):
    """The 200 smallest non-negative values of the type, denormals first, and their negatives."""
    bits = {4: np.uint32, 2: np.uint16}[np.dtype(dtype).itemsize]
    positive = np.arange(200).astype(bits).view(dtype)
    values = np.random.default_rng(0).permutation(np.concatenate([positive, -positive[1:]]))
    for k in (1, 100, 199, 200, 201, 398):
        np.testing.assert_array_equal(
            select(values, np.int32(k)), oracles.top_k_mask(values, k), err_msg=str(k)
        )


def test_vmap_over_scores_and_k():
    rng = np.random.default_rng(1)
    scores = rng.integers(-3, 4, (6, 5, 4)).astype(np.float32)
    ks = np.array([0, 1, 7, 10, 19, 20], np.int32)
    masks = jax.vmap(sx.top_k_mask)(scores, ks)
    for mask, s, k in zip(masks, scores, ks, strict=True):
        np.testing.assert_array_equal(mask, oracles.top_k_mask(s, k))
    masks = jax.jit(jax.vmap(sx.top_k_mask, in_axes=(None, 0)))(scores[0], ks)
    for mask, k in zip(masks, ks, strict=True):
        np.testing.assert_array_equal(mask, oracles.top_k_mask(scores[0], k))


def test_vmap_over_keys():
    keys = jax.random.split(jax.random.key(0), 5)
    masks = np.asarray(jax.vmap(lambda key: sx.top_k_mask(jnp.zeros((9, 9)), 40, key))(keys))
    assert (masks.sum(axis=(1, 2)) == 40).all()
    for a, b in itertools.combinations(masks, 2):
        assert (a != b).any()


def test_jit_equals_eager_and_concrete_k_equals_traced():
    scores = np.random.default_rng(2).integers(0, 9, (13, 17)).astype(np.float32)
    key = jax.random.key(3)
    for k, *rest in ((0,), (100,), (100, key), (221, key)):
        jitted = select(scores, np.int32(k), *rest)
        np.testing.assert_array_equal(sx.top_k_mask(scores, k, *rest), jitted)
        static = jax.jit(lambda s, *rest, k=k: sx.top_k_mask(s, k, *rest))
        np.testing.assert_array_equal(static(scores, *rest), jitted)


def test_same_key_same_mask_other_key_other_mask():
    scores = jnp.zeros((20, 20))
    masks = [np.asarray(select(scores, 100, jax.random.key(seed))) for seed in range(4)]
    np.testing.assert_array_equal(masks[0], select(scores, 100, jax.random.key(0)))
    for a, b in itertools.combinations(masks, 2):
        assert (a != b).any()


def test_ties_are_broken_uniformly():
    """Positions 1, 3, 4, 6, 7 tie for two places: all ten pairs are equally likely."""
    scores = jnp.array([9.0, 5.0, 1.0, 5.0, 5.0, 8.0, 5.0, 5.0])
    keys = jax.random.split(jax.random.key(0), 4000)
    masks = np.asarray(jax.jit(jax.vmap(lambda key: sx.top_k_mask(scores, 4, key)))(keys))
    assert masks[:, [0, 5]].all()
    assert not masks[:, 2].any()
    statistic, freedom = subset_chi_square(masks[:, [1, 3, 4, 6, 7]], 5, 2)
    assert statistic < chi_square_bound(freedom)


def test_random_mask_is_a_uniform_subset():
    keys = jax.random.split(jax.random.key(1), 4000)
    masks = jax.jit(jax.vmap(lambda key: sx.random_mask(key, (2, 3), 3)))(keys)
    assert masks.shape == (4000, 2, 3)
    assert masks.dtype == jnp.bool_
    statistic, freedom = subset_chi_square(masks.reshape(4000, 6), 6, 3)
    assert statistic < chi_square_bound(freedom)


def test_random_mask_takes_two_positions_together_as_often_as_chance_does():
    """Of 2,048 positions a tenth, 40,000 times: pairs at a distance, within 4 standard deviations.

    A pair is taken with probability q = k (k - 1) / (n (n - 1)); with the finalizer of MurmurHash3
    alone, those at a distance of 1,024 are off by 16.
    """
    n, k, draws = 2048, 205, 40
    draw = jax.jit(jax.vmap(lambda key: sx.random_mask(key, (n,), k)))
    distances = (1, 2, 16, 64, 512, 1024)
    together = np.zeros(len(distances))
    for seed in range(draws):
        masks = np.asarray(draw(jax.random.split(jax.random.key(seed), 1000)))
        together += [np.sum(masks[:, d:] & masks[:, :-d]) for d in distances]
    expected = 1000 * draws * (n - np.array(distances)) * k * (k - 1) / (n * (n - 1))
    assert np.all(np.abs(together - expected) < 4 * np.sqrt(expected)), together / expected


def test_random_mask_spreads_over_neurons_as_chance_does():
    """Fan-in and fan-out of a random mask are hypergeometric, with its variance.

    The mean of (count - mean)**2 / variance over 128 rows or columns has a standard deviation of
    sqrt(2 / 127), over 50 masks 0.018; six of those are allowed.
    """
    keys = jax.random.split(jax.random.key(2), 50)
    masks = jax.jit(jax.vmap(lambda key: sx.random_mask(key, (128, 128), 1638)))(keys)
    p, total = 1638 / 128**2, 128**2
    variance = 128 * p * (1 - p) * (total - 128) / (total - 1)
    for axis in (1, 2):
        counts = np.asarray(masks).sum(axis=axis)
        spread = ((counts - 128 * p) ** 2).mean() / variance
        assert abs(spread - 1) < 6 * np.sqrt(2 / 127 / 50), axis


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 3, 4, 8)])
def test_random_mask_keeps_exactly_k(shape):
    size = int(np.prod(shape))
    draw = jax.jit(lambda key, k: sx.random_mask(key, shape, k))
    for k in sorted({0, size // 3, size}):
        mask = draw(jax.random.key(k), np.int32(k))
        assert mask.shape == shape
        assert mask.sum() == k
    once, again = (sx.random_mask(jax.random.key(0), shape, size // 2) for _ in range(2))
    np.testing.assert_array_equal(once, again)


# --- sharded arrays --------------------------------------------------------------------------


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("a", "b"), P(None, ("a", "b")), P("b")])
def test_sharded_array_gives_the_same_mask(axis_type, spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    scores = np.random.default_rng(4).integers(-20, 20, (16, 24)).astype(np.float32)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, spec)
        placed = jax.device_put(scores, sharding)
        for k in (0, 1, 150, 384):
            mask = select(placed, np.int32(k))
            assert mask.sharding.is_equivalent_to(sharding, 2)
            np.testing.assert_array_equal(mask, oracles.top_k_mask(scores, k))
        tied = np.asarray(select(placed, np.int32(150), jax.random.key(5)))
        where = jax.device_put(scores > 0, sharding)
        np.testing.assert_array_equal(
            select(placed, np.int32(50), where=where),
            oracles.top_k_mask(scores, 50, scores > 0),
        )
    np.testing.assert_array_equal(tied, select(scores, np.int32(150), jax.random.key(5)))


def test_sharded_array_is_never_gathered():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    scores = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=NamedSharding(mesh, P("a")))
    text = select.lower(scores, jnp.int32(100)).compile().as_text()
    # A CPU gathers partial counts: of eight devices for three candidates, in two searches.
    assert collectives(text) == {"all-gather": Collective(2 * 3, 2 * 3 * 8 * 4)}
    assert " sort(" not in text


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [-1, 7])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"\bk\b.*{k}"):
        sx.top_k_mask(jnp.zeros((2, 3)), k)
    with pytest.raises(ValueError, match=rf"\bk\b.*{k}"):
        sx.random_mask(jax.random.key(0), (2, 3), k)


def test_k_must_be_an_integer():
    with pytest.raises(TypeError, match=r"\bk\b"):
        sx.top_k_mask(jnp.zeros((2, 3)), 1.5)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.complex64])
def test_scores_must_be_floating(dtype):
    with pytest.raises(TypeError, match="scores"):
        sx.top_k_mask(jnp.zeros((2, 3), dtype), 1)


def test_where_must_fit():
    with pytest.raises(ValueError, match="where"):
        sx.top_k_mask(jnp.zeros((2, 3)), 1, where=jnp.ones((3, 2), bool))
    with pytest.raises(TypeError, match="where"):
        sx.top_k_mask(jnp.zeros((2, 3)), 1, where=jnp.ones((2, 3), jnp.float32))


def test_too_many_elements_for_an_int32_count():
    scores = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    with pytest.raises(ValueError, match=r"2147483648|2\*\*31|2\^31"):
        jax.eval_shape(lambda s: sx.top_k_mask(s, 5), scores)
