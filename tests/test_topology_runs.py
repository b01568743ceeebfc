"""SET and RigL over whole runs against NumPy, and what holds for any weights and gradients."""

import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given

import sparseopt_jax as sx
from tests import oracles

KEY = jax.random.key(0)
SHAPES = {
    "conv": (3, 3, 4, 6),
    "dense": (20, 15),
    "twin": (20, 15),
    "head": (15, 8),
    "full": (6, 5),
    "bias": (8,),
}
ALPHA, INTERVAL, END = 0.37, 10, 300


def normal(rng):
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def random_masks(rng, density=0.35):
    masks = {name: rng.random(shape) < density for name, shape in SHAPES.items()}
    masks["full"][:] = masks["bias"][:] = True
    return masks


def masked(params, masks):
    return {name: np.where(masks[name], w, np.float32(0)) for name, w in params.items()}


def run(policy, seed, new_masks):
    """Train for 300 steps of random weights; `new_masks(step, masks, params, grads)` updates.

    Between updates the active weights move at random: a grown weight starts from 0, a regrown one
    from where it was.
    """
    rng = np.random.default_rng(seed)
    masks, params = random_masks(rng), normal(rng)
    active = {name: mask.sum() for name, mask in masks.items()}
    updates = 0
    for step in range(END + 5):
        due = step in range(INTERVAL, END + 1, INTERVAL)
        assert bool(policy.is_update_step(step)) == due
        params = masked(params, masks)
        if due:
            grads = normal(rng)
            # No ties, so that library and oracle have no choice to disagree about.
            for name, mask in masks.items():
                assert len(np.unique(np.abs(params[name][mask]))) == active[name]
                assert len(np.unique(np.abs(grads[name]))) == mask.size
            masks = new_masks(step, masks, params, grads)
            assert {name: mask.sum() for name, mask in masks.items()} == active
            params = masked(params, masks)
            updates += 1
        params = {n: w + np.float32(0.2) * noise for (n, w), noise in
                  zip(params.items(), normal(rng).values(), strict=True)}  # fmt: skip
    assert updates == 30


def drop_fraction(step, counts):
    """The oracle's fraction, once it is clear that float32 and float64 give the same counts."""
    fraction = oracles.drop_fraction_at(ALPHA, END, step)
    for count in counts:
        product = fraction * count
        assert product < 1e-6 or abs(product - round(product)) > 1e-4, (step, product)
    return fraction


def test_rigl_equals_numpy_over_a_whole_run():
    policy = sx.RigL(interval=INTERVAL, drop_fraction=ALPHA, end_step=END)
    update = jax.jit(policy.update)
    moved = regrown = 0

    def new_masks(step, masks, params, grads):
        nonlocal moved, regrown
        fraction = drop_fraction(step, [mask.sum() for mask in masks.values()])
        got = update(jax.random.key(step), jnp.int32(step), masks, params, grads)
        for name, mask in masks.items():
            expected, kept = oracles.rigl_layer(mask, params[name], grads[name], fraction)
            np.testing.assert_array_equal(got[name], expected, err_msg=f"{name} at {step}")
            moved += (expected & ~mask).sum()
            regrown += (expected & mask & ~kept).sum()
        return {name: np.asarray(mask) for name, mask in got.items()}

    run(policy, 0, new_masks)
    # The run did what it is meant to test.
    assert moved > 300
    assert regrown > 100


@pytest.mark.parametrize("drop_by", ["magnitude", "sign"])
def test_set_keeps_what_numpy_keeps_over_a_whole_run(drop_by):
    """Under 16 keys: what all 16 masks share is the kept set, exactly."""
    policy = sx.SET(interval=INTERVAL, drop_fraction=ALPHA, end_step=END, drop_by=drop_by)
    update = jax.jit(policy.update)
    kept_by = {"magnitude": oracles.kept_by_magnitude, "sign": oracles.kept_by_sign}[drop_by]

    def new_masks(step, masks, params, grads):
        counts = [mask.sum() for mask in masks.values()]
        counts += [(mask & (params[n] > 0)).sum() for n, mask in masks.items()]
        counts += [(mask & (params[n] < 0)).sum() for n, mask in masks.items()]
        fraction = drop_fraction(step, counts)
        keys = jax.random.split(jax.random.key(step), 16)
        got = [update(key, jnp.int32(step), masks, params, grads) for key in keys]
        for name, mask in masks.items():
            batch = np.stack([new[name] for new in got])
            assert (batch.reshape(16, -1).sum(axis=1) == mask.sum()).all()
            if mask.all():
                continue
            kept, dropped = kept_by(mask, params[name], fraction)
            np.testing.assert_array_equal(batch.all(axis=0), kept, err_msg=f"{name} at {step}")
            if dropped:
                assert (batch != batch[0]).any()
        return {name: np.asarray(mask) for name, mask in got[0].items()}

    run(policy, 1, new_masks)


# --- keys, jit, scores -----------------------------------------------------------------------


def at_start(cls, **options):
    """A policy whose drop fraction at step 0 is one half: 1 + cos(0) is 2."""
    return cls(interval=10, drop_fraction=0.5, end_step=100, begin_step=0, **options)


# Compiled once for all tests on the same shapes.
UPDATES = {
    (cls, options): jax.jit(at_start(cls, **dict(options)).update)
    for cls, options in ((sx.RigL, ()), (sx.SET, ()), (sx.SET, (("drop_by", "sign"),)))
}
TIES = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}


def update(cls, masks, params, scores, key=KEY):
    return UPDATES[cls, ()](key, np.int32(0), masks, params, scores)


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    masks = random_masks(rng)
    return masks, masked(normal(rng), masks), normal(rng)


