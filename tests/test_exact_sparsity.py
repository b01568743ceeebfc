"""Exact counts and exact zeros after every step, whatever the gradients and dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparseopt_jax as sx
from tests.helpers import make_params
from tests.training import RIGL, SET, check_zeros, make_tx, random_grads, step_fn

pytestmark = pytest.mark.usefixtures("standard_promotion")

GRADIENTS = ("normal", "zeros", "ties", "inf", "nan", "huge", "layer_nan")


def awkward_gradients(kind, key, params):
    """Gradients of one of the kinds in ``GRADIENTS``; ``kind`` is a traced index."""

    def leaf(i, p):
        k = jax.random.fold_in(key, i)
        normal = jax.random.normal(k, p.shape)
        at = jax.random.bernoulli(jax.random.fold_in(k, 1), 0.1, p.shape)
        broken = jnp.where(at, jnp.nan, normal)
        return jnp.select(
            [jnp.full(p.shape, kind == n) for n in range(len(GRADIENTS))],
            [
                normal,
                jnp.zeros(p.shape),
                jnp.sign(normal),
                jnp.where(at, jnp.inf, normal),
                broken,
                normal * 3e38,
                broken if i == 0 else normal,
            ],
        ).astype(p.dtype)

    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, [leaf(i, p) for i, p in enumerate(leaves)])


@functools.cache
def thousand_steps(name):
    topology = {
        "static": sx.Static(),
        "set": SET,
        "set_by_sign": sx.SET(interval=3, drop_fraction=0.4, end_step=1_000, drop_by="sign"),
        "rigl": RIGL,
        "rigl_skip": sx.RigL(interval=3, drop_fraction=0.4, end_step=1_000, skip_step=True),
        "rigl_accumulated": sx.RigL(
            interval=3, drop_fraction=0.4, end_step=1_000, accumulate_steps=2
        ),
    }[name]
    tx = make_tx(sx.sparseopt(0.05, weight_decay=1e-3), topology)

    @jax.jit
    def simulate(key, kinds):
        params = jax.tree.map(jnp.asarray, make_params())
        opt_state = tx.init(params)
        params = sx.apply_masks(params, sx.get_masks(opt_state))
        expected = jax.tree.map(jnp.sum, sx.get_masks(opt_state))

        def body(carry, inputs):
            params, opt_state = carry
            kind, key = inputs
            before = sx.get_masks(opt_state)
            grads = awkward_gradients(kind, key, params)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            good = jax.tree.map(
                lambda p, m, n: (jnp.sum(m) == n) & jnp.all(jnp.where(m, True, p == 0)),
                params,
                sx.get_masks(opt_state),
                expected,
            )
            changed = jax.tree.map(lambda a, b: jnp.any(a != b), before, sx.get_masks(opt_state))
            moved = jnp.any(jnp.stack(jax.tree.leaves(changed)))
            ok = jnp.all(jnp.stack(jax.tree.leaves(good)))
            # A weight or slot that a gradient made NaN or infinite would freeze its layer for the
            # rest of the run, so the loop repairs the active ones, as a restart would.
            heal = functools.partial(
                jax.tree.map,
                lambda x: (
                    jnp.where(jnp.isfinite(x), x, 0.25).astype(x.dtype)
                    if jnp.issubdtype(x.dtype, jnp.floating)
                    else x
                ),
            )
            params = jax.tree.map(
                lambda p, m: jnp.where(m, heal(p), p), params, sx.get_masks(opt_state)
            )
            opt_state = opt_state._replace(inner_state=heal(opt_state.inner_state))
            return (params, opt_state), (ok, moved)

        keys = jax.random.split(key, len(kinds))
        _, (ok, moved) = jax.lax.scan(body, (params, opt_state), (kinds, keys))
        return ok, moved

    return simulate


@pytest.mark.parametrize(
    "name", ["static", "set", "set_by_sign", "rigl", "rigl_skip", "rigl_accumulated"]
)
@settings(max_examples=3)
@given(data=st.data())
def test_exact_counts_and_zeros_after_each_of_a_thousand_steps(name, data):
    pattern = data.draw(st.lists(st.integers(0, len(GRADIENTS) - 1), min_size=1, max_size=12))
    kinds = np.resize(np.array([*pattern, 0], np.int32), 1_000)
    seed = data.draw(st.integers(0, 2**31 - 1))
    ok, moved = thousand_steps(name)(jax.random.key(seed), kinds)
    assert np.asarray(ok).all(), f"first violation at step {int(np.argmin(ok))}"
    # Updates fall on every third step; one with finite gradients moves something.
    finite = [t for t in range(3, 999, 3) if kinds[t] == kinds[t - 1] == GRADIENTS.index("normal")]
    if name == "static" or finite:
        assert np.asarray(moved).any() == (name != "static")


def test_a_forgotten_apply_masks_heals_on_the_first_step():
    params = make_params()
    tx = make_tx(topology=sx.Static())
    opt_state = tx.init(params)
    params, opt_state = step_fn(tx)(params, opt_state, random_grads(jax.random.key(0), params))
    check_zeros(params, opt_state)


@pytest.mark.parametrize(
    ("weights", "updates"),
    [
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
    ],
)
def test_masked_weights_are_exactly_zero_in_low_precision(weights, updates):
    cast = optax.stateless(lambda u, p: jax.tree.map(lambda x: x.astype(updates), u))
    params = jax.tree.map(lambda p: p * np.float32(1.2345), make_params())
    params = jax.tree.map(lambda p: jnp.asarray(p, weights), params)
    tx = make_tx(optax.chain(optax.sgd(0.1), cast))
    opt_state = tx.init(params)  # The masks are not applied: every -w must be exact.
    step = step_fn(tx)
    for i in range(7):
        params, opt_state = step(params, opt_state, random_grads(jax.random.key(i), params))
    assert {p.dtype.name for p in jax.tree.leaves(params)} == {weights}
    check_zeros(params, opt_state)
