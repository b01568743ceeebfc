"""Every hyperparameter of every recipe under ``optax.inject_hyperparams``."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax as sx

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {"kernel": jax.random.normal(jax.random.key(0), (6, 4)), "bias": jnp.ones(4)}
MASKS = {"kernel": PARAMS["kernel"] > -0.5, "bias": jnp.ones(4, bool)}

# A value for each hyperparameter that is not the default, so that one that gets lost is seen.
RECIPES = {
    "sparseopt": (sx.sparseopt, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    "sparseopt_ham": (
        sx.sparseopt_ham,
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "alpha": 3.0, "beta": 0.5},
    ),
    "sparseopt_adamw": (
        sx.sparseopt_adamw,
        {
            "b1": 0.8,
            "b2": 0.9,
            "eps": 1e-3,
            "eps_root": 1e-3,
            "weight_decay": 0.1,
            "nesterov": True,
        },
    ),
    "sparseopt_lion": (sx.sparseopt_lion, {"b1": 0.7, "b2": 0.8, "weight_decay": 0.1}),
    "sparseopt_muon": (
        sx.sparseopt_muon,
        {
            "ns_steps": 3,
            "beta": 0.8,
            "eps": 1e-3,
            "weight_decay": 0.1,
            "nesterov": False,
            "adam_b1": 0.8,
            "adam_b2": 0.9,
            "adam_eps_root": 1e-3,
            "adam_weight_decay": 0.1,
            "adam_learning_rate": 0.05,
            "consistent_rms": 0.3,
        },
    ),
}
# Not numbers: what they say is part of the program.
STATIC = {
    "mask", "average_over", "out_axes", "layers", "batch_axes", "mu_dtype", "weight_decay_mask",
    "ns_coeffs", "adaptive", "preconditioning", "muon_weight_dimension_numbers",
}  # fmt: skip


def three_steps(tx):
    def run(params):
        opt_state = tx.init(params)
        for i in range(3):
            grads = jax.tree.map(lambda p, i=i: jnp.cos(p * (i + 1)), params)
            updates, opt_state = tx.update(grads, opt_state, params, masks=MASKS)
            params = optax.apply_updates(params, updates)
        return params

    return jax.jit(run)(PARAMS)


@pytest.mark.parametrize("name", RECIPES)
def test_injected_it_is_the_recipe_itself(name):
    """With nothing static, and none of the arguments given but these numbers."""
    recipe, numbers = RECIPES[name]
    parameters = set(inspect.signature(recipe).parameters)
    assert parameters == {"learning_rate", *numbers} | (STATIC & parameters)
    injected = optax.inject_hyperparams(recipe)(learning_rate=0.1, **numbers)
    of_state = {k for k, v in numbers.items() if not isinstance(v, bool)} | {"learning_rate"}
    assert of_state <= set(injected.init(PARAMS).hyperparams)
    got, expected = three_steps(injected), three_steps(recipe(0.1, **numbers))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, expected)


@pytest.mark.parametrize("name", RECIPES)
def test_each_number_can_be_changed_in_the_state(name):
    """As a schedule, too: one that gives the number is the number."""
    recipe, numbers = RECIPES[name]
    scheduled = {
        k: optax.constant_schedule(v) if isinstance(v, float) else v for k, v in numbers.items()
    }
    tx = optax.inject_hyperparams(recipe)(learning_rate=lambda step: 0.1, **scheduled)
    got, expected = three_steps(tx), three_steps(recipe(0.1, **numbers))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, expected)


def test_weight_decay_by_hand():
    """Zero gradients, rate 0.1, decay 0.1: -0.01 w for the kernel, nothing for the bias."""
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    tx = optax.inject_hyperparams(sx.sparseopt)(learning_rate=0.1, weight_decay=0.1)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS, masks=MASKS)
    np.testing.assert_allclose(updates["kernel"], -0.01 * PARAMS["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_around_and_inside_of_sparse_training():
    def make(rate, drop):
        return sx.sparse_training(
            optax.inject_hyperparams(sx.sparseopt)(rate, weight_decay=0.1),
            distribution=sx.ERK(0.5),
            topology=sx.SET(2, drop, 100),
        )

    tx = optax.inject_hyperparams(make, static_args="drop")(rate=0.1, drop=0.3)
    plain = sx.sparse_training(
        sx.sparseopt(0.1, weight_decay=0.1), distribution=sx.ERK(0.5), topology=sx.SET(2, 0.3, 100)
    )
    ends = []
    for one in (tx, plain):
        params, opt_state = PARAMS, one.init(PARAMS)
        for _ in range(3):
            updates, opt_state = jax.jit(one.update)(params, opt_state, params)
            params = optax.apply_updates(params, updates)
        ends.append((params, sx.get_masks(opt_state)))
    (params, masks), (expected, same_masks) = ends
    jax.tree.map(np.testing.assert_array_equal, masks, same_masks)
    np.testing.assert_allclose(params["kernel"], expected["kernel"], rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)}, "'mask'"),
        ({"layers": lambda path: True}, "'layers'"),
        ({"out_axes": -1}, "static_args"),
    ],
    ids=["mask", "layers", "out_axes"],
)
def test_what_is_not_a_number_says_what_to_write(arguments, message):
    tx = optax.inject_hyperparams(sx.sparseopt)(0.1, weight_decay=0.1, **arguments)
    with pytest.raises(TypeError, match=message):
        jax.jit(tx.init)(PARAMS)
    (name,) = arguments
    tx = optax.inject_hyperparams(sx.sparseopt, static_args=name)(
        0.1, weight_decay=0.1, **arguments
    )
    expected = three_steps(sx.sparseopt(0.1, weight_decay=0.1, **arguments))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), three_steps(tx), expected
    )
