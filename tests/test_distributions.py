"""How many weights each layer keeps: Uniform, ER, ERK and PerLayer against NumPy."""

import dataclasses
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import sparseopt_jax as sx
from tests import oracles

LAYERS = oracles.resnet50_layers()
SHAPES = {path: shape for path, (shape, _) in LAYERS.items()}
TOTAL = sum(math.prod(shape) for shape in SHAPES.values())
STEM = "conv_stem/kernel"
SPARSITIES = (0.8, 0.9, 0.95, 0.97, 0.99)

MLP = {"Dense_0/kernel": (20, 30), "Dense_1/kernel": (30, 40), "Dense_2/kernel": (40, 10)}


def sizes(shapes):
    return {path: math.prod(shape) for path, shape in shapes.items()}


def check_counts(counts, density, shapes):
    """Within one weight of the real-valued count, layer by layer, and integers."""
    assert set(counts) == set(shapes)
    for path, exact in oracles.expected_counts(density, shapes).items():
        assert isinstance(counts[path], int | np.integer)
        assert abs(counts[path] - exact) <= 1, (path, counts[path], exact)


def test_the_list_of_layers_is_resnet50():
    """54 kernels; with 53 batch norms (scale and bias) and fc's bias, torchvision's count."""
    assert len(SHAPES) == 54
    channels = sum(shape[-1] for path, shape in SHAPES.items() if path != "fc/kernel")
    assert TOTAL + 2 * channels + 1000 == 25_557_032


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_erk_on_resnet50(sparsity):
    density = oracles.erk_density(SHAPES, sparsity)
    counts = sx.ERK(sparsity).layer_counts(SHAPES)
    check_counts(counts, density, SHAPES)
    assert abs(sum(counts.values()) - (1 - sparsity) * TOTAL) <= len(SHAPES)
    for path, size in sizes(SHAPES).items():
        assert 0 < counts[path] <= size
        assert (counts[path] == size) == (density[path] == 1)


def test_erk_redistributes_over_full_layers():
    """At 0.8 eight 1x1 convolutions would be over-full, at 0.9 only the first, at 0.95 none."""
    dense = {}
    for sparsity in (0.8, 0.9, 0.95):
        counts = sx.ERK(sparsity).layer_counts(SHAPES)
        dense[sparsity] = [p for p, size in sizes(SHAPES).items() if counts[p] == size]
    assert len(dense[0.8]) == 8
    assert dense[0.9] == ["stage0_block0/conv1/kernel"]
    assert dense[0.95] == []


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_er_on_resnet50(sparsity):
    density = oracles.erk_density(SHAPES, sparsity, kernel=False)
    counts = sx.ER(sparsity).layer_counts(SHAPES)
    check_counts(counts, density, SHAPES)
    assert abs(sum(counts.values()) - (1 - sparsity) * TOTAL) <= len(SHAPES)


def test_erk_by_hand():
    """Two layers, 75 % sparse, so 1,100 of 4,400 weights stay.

    raw: (10 + 40) / 400 = 0.125 and (40 + 100) / 4000 = 0.035. Both below full: eps solves
    eps * (0.125 * 400 + 0.035 * 4000) = eps * 190 = 1100, so eps = 5.789 and eps * 0.125 = 0.724.
    At 50 %, 2,200 stay: eps = 11.58 would give the first 1.447, so it is dense with its 400, and
    1,800 remain for the second.
    """
    shapes = {"a": (10, 40), "b": (40, 100)}
    counts = sx.ERK(0.75).layer_counts(shapes)
    assert abs(counts["a"] - 289.47) <= 1
    assert abs(counts["b"] - 810.53) <= 1
    assert sx.ERK(0.5).layer_counts(shapes) == {"a": 400, "b": 1800}
    # On matrices ER is the same; on kernels the window counts in ERK alone:
    # ERK raw (3 + 3 + 10 + 10) / 900 = 0.028889, ER raw (10 + 10) / 100 = 0.2, one layer each.
    assert sx.ER(0.5).layer_counts(shapes) == {"a": 400, "b": 1800}
    shapes = {"conv": (3, 3, 10, 10), "fc": (30, 30)}
    # ERK: 0.028889 * 900 = 26 and (60 / 900) * 900 = 60, so eps = 360 / 86 for 360 weights.
    assert abs(sx.ERK(0.8).layer_counts(shapes)["conv"] - 26 * 360 / 86) <= 1
    # ER: 0.2 * 900 = 180 and 60, so eps = 1.5 for 360 weights.
    assert sx.ER(0.8).layer_counts(shapes) == {"conv": 270, "fc": 90}


