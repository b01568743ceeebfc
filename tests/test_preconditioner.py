"""SparseOpt's factor and optimizer against NumPy, its identities, bad input."""

import jax
import ml_dtypes
import numpy as np
import optax
import pytest

import sparseopt_jax as sx
from tests import oracles
from tests.helpers import KERNELS, flat, make_params, random_masks

MODES = ("layer", "network", None)


def scale(grads, masks, jit=True, **options):
    tx = sx.scale_by_sparseopt(**options)

    def update(grads, masks):
        return tx.update(grads, tx.init(grads), masks=masks)[0]

    return (jax.jit(update) if jit else update)(grads, masks)


def assert_same_bits(got, expected):
    """Leaf by leaf the same dtype and the same bits, so that -0.0 and NaN count too."""
    for path, a in flat(expected).items():
        b = np.asarray(flat(got)[path])
        assert b.dtype == a.dtype, path
        assert b.tobytes() == np.asarray(a).tobytes(), path


# --- the factor ------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("out_axes", [-1, 0])
@pytest.mark.parametrize("average_over", MODES)
def test_factor_equals_numpy(average_over, out_axes, jit):
    grads = make_params(seed=3)
    masks = random_masks(grads)
    masks["Dense_1"]["kernel"][:] = True  # a dense layer among sparse ones
    got = scale(grads, masks, jit, average_over=average_over, out_axes=out_axes)
    assert jax.tree.structure(got) == jax.tree.structure(grads)
    factors = oracles.sparseopt_factors(flat(masks), average_over, out_axes)
    for path, g in flat(grads).items():
        if path.startswith("Dense_1") or path not in KERNELS:
            np.testing.assert_array_equal(flat(got)[path], g, err_msg=path)
        else:
            # Two divisions, a square root and a product in float32: a few times 6e-8.
            expected = g.astype(np.float64) * factors[path]
            np.testing.assert_allclose(flat(got)[path], expected, rtol=5e-7, err_msg=path)


@pytest.mark.parametrize("out_axes", [(-2, -1), (1, 2)])
@pytest.mark.parametrize("average_over", MODES)
def test_several_out_axes(average_over, out_axes):
    """An attention projection (inputs, heads, head size): each head's unit is a neuron."""
    rng = np.random.default_rng(0)
    grads = {"kernel": rng.normal(size=(12, 4, 5)).astype(np.float32)}
    masks = {"kernel": rng.random((12, 4, 5)) < 0.4}
    # Its bias has no such axes, and is dense anyway.
    if out_axes == (-2, -1):
        grads["bias"], masks["bias"] = np.ones(5, np.float32), np.ones(5, bool)
    got = scale(grads, masks, average_over=average_over, out_axes=out_axes)
    kernel = {"kernel": masks["kernel"]}
    factor = oracles.sparseopt_factors(kernel, average_over, out_axes)["kernel"]
    assert factor.shape == (1, 4, 5)
    np.testing.assert_allclose(got["kernel"], grads["kernel"] * factor, rtol=5e-7)
    if "bias" in grads:
        np.testing.assert_array_equal(got["bias"], grads["bias"])


def test_factor_by_hand():
    """Four inputs; fan-in 1, 2, 4, 1: mean 2, so sqrt(1/2), 1, sqrt(2), sqrt(1/2).

    A second layer has densities 1/2 and 1 of two inputs. The network's mean of 1 - s is
    (1/4 + 1/2 + 1 + 1/4 + 1/2 + 1) / 6 = 3.5 / 6.
    """
    first = np.array([[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]], bool)
    second = np.array([[1, 1], [0, 1]], bool)
    masks = {"a": first, "b": second, "c": np.ones((3, 2), bool)}
    ones = {name: np.ones(mask.shape, np.float32) for name, mask in masks.items()}
    a, b = np.array([0.25, 0.5, 1, 0.25]), np.array([0.5, 1])
    expected = {
        "layer": (np.sqrt(a * 2), np.sqrt(b / 0.75)),
        None: (np.sqrt(a), np.sqrt(b)),
        "network": (np.sqrt(a * 6 / 3.5), np.sqrt(b * 6 / 3.5)),
    }
    for average_over, rows in expected.items():
        got = scale(ones, masks, average_over=average_over)
        for name, row in zip("ab", rows, strict=True):
            np.testing.assert_allclose(
                got[name], np.broadcast_to(row, masks[name].shape), rtol=5e-7
            )
        np.testing.assert_array_equal(got["c"], ones["c"])


