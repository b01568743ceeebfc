"""Mask trees: their counts, their structure, and what is made from them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import sparseopt_jax as sx
from tests import oracles
from tests.helpers import KERNELS, flat, make_params, random_masks

# --- init ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "distribution",
    [
        sx.ERK(0.8),
        sx.ER(0.8),
        sx.Uniform(0.9),
        sx.Uniform(0.9, dense_first=False),
        sx.PerLayer({"Conv_*": 0.0, "Dense_*": 0.75}),
        sx.ERK(0.8, overrides={"Conv_0/*": 0.0}),
    ],
    ids=lambda d: type(d).__name__,
)
def test_init_masks_keeps_the_counts_of_the_distribution(distribution):
    params = make_params()
    masks = jax.jit(lambda key: sx.init_masks(key, params, distribution))(jax.random.key(0))
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    counts = distribution.layer_counts(KERNELS)
    shapes = {path: w.shape for path, w in flat(params).items()}
    for path, mask in flat(masks).items():
        assert mask.dtype == jnp.bool_
        assert mask.shape == shapes[path]
        assert mask.sum() == counts.get(path, mask.size), path


def test_init_masks_under_jit_and_by_key():
    params = make_params()

    @jax.jit
    def init(key):
        return sx.init_masks(key, params, sx.ERK(0.8))

    first, again, other = init(jax.random.key(0)), init(jax.random.key(0)), init(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    eager = sx.init_masks(jax.random.key(0), params, sx.ERK(0.8))
    jax.tree.map(np.testing.assert_array_equal, first, eager)
    for path in KERNELS:
        assert (flat(first)[path] != flat(other)[path]).any(), path
    batch = jax.vmap(init)(jax.random.split(jax.random.key(0), 3))
    for path in KERNELS:
        a, b, c = np.asarray(flat(batch)[path])
        assert (a != b).any()
        assert (b != c).any()
        assert a.sum() == b.sum() == c.sum()


def test_layers_of_one_shape_get_different_masks():
    params = {f"Dense_{i}": {"kernel": np.zeros((20, 20), np.float32)} for i in range(3)}
    masks = flat(sx.init_masks(jax.random.key(0), params, sx.Uniform(0.5, dense_first=False)))
    a, b, c = masks.values()
    assert (a != b).any()
    assert (b != c).any()
    assert (a != c).any()


def test_every_position_is_equally_likely():
    """6,000 masks of 3 in 10: a count is 1,800 +- 35.5; six standard deviations allowed."""
    params = {"kernel": np.zeros((5, 2), np.float32)}
    distribution = sx.PerLayer({"kernel": 0.7})
    keys = jax.random.split(jax.random.key(0), 6000)
    masks = jax.vmap(lambda key: sx.init_masks(key, params, distribution))(keys)["kernel"]
    counts = np.asarray(masks).sum(axis=0)
    assert counts.sum() == 18_000
    assert np.abs(counts - 1800).max() < 6 * np.sqrt(6000 * 0.3 * 0.7)


def test_prunable_chooses_the_layers():
    seen = {}

    def prunable(path, leaf):
        seen[path] = leaf.shape
        return path.startswith("Dense_0/k") or path == "Embed_0/embedding"

    params = make_params()
    masks = sx.init_masks(jax.random.key(0), params, sx.ERK(0.8), prunable=prunable)
    counts = sx.ERK(0.8).layer_counts({"Dense_0/kernel": (30, 20), "Embed_0/embedding": (11, 7)})
    for path, mask in flat(masks).items():
        assert mask.sum() == counts.get(path, mask.size), path
    shapes = {path: w.shape for path, w in flat(params).items()}
    assert seen.items() <= shapes.items()
    assert set(KERNELS) <= set(seen)


def test_default_prunable():
    answers = {path: sx.default_prunable(path, leaf) for path, leaf in flat(make_params()).items()}
    assert {path for path, answer in answers.items() if answer} == set(KERNELS)


def test_leaves_without_elements_are_no_layers():
    """They stay as they are; so does a stack of no layers."""
    empty = {"in": jnp.ones((0, 4)), "out": jnp.ones((4, 0)), "stack": jnp.ones((0, 3, 3))}
    params = {"a": jnp.ones((4, 6)), **empty}
    tx = sx.sparse_training(
        sx.sparseopt(0.1),
        distribution=sx.ERK(0.5),
        topology=sx.RigL(1, 0.5, 10, begin_step=0),
        batch_axes={"stack": 0},
    )
    opt_state = jax.jit(tx.init)(params)
    assert list(flat(opt_state.fan_in)) == ["a"]
    updates, opt_state = jax.jit(tx.update)(params, opt_state, params)
    masks = sx.get_masks(opt_state)
    assert [mask.shape for mask in masks.values()] == [p.shape for p in params.values()]
    assert int(masks["a"].sum()) == 12
    assert not jnp.where(masks["a"], 0, params["a"] + updates["a"]).any()
    with pytest.raises(ValueError, match="prunable chooses no leaf"):
        sx.init_masks(jax.random.key(0), empty, sx.ERK(0.5))


class Layer(NamedTuple):
    kernel: np.ndarray
    bias: np.ndarray


def test_any_pytree():
    layer = Layer(np.zeros((6, 5), np.float32), np.zeros(5, np.float32))
    params = {"blocks": [layer, layer], "head": (layer,)}
    distribution = sx.PerLayer({"blocks/0/*": 0.5, "blocks/1/*": 0.9, "head/0/kernel": 0.0})
    masks = sx.init_masks(jax.random.key(0), params, distribution)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    assert [int(masks["blocks"][i].kernel.sum()) for i in (0, 1)] == [15, 3]
    assert masks["head"][0].kernel.all()
    assert masks["blocks"][0].bias.all()
    sizes = jax.tree.map(lambda w, m: (w.shape, m.shape), params, masks)
    assert sizes["blocks"][1].kernel == ((6, 5), (6, 5))


# --- apply, fan_in, density, scale_to_fan_in --------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_apply_masks_gives_exact_zeros_and_leaves_the_rest_alone(dtype):
    params = make_params(dtype)
    params["Dense_0"]["kernel"][:10, 0] = np.array([np.nan, np.inf, -np.inf, -0.0, -1] * 2, dtype)
    masks = random_masks(params)
    masks["Dense_0"]["kernel"][:10, 0] = [True] * 5 + [False] * 5
    out = sx.apply_masks(params, masks)
    assert jax.tree.structure(out) == jax.tree.structure(params)
    bits = {2: np.uint16, 4: np.uint32}[np.dtype(dtype).itemsize]
    for path, w in flat(out).items():
        before, mask = flat(params)[path], flat(masks)[path]
        assert w.dtype == before.dtype
        # Bit for bit: a masked NaN or inf becomes +0.0, an active one stays what it is.
        expected = np.where(mask, before.view(bits), bits(0))
        np.testing.assert_array_equal(np.asarray(w).view(bits), expected)


def test_masks_zip_with_params():
    params = make_params()
    masks = random_masks(params)
    out = jax.tree.map(lambda w, m: np.where(m, w, 0), params, masks)
    applied = sx.apply_masks(params, masks)
    jax.tree.map(np.testing.assert_array_equal, out, applied)


@pytest.mark.parametrize(
    ("shape", "out_axes"),
    [
        ((30, 20), -1),
        ((30, 20), 0),
        ((3, 3, 4, 10), -1),
        ((3, 3, 4, 10), 2),
        ((10, 4, 3, 3), 0),
        ((12, 4, 5), (-2, -1)),
        ((12, 4, 5), (1, 2)),
        ((4, 5, 12), (0, 1)),
        ((7,), -1),
    ],
)
def test_fan_in(shape, out_axes):
    mask = np.random.default_rng(0).random(shape) < 0.3
    count = sx.fan_in(mask, out_axes)
    assert count.dtype == jnp.int32
    np.testing.assert_array_equal(count, oracles.fan_in(mask, out_axes))
    np.testing.assert_array_equal(count, jax.jit(lambda m: sx.fan_in(m, out_axes))(mask))


def test_fan_in_by_hand():
    mask = np.array([[1, 0, 1], [1, 0, 0]], bool)  # two inputs, three neurons
    np.testing.assert_array_equal(sx.fan_in(mask), [2, 0, 1])
    np.testing.assert_array_equal(sx.fan_in(mask, 0), [2, 1])


def test_density():
    params = make_params()
    masks = random_masks(params)
    densities = sx.density(masks)
    assert jax.tree.structure(densities) == jax.tree.structure(params)
    for path, value in flat(densities).items():
        assert value.dtype == jnp.float32
        assert value.shape == ()
        # One division in float32: half a unit in the last place, or one.
        np.testing.assert_allclose(value, flat(masks)[path].mean(), rtol=1.2e-7)


@pytest.mark.parametrize("out_axes", [-1, 0])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_scale_to_fan_in(dtype, out_axes):
    params = make_params(dtype)
    masks = random_masks(params)
    masks["Dense_1"]["kernel"][:] = True
    masks["Dense_0"]["kernel"][:, 3] = False
    masks["Dense_0"]["kernel"][4, :] = False
    out = flat(sx.scale_to_fan_in(params, masks, out_axes))
    # A product and a square root: a few units in the last place of the type.
    rtol = 4 * float(ml_dtypes.finfo(dtype).eps)
    for path, w in flat(params).items():
        assert out[path].dtype == w.dtype
        mask = flat(masks)[path]
        if mask.all():
            np.testing.assert_array_equal(out[path], w, err_msg=path)
            continue
        count = oracles.fan_in(mask, out_axes)
        dense = mask.size / count.size
        # A neuron without weights has no scale to get right, only no NaN and no inf to give.
        scale = np.sqrt(dense / np.maximum(count, 1))
        scale = oracles.along_out_axes(scale, mask.ndim, out_axes)
        got = np.where(mask, np.asarray(out[path]).astype(np.float64), 0)
        expected = np.where(mask, w.astype(np.float64) * scale, 0)
        np.testing.assert_allclose(got, expected, rtol=rtol, err_msg=path)
        assert np.isfinite(np.asarray(out[path]).astype(np.float64)).all(), path


def test_scaled_weights_have_the_variance_of_he_normal_for_their_fan_in():
    """Var = 2 / active fan-in: per-neuron sum of squares near 2, as a dense He-normal neuron's."""
    rng = np.random.default_rng(0)
    kernel = (rng.normal(size=(2000, 6)) * np.sqrt(2 / 2000)).astype(np.float32)
    mask = rng.random((2000, 6)) < np.array([0.1, 0.2, 0.3, 0.5, 0.8, 0.9])
    params, masks = {"kernel": kernel}, {"kernel": mask}
    out = np.asarray(sx.apply_masks(sx.scale_to_fan_in(params, masks), masks)["kernel"])
    # The sum of n squares has the relative standard deviation sqrt(2 / n), n = 200 at least: 0.1.
    np.testing.assert_allclose((out.astype(np.float64) ** 2).sum(axis=0), 2, rtol=0.3)