# Multiply-adds at inference over the dense net's, as published for RigL's checkpoints (README of
# google-research/rigl). Two digits are given, and their count adds batch norm, ReLU and pooling to
# the convolutions counted here: hence 0.01.
@pytest.mark.parametrize(
    ("distribution", "published"),
    [
        (sx.ERK(0.8), 0.42),
        (sx.ERK(0.9), 0.24),
        (sx.ERK(0.95), 0.12),
        (sx.ERK(0.965), 0.09),
        (sx.Uniform(0.8), 0.23),
        (sx.Uniform(0.9), 0.13),
        (sx.Uniform(0.95), 0.08),
        (sx.Uniform(0.965), 0.07),
    ],
)
def test_flops_of_resnet50_as_published(distribution, published):
    counts = distribution.layer_counts(SHAPES)
    density = {path: counts[path] / size for path, size in sizes(SHAPES).items()}
    assert abs(oracles.flops_fraction(density, LAYERS) - published) < 0.01


# --- uniform ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_uniform_leaves_the_first_layer_dense_and_does_not_compensate(sparsity):
    counts = sx.Uniform(sparsity).layer_counts(SHAPES)
    density = {path: 1.0 if path == STEM else 1 - sparsity for path in SHAPES}
    check_counts(counts, density, SHAPES)
    assert counts[STEM] == 7 * 7 * 3 * 64


def dense_layers(shapes, **options):
    counts = sx.Uniform(0.5, **options).layer_counts(shapes)
    return [path for path, size in sizes(shapes).items() if counts[path] == size]


def test_uniform_first_layer():
    # The convolution with the fewest input channels, wherever its name sorts.
    conv = {"a/kernel": (3, 3, 16, 8), "b/kernel": (3, 3, 3, 16), "c/kernel": (8, 10)}
    assert dense_layers(conv) == ["b/kernel"]
    # Paths alike but for their numbers: the first in natural order, in which 2 comes before 10.
    mlp = {"Dense_10/kernel": (4, 6), "Dense_9/kernel": (6, 8), "Dense_2/kernel": (8, 4)}
    assert dense_layers(mlp) == ["Dense_2/kernel"]
    assert dense_layers(mlp, dense_first=False) == []
    assert dense_layers(mlp, dense_first="Dense_9/kernel") == ["Dense_9/kernel"]
    with pytest.raises(ValueError, match="Dense_8/kernel"):
        dense_layers(mlp, dense_first="Dense_8/kernel")


@pytest.mark.parametrize(
    ("paths", "shape"),
    [
        (["head/kernel"], (8, 8)),
        (["1/0", "0/0"], (8, 8)),  # lists or tuples of weights and biases
        (["layers/10/kernel/value", "layers/9/kernel/value"], (8, 8)),
        ([".layers[2].weight", ".layers[0].weight"], (8, 8)),
        (["mlp/~/linear_1/w", "mlp/~/linear_0/w"], (8, 8)),
        (["block1/dense0/kernel", "block0/dense1/kernel", "block0/dense0/kernel"], (8, 8)),
        (["blocks/kernel/1", "blocks/kernel/0"], (3, 3, 8, 8)),  # a stack, as it is counted
        (["conv2/weight", "conv1/weight"], (8, 8, 3, 3)),
        (["x\u00b22/w", "x\u00b21/w"], (8, 8)),  # a superscript is a digit, and no number
    ],
)
def test_numbers_tell_the_first_layer(paths, shape):
    assert dense_layers(dict.fromkeys(paths, shape)) == [paths[-1]]