def test_vmap_over_masks():
    grads = {"kernel": np.ones((6, 5), np.float32)}
    masks = {"kernel": np.random.default_rng(0).random((3, 6, 5)) < 0.5}
    got = jax.vmap(lambda m: scale(grads, m, jit=False))(masks)["kernel"]
    for out, mask in zip(got, masks["kernel"], strict=True):
        factor = oracles.sparseopt_factors({"kernel": mask})["kernel"]
        np.testing.assert_allclose(out, np.broadcast_to(factor, (6, 5)), rtol=5e-7)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("average_over", MODES)
def test_low_precision_gradients(dtype, average_over):
    grads = make_params(dtype)
    masks = random_masks(grads)
    got = scale(grads, masks, average_over=average_over)
    factors = oracles.sparseopt_factors(flat(masks), average_over)
    # The factor rounded to the type, and the product: half a unit in the last place each.
    rtol = 1.01 * float(ml_dtypes.finfo(dtype).eps)
    for path, g in flat(grads).items():
        out = flat(got)[path]
        assert out.dtype == dtype
        expected = g.astype(np.float64) * factors[path]
        np.testing.assert_allclose(np.asarray(out).astype(np.float64), expected, rtol=rtol)


# --- where it does nothing, bit for bit ------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("average_over", MODES)
@pytest.mark.parametrize("jit", [True, False])
def test_dense_masks_are_the_identity(average_over, dtype, jit):
    grads = make_params(dtype)
    grads["Dense_0"]["kernel"][0, :6] = np.array([np.nan, np.inf, -np.inf, -0.0, 0, 6e-8], dtype)
    masks = jax.tree.map(lambda g: np.ones(g.shape, bool), grads)
    assert_same_bits(scale(grads, masks, jit, average_over=average_over), grads)


@pytest.mark.parametrize("fan_in", [41, 47, 55, 61, 82, 83, 97])
def test_dense_is_the_identity_where_a_reciprocal_rounds(fan_in):
    """n * (1 / n) is not 1 in float32 for these n, should a compiler divide that way."""
    assert np.float32(fan_in) * (np.float32(1) / np.float32(fan_in)) != 1
    grads = {"kernel": np.random.default_rng(0).normal(size=(fan_in, 5)).astype(np.float32)}
    masks = {"kernel": np.ones((fan_in, 5), bool)}
    for average_over in ("layer", "network", None):
        assert_same_bits(scale(grads, masks, True, average_over=average_over), grads)


@pytest.mark.parametrize("neurons", [1, 3, 7, 10, 41, 49, 100])
def test_equal_fan_in_is_the_identity(neurons):
    """Every fan-in up to 64, so that a mean that is off by a rounding shows."""
    rng = np.random.default_rng(0)
    grads = {"kernel": rng.normal(size=(64, neurons)).astype(np.float32)}
    tx = sx.scale_by_sparseopt("layer")
    update = jax.jit(lambda g, m: tx.update(g, tx.init(g), masks=m)[0])
    rank = np.argsort(rng.random((64, neurons)), axis=0)
    for active in range(1, 65):
        assert_same_bits(update(grads, {"kernel": rank < active}), grads)


def test_equal_fan_in_is_the_identity_where_float32_cannot_count():
    """4,097 neurons with 4,097 weights each: their sum is odd and above 2**24."""
    grads = {"kernel": np.ones((4100, 4097), np.float32)}
    masks = {"kernel": np.ones((4100, 4097), bool)}
    masks["kernel"][:3] = False
    assert_same_bits(scale(grads, masks), grads)


def test_layers_names_those_that_are_scaled():
    grads = make_params()
    masks = random_masks(grads)
    got = flat(scale(grads, masks, layers=lambda path: path.startswith("Dense_0/")))
    everywhere = flat(scale(grads, masks))
    for path, g in flat(grads).items():
        expected = everywhere[path] if path == "Dense_0/kernel" else g
        np.testing.assert_array_equal(got[path], expected, err_msg=path)
    assert (got["Dense_0/kernel"] != grads["Dense_0"]["kernel"]).any()


# --- nothing to divide by --------------------------------------------------------------------


@pytest.mark.parametrize("average_over", MODES)
def test_a_neuron_without_weights(average_over):
    grads = make_params()
    masks = random_masks(grads)
    masks["Dense_0"]["kernel"][:, [0, 7]] = False
    got = scale(grads, masks, average_over=average_over)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(got))
    zero = (np.asarray(got["Dense_0"]["kernel"]) == 0).all(axis=0)
    assert np.flatnonzero(zero).tolist() == [0, 7]


@pytest.mark.parametrize("average_over", MODES)
@pytest.mark.parametrize("empty", [["Dense_0"], ["Conv_0", "Dense_0", "Dense_1"]])
def test_a_layer_without_weights(average_over, empty):
    grads = make_params()
    masks = random_masks(grads)
    for name in empty:
        masks[name]["kernel"][:] = False
    got = flat(scale(grads, masks, average_over=average_over))
    for path, g in got.items():
        assert np.isfinite(g).all(), path
        assert (np.asarray(g) == 0).all() == (path.split("/")[0] in empty and path in KERNELS), path


