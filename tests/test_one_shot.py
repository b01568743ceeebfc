"""masks_from_scores and Global against sorts in NumPy."""

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sparseopt_jax as sx
from tests import oracles
from tests.helpers import KERNELS, flat, make_params

HOSTILE = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 1.0, -1.0, 1e-40], np.float32)


def hostile(seed=0, dtype=np.float32):
    """Scores full of ties, infinities and NaN for the small network."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: rng.choice(HOSTILE, p.shape).astype(dtype), make_params())


def kernels(tree):
    return {path: flat(tree)[path] for path in KERNELS}


def check_largest(masks, scores, counts):
    """The largest ``counts`` of the layers that it names, everything else dense."""
    assert jax.tree.structure(masks) == jax.tree.structure(scores)
    for path, mask in flat(masks).items():
        score = flat(scores)[path]
        expected = oracles.top_k_mask(score, counts.get(path, score.size))
        np.testing.assert_array_equal(mask, expected, err_msg=path)


def global_counts(scores, sparsity, floor):
    """What ``Global`` gives each layer, by sorting all: the floors first, then whoever is best."""
    size = {path: score.size for path, score in scores.items()}
    budget = round((1 - sparsity) * sum(size.values()))
    if isinstance(floor, int):
        least = {path: max(1, min(n, floor)) for path, n in size.items()}
    else:
        least = {path: max(1, math.floor(n * floor)) for path, n in size.items()}
    kept = [oracles.top_k_mask(score, least[path]).ravel() for path, score in scores.items()]
    whole = np.concatenate([np.ravel(score) for score in scores.values()])
    rest = ~np.concatenate(kept)
    chosen = ~rest | oracles.top_k_mask(whole, budget - sum(least.values()), rest)
    parts = np.split(chosen, np.cumsum(list(size.values()))[:-1])
    return {path: int(part.sum()) for path, part in zip(size, parts, strict=True)}


@pytest.mark.parametrize("distribution", [sx.ERK(0.8), sx.Uniform(0.9)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_masks_are_the_largest_of_each_layer(distribution, dtype):
    scores = hostile(dtype=dtype)
    masks = jax.jit(lambda s: sx.masks_from_scores(s, distribution))(scores)
    check_largest(masks, scores, distribution.layer_counts(KERNELS))


@pytest.mark.parametrize("floor", [1, 0, 25, 200, 0.05, 0.1])
def test_global_against_a_sort_of_the_whole_network(floor):
    scores = hostile()
    # One layer scores lowest, so that it keeps its floor alone.
    scores["Dense_1"]["kernel"] = np.full((20, 15), np.nan, np.float32)
    if floor == 25:  # And dtypes may differ.
        scores["Dense_0"]["kernel"] = scores["Dense_0"]["kernel"].astype(jnp.bfloat16)
    counts = global_counts(kernels(scores), 0.5, floor)
    assert sum(counts.values()) == 630  # Half of 360 + 600 + 300.
    assert counts["Dense_1/kernel"] == {1: 1, 0: 1, 25: 25, 200: 200, 0.05: 15, 0.1: 30}[floor]
    masks = jax.jit(lambda s: sx.masks_from_scores(s, sx.Global(0.5, floor)))(scores)
    check_largest(masks, scores, counts)


def test_global_beside_others():
    """Overrides stand outside the budget, and other patterns of a mapping do, too."""
    scores = hostile()
    inside = kernels(scores)
    del inside["Conv_0/kernel"]
    counts = {"Conv_0/kernel": 90} | global_counts(inside, 0.7, 1)
    masks = sx.masks_from_scores(scores, sx.Global(0.7, overrides={"Conv_0/*": 0.75}))
    check_largest(masks, scores, counts)
    by_pattern = {"Conv_*": sx.PerLayer({"*": 0.75}), "Dense_*": sx.Global(0.7)}
    check_largest(sx.masks_from_scores(scores, by_pattern), scores, counts)


def test_layers_of_a_stack_are_layers_of_their_own():
    """Stacked along axis 1 the masks are those of the layers apart, Global's counts included."""
    rng = np.random.default_rng(0)
    layers = rng.normal(size=(3, 8, 5)).astype(np.float32) * np.array([1, 2, 4.0])[:, None, None]
    head = rng.normal(size=(5, 6)).astype(np.float32)
    apart = {"block": list(layers.astype(np.float32)), "head": head}
    stacked = {"block": np.stack(apart["block"], axis=1), "head": head}
    for distribution in (sx.Global(0.6, floor=0.1), sx.ERK(0.6)):
        masks = sx.masks_from_scores(stacked, distribution, batch_axes={"block": 1})
        expected = sx.masks_from_scores(apart, distribution)
        np.testing.assert_array_equal(masks["block"], np.stack(expected["block"], axis=1))
        np.testing.assert_array_equal(masks["head"], expected["head"])


