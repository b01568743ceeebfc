"""The chain links, alone and against ``sparse_training``, which is composed of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax as sx
from tests.helpers import make_params, random_masks
from tests.training import random_grads

pytestmark = pytest.mark.usefixtures("standard_promotion")


def kernels(params):
    return jax.tree.map(lambda p: p.ndim >= 2, params)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_chain_equals_static_sparse_training_bit_for_bit(nesterov):
    params = jax.tree.map(jnp.asarray, make_params())
    masks = random_masks(params)
    chain = optax.chain(
        sx.zero_inactive(),
        sx.scale_by_sparseopt(),
        optax.add_decayed_weights(1e-2, kernels),
        optax.sgd(0.1, 0.9, nesterov),
        sx.keep_params_masked(),
    )
    whole = sx.sparse_training(
        sx.sparseopt(0.1, 0.9, nesterov, 1e-2), masks=masks, topology=sx.Static()
    )
    runs = {}
    for name, tx, extra in (("chain", chain, {"masks": masks}), ("whole", whole, {})):
        # From dense parameters: both come to the masks on the first step.
        p, opt_state = params, tx.init(params)

        @jax.jit
        def step(p, opt_state, grads, tx=tx, extra=extra):
            updates, opt_state = tx.update(grads, opt_state, p, **extra)
            return optax.apply_updates(p, updates), opt_state

        p = sx.apply_masks(p, masks)
        for i in range(5):
            p, opt_state = step(p, opt_state, random_grads(jax.random.key(i), params))
        runs[name] = p
    jax.tree.map(np.testing.assert_array_equal, *runs.values())


def test_each_link_by_hand():
    masks = {"w": jnp.array([[True, False, False]])}
    params = {"w": jnp.array([[1.0, 2.0, -0.0]])}
    grads = {"w": jnp.array([[3.0, jnp.nan, jnp.inf]])}
    zero, keep = sx.zero_inactive(), sx.keep_params_masked()
    updates, _ = zero.update(grads, zero.init(params), params, masks=masks)
    assert updates["w"].tolist() == [[3.0, 0.0, 0.0]]
    updates, _ = keep.update(grads, keep.init(params), params, masks=masks)
    assert updates["w"].tolist() == [[3.0, -2.0, 0.0]]
    assert optax.apply_updates(params, updates)["w"].tolist() == [[4.0, 0.0, 0.0]]


def test_half_precision_updates_hold_the_whole_weight():
    """bfloat16 updates of float32 weights come out in float32, so that w + (-w) is 0."""
    params = {"w": jnp.array([1.0000001, 2.0])}
    masks = {"w": jnp.array([False, True])}
    keep = sx.keep_params_masked()
    half = {"w": jnp.array([0.5, 0.5], jnp.bfloat16)}
    updates, _ = keep.update(half, keep.init(params), params, masks=masks)
    assert updates["w"].dtype == jnp.float32
    assert optax.apply_updates(params, updates)["w"].tolist() == [0.0, 2.5]


def test_what_optax_masked_hides_passes():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    masks = {"a": jnp.array([True, False]), "b": jnp.array([True, False])}
    for link, second in ((sx.zero_inactive(), 0.0), (sx.keep_params_masked(), -1.0)):
        tx = optax.masked(link, {"a": True, "b": False})
        updates, _ = tx.update(params, tx.init(params), params, masks=masks)
        assert updates["a"].tolist() == [1.0, second]
        assert updates["b"].tolist() == [1.0, 1.0]


def test_bad_calls():
    params = {"w": jnp.ones(2)}
    for link in (sx.zero_inactive(), sx.keep_params_masked()):
        with pytest.raises(sx.MissingMasksError, match="masks is missing"):
            link.update(params, link.init(params), params)
        with pytest.raises(TypeError, match="'w' must be a bool array"):
            link.update(params, link.init(params), params, masks=params)
    with pytest.raises(ValueError, match="params is missing: keep_params_masked needs"):
        sx.keep_params_masked().update(params, optax.EmptyState(), masks=params)
