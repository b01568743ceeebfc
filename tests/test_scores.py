"""SNIP, GraSP and SynFlow against NumPy: gates moved by hand, gradients written out, all paths."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt_jax as sx
from tests.helpers import flat

RNG = np.random.default_rng(0)
PARAMS = {
    "a": {"kernel": RNG.normal(size=(3, 4)), "bias": RNG.normal(size=4)},
    "b": {"kernel": RNG.normal(size=(4, 2)), "bias": RNG.normal(size=2)},
}
X, Y = RNG.normal(size=(5, 3)), RNG.normal(size=(5, 2))


def loss(params, x, y):
    """Works in NumPy's float64 as in JAX's float32: of arrays it uses what both have."""
    np_ = jnp if isinstance(x, jax.Array) else np
    hidden = np_.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    out = hidden @ params["b"]["kernel"] + params["b"]["bias"][None]
    return ((out - y) ** 2).sum() / len(x)


def gradient(params, x, y):
    """Of ``loss``, by hand."""
    hidden = np.tanh(x @ params["a"]["kernel"] + params["a"]["bias"])
    out = hidden @ params["b"]["kernel"] + params["b"]["bias"]
    d_out = 2 * (out - y) / len(x)
    d_hidden = (d_out @ params["b"]["kernel"].T) * (1 - hidden**2)
    return {
        "a": {"kernel": x.T @ d_hidden, "bias": d_hidden.sum(0)},
        "b": {"kernel": hidden.T @ d_out, "bias": d_out.sum(0)},
    }


def gate_derivatives(function, params, size=1e-5):
    """Of ``function`` by a gate of each weight, by central differences in float64."""
    found = {}
    for path, weight in flat(params).items():
        found[path] = np.zeros(weight.shape)
        for index in np.ndindex(weight.shape):
            values = []
            for gate in (1 + size, 1 - size):
                moved = jax.tree.map(np.copy, params)
                flat(moved)[path][index] *= gate
                values.append(function(moved))
            found[path][index] = (values[0] - values[1]) / (2 * size)
    return found


def in_jax(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


def test_snip_is_the_loss_by_the_gates():
    expected = gate_derivatives(lambda p: loss(p, X, Y), PARAMS)
    scores = jax.jit(lambda p, x, y: sx.snip_scores(loss, p, x, y))(*in_jax((PARAMS, X, Y)))
    for path, score in flat(scores).items():
        np.testing.assert_allclose(score, np.abs(expected[path]), rtol=1e-4, atol=1e-5)


def test_grasp_is_half_the_squared_gradient_norm_by_the_gates():
    def half_square(params):
        return sum((g**2).sum() for g in flat(gradient(params, X, Y)).values()) / 2

    expected = gate_derivatives(half_square, PARAMS)
    scores = jax.jit(lambda p, x, y: sx.grasp_scores(loss, p, x, y))(*in_jax((PARAMS, X, Y)))
    assert any((score < 0).any() for score in flat(scores).values())
    for path, score in flat(scores).items():
        np.testing.assert_allclose(score, expected[path], rtol=1e-4, atol=1e-4)
    # What GraSP keeps keeps more of the gradient than what it would remove first.
    masks = sx.masks_from_scores(scores, sx.Global(0.5))
    kept, removed = (
        half_square(jax.tree.map(np.where, m, PARAMS, jax.tree.map(np.zeros_like, PARAMS)))
        for m in (masks, jax.tree.map(lambda m: ~m if m.ndim == 2 else m, masks))
    )
    assert kept > removed


def test_synflow_adds_up_all_paths():
    """Three layers without biases: the magnitudes multiplied along each of 3 * 4 * 3 * 2 paths."""
    shapes = {"a": (3, 4), "b": (4, 3), "c": (3, 2)}
    params = {name: {"kernel": RNG.normal(size=shape)} for name, shape in shapes.items()}

    def apply(params, x):
        for name in "ab":
            x = jax.nn.relu(x @ params[name]["kernel"])
        return {"logits": x @ params["c"]["kernel"]}

    expected = {name: np.zeros(shape) for name, shape in shapes.items()}
    for i, j, k, out in itertools.product(range(3), range(4), range(3), range(2)):
        steps = {"a": (i, j), "b": (j, k), "c": (k, out)}
        product = np.prod([abs(params[name]["kernel"][at]) for name, at in steps.items()])
        for name, at in steps.items():
            expected[name][at] += product
    scores = jax.jit(lambda p, x: sx.synflow_scores(apply, p, x))(in_jax(params), jnp.ones((1, 3)))
    for name in shapes:
        np.testing.assert_allclose(scores[name]["kernel"], expected[name], rtol=1e-5)
    # 0.1 of an input of ones: a tenth of each score, where there are no biases.
    smaller = sx.synflow_scores(apply, in_jax(params), jnp.full((1, 3), 0.1))
    np.testing.assert_allclose(10 * smaller["b"]["kernel"], expected["b"], rtol=1e-5)


def test_rounds_of_synflow_spare_a_wide_layer_that_one_round_empties():
    """Layer collapse (Tanaka et al.): between narrow layers a wide one scores low."""
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = {"a": (4, 6), "b": (6, 200), "c": (200, 2)}
    params = {
        name: {"kernel": jax.random.normal(key, shape)}
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }

    def apply(params, x):
        for name in "abc":
            x = x @ params[name]["kernel"]
        return x

    def prune(rounds, density=0.01):
        kept = params
        for t in range(1, rounds + 1):
            scores = sx.synflow_scores(apply, kept, jnp.ones((1, 4)))
            masks = sx.masks_from_scores(scores, sx.Global(1 - density ** (t / rounds)))
            kept = sx.apply_masks(kept, masks)
        return {name: int((kept[name]["kernel"] != 0).sum()) for name in shapes}

    once, often = prune(1), prune(6)
    assert sum(once.values()) == sum(often.values()) == round(0.01 * (24 + 1200 + 400))
    assert min(often.values()) > min(once.values())


def test_what_is_not_floating_is_passed_on():
    params = {"kernel": jnp.array([[2.0, -3.0]]), "steps": jnp.array(3), "hidden": None}

    def scaled(params):
        return params["steps"] * jnp.sum(params["kernel"] ** 2)

    with jax.numpy_dtype_promotion("standard"):
        scores = sx.snip_scores(scaled, params)
        assert sx.grasp_scores(scaled, params)["steps"] == 0
        assert sx.synflow_scores(scaled, params)["kernel"].tolist() == [[24.0, 54.0]]
    assert scores["steps"] == 0
    assert scores["hidden"] is None
    assert scores["kernel"].tolist() == [[24.0, 54.0]]
    masks = sx.masks_from_scores(scores, sx.ERK(0.5))
    assert masks["kernel"].tolist() == [[False, True]]
    assert masks["steps"]
    sx.check_masks(masks, params)


def test_boxes_reach_the_loss_and_come_back():
    params = {"kernel": nn.LogicallyPartitioned(jnp.array([[2.0, -3.0]]), ("in", "out"))}
    scores = sx.snip_scores(lambda p: jnp.sum(p["kernel"].value ** 2), params)
    assert isinstance(scores["kernel"], nn.LogicallyPartitioned)
    assert scores["kernel"].value.tolist() == [[8.0, 18.0]]


@pytest.mark.parametrize("scores", [sx.snip_scores, sx.grasp_scores])
@pytest.mark.parametrize("value", [jnp.ones(3), jnp.array(1), 1.0, None])
def test_a_loss_that_is_no_scalar(scores, value):
    with pytest.raises(ValueError, match="loss must return one floating scalar"):
        scores(lambda params: value, {"kernel": jnp.ones((2, 2))})


@pytest.mark.parametrize("value", [jnp.array([1, 2]), {}, None])
def test_outputs_that_are_not_floating(value):
    with pytest.raises(ValueError, match="apply must return floating arrays"):
        sx.synflow_scores(lambda params: value, {"kernel": jnp.ones((2, 2))})