def test_under_vmap_each_has_masks_of_its_own():
    def masks_of(scores):
        return sx.masks_from_scores(scores, sx.Global(0.7, 0.1))

    trees = [hostile(seed) for seed in range(3)]
    together = jax.vmap(masks_of)(jax.tree.map(lambda *leaves: np.stack(leaves), *trees))
    for i, scores in enumerate(trees):
        check_largest(
            jax.tree.map(lambda m, i=i: m[i], together),
            scores,
            global_counts(kernels(scores), 0.7, 0.1),
        )


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(mode):
    """Sharded along different axes, the masks are those of one device."""
    scores = {"a": np.zeros((16, 8), np.float32), "b": np.zeros((8, 24), np.float32)}
    rng = np.random.default_rng(0)
    scores = {name: rng.choice(HOSTILE, a.shape) for name, a in scores.items()}
    expected = sx.masks_from_scores(scores, sx.Global(0.7))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(mode,))
    specs = {"a": PartitionSpec("x", None), "b": PartitionSpec(None, "x")}
    with jax.set_mesh(mesh):
        placed = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in scores.items()}
        masks = jax.jit(lambda s: sx.masks_from_scores(s, sx.Global(0.7)))(placed)
    jax.tree.map(np.testing.assert_array_equal, masks, expected)
    if mode == AxisType.Explicit:
        assert masks["b"].sharding.spec == specs["b"]


def test_a_run_trains_on_from_the_masks():
    """Pruned by magnitude once, with the counts that Global found, and static from there."""
    params = jax.tree.map(jnp.asarray, make_params())
    masks = sx.masks_from_scores(jax.tree.map(jnp.abs, params), sx.Global(0.9))
    tx = sx.sparse_training(optax.sgd(0.1), masks=masks, topology=sx.Static())
    kept = sx.get_masks(tx.init(params))
    jax.tree.map(np.testing.assert_array_equal, kept, masks)


def test_a_distribution_of_ones_own_by_scores():
    """Each layer keeps what is positive; where there are no scores, the half."""

    class Positive:
        def layer_counts(self, layers):
            return {path: math.prod(shape) // 2 for path, shape in layers.items()}

        def counts_from_scores(self, scores):
            return {path: jnp.sum(a > 0, dtype=jnp.int32) for path, a in scores.items()}

    scores = {"a": np.array([[3.0, -1.0, 2.0, 1.0]]), "b": np.array([[-1.0, -2.0]])}
    for masks_of in (sx.masks_from_scores, jax.jit(sx.masks_from_scores, static_argnums=1)):
        masks = masks_of(scores, Positive())
        assert jax.tree.map(np.ndarray.tolist, jax.tree.map(np.asarray, masks)) == {
            "a": [[True, False, True, True]],
            "b": [[False, False]],
        }
    masks = sx.init_masks(jax.random.key(0), scores, Positive())
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ({"w": 9}, ValueError, "layer 'w' of 8 weights: count must be at most 8, got 9"),
        ({"w": -1}, ValueError, "count must be at least 0, got -1"),
        ({"w": 2.5}, TypeError, r"count must be an int, got 2\.5"),
        ({"v": 2}, ValueError, "counts 'v', which is none of the layers: w"),
    ],
)
def test_counts_that_no_layer_can_have(counts, error, message):
    class Wrong:
        def layer_counts(self, layers):
            return counts

    with pytest.raises(error, match=message):
        sx.init_masks(jax.random.key(0), {"w": jnp.ones((2, 4))}, Wrong())


