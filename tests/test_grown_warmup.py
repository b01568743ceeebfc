"""Weights that grow under Adam: against a fresh Adam for each weight, and by its constant step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax as sx
from tests.training import random_grads, start

pytestmark = pytest.mark.usefixtures("standard_promotion")

SHAPE = (16, 12)


def updates_of(tx, steps, gradient):
    """The updates and masks of each step, (steps, *SHAPE) each, as numpy arrays."""
    params = {"kernel": jax.random.normal(jax.random.key(0), SHAPE)}
    params, opt_state = start(tx, params)

    def body(carry, i):
        params, opt_state = carry
        grads = gradient(i, params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        mask = sx.get_masks(opt_state)["kernel"]
        return (params, opt_state), (updates["kernel"], mask, grads["kernel"])

    _, record = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(steps)))((params, opt_state))
    return tuple(map(np.asarray, record))


def make_tx(b2, warmup, begin=30, interval=20):
    topology = sx.SET(interval, 0.3, 10_000, begin_step=begin)
    return sx.sparse_training(
        optax.adam(1e-2, b2=b2), distribution=sx.ERK(0.6), topology=topology, grown_warmup=warmup
    )


@pytest.mark.parametrize("b2", [0.95, 0.999])
def test_each_weight_steps_as_in_an_adam_of_its_own(b2):
    """NumPy, in float64: moments and count of each weight begin when it becomes active."""
    tx = make_tx(b2, sx.adam_bias_correction(b2=b2), begin=20, interval=30)
    updates, masks, grads = updates_of(
        tx, 120, lambda i, p: random_grads(jax.random.fold_in(jax.random.key(1), i), p)
    )
    count, mu, nu = np.zeros(SHAPE), np.zeros(SHAPE), np.zeros(SHAPE)
    was_active = masks[0]
    changes = 0
    for update, mask, grad in zip(updates, masks, grads.astype(np.float64), strict=True):
        stays = mask & was_active
        changes += (mask & ~was_active).sum()
        count, mu, nu = (np.where(stays, x, 0) for x in (count, mu, nu))
        count, mu, nu = count + 1, 0.9 * mu + 0.1 * grad, b2 * nu + (1 - b2) * grad**2
        expected = -1e-2 * (mu / (1 - 0.9**count)) / (np.sqrt(nu / (1 - b2**count)) + 1e-8)
        # Where moments nearly cancel, what is left has the rounding of a whole step of 1e-2.
        np.testing.assert_allclose(update[mask], expected[mask], rtol=2e-5, atol=1e-2 * 1e-6)
        was_active = mask
    assert changes > 50


@pytest.mark.parametrize("b2", [0.95, 0.99, 0.999])
def test_no_step_is_longer_than_usual(b2):
    """Under a constant gradient Adam's step is the learning rate; grown after 3,000 steps, too."""

    def longest(warmup):
        updates, masks, _ = updates_of(
            make_tx(b2, warmup, 3_000, 50),
            3_400,
            lambda i, p: jax.tree.map(jnp.ones_like, p),
        )
        assert (masks[0] != masks[-1]).any()
        return np.abs(updates[masks]).max() / 1e-2

    assert longest(sx.adam_bias_correction(b2=b2)) < 1.1
    if b2 == 0.999:  # The cold start that it cures.
        assert longest(None) > 6


def test_a_ramp_by_hand():
    """SGD with gradient 1 and rate 1: a weight's a-th update since it grew is min(a / 4, 1)."""
    tx = sx.sparse_training(
        optax.sgd(1.0),
        distribution=sx.ERK(0.6),
        topology=sx.SET(3, 0.3, 100, begin_step=5),
        grown_warmup=4,
    )
    updates, masks, _ = updates_of(tx, 30, lambda i, p: jax.tree.map(jnp.ones_like, p))
    age = np.full(SHAPE, 100)  # Initial weights are not ramped.
    grown = ~masks[0]
    for i, (update, mask) in enumerate(zip(updates, masks, strict=True)):
        if i:
            grown = mask & ~masks[i - 1]
            age = np.where(grown, 1, age + 1)
        np.testing.assert_allclose(update[mask], -np.minimum(age / 4, 1)[mask], rtol=1e-6)
    assert (age < 30).any()


def test_a_function_of_age_and_step():
    """It sees how many updates each weight has had, and how many there were."""
    tx = sx.sparse_training(
        optax.sgd(1.0),
        distribution=sx.ERK(0.6),
        topology=sx.SET(3, 0.3, 100),
        grown_warmup=lambda age, step: age + 1000.0 * step,
    )
    updates, masks, _ = updates_of(tx, 5, lambda i, p: jax.tree.map(jnp.ones_like, p))
    assert set(np.unique(-updates[2][masks[2]])) == {1.0}  # Active from the start.
    assert set(np.unique(-updates[4][masks[4]])) == {1.0, 5002.0}


def test_weights_made_active_by_hand():
    tx = make_tx(0.999, 10)
    params, opt_state = start(tx, {"kernel": jnp.ones(SHAPE)})
    for _ in range(3):
        _, opt_state = tx.update(params, opt_state, params)
    mask = sx.get_masks(opt_state)["kernel"]
    opt_state = sx.set_masks(opt_state, {"kernel": jnp.ones(SHAPE, bool)})
    updates, _ = tx.update({"kernel": jnp.ones(SHAPE)}, opt_state, params)
    # Adam's step at count 4 with moments that begin, times 1 / 10.
    first = 1e-2 * (0.1 / (1 - 0.9**4)) / np.sqrt(0.001 / (1 - 0.999**4)) / 10
    np.testing.assert_allclose(-updates["kernel"][~mask], first, rtol=1e-4)


def test_bad_arguments():
    with pytest.raises(TypeError, match="grown_warmup must be a number of steps"):
        make_tx(0.9, "ramp")
    with pytest.raises(ValueError, match="grown_warmup must be at least 1, got 0"):
        make_tx(0.9, 0)
    with pytest.raises(ValueError, match="b2 must lie in"):
        sx.adam_bias_correction(b2=1.0)
    # 1 - 0.999**a reaches 1 / 1.21 at a = 1,750.3; 63 updates of 27 steps are 1,701.
    with pytest.raises(ValueError, match="1701 steps: the interval must be at least 28"):
        make_tx(0.999, sx.adam_bias_correction(), interval=27)
    with pytest.raises(ValueError, match="the interval must be at least 16"):
        make_tx(0.999, 1_000, interval=10)
    make_tx(0.999, sx.adam_bias_correction(), interval=28)