@pytest.mark.parametrize("cls", [sx.SET, sx.RigL])
def test_jit_equals_eager_and_the_same_key_gives_the_same_masks(cls):
    masks, params, _ = inputs()
    jitted = update(cls, masks, params, TIES)
    jax.tree.map(np.testing.assert_array_equal, jitted, update(cls, masks, params, TIES))
    eager = at_start(cls).update(KEY, 0, masks, params, TIES)
    jax.tree.map(np.testing.assert_array_equal, jitted, eager)


@pytest.mark.parametrize("cls", [sx.SET, sx.RigL])
def test_vmap_over_keys_gives_different_masks(cls):
    """RigL's differ where gradients tie: here they are all 1."""
    trees = [{n: tree[n] for n in ("dense", "bias")} for tree in (*inputs()[:2], TIES)]
    keys = jax.random.split(KEY, 4)
    got = jax.jit(jax.vmap(lambda key: at_start(cls).update(key, 0, *trees)))(keys)
    for a, b in itertools.combinations(np.asarray(got["dense"]), 2):
        assert (a != b).any()
        assert a.sum() == b.sum() == trees[0]["dense"].sum()
    assert got["bias"].all()


@pytest.mark.parametrize("cls", [sx.SET, sx.RigL])
def test_layers_that_look_alike_grow_differently(cls):
    masks, params, _ = inputs()
    for tree in (masks, params):
        tree["twin"] = tree["dense"]
    got = update(cls, masks, params, TIES)
    assert (got["dense"] != got["twin"]).any()


def test_what_scores_and_keys_may_decide():
    masks, params, grads = inputs()
    other = normal(np.random.default_rng(7))
    plain = update(sx.RigL, masks, params, grads)
    # RigL: neither the key, without ties, nor the sign of a gradient.
    flipped = {name: -g for name, g in grads.items()}
    got = update(sx.RigL, masks, params, flipped, key=jax.random.key(9))
    jax.tree.map(np.testing.assert_array_equal, got, plain)
    assert (update(sx.RigL, masks, params, other)["conv"] != plain["conv"]).any()
    # SET: not the gradient.
    jax.tree.map(
        np.testing.assert_array_equal,
        update(sx.SET, masks, params, grads),
        update(sx.SET, masks, params, other),
    )


# --- not finite ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["active weight", "active gradient", "masked gradient"])
@pytest.mark.parametrize("cls", [sx.RigL, sx.SET])
def test_a_layer_that_is_not_finite_keeps_its_mask_and_the_others_move(cls, where, value):
    masks, params, grads = inputs()
    tree = params if where == "active weight" else grads
    position = tuple(np.argwhere(masks["dense"] == where.startswith("active"))[3])
    tree["dense"][position] = value
    got = update(cls, masks, params, grads)
    np.testing.assert_array_equal(got["dense"], masks["dense"])
    # Its twin too, although the two may well be computed together.
    for name in ("conv", "twin", "head"):
        assert (got[name] != masks[name]).any()
        assert got[name].sum() == masks[name].sum()


# --- any weights, any gradients --------------------------------------------------------------

SHAPE = (4, 6)
VALUES = (0.0, -0.0, 1.0, -1.0, 0.5, -2.0, 3e-39, -3e-39, 6e4, -6e4)
EXTREME = (np.inf, -np.inf, np.nan)


@st.composite
def layers(draw):
    dtype = draw(st.sampled_from((np.float32, ml_dtypes.bfloat16)))
    # Half of the examples without inf and NaN, which stop an update.
    values = VALUES + (EXTREME if draw(st.booleans()) else ())
    size = SHAPE[0] * SHAPE[1]

    def array(strategy):
        return np.array(draw(st.lists(strategy, min_size=size, max_size=size)))

    mask = array(st.booleans()).reshape(SHAPE)
    w = array(st.sampled_from(values) | st.floats(-8, 8, width=16))
    score = array(st.sampled_from(values) | st.floats(-8, 8, width=16))
    with np.errstate(over="ignore", under="ignore"):
        w, score = (a.astype(np.float32).astype(dtype).reshape(SHAPE) for a in (w, score))
    return mask, np.where(mask, w, np.zeros((), dtype)), score


@pytest.mark.parametrize(("cls", "options"), UPDATES)
@given(layers(), st.integers(0, 100), st.integers(0, 2**32 - 1))
def test_any_update(cls, options, layer, step, seed):
    mask, w, score = layer
    trees = ({"kernel": a} for a in (mask, w, score))
    new = UPDATES[cls, options](jax.random.key(seed), np.int32(step), *trees)["kernel"]
    assert new.sum() == mask.sum()
    fraction = float(at_start(cls, **dict(options)).drop_fraction_at(jnp.int32(step)))
    if cls is sx.RigL:
        oracles.check_update(mask, new, w, score, fraction)
    elif not options and np.isfinite(oracles.rank_key(score)).all():
        oracles.check_update(mask, new, w, None, fraction)


@pytest.mark.parametrize("cls", [sx.RigL, sx.SET])
@pytest.mark.parametrize("active", [0, 1, 23, 24])
def test_empty_and_nearly_full_layers(cls, active):
    mask = (np.arange(24) < active).reshape(SHAPE)
    w = np.where(mask, np.float32(1), np.float32(0))
    for score in (np.zeros(SHAPE, np.float32), np.ones(SHAPE, np.float32)):
        new = UPDATES[cls, ()](
            KEY, np.int32(0), {"kernel": mask}, {"kernel": w}, {"kernel": score}
        )["kernel"]
        assert new.sum() == active
        if active in (0, 24):
            np.testing.assert_array_equal(new, mask)
