"""The table of layers and fan-in statistics, against NumPy and tables written by hand."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import sparseopt_jax as sx
from sparseopt_jax.summary import fan_in_statistics, summary
from tests import oracles
from tests.helpers import KERNELS, flat, make_params, random_masks

# --- fan_in_statistics -----------------------------------------------------------------------


@pytest.mark.parametrize("out_axes", [-1, (-2, -1)])
def test_statistics_equal_numpy(out_axes):
    masks = random_masks(make_params())
    masks["Conv_0"]["kernel"][..., 3] = False
    masks["Dense_0"]["kernel"][7:9] = False
    if out_axes != -1:  # of (20, 15) no incoming axis is left: as many neurons as weights
        masks = {"Conv_0": masks["Conv_0"], "Dense_1": masks["Dense_1"]}
    got = jax.jit(functools.partial(fan_in_statistics, out_axes=out_axes))(masks)
    kernels = [path for path in KERNELS if path in flat(masks)]
    assert set(got) - {"Embed_0/embedding"} == set(kernels)
    for path in kernels:
        expected = oracles.fan_in(flat(masks)[path], out_axes)
        statistics = got[path]
        np.testing.assert_allclose(statistics.mean, expected.mean(), rtol=2e-7)
        # A float32 sum of n squares is right to n * 2**-24, whatever the order of summation.
        rounding = expected.size * 2.0**-24
        np.testing.assert_allclose(statistics.std, expected.std(), rtol=rounding)
        assert statistics.min == expected.min()
        assert statistics.max == expected.max()
        assert statistics.dead == (expected == 0).sum()
        assert [x.dtype for x in statistics] == [np.float32] * 2 + [np.int32] * 3
    assert got["Conv_0/kernel"].dead >= 1


def test_statistics_of_equal_fan_in_have_no_spread():
    """61 neurons of fan-in 41: neither sum nor mean may leave a rounding behind."""
    mask = np.zeros((97, 61), bool)
    mask[:41] = True
    got = jax.jit(fan_in_statistics)(mask)[""]
    assert [float(x) for x in got] == [41, 0, 41, 41, 0]


def test_statistics_of_a_stack_are_those_of_its_layers():
    rng = np.random.default_rng(0)
    masks = {"stack": rng.random((7, 3, 5)) < 0.3, "bias": np.ones((3, 7), bool)}
    run = functools.partial(fan_in_statistics, batch_axes={"stack": 1, "bias": 0})
    got = jax.jit(run)(masks)
    assert list(got) == ["stack"]  # the biases of three layers are no kernel
    counts = masks["stack"].sum(axis=0)
    np.testing.assert_allclose(got["stack"].mean, counts.mean(axis=1), rtol=2e-7)
    np.testing.assert_allclose(got["stack"].std, counts.std(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(got["stack"].min, counts.min(axis=1))
    np.testing.assert_array_equal(got["stack"].max, counts.max(axis=1))
    np.testing.assert_array_equal(got["stack"].dead, (counts == 0).sum(axis=1))


def test_statistics_of_what_is_empty():
    masks = {"no_neuron": np.ones((3, 0), bool), "no_input": np.ones((0, 3), bool)}
    got = fan_in_statistics(masks)
    assert list(got) == ["no_input"]
    assert [float(x) for x in got["no_input"]] == [0, 0, 0, 0, 3]


def test_statistics_errors():
    with pytest.raises(TypeError, match="masks leaf 'w' must be a bool array, got float32"):
        fan_in_statistics({"w": np.ones((3, 2), np.float32)})
    with pytest.raises(ValueError, match="out_axes must lie in"):
        fan_in_statistics({"w": np.ones((3, 2), bool)}, out_axes=2)
    with pytest.raises(ValueError, match="batch_axes pattern 'v' matches none of the leaves: w"):
        fan_in_statistics({"w": np.ones((3, 2), bool)}, batch_axes={"v": 0})


# --- summary ---------------------------------------------------------------------------------

# Fan-ins of Conv_0 (window 1x2, two inputs): 2, 0, 4. Mean 2, standard deviation sqrt(8/3) = 1.63.
# Of Dense_0: 2, 1, 2, 2, 2: mean 1.8, standard deviation 0.4.
TABLE = """\
leaf            shape  kept  density  fan-in ± std  min..max  dead
Conv_0/kernel   2x2x3     6   0.5000     2.0 ± 1.6      0..4     1
Dense_0/kernel    2x5     9   0.9000     1.8 ± 0.4      1..2     0
2 sparse leaves: 15 of 22 weights active, density 0.6818; 1 dead neuron
3 dense leaves: 1,010 parameters, all active
dense of two and more dimensions: Dense_1/kernel 100x10
all parameters: 1,025 of 1,032 active, density 0.9932"""


def small_model():
    conv = np.array([[[1, 0, 1], [0, 0, 1]], [[1, 0, 1], [0, 0, 1]]], bool)
    dense = np.ones((2, 5), bool)
    dense[0, 1] = False
    masks = {
        "Conv_0": {"kernel": conv, "bias": np.ones(3, bool)},
        "Dense_0": {"kernel": dense, "bias": np.ones(7, bool)},
        "Dense_1": {"kernel": np.ones((100, 10), bool)},
    }
    return jax.tree.map(np.float32, masks), masks


def test_table_by_hand():
    params, masks = small_model()
    assert summary(params, masks) == TABLE
    assert summary(*jax.tree.map(jnp.asarray, (params, masks))) == TABLE
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    assert summary(shapes, masks) == TABLE


def test_table_of_a_stack_of_other_axes_and_of_a_vector():
    """(in, layers, out): two layers with fan-ins 3, 1 and 0, 2; and a masked vector has no fan-in.

    Mean 1.5, standard deviation sqrt(1.25) = 1.1. `t` has its out axis first: fan-ins 1 and 2.
    """
    stack = np.zeros((3, 2, 2), bool)
    stack[:3, 0, 0] = stack[:1, 0, 1] = stack[:2, 1, 1] = True
    masks = {
        "stack": stack,
        "t": np.array([[1, 0, 0], [1, 1, 0]], bool),
        "vector": np.array([True, False]),
    }
    got = summary(masks, masks, out_axes={"t": 0}, batch_axes={"stack": 1})
    assert [line.split() for line in got.splitlines()[1:4]] == [
        ["stack", "3x2x2", "6", "0.5000", "1.5", "±", "1.1", "0..3", "1"],
        ["t", "2x3", "3", "0.5000", "1.5", "±", "0.5", "1..2", "0"],
        ["vector", "2", "1", "0.5000", "-", "-", "-"],
    ]
    assert "dense" not in got


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_not_zero_are_counted(dtype):
    """Of 22 weights in sparse leaves 15 are active; dense leaves may have zeros."""
    params, masks = small_model()
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    params["Dense_1"]["kernel"][:, 0] = 0
    assert summary(params, masks) == TABLE
    params["Dense_0"]["kernel"][1] = 0  # five active weights, as after they have grown
    added = set(summary(params, masks).splitlines()) - set(TABLE.splitlines())
    assert added == {"in params 10 of the 15 active weights are not zero"}
    params["Dense_0"]["kernel"][0, 1] = np.nan  # one that is not active
    params["Conv_0"]["kernel"][:] = -1
    lines = summary(jax.tree.map(jnp.asarray, params), masks).splitlines()
    start = lines.index("2 sparse leaves: 15 of 22 weights active, density 0.6818; 1 dead neuron")
    text = " ".join(line.strip() for line in lines[start + 1 : -3])
    assert text.startswith(
        "7 weights outside the masks are not zero (Conv_0/kernel 6, Dense_0/kernel 1): in params "
        "17 of the 22 are not, density 0.7727. "
    )
    assert lines[-3:] == TABLE.splitlines()[-3:]
    assert max(map(len, lines)) <= 100


def test_a_wrapper_that_breaks_exactness_shows():
    """What rescales the updates of sparse_training leaves half of every inactive weight."""
    params = {"kernel": jnp.ones((8, 8))}
    tx = sx.sparse_training(optax.sgd(0.1), distribution=sx.ERK(0.75), topology=sx.Static())
    for chain, outside in ((tx, 0), (optax.chain(tx, optax.scale(0.5)), 48)):
        opt_state = chain.init(params)
        updates, opt_state = chain.update(params, opt_state, params)
        table = summary(optax.apply_updates(params, updates), sx.get_masks(opt_state))
        assert (f"{outside} weights outside the masks" in table) == bool(outside)


def test_dense_leaves_that_may_be_kernels_are_named():
    """Not what is left of a stack's biases without its batch axis, and not what is empty."""
    masks = {
        "blocks": {"w": np.ones((3, 4, 4), bool), "b": np.ones((3, 4), bool)},
        "heads": {f"h[{i}]": np.eye(7, dtype=bool) | np.bool_(i) for i in range(30)},
        "none": np.ones((0, 4), bool),
    }
    shapes = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, np.float32), masks)
    lines = summary(shapes, masks, batch_axes={"blocks/*": 0}).splitlines()
    assert max(map(len, lines)) <= 100
    first = lines.index("32 dense leaves: 1,481 parameters, all active") + 1
    named = " ".join(line.strip() for line in lines[first:-1])
    assert named == "dense of two and more dimensions: blocks/w 3x4x4, " + ", ".join(
        sorted(f"heads/h[{i}] 7x7" for i in range(1, 30))
    )


