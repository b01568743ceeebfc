"""Layers that the optimizer does not move, or that no gradient reaches, keep their weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax as sx
from sparseopt_jax.frozen import frozen_leaves
from tests.training import random_grads, start, step_fn

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {
    "frozen": {"kernel": jax.random.normal(jax.random.key(0), (16, 8)), "bias": jnp.ones(8)},
    "free": {"kernel": jax.random.normal(jax.random.key(1), (8, 12))},
}
FROZEN = {"frozen": True, "free": False}
KERNEL_ONLY = {"frozen": {"kernel": True, "bias": False}, "free": {"kernel": False}}


def partition():
    return optax.partition(
        {"still": optax.set_to_zero(), "moving": optax.sgd(0.1, 0.9)},
        {"frozen": "still", "free": "moving"},
    )


FREEZING = {
    "partition": partition,
    "masked, last": lambda: optax.chain(
        optax.adam(1e-2), optax.masked(optax.set_to_zero(), FROZEN)
    ),
    "masked, first": lambda: optax.chain(
        optax.masked(optax.set_to_zero(), FROZEN), optax.adam(1e-2)
    ),
    "freeze": lambda: optax.chain(optax.adam(1e-2), optax.freeze(FROZEN)),
    "freeze a kernel": lambda: optax.chain(optax.adam(1e-2), optax.freeze(KERNEL_ONLY)),
    "selective_transform": lambda: optax.selective_transform(
        optax.adam(1e-2), freeze_mask=KERNEL_ONLY
    ),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), partition()),
    "apply_if_finite": lambda: optax.apply_if_finite(partition(), 3),
    "MultiSteps": lambda: optax.MultiSteps(partition(), 2).gradient_transformation(),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda rate: optax.chain(optax.freeze(FROZEN), optax.adam(rate))
    )(1e-2),
    "sparseopt": lambda: optax.chain(
        sx.sparseopt(0.1, weight_decay=0.0), optax.freeze(FROZEN), optax.scale(0.5)
    ),
}
MOVING = {
    "adam": lambda: optax.adam(1e-2),
    "masked passes the rest on": lambda: optax.chain(
        optax.masked(optax.trace(0.9), FROZEN), optax.scale(-0.1)
    ),
    "global norm": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "sign": lambda: optax.sign_sgd(0.1),
    "muon": lambda: optax.contrib.muon(0.02),
    "MultiSteps": lambda: optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
}


def frozen_by(inner):
    tx = optax.with_extra_args_support(inner)
    state = tx.init(PARAMS)
    extra = {"masks": jax.tree.map(lambda p: jnp.ones(p.shape, bool), PARAMS)}
    return frozen_leaves(lambda g: tx.update(g, state, PARAMS, **extra)[0], PARAMS)


@pytest.mark.parametrize("name", FREEZING)
def test_what_an_optimizer_freezes_is_found(name):
    expected = {"frozen/kernel", "frozen/bias"}
    if "kernel" in name or "selective" in name:
        expected = {"frozen/kernel"}
    assert frozen_by(FREEZING[name]()) == expected


@pytest.mark.parametrize("name", MOVING)
def test_what_moves_is_not_taken_for_frozen(name):
    assert frozen_by(MOVING[name]()) == set()


def run(tx, grads_of, steps=5):
    params, opt_state = start(tx, PARAMS)
    first = params, sx.get_masks(opt_state)
    step = step_fn(tx)
    for i in range(steps):
        params, opt_state = step(params, opt_state, grads_of(i))
    return first, (params, sx.get_masks(opt_state))


def check(first, last):
    """The frozen kernel has its weights and its mask; the masks of the other one moved."""
    (params, masks), (new_params, new_masks) = first, last
    for old, new in ((params, new_params), (masks, new_masks)):
        np.testing.assert_array_equal(old["frozen"]["kernel"], new["frozen"]["kernel"])
    assert (masks["free"]["kernel"] != new_masks["free"]["kernel"]).any()


@pytest.mark.parametrize(
    "topology", [sx.SET(1, 0.3, 100), sx.RigL(1, 0.3, 100)], ids=["set", "rigl"]
)
@pytest.mark.parametrize("name", ["partition", "masked, first"])
def test_frozen_layers_keep_their_weights(name, topology):
    distribution = sx.Uniform(0.5, dense_first=False)
    tx = sx.sparse_training(FREEZING[name](), distribution=distribution, topology=topology)
    check(*run(tx, lambda i: random_grads(jax.random.key(i), PARAMS)))
    # By hand as well.
    params, opt_state = start(tx, PARAMS)
    _, after = sx.update_topology(tx, opt_state, params, PARAMS)
    old, new = (sx.get_masks(state)["frozen"]["kernel"] for state in (opt_state, after))
    np.testing.assert_array_equal(old, new)


def test_an_update_by_hand_of_an_optimizer_that_asks_for_more():
    """Polyak's step needs the loss, which no topology update has."""
    tx = sx.sparse_training(
        optax.polyak_sgd(), distribution=sx.ERK(0.5), topology=sx.SET(1, 0.3, 100)
    )
    params, opt_state = start(tx, PARAMS)
    _, after = sx.update_topology(tx, opt_state, params, PARAMS)
    old, new = (sx.get_masks(state)["free"]["kernel"] for state in (opt_state, after))
    assert (old != new).any()
    with pytest.raises(TypeError, match="value"):
        tx.update(PARAMS, opt_state, params)


@pytest.mark.parametrize(
    "topology",
    [sx.SET(1, 0.3, 100), sx.RigL(1, 0.3, 100), sx.RigL(2, 0.3, 100, accumulate_steps=2)],
    ids=["set", "rigl", "accumulating"],
)
def test_layers_that_no_gradient_reaches_keep_their_weights(topology):
    """``stop_gradient`` around a layer: its gradient is 0 everywhere."""

    def grads_of(i):
        grads = random_grads(jax.random.key(i), PARAMS)
        return grads | {"frozen": jax.tree.map(jnp.zeros_like, grads["frozen"])}

    distribution = sx.Uniform(0.5, dense_first=False)
    tx = sx.sparse_training(optax.sgd(0.1, 0.9), distribution=distribution, topology=topology)
    check(*run(tx, grads_of))


def test_one_gradient_that_is_not_zero_is_enough():
    topology = sx.RigL(1, 0.3, 100)
    masks = {"kernel": jnp.asarray(np.arange(64).reshape(8, 8) % 2 == 0)}
    params = {"kernel": jnp.where(masks["kernel"], 1.0, 0.0)}
    grads = {"kernel": jnp.zeros((8, 8)).at[0, 1].set(1e-30)}
    after = topology.update(jax.random.key(0), 1, masks, params, grads)
    assert after["kernel"][0, 1]
    assert (after["kernel"] != masks["kernel"]).any()
