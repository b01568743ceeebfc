"""SET and RigL against hand-worked tables; their schedules; bad input."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparseopt_jax as sx
from sparseopt_jax.schedules import millionths_of
from tests.helpers import chi_square_bound, subset_chi_square


def at_start(cls, drop_fraction, **options):
    """A policy whose drop fraction at step 0 is `drop_fraction` itself: 1 + cos(0) is 2."""
    return cls(interval=10, drop_fraction=drop_fraction, end_step=100, begin_step=0, **options)


RIGL = at_start(sx.RigL, 0.5)
SET = at_start(sx.SET, 0.5)
SET_BY_SIGN = at_start(sx.SET, 0.5, drop_by="sign")


@functools.cache
def compiled(policy, batched):
    update = jax.vmap(policy.update, (0, None, None, None, None)) if batched else policy.update
    return jax.jit(update)


def one_layer(policy, mask, w, score, step=0, keys=None):
    """Update one kernel of ten weights: plain lists in, NumPy out; a batch where keys are given."""
    mask, w, score = (
        {"kernel": np.asarray(a, dtype).reshape(2, 5)}
        for a, dtype in ((mask, bool), (w, np.float32), (score, np.float32))
    )
    update = compiled(policy, keys is not None)
    out = update(jax.random.key(0) if keys is None else keys, jnp.int32(step), mask, w, score)
    assert out["kernel"].dtype == jnp.bool_
    return np.asarray(out["kernel"]).reshape(*(() if keys is None else keys.shape), 10).astype(int)


def many(policy, mask, w, score):
    """The same update under 8,000 keys."""
    keys = jax.random.split(jax.random.key(1), 8000)
    return one_layer(policy, mask, w, score, keys=keys).astype(bool)


# --- hand-worked tables ----------------------------------------------------------------------

# Ten weights, six active; half of the six are dropped.
# fmt: off
#             0    1    2    3    4    5    6    7    8    9
MASK = [      1,   1,   0,   1,   0,   1,   1,   0,   1,   0]
W = [        .9, -.1,   0,  .5,   0, -.3,  .2,   0, -.7,   0]
GRAD = [     9., -.8,  .1,  8., -.9,  .2, -.3,  .4,  7., .05]
# Kept, by |w|: 0 (.9), 8 (.7), 3 (.5); dropped: 1, 5, 6.
KEPT = [      1,   0,   0,   1,   0,   0,   0,   0,   1,   0]
# Not kept, by |gradient|: 4 (.9), 1 (.8), 7 (.4), 6 (.3), 5 (.2), 2 (.1), 9 (.05).
# Grown: 4, 1 and 7, of which 1 had been dropped a moment ago and comes back.
NEW = [       1,   1,   0,   1,   1,   0,   0,   1,   1,   0]
# fmt: on


def test_rigl_by_hand():
    np.testing.assert_array_equal(one_layer(RIGL, MASK, W, GRAD), NEW)


def test_rigl_by_hand_on_a_later_step():
    """Step 50 of 100: 0.5 / 2 * (1 + cos(pi / 2)) = 0.25; 1.5 weights, so one goes.

    Position 1 (|w| = .1) is the one, and among the five not kept 4 has the largest gradient.
    """
    expected = [1, 0, 0, 1, 1, 1, 1, 0, 1, 0]
    np.testing.assert_array_equal(one_layer(RIGL, MASK, W, GRAD, step=50), expected)


def test_rigl_regrows_everything_it_dropped():
    """The dropped weights 1, 5, 6 have the largest gradients of all: nothing changes."""
    grad = [0, 3, 0, 0, 1, 4, -5, 1, 0, 1]
    np.testing.assert_array_equal(one_layer(RIGL, MASK, W, grad), MASK)


def test_rigl_with_ties_that_leave_no_choice():
    """Four weights of size 1, four of size 2, half are dropped: all the 1s (0, 1, 4, 5).

    Four gradients of size 5 among the positions not kept, the rest 0: 1, 4, 8, 9 are grown, two of
    them again.
    """
    mask = [1, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    w = [1, -1, 2, -2, -1, 1, 2, -2, 0, 0]
    grad = [0, 5, 9, 9, -5, 0, 9, 9, 5, -5]
    expected = [0, 1, 1, 1, 1, 0, 1, 1, 1, 1]
    np.testing.assert_array_equal(one_layer(RIGL, mask, w, grad), expected)


@pytest.mark.parametrize("policy", [RIGL, SET])
def test_too_few_active_weights_to_drop_one(policy):
    """floor(0.5 * 1) = 0, and on step 50 floor(0.25 * 3) = 0."""
    grad = [9, 9, 9, 0, 0, 0, 9, 9, 9, 0]
    mask = [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(one_layer(policy, mask, mask, grad), mask)
    mask = [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    np.testing.assert_array_equal(one_layer(policy, mask, mask, grad, step=50), mask)


def test_set_by_hand():
    """The same table: kept as under RigL; three of the seven others, all 35 triples equally."""
    kept = np.array(KEPT, bool)
    masks = many(SET, MASK, W, GRAD)
    assert masks[:, kept].all()
    assert (masks.sum(axis=1) == 6).all()
    statistic, freedom = subset_chi_square(masks[:, ~kept], 7, 3)
    assert statistic < chi_square_bound(freedom)


@pytest.mark.parametrize(("policy", "kept"), [(SET, [4, 5, 6, 7]), (SET_BY_SIGN, [2, 3, 6, 7])])
def test_set_drops_by_magnitude_or_by_sign(policy, kept):
    """By sign, half of the positive and half of the negative weights go, those nearest to zero.

    Positive: .1, .2, .3, .4 (positions 0 to 3): .1 and .2 go. Negative: -1, -2, -3, -4 (4 to 7):
    -1 and -2, the largest, go. By magnitude all of the positive ones go.
    """
    w = [0.1, 0.2, 0.3, 0.4, -1, -2, -3, -4, 0, 0]
    masks = many(policy, [1] * 8 + [0] * 2, w, w)
    assert (masks.sum(axis=1) == 8).all()
    # Four of the six others are grown: 8,000 draws neither miss nor always take one of them.
    assert np.flatnonzero(masks.all(axis=0)).tolist() == kept
    assert masks.any(axis=0).all()


def test_set_by_sign_with_one_sign_only():
    masks = many(SET_BY_SIGN, [1] * 6 + [0] * 4, [-3, -1, -6, -2, -5, -4, 0, 0, 0, 0], W)
    assert np.flatnonzero(masks.all(axis=0)).tolist() == [2, 4, 5]
    assert (masks.sum(axis=1) == 6).all()


def test_ties_between_gradients_are_broken_uniformly():
    """floor(0.5 * 5) = 2 are dropped (3 and 4); equal gradients: any two of the seven not kept."""
    mask, w = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0, 0, 0, 0, 0]
    masks = many(RIGL, mask, w, [1] * 10)
    assert masks[:, :3].all()
    statistic, freedom = subset_chi_square(masks[:, 3:], 7, 2)
    assert statistic < chi_square_bound(freedom)


def test_ties_between_weights_are_broken_uniformly():
    """Two of five equal weights go (floor(0.5 * 5)); the two with gradients are grown."""
    mask, w = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0], [1, -1, 1, -1, 1, 0, 0, 0, 0, 0]
    masks = many(RIGL, mask, w, [0, 0, 0, 0, 0, 1, 2, 0, 0, 0])
    assert masks[:, [5, 6]].all()
    statistic, freedom = subset_chi_square(~masks[:, :5], 5, 2)
    assert statistic < chi_square_bound(freedom)


# --- schedules -------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [sx.SET, sx.RigL])
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        # Both ends count; by default the first update comes after one interval.
        ({"interval": 3, "end_step": 12}, [3, 6, 9, 12]),
        ({"interval": 3, "end_step": 11}, [3, 6, 9]),
        ({"interval": 3, "end_step": 12, "begin_step": 0}, [0, 3, 6, 9, 12]),
        ({"interval": 3, "end_step": 9, "begin_step": 2}, [2, 5, 8]),
        ({"interval": 5, "end_step": 7, "begin_step": 7}, [7]),
        ({"interval": 1, "end_step": 4}, [1, 2, 3, 4]),
    ],
)
def test_update_steps(cls, options, steps):
    policy = cls(drop_fraction=0.3, **options)
    assert [step for step in range(20) if policy.is_update_step(step)] == steps
    traced = jax.jit(jax.vmap(policy.is_update_step))(jnp.arange(20))
    assert traced.dtype == jnp.bool_
    assert np.flatnonzero(traced).tolist() == steps


@pytest.mark.parametrize("cls", [sx.SET, sx.RigL])
def test_drop_fraction(cls):
    # 0.15 * (1 + cos(pi * step / 100)); cos of 0, 36, 45, 60, 90, 135 and 180 degrees.
    table = {
        0: 0.3,
        20: 0.15 * (1 + (1 + math.sqrt(5)) / 4),
        25: 0.15 * (1 + math.sqrt(0.5)),
        50: 0.15,
        75: 0.15 * (1 - math.sqrt(0.5)),
        100: 0.0,
    }
    policy = cls(interval=10, drop_fraction=0.3, end_step=100)
    for step, expected in table.items():
        got = policy.drop_fraction_at(jnp.int32(step))
        assert got.dtype == jnp.float32
        # The fraction is the formula's, rounded to six decimals, to within a bit of float32.
        np.testing.assert_allclose(got, round(expected, 6), rtol=1.2e-7, atol=0)


@given(
    st.integers(0, 10**6) | st.sampled_from([300_000, 700_000, 999_999]),
    st.integers(0, 2**31 - 1) | st.integers(0, 5_000),
)
def test_dropped_weights_are_counted_without_rounding(millionths, n):
    """floor(fraction * n) for layers of up to 2**31 - 1 weights, against Python's integers."""
    got = millionths_of(jnp.int32(millionths), jnp.int32(n))
    assert int(got) == millionths * n // 10**6


