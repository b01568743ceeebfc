"""Inside ``jax.shard_map`` with its default checks: one model a device, and one for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import sparseopt_jax as sx

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {"kernel": jax.random.normal(jax.random.key(0), (12, 8)), "bias": jnp.ones(8)}
TWO = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p + 0.1]), PARAMS)
TOPOLOGIES = {
    "rigl": sx.RigL(1, 0.3, 100),
    "accumulating": sx.RigL(2, 0.3, 100, accumulate_steps=2),
    "set": sx.SET(1, 0.3, 100),
}


def mapped(function, in_specs, out_specs):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def each(function):
    """``function`` on each device, of its part of the leading axis."""
    own = PartitionSpec("x")

    def one(*args):
        result = function(*jax.tree.map(lambda a: a[0], args))
        return jax.tree.map(lambda a: a[None], result)

    return mapped(one, own, own)


def make_tx(topology):
    return sx.sparse_training(sx.sparseopt(0.1), distribution=sx.ERK(0.5), topology=topology)


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_one_agent_a_device(topology):
    """Each with its own ``init``; the masks are those of the same agents alone."""
    tx = make_tx(topology)

    def agent(params):
        opt_state = tx.init(params)
        params = sx.apply_masks(params, sx.get_masks(opt_state))
        for _ in range(3):
            grads = jax.tree.map(jnp.sin, params)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        return params, sx.get_masks(opt_state)["kernel"], opt_state.inner_state

    params, masks, _ = each(agent)(TWO)
    for i in range(2):
        alone, mask, _ = jax.jit(agent)(jax.tree.map(lambda p, i=i: p[i], TWO))
        np.testing.assert_array_equal(masks[i], mask)
        np.testing.assert_allclose(params["kernel"][i], alone["kernel"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_one_model_on_all_devices(topology):
    """Parameters are replicated and gradients averaged, so the state does not vary either."""
    tx, same = make_tx(topology), PartitionSpec()

    def step(params, opt_state, grads):
        grads = jax.lax.pmean(jax.tree.map(lambda g: g[0], grads), "x")
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    together = mapped(step, (same, same, PartitionSpec("x")), same)
    state = alone = PARAMS, tx.init(PARAMS)
    mean = jax.tree.map(lambda g: jnp.mean(g, 0), TWO)
    for _ in range(3):
        state = together(*state, TWO)
        updates, opt_state = jax.jit(tx.update)(mean, alone[1], alone[0])
        alone = optax.apply_updates(alone[0], updates), opt_state
    masks, expected = sx.get_masks(state[1]), sx.get_masks(alone[1])
    jax.tree.map(np.testing.assert_array_equal, masks, expected)


def test_selection():
    scores = jnp.asarray(np.random.default_rng(0).integers(0, 4, (2, 5, 6)).astype(np.float32))
    keys = jax.random.split(jax.random.key(0), 2)

    def select(scores, key):
        return (
            sx.top_k_mask(scores, 7),
            sx.top_k_mask(scores, 7, key=key),
            sx.top_k_mask(scores, 7, key=jax.random.key(1)),
            sx.random_mask(key, (4, 4), 5),
            sx.init_masks(key, {"kernel": scores}, sx.ERK(0.5))["kernel"],
        )

    for i, masks in enumerate(zip(*each(select)(scores, keys), strict=True)):
        for mask, expected in zip(masks, select(scores[i], keys[i]), strict=True):
            np.testing.assert_array_equal(mask, expected)


def test_sharpness():
    """The largest eigenvalue of diag(scales), another on each device."""
    scales = jnp.array([[1.0, 3.0, -7.0], [2.0, 5.0, 4.0]])

    def sharpness(scales, weights):
        loss = lambda w: 0.5 * jnp.sum(scales * w**2)  # noqa: E731
        return sx.hessian_top_eigenvalue(loss, weights, jax.random.key(0)).eigenvalue

    found = each(sharpness)(scales, jnp.ones((2, 3)))
    np.testing.assert_allclose(found, [3.0, 5.0], rtol=1e-5)
