"""The table of layers and fan-in statistics, against NumPy and tables written by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
3 dense leaves: 1,010 parameters, all active"""


def small_model():
    conv = np.array([[[1, 0, 1], [0, 0, 1]], [[1, 0, 1], [0, 0, 1]]], bool)
    dense = np.ones((2, 5), bool)
    dense[0, 1] = False
    masks = {
        "Conv_0": {"kernel": conv, "bias": np.ones(3, bool)},
        "Dense_0": {"kernel": dense, "bias": np.ones(7, bool)},
        "Dense_1": {"kernel": np.ones((100, 10), bool)},
    }
    return jax.tree.map(lambda m: np.ones(m.shape, np.float32), masks), masks


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


def test_table_without_sparse_leaves():
    params, masks = small_model()
    got = summary(params, jax.tree.map(np.ones_like, masks))
    assert got == "no sparse leaves\n5 dense leaves: 1,032 parameters, all active"
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