@pytest.mark.parametrize(
    ("shapes", "unclear"),
    [
        ({"encoder/kernel": (8, 4), "decoder/kernel": (4, 8)}, ["encoder", "decoder"]),
        ({"torso/kernel": (8, 4), "action_head/kernel": (4, 8)}, ["torso", "action_head"]),
        ({"hidden": {}, "Dense_0": {}, "Dense_1": {}}, ["hidden", "Dense_0", "Dense_1"]),
        ({"0/a": {}, "0/b": {}, "1/a": {}}, ["0/a", "0/b", "1/a"]),
        # Two convolutions that see one channel (depthwise ones, say).
        ({"a/kernel": (3, 3, 1, 8), "b/kernel": (3, 3, 1, 8)}, ["a/kernel", "b/kernel"]),
        # As Equinox and PyTorch have them, (out, in, window): the fewest would be the window's.
        ({"stem/weight": (8, 3, 5, 5), "conv/weight": (8, 8, 3, 3)}, ["stem", "conv"]),
    ],
)
def test_uniform_asks_where_nothing_tells_the_first_layer(shapes, unclear):
    shapes = {path: shape or (8, 8) for path, shape in shapes.items()}
    with pytest.raises(
        ValueError, match="dense_first=True cannot tell which.*" + ".*".join(unclear)
    ):
        dense_layers(shapes)
    named = next(path for path in shapes if path.startswith(unclear[0]))
    with pytest.raises(ValueError, match=f"for example dense_first='{named}'"):
        dense_layers(shapes)
    assert dense_layers(shapes, dense_first=named) == [named]
    assert dense_layers(shapes, dense_first=False) == []


def test_per_layer():
    distribution = sx.PerLayer({"Dense_[01]/*": 0.5, "Dense_2/kernel": 0.9})
    assert distribution.layer_counts(MLP) == {
        "Dense_0/kernel": 300,
        "Dense_1/kernel": 600,
        "Dense_2/kernel": 40,
    }
    with pytest.raises(ValueError, match="Conv_"):
        sx.PerLayer({"*": 0.5, "Conv_*": 0.9}).layer_counts(MLP)


# --- overrides -------------------------------------------------------------------------------

WITH_OVERRIDES = (sx.ERK, sx.ER, lambda s, **kw: sx.Uniform(s, dense_first=False, **kw))


@pytest.mark.parametrize("make", WITH_OVERRIDES, ids=("ERK", "ER", "Uniform"))
def test_overrides_stand_outside_the_budget(make):
    """The others come out as if the overridden layers did not exist."""
    overrides = {"fc/*": 0.5, "*/shortcut/kernel": 0.0}
    counts = make(0.9, overrides=overrides).layer_counts(SHAPES)
    outside = {path for path in SHAPES if any(oracles.matches(p, path) for p in overrides)}
    assert len(outside) == 5
    assert counts["fc/kernel"] == 2048 * 500
    assert all(counts[path] == math.prod(SHAPES[path]) for path in outside - {"fc/kernel"})
    rest = {path: shape for path, shape in SHAPES.items() if path not in outside}
    assert {path: counts[path] for path in rest} == make(0.9).layer_counts(rest)


@pytest.mark.parametrize("make", WITH_OVERRIDES, ids=("ERK", "ER", "Uniform"))
def test_an_override_that_matches_nothing(make):
    with pytest.raises(ValueError, match=r"Dense_9/\*"):
        make(0.5, overrides={"Dense_0/*": 0.1, "Dense_9/*": 0.1}).layer_counts(MLP)


# --- layers without weights ------------------------------------------------------------------


@pytest.mark.parametrize("empty", [(0, 4), (4, 0), (3, 0, 4, 4), (0,), (0, 0)])
def test_layers_without_weights_are_left_out(empty):
    shapes = {"a/kernel": (8, 10), "e/kernel": empty, "b/kernel": (20, 8)}
    full = {path: shape for path, shape in shapes.items() if shape != empty}
    for distribution in (
        sx.ERK(0.5),
        sx.ER(0.5, overrides={"a/*": 0.2}),
        sx.Uniform(0.5, dense_first="a/kernel"),
        sx.Uniform(0.5, dense_first=False),
        sx.PerLayer({"*/kernel": 0.5}),
    ):
        assert distribution.layer_counts(shapes) == distribution.layer_counts(full)
    # What is left tells the first layer.
    assert sx.Uniform(0.5).layer_counts({"e": empty, "a": (4, 4)}) == {"a": 16}
    for distribution in (sx.ERK(0.5), sx.ER(0.5), sx.Uniform(0.5)):
        assert distribution.layer_counts({"e": empty}) == {}