# --- the optimizer ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("momentum", "nesterov", "weight_decay", "average_over"),
    [
        (0.9, False, 0.0, "layer"),
        (0.9, False, 5e-2, "layer"),
        (0.9, True, 5e-2, "layer"),
        (0.0, False, 5e-2, "network"),
        (0.7, True, 0.0, None),
    ],
)
def test_sparseopt_equals_numpy(momentum, nesterov, weight_decay, average_over):
    """Ten steps with a decaying rate, and with other masks from the sixth step on."""
    rate = optax.exponential_decay(0.3, transition_steps=1, decay_rate=0.8)
    tx = sx.sparseopt(
        rate,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        average_over=average_over,
    )
    params = make_params()
    state = tx.init(params)
    oracle = oracles.SGD(lambda t: 0.3 * 0.8**t, momentum, nesterov, weight_decay, average_over)
    expected = {path: w.astype(np.float64) for path, w in flat(params).items()}

    @jax.jit
    def step(params, state, grads, masks):
        updates, state = tx.update(grads, state, params, masks=masks)
        return optax.apply_updates(params, updates), state

    for t in range(10):
        grads = make_params(seed=100 + t)
        masks = random_masks(grads, seed=1 if t < 5 else 2)
        params, state = step(params, state, grads, masks)
        expected = oracle.step(expected, flat(grads), flat(masks))
    for path, w in flat(params).items():
        # Ten float32 steps on numbers of order one.
        np.testing.assert_allclose(w, expected[path], rtol=2e-6, atol=2e-6, err_msg=path)


def test_which_weights_decay():
    """By default those of two and more dimensions; or as `mask` says."""
    params = make_params()
    zeros = jax.tree.map(np.zeros_like, params)
    masks = random_masks(params)
    chosen = {
        (): {path for path, w in flat(params).items() if w.ndim >= 2},
        (("mask", lambda tree: jax.tree.map(lambda w: w.shape == (20,), tree)),): {"Dense_0/bias"},
    }
    assert len(chosen[()]) == 4
    for options, paths in chosen.items():
        tx = sx.sparseopt(0.5, momentum=0.0, weight_decay=0.1, **dict(options))
        updates, _ = tx.update(zeros, tx.init(params), params, masks=masks)
        for path, u in flat(updates).items():
            w = flat(params)[path] if path in paths else 0
            np.testing.assert_allclose(u, -0.5 * 0.1 * w + np.zeros_like(u), rtol=1e-6)


def test_dense_masks_give_plain_sgd():
    params = make_params()
    dense = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
    ours, plain = sx.sparseopt(0.1, nesterov=True), optax.sgd(0.1, momentum=0.9, nesterov=True)
    states = ours.init(params), plain.init(params)
    for t in range(3):
        grads = make_params(seed=t)
        a, b = ours.update(grads, states[0], params, masks=dense), plain.update(grads, states[1])
        states = a[1], b[1]
        assert_same_bits(a[0], b[0])


# --- bad input -------------------------------------------------------------------------------


def broken_masks(fault):
    masks = random_masks(make_params())
    if fault == "structure":
        del masks["Dense_1"]
    elif fault == "shape":
        masks["Dense_0"]["kernel"] = masks["Dense_0"]["kernel"].T
    elif fault == "dtype":
        masks["Dense_0"]["kernel"] = masks["Dense_0"]["kernel"].astype(np.float32)
    elif fault == "None":
        masks = None
    return masks


MAKE = (sx.scale_by_sparseopt, lambda: sx.sparseopt(0.1))


@pytest.mark.parametrize("make", MAKE, ids=("scale_by_sparseopt", "sparseopt"))
@pytest.mark.parametrize(
    ("fault", "error"),
    [("structure", ValueError), ("shape", ValueError), ("dtype", TypeError), ("None", ValueError)],
)
def test_masks_that_do_not_fit(make, fault, error):
    params = make_params()
    tx = make()
    with pytest.raises(error, match="masks"):
        tx.update(params, tx.init(params), params, masks=broken_masks(fault))


@pytest.mark.parametrize("make", MAKE, ids=("scale_by_sparseopt", "sparseopt"))
def test_masks_missing(make):
    params = make_params()
    tx = make()
    with pytest.raises(ValueError, match="masks"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("value", ["neuron", "Layer", 3])
def test_unknown_average_over(value):
    for make in (sx.scale_by_sparseopt, lambda **kw: sx.sparseopt(0.1, **kw)):
        with pytest.raises(ValueError, match=rf"average_over.*{value}"):
            make(average_over=value)