# --- bad input -------------------------------------------------------------------------------


def test_nothing_prunable():
    params = {"Dense_0": {"bias": np.zeros(3, np.float32)}}
    with pytest.raises(ValueError, match="prunable"):
        sx.init_masks(jax.random.key(0), params, sx.ERK(0.5))
    with pytest.raises(ValueError, match="prunable"):
        sx.init_masks(jax.random.key(0), make_params(), sx.ERK(0.5), prunable=lambda *_: False)


@pytest.mark.parametrize("dtype", [np.int32, np.int8])
def test_integer_parameters(dtype):
    params = {"Dense_0": {"kernel": np.zeros((4, 5), dtype)}}
    with pytest.raises(TypeError, match="Dense_0/kernel"):
        sx.init_masks(jax.random.key(0), params, sx.ERK(0.5))
    params["Dense_1"] = {"kernel": np.zeros((4, 5), np.float32)}
    with pytest.raises(TypeError, match="Dense_0/kernel"):
        sx.init_masks(jax.random.key(0), params, sx.ERK(0.5))


def test_an_override_that_matches_no_layer():
    with pytest.raises(ValueError, match="Dense_7"):
        sx.init_masks(jax.random.key(0), make_params(), sx.ERK(0.5, overrides={"Dense_7/*": 0.1}))


def broken_masks(fault):
    masks = random_masks(make_params())
    if fault == "structure":
        del masks["Dense_1"]
    elif fault == "extra":
        masks["Dense_2"] = {"kernel": np.ones((2, 2), bool)}
    elif fault == "shape":
        masks["Dense_0"]["kernel"] = masks["Dense_0"]["kernel"].T
    elif fault == "dtype":
        masks["Dense_0"]["kernel"] = masks["Dense_0"]["kernel"].astype(np.float32)
    elif fault == "none":
        masks = None
    return masks


@pytest.mark.parametrize(
    ("fault", "error", "names"),
    [
        ("structure", ValueError, "masks"),
        ("extra", ValueError, "masks"),
        ("shape", ValueError, "Dense_0/kernel"),
        ("dtype", TypeError, "Dense_0/kernel"),
        ("none", (ValueError, TypeError), "masks"),
    ],
)
def test_masks_that_do_not_fit(fault, error, names):
    params = make_params()
    sx.check_masks(random_masks(params), params)
    with pytest.raises(error, match=names):
        sx.check_masks(broken_masks(fault), params)
    with pytest.raises(error, match=names):
        sx.apply_masks(params, broken_masks(fault))