def test_a_scalar_is_a_layer_of_one_weight():
    """raw: 1 and (4 + 4) / 16 = 0.5; eps * (1 + 8) = 8.5, so 0.94 and 7.6 weights."""
    for distribution in (sx.ERK(0.5), sx.ER(0.5)):
        assert distribution.layer_counts({"t": (), "w": (4, 4)}) == {"t": 1, "w": 8}
        with pytest.raises(ValueError, match=r"layer 't' of shape \(\) would keep no weight"):
            distribution.layer_counts({"t": ()})


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5, 95, math.nan, math.inf])
@pytest.mark.parametrize(
    "make",
    [
        sx.Uniform,
        sx.ER,
        sx.ERK,
        lambda s: sx.PerLayer({"*": s}),
        lambda s: sx.ERK(0.5, overrides={"Dense_1/*": s}),
    ],
    ids=("Uniform", "ER", "ERK", "PerLayer", "override"),
)
def test_sparsity_outside_its_range(make, sparsity):
    with pytest.raises(ValueError, match=rf"(?s)(sparsit|overrides).*{sparsity}"):
        make(sparsity).layer_counts(MLP)


@pytest.mark.parametrize(
    "distribution",
    [
        sx.Uniform(0.999, dense_first=False),
        sx.PerLayer({"*": 0.999}),
        sx.ERK(0.5, overrides={"Dense_2/*": 0.999}),
    ],
    ids=("Uniform", "PerLayer", "override"),
)
def test_a_layer_that_would_keep_no_weight(distribution):
    """0.1 % of 400 weights is less than half a weight; of 10,000 it is ten."""
    with pytest.raises(ValueError, match="Dense_2/kernel"):
        distribution.layer_counts({"Dense_0/kernel": (100, 100), "Dense_2/kernel": (20, 20)})


@pytest.mark.parametrize("make", [sx.ER, sx.ERK])
def test_er_that_would_leave_a_layer_empty(make):
    # One weight stays, shared out as n_in + n_out, 3 to 200: 0.015 of it for the small layer.
    shapes = {"small": (1, 2), "large": (100, 100)}
    with pytest.raises(ValueError, match="small"):
        make(0.9999).layer_counts(shapes)


@pytest.mark.parametrize("make", [lambda: sx.Uniform(0.5), lambda: sx.ER(0.5), lambda: sx.ERK(0.5)])
def test_distributions_are_frozen_values(make):
    assert make() == make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().sparsity = 0.1


# --- any shapes ------------------------------------------------------------------------------

shapes_strategy = st.dictionaries(
    st.sampled_from([f"layer_{i}/kernel" for i in range(12)]),
    st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple),
    min_size=1,
)


@given(shapes_strategy, st.floats(0, 0.99))
@pytest.mark.parametrize("kernel", [True, False], ids=("ERK", "ER"))
def test_er_and_erk_on_any_shapes(kernel, shapes, sparsity):
    density = oracles.erk_density(shapes, sparsity, kernel=kernel)
    exact = oracles.expected_counts(density, shapes)
    distribution = (sx.ERK if kernel else sx.ER)(sparsity)
    try:
        counts = distribution.layer_counts(shapes)
    except ValueError as error:
        # The only excuse: some layer's share rounds to nothing, and the message names one.
        assert any(path in str(error) and exact[path] < 1 for path in shapes)  # noqa: PT017
        return
    check_counts(counts, density, shapes)
    assert all(1 <= counts[path] <= size for path, size in sizes(shapes).items())
    assert abs(sum(counts.values()) - (1 - sparsity) * sum(sizes(shapes).values())) <= len(shapes)


@given(shapes_strategy)
def test_no_sparsity_keeps_everything(shapes):
    uniform = sx.Uniform(0.0, dense_first=False)
    for distribution in (uniform, sx.ER(0.0), sx.ERK(0.0), sx.PerLayer({"*": 0.0})):
        assert distribution.layer_counts(shapes) == sizes(shapes)