def test_table_without_sparse_leaves():
    params, masks = small_model()
    got = summary(params, jax.tree.map(np.ones_like, masks))
    assert got.splitlines() == [
        "no sparse leaves",
        "5 dense leaves: 1,032 parameters, all active",
        "dense of two and more dimensions: Conv_0/kernel 2x2x3, Dense_0/kernel 2x5, Dense_1/kernel "
        "100x10",
    ]
    assert summary({}, {}) == "no sparse leaves"


def test_resnet50_fits_100_columns():
    shapes = {path: shape for path, (shape, _) in oracles.resnet50_layers().items()}
    rng = np.random.default_rng(0)
    masks = {path: rng.random(shape, np.float32) < 0.1 for path, shape in shapes.items()}
    lines = summary(masks, masks).splitlines()
    assert len(lines) == 1 + 54 + 1
    assert max(map(len, lines)) <= 100
    # All columns but the first end where their heading does.
    assert len({len(line) for line in lines[:-1]}) == 1
    # 25.5 million weights, as is well known (25,502,912 without biases and batch norm).
    active = sum(int(mask.sum()) for mask in masks.values())
    assert lines[-1].startswith(f"54 sparse leaves: {active:,} of 25,502,912 weights active, ")


def test_summary_errors():
    params, masks = small_model()
    with pytest.raises(TypeError, match=r"masks leaf 'Conv_0/bias' is traced.* outside of jax.jit"):
        jax.jit(lambda m: jnp.zeros(len(summary(params, m))))(masks)
    with pytest.raises(ValueError, match="masks must have the tree structure of params"):
        summary(params, masks["Conv_0"])
    with pytest.raises(TypeError, match="must be a bool array, got float32"):
        summary(params, params)
    with pytest.raises(ValueError, match="out_axes must lie in"):
        summary(params, masks, out_axes=5)
