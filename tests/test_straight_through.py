"""straight_through: a sparse forward pass and a dense gradient, against both written out."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sparseopt_jax as sx
from tests.helpers import flat, make_params, random_masks

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 8)).astype(np.float32)
Y = RNG.normal(size=(6, 3)).astype(np.float32)
W1 = RNG.normal(size=(8, 4)).astype(np.float32)
W2 = RNG.normal(size=(4, 3)).astype(np.float32)


def two_of_four(w):
    """2:4 along the incoming axis, by hand: the two largest magnitudes of each four."""
    groups = jnp.abs(w).T.reshape(w.shape[1], -1, 4)
    rank = jnp.argsort(jnp.argsort(-groups, axis=-1), axis=-1)
    return (rank < 2).reshape(w.T.shape).T


def loss(params, x=X, y=Y):
    hidden = jnp.tanh(x @ params["a"])
    return jnp.sum((hidden @ params["b"] - y) ** 2)


@pytest.mark.parametrize("decay", [0.0, 0.25])
def test_sr_ste_against_the_chain_rule_by_hand(decay):
    """Masks are made within the loss, as Zhou et al. do it; gradients by NumPy, of all weights."""

    @jax.jit
    def value_and_grad(params):
        def of_dense(params):
            masks = {"a": two_of_four(params["a"]), "b": None}
            return loss(sx.straight_through(params, masks, decay))

        return jax.value_and_grad(of_dense)(params)

    value, grads = value_and_grad({"a": jnp.asarray(W1), "b": jnp.asarray(W2)})
    mask = np.zeros(W1.shape, bool)
    for column, start in np.ndindex(4, 2):
        best = np.argsort(-np.abs(W1[4 * start : 4 * start + 4, column]))[:2]
        mask[4 * start + best, column] = True
    sparse = np.where(mask, W1, 0).astype(np.float64)
    hidden = np.tanh(X @ sparse)
    error = hidden @ W2 - Y
    expected = X.T @ (2 * error @ W2.T * (1 - hidden**2)) + decay * np.where(mask, 0, W1)
    np.testing.assert_allclose(value, (error**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(grads["a"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["b"], hidden.T @ (2 * error), rtol=1e-4, atol=1e-5)


def test_masks_of_a_structure_are_those_made_by_hand():
    """2:4 forward from ``masks_from_scores`` within the loss, SR-STE's gradient of all weights."""
    half = sx.Uniform(0.5, dense_first=False)

    @functools.partial(jax.jit, static_argnums=1)
    def grad(params, by_hand):
        def of_dense(params):
            masks = {"a": two_of_four(params["a"]), "b": None}
            if not by_hand:
                scores = jax.lax.stop_gradient({"a": jnp.abs(params["a"])})
                masks |= sx.masks_from_scores(scores, half, sx.NM(2, 4))
            return loss(sx.straight_through(params, masks, 0.25))

        return jax.grad(of_dense)(params)

    params = {"a": jnp.asarray(W1), "b": jnp.asarray(W2)}
    jax.tree.map(np.testing.assert_array_equal, grad(params, False), grad(params, True))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_forward_is_apply_masks_bit_for_bit(dtype):
    params = make_params(dtype)
    params["Dense_0"]["kernel"][:3] = [[np.nan], [np.inf], [-0.0]]
    masks = random_masks(params)
    expected = sx.apply_masks(params, masks)
    for decay in (0.0, 0.1):
        sparse = sx.straight_through(params, masks, decay)
        assert jax.tree.structure(sparse) == jax.tree.structure(expected)
        for path, leaf in flat(sparse).items():
            assert leaf.dtype == dtype
            assert np.asarray(leaf).tobytes() == np.asarray(flat(expected)[path]).tobytes(), path


def test_a_weight_that_is_not_finite_stays_out_of_the_loss():
    masks = {"a": jnp.array([True, False, False])}
    params = {"a": jnp.array([1.0, jnp.nan, jnp.inf])}

    def total(params):
        return jnp.sum(sx.straight_through(params, masks)["a"] * 3.0)

    value, grads = jax.value_and_grad(total)(params)
    assert float(value) == 3.0
    assert grads["a"].tolist() == [3.0, 3.0, 3.0]