def test_static_never_changes():
    masks, w = {"kernel": np.asarray(MASK, bool)}, {"kernel": np.float32(W)}
    out = sx.Static().update(jax.random.key(0), jnp.int32(10), masks, w, w)
    np.testing.assert_array_equal(out["kernel"], MASK)
    assert not any(sx.Static().is_update_step(step) for step in range(5))


# --- values and bad input --------------------------------------------------------------------

GOOD = {"interval": 10, "drop_fraction": 0.3, "end_step": 100}


@pytest.mark.parametrize("cls", [sx.SET, sx.RigL])
def test_policies_are_frozen_values(cls):
    assert cls(**GOOD) == cls(**GOOD)
    assert hash(cls(**GOOD)) == hash(cls(**GOOD))
    assert cls(**GOOD) != cls(**{**GOOD, "interval": 11})
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls(**GOOD).interval = 5
    assert sx.Static() == sx.Static()


BAD = [
    ("interval", 0),
    ("interval", -5),
    ("drop_fraction", 0.0),
    ("drop_fraction", 1.0),
    ("drop_fraction", -0.3),
    ("drop_fraction", 1.5),
    ("drop_fraction", math.nan),
    ("begin_step", -1),
]


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [(cls, name, value) for cls in (sx.SET, sx.RigL) for name, value in BAD]
    + [
        (sx.SET, "drop_by", "size"),
        (sx.RigL, "grow_by", "size"),
        (sx.RigL, "accumulate_steps", 0),
        (sx.RigL, "accumulate_steps", -2),
        (sx.RigL, "accumulate_steps", 11),
    ],
)
def test_a_bad_value_is_named(cls, name, value):
    """The argument first, then its value."""
    with pytest.raises(ValueError, match=f"(?s){name}.*{value}"):
        cls(**{**GOOD, name: value})


@pytest.mark.parametrize("cls", [sx.SET, sx.RigL])
def test_end_before_begin(cls):
    with pytest.raises(ValueError, match=r"(?s)end_step.*19"):
        cls(interval=10, drop_fraction=0.3, end_step=19, begin_step=20)
    # Begin is one interval unless given.
    with pytest.raises(ValueError, match=r"(?s)end_step.*9"):
        cls(interval=10, drop_fraction=0.3, end_step=9)
    assert cls(interval=10, drop_fraction=0.3, end_step=10).is_update_step(10)


def test_good_options_are_taken():
    sx.SET(**GOOD, drop_by="sign", skip_step=True)
    sx.RigL(**GOOD, grow_by="corrected_gradient", accumulate_steps=10, skip_step=True)


@pytest.mark.parametrize("cls", [sx.SET, sx.RigL])
def test_masks_of_another_shape(cls):
    masks, params = {"kernel": np.ones((2, 3), bool)}, {"kernel": np.ones((3, 2), np.float32)}
    with pytest.raises(ValueError, match="mask"):
        cls(**GOOD).update(jax.random.key(0), 10, masks, params, params)