def test_what_cannot_be_ranked_is_named():
    with pytest.raises(TypeError, match="scores leaf 'kernel' has dtype int32; only float16"):
        sx.masks_from_scores({"kernel": jnp.ones((2, 2), jnp.int32)}, sx.ERK(0.5))
    with pytest.raises(ValueError, match=r"no leaf of scores.* scores has bias \(2,\)"):
        sx.masks_from_scores({"bias": jnp.ones(2)}, sx.ERK(0.5))
    shape = jax.ShapeDtypeStruct((2**15, 2**15), np.float32)
    with pytest.raises(ValueError, match=r"Global counts in int32.*got 2147483648: give parts of"):
        jax.eval_shape(lambda s: sx.masks_from_scores(s, sx.Global(0.5)), {"a": shape, "b": shape})


# --- Global without scores -------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=6),
    sparsity=st.floats(0, 0.99),
    floor=st.one_of(st.integers(0, 60), st.floats(0, 1)),
)
def test_counts_by_shape_are_in_proportion_and_add_up(sizes, sparsity, floor):
    shapes = {f"layer{i}": (1, size) for i, size in enumerate(sizes)}
    budget = round((1 - sparsity) * sum(sizes))
    least = [
        max(1, min(n, floor) if isinstance(floor, int) else math.floor(n * floor)) for n in sizes
    ]
    if sum(least) > budget:
        with pytest.raises(ValueError, match=f"asks for {sum(least)} weights.* leaves {budget}"):
            sx.Global(sparsity, floor).layer_counts(shapes)
        return
    counts = list(sx.Global(sparsity, floor).layer_counts(shapes).values())
    assert sum(counts) == budget
    assert all(low <= k <= n for low, k, n in zip(least, counts, sizes, strict=True))
    # One density for all whose floor lies below it, found by bisection, to within a weight.
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        enough = sum(max(f, middle * n) for f, n in zip(least, sizes, strict=True)) >= budget
        low, high = (low, middle) if enough else (middle, high)
    for k, f, n in zip(counts, least, sizes, strict=True):
        assert abs(k - max(f, high * n)) < 1 + 1e-6


def test_counts_by_shape_by_hand():
    """A quarter of 400 weights stays: 100, of which floors of 30 take 60 and leave a 40."""
    shapes = {"a": (10, 20), "b": (10, 10), "head": (10, 10)}
    assert sx.Global(0.75).layer_counts(shapes) == {"a": 50, "b": 25, "head": 25}
    by_pattern = sx.Global(0.75, overrides={"head": 0.6})
    assert by_pattern.layer_counts(shapes) == {"a": 50, "b": 25, "head": 40}
    with pytest.raises(ValueError, match=r"floor=40 asks for 120 weights of 3 layers.* leaves 100"):
        sx.Global(0.75, floor=40).layer_counts(shapes)
    assert sx.Global(0.75, floor=30).layer_counts(shapes) == {"a": 40, "b": 30, "head": 30}
    assert sx.Global(0.75, floor=0.25).layer_counts(shapes) == {"a": 50, "b": 25, "head": 25}
    # 7 of 20 weights: 3.5, 2.45 and 1.05; the largest remainder gets the one that is left.
    uneven = {"a": (1, 10), "b": (1, 7), "c": (1, 3)}
    assert sx.Global(0.65).layer_counts(uneven) == {"a": 4, "b": 2, "c": 1}


def test_init_masks_takes_global():
    params = make_params()
    masks = sx.init_masks(jax.random.key(0), params, sx.Global(0.8))
    expected = sx.Global(0.8).layer_counts(KERNELS)
    assert {p: int(m.sum()) for p, m in kernels(masks).items()} == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, r"sparsity must lie in \[0, 1\)"),
        ({"sparsity": 0.5, "floor": -1}, ValueError, "floor must be at least 0, got -1"),
        ({"sparsity": 0.5, "floor": 1.5}, ValueError, r"density in \[0, 1\].*got 1\.5"),
        ({"sparsity": 0.5, "floor": float("nan")}, ValueError, "floor must be a density"),
        ({"sparsity": 0.5, "floor": "1"}, TypeError, "floor must be a number of weights"),
        ({"sparsity": 0.5, "floor": True}, TypeError, "floor must be a number of weights"),
        ({"sparsity": 0.5, "overrides": 3}, TypeError, "overrides must map"),
    ],
)
def test_bad_settings_of_global(arguments, error, message):
    with pytest.raises(error, match=message):
        sx.Global(**arguments)