def test_leaves_without_masks_and_boxes():
    """MaskedNode and None stand for dense leaves; boxes stay; an int leaf passes."""
    params = {
        "kernel": nn.LogicallyPartitioned(jnp.array([[1.0, 2.0]]), ("in", "out")),
        "bias": jnp.ones(2),
        "scale": jnp.ones(2),
        "steps": jnp.array([1, 2]),
    }
    mask = jnp.array([[True, False]])
    masks = {
        "kernel": mask,
        "bias": optax.MaskedNode(),
        "scale": None,
        "steps": jnp.array([True, False]),
    }
    sparse = sx.straight_through(params, masks, 0.5)
    assert isinstance(sparse["kernel"], nn.LogicallyPartitioned)
    assert sparse["kernel"].value.tolist() == [[1.0, 0.0]]
    assert sparse["bias"] is params["bias"]
    assert sparse["scale"] is params["scale"]
    assert sparse["steps"].tolist() == [1, 0]
    # Masks of a state: True for what is never sparse.
    floating = {name: params[name] for name in ("kernel", "bias")}
    tx = sx.sparse_training(optax.sgd(0.1), distribution=sx.ERK(0.5), topology=sx.Static())
    masks = sx.get_masks(tx.init(floating))
    sparse = sx.straight_through(floating, masks)
    assert int((sparse["kernel"].value != 0).sum()) == 1
    assert sparse["bias"].tolist() == [1.0, 1.0]


def test_forward_mode_and_second_derivatives():
    """Without decay it may be differentiated in any way: tangents pass as gradients do."""
    masks = {"a": jnp.array([True, False])}

    def cubes(params):
        return jnp.sum(sx.straight_through(params, masks)["a"] ** 3)

    params = {"a": jnp.array([2.0, 5.0])}
    value, tangent = jax.jvp(cubes, (params,), ({"a": jnp.array([1.0, 7.0])},))
    assert (float(value), float(tangent)) == (8.0, 12.0)
    hessian = jax.hessian(cubes)(params)["a"]["a"]
    assert hessian.tolist() == [[12.0, 0.0], [0.0, 0.0]]


def test_decay_may_be_traced_and_is_batched():
    masks = {"a": jnp.array([True, False])}

    def total(params, decay):
        return jnp.sum(sx.straight_through(params, masks, decay)["a"])

    decays = jnp.array([0.0, 0.5, 1.0])
    grads = jax.jit(jax.vmap(jax.grad(total), (None, 0)))({"a": jnp.array([2.0, 4.0])}, decays)
    assert grads["a"].tolist() == [[1.0, 1.0], [1.0, 3.0], [1.0, 5.0]]


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(mode):
    """Masks need not be sharded as the weights are; gradients come out as the weights are."""
    mask = random_masks({"kernel": W1}, 0.5)["kernel"]

    def total(params):
        sparse = sx.straight_through(params, {"kernel": mask}, 0.5)
        return jnp.sum(sparse["kernel"] ** 2)

    expected = 2 * W1 * mask + 0.5 * W1 * ~mask
    mesh = jax.make_mesh((8,), ("x",), axis_types=(mode,))
    sharding = NamedSharding(mesh, PartitionSpec("x", None))
    with jax.set_mesh(mesh):
        grads = jax.jit(jax.grad(total))({"kernel": jax.device_put(W1, sharding)})
    np.testing.assert_allclose(grads["kernel"], expected, rtol=1e-6)
    if mode == AxisType.Explicit:
        assert grads["kernel"].sharding.spec == sharding.spec


@pytest.mark.parametrize(
    ("masks", "decay", "error", "message"),
    [
        ({"a": np.ones(2, bool)}, -0.1, ValueError, r"decay must be at least 0, got -0\.1"),
        ({"a": np.ones(2, bool)}, float("nan"), ValueError, "decay must be at least 0, got nan"),
        ({"a": np.ones(2, bool)}, "0.1", TypeError, "decay must be a number"),
        ({"a": np.ones(2)}, 0.0, TypeError, "'a' must be a bool array"),
        ({"a": np.ones(3, bool)}, 0.0, ValueError, r"'a' has shape \(3,\)"),
        ({}, 0.0, ValueError, "missing: a"),
        (None, 0.0, ValueError, "masks must have the tree structure of params, got None"),
    ],
)
def test_bad_arguments(masks, decay, error, message):
    with pytest.raises(error, match=message):
        sx.straight_through({"a": jnp.ones(2)}, masks, decay)


def test_a_traced_decay_that_is_no_number():
    with pytest.raises(TypeError, match="decay must be a number"):
        jax.jit(lambda d: sx.straight_through({"a": jnp.ones(2)}, {"a": None}, d))(jnp.ones(2))
