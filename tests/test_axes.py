"""Out and batch axes: against what real layers compute, and stacks against their layers."""

import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import sparseopt_jax as sx
from sparseopt_jax.axes import from_layers, layer_shape, layers_of, to_layers
from tests import oracles
from tests.helpers import flat


def random_mask(shape, seed=0, density=0.4):
    return np.random.default_rng(seed).random(shape) < density


# --- real layers -----------------------------------------------------------------------------

# Each with an input of ones that just fills one window, so that with a kernel of zeros and ones a
# neuron's output is its number of active incoming weights.
LAYERS = {
    "dense": (nn.Dense(5, use_bias=False), (7,), -1),
    "dense_general": (nn.DenseGeneral((2, 3), use_bias=False), (7,), (-2, -1)),
    "dense_general_in": (nn.DenseGeneral(5, axis=(-2, -1), use_bias=False), (2, 3), -1),
    "conv": (nn.Conv(5, (3, 2), use_bias=False, padding="VALID"), (1, 3, 2, 4), -1),
    "grouped": (
        nn.Conv(6, (3,), feature_group_count=2, use_bias=False, padding="VALID"),
        (1, 3, 4),
        -1,
    ),
    "depthwise": (
        nn.Conv(4, (3, 3), feature_group_count=4, use_bias=False, padding="VALID"),
        (1, 3, 3, 4),
        -1,
    ),
    "transposed": (nn.ConvTranspose(5, (3,), use_bias=False, padding="SAME"), (1, 9, 4), -1),
    "transposed_kernel": (
        nn.ConvTranspose(5, (3,), use_bias=False, padding="SAME", transpose_kernel=True),
        (1, 9, 4),
        -2,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_fan_in_is_what_the_layer_sums(name):
    module, shape, out_axes = LAYERS[name]
    kernel = jax.eval_shape(module.init, jax.random.key(0), jnp.ones(shape))["params"]["kernel"]
    mask = random_mask(kernel.shape)
    output = module.apply({"params": {"kernel": jnp.float32(mask)}}, jnp.ones(shape))
    if name.startswith("transposed"):
        output = output[0, 4]  # in the middle, where the whole window reaches
    counted = sx.fan_in(jnp.asarray(mask), out_axes)
    np.testing.assert_array_equal(counted, np.asarray(output).reshape(counted.shape))


def test_attention_projections_by_path():
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, use_bias=False)
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((3, 8)))["params"]
    masks = {
        path: random_mask(leaf.shape, i) for i, (path, leaf) in enumerate(flat(params).items())
    }
    assert masks["query/kernel"].shape == (8, 2, 3)
    assert masks["out/kernel"].shape == (2, 3, 8)
    out_axes = {"out/*": -1, "*": (-2, -1)}
    grads = {path: jnp.ones(mask.shape) for path, mask in masks.items()}
    tx = sx.scale_by_sparseopt(out_axes=out_axes)
    scaled, _ = jax.jit(lambda g, m: tx.update(g, tx.init(g), masks=m))(
        grads, jax.tree.map(jnp.asarray, masks)
    )
    for path, mask in masks.items():
        axes = -1 if path == "out/kernel" else (-2, -1)
        factor = oracles.sparseopt_factors({"k": mask}, "layer", axes)["k"]
        np.testing.assert_allclose(scaled[path], np.broadcast_to(factor, mask.shape), rtol=1e-6)


def test_scanned_layers_are_stacked_on_axis_0():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(6, use_bias=False)(x), None

    scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    params = jax.eval_shape(scanned.init, jax.random.key(0), jnp.ones(6), None)["params"]
    kernel = params["Dense_0"]["kernel"]
    assert kernel.shape == (3, 6, 6)
    masks = sx.init_masks(jax.random.key(0), params, sx.Uniform(0.5, False), batch_axes=0)
    mask = np.asarray(masks["Dense_0"]["kernel"])
    assert mask.sum((1, 2)).tolist() == [18, 18, 18]
    counted = sx.fan_in(jnp.asarray(mask), -1, 0)
    assert counted.shape == (3, 6)
    np.testing.assert_array_equal(counted, [oracles.fan_in(layer) for layer in mask])


# --- stacks against their layers -------------------------------------------------------------


@given(st.data())
def test_layers_of_a_stack_round_trip(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=5)))
    batch = tuple(
        data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True, max_size=len(shape) - 1))
    )
    array = np.arange(np.prod(shape)).reshape(shape)
    layers = to_layers(jnp.asarray(array), batch)
    rest = tuple(axis for axis in range(len(shape)) if axis not in batch)
    expected = array.transpose(*batch, *rest).reshape(-1, *(shape[axis] for axis in rest))
    np.testing.assert_array_equal(layers, expected)
    assert layers.shape == (layers_of(shape, batch), *layer_shape(shape, batch))
    np.testing.assert_array_equal(from_layers(layers, shape, batch), array)


def stack_and_layers():
    """Three layers, one of them dense, stacked along the middle axis, and one by itself."""
    layers = [random_mask((8, 5), 1), np.ones((8, 5), bool), random_mask((8, 5), 2)]
    alone = random_mask((6, 4), 3)
    stacked = {"blocks": {"kernel": np.stack(layers, 1)}, "head": {"kernel": alone}}
    apart = {"a": layers[0], "b": layers[1], "c": layers[2], "head": alone}
    return stacked, apart


@pytest.mark.parametrize("average_over", ["layer", "network", None])
def test_factors_of_a_stack_are_those_of_its_layers(average_over):
    stacked, apart = stack_and_layers()
    tx = sx.scale_by_sparseopt(average_over, batch_axes={"blocks/*": 1})
    grads = jax.tree.map(lambda m: jnp.ones(m.shape), stacked)
    scaled, _ = jax.jit(lambda g, m: tx.update(g, tx.init(g), masks=m))(
        grads, jax.tree.map(jnp.asarray, stacked)
    )
    factors = oracles.sparseopt_factors(apart, average_over)
    for i, name in enumerate("abc"):
        got = scaled["blocks"]["kernel"][:, i]
        np.testing.assert_allclose(got, np.broadcast_to(factors[name], (8, 5)), rtol=1e-6)
    np.testing.assert_array_equal(scaled["blocks"]["kernel"][:, 1], 1)
    np.testing.assert_allclose(
        scaled["head"]["kernel"], np.broadcast_to(factors["head"], (6, 4)), rtol=1e-6
    )


def test_each_layer_of_a_stack_keeps_what_it_would_keep_by_itself():
    stacked = {"blocks": {"kernel": jnp.ones((3, 40, 30))}, "head": jnp.ones((30, 10))}
    apart = {"blocks": {"kernel": [jnp.ones((40, 30))] * 3}, "head": jnp.ones((30, 10))}
    distribution = sx.ERK(0.8, overrides={"blocks/kernel/1": 0.5})
    expected = sx.init_masks(jax.random.key(0), apart, distribution)
    masks = sx.init_masks(jax.random.key(0), stacked, distribution, batch_axes={"blocks/*": 0})
    assert masks["blocks"]["kernel"].sum((1, 2)).tolist() == [
        int(mask.sum()) for mask in expected["blocks"]["kernel"]
    ]
    assert int(masks["blocks"]["kernel"][1].sum()) == 600
    assert masks["head"].sum() == expected["head"].sum()


@pytest.mark.parametrize("topology", [sx.RigL(1, 0.4, 10), sx.SET(1, 0.4, 10)], ids=["rigl", "set"])
def test_a_stack_is_updated_layer_by_layer(topology):
    """RigL has no ties here, so a stack gives the masks of its layers; SET's counts do."""
    rng = np.random.default_rng(0)
    masks = {name: jnp.asarray(random_mask((8, 5), i)) for i, name in enumerate("abc")}
    weights = {
        name: jnp.where(m, jnp.float32(rng.normal(size=(8, 5))), 0) for name, m in masks.items()
    }
    scores = {name: jnp.float32(rng.normal(size=(8, 5))) for name in masks}

    def stack(tree):
        return {"k": jnp.stack(list(tree.values()), 1)}

    apart = topology.update(jax.random.key(0), 1, masks, weights, scores)
    trees = list(map(stack, (masks, weights, scores)))
    layers = sx.describe_layers(trees[0], batch_axes=1)
    stacked = topology.update(jax.random.key(0), 1, *trees, layers)["k"]
    for i, name in enumerate(masks):
        assert int(stacked[:, i].sum()) == int(masks[name].sum())
        assert (np.asarray(stacked[:, i]) != np.asarray(masks[name])).any()
        if isinstance(topology, sx.RigL):
            np.testing.assert_array_equal(stacked[:, i], apart[name])


def test_a_layer_of_a_stack_that_is_not_finite_keeps_its_mask():
    masks = {"k": jnp.asarray(random_mask((3, 8, 5)))}
    weights = {"k": jnp.where(masks["k"], jax.random.normal(jax.random.key(0), (3, 8, 5)), 0)}
    scores = {"k": jax.random.normal(jax.random.key(1), (3, 8, 5)).at[1, 0, 0].set(jnp.nan)}
    layers = sx.describe_layers(masks, batch_axes=0)
    new = sx.RigL(1, 0.4, 10).update(jax.random.key(0), 1, masks, weights, scores, layers)
    changed = (new["k"] != masks["k"]).any((1, 2)).tolist()
    assert changed == [True, False, True]


def test_a_stacked_bias_is_no_kernel_wherever_its_layers_are():
    """Stacked along the last axis, a bias has its batch axis where a kernel has its neurons."""
    masks = {"kernel": jnp.asarray(random_mask((6, 3, 4))), "bias": jnp.ones((4, 3), bool)}
    grads = jax.tree.map(lambda m: jnp.ones(m.shape), masks)
    tx = sx.scale_by_sparseopt(batch_axes=1)
    scaled, _ = tx.update(grads, tx.init(grads), masks=masks)
    np.testing.assert_array_equal(scaled["bias"], 1)
    gained = sx.scale_to_fan_in(grads, masks, batch_axes=1)
    np.testing.assert_array_equal(gained["bias"], 1)
    drawn = sx.init_masks(
        jax.random.key(0), {"w": grads["kernel"], "b": grads["bias"]}, sx.ERK(0.5), batch_axes=1
    )
    assert bool(drawn["b"].all())


@pytest.mark.usefixtures("standard_promotion")
def test_a_stack_trains_sparsely_and_its_biases_stay_dense():
    """The stacked biases have two dimensions, but a layer's has one; "b" is Haiku's name for it."""
    params = {
        "blocks": {"w": jax.random.normal(jax.random.key(0), (3, 8, 8)), "b": jnp.ones((3, 8))}
    }
    tx = sx.sparse_training(
        sx.sparseopt(0.1, batch_axes=0),
        distribution=sx.Uniform(0.5, False),
        topology=sx.RigL(2, 0.4, 100),
        batch_axes=0,
    )
    opt_state = tx.init(params)
    assert opt_state.fan_in["blocks"]["w"].shape == (3, 1, 8)
    first = sx.get_masks(opt_state)
    assert bool(first["blocks"]["b"].all())

    @jax.jit
    def step(params, opt_state, i):
        grads = jax.tree.map(lambda p: jnp.cos(p + i), params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return jax.tree.map(jnp.add, params, updates), opt_state

    for i in range(5):
        params, opt_state = step(params, opt_state, jnp.float32(i))
    mask = np.asarray(sx.get_masks(opt_state)["blocks"]["w"])
    assert mask.sum((1, 2)).tolist() == [32, 32, 32]
    assert (mask != np.asarray(first["blocks"]["w"])).any((1, 2)).all()
    np.testing.assert_array_equal(np.asarray(params["blocks"]["w"])[~mask], 0)


# --- bad input -------------------------------------------------------------------------------


def test_bad_axes():
    mask = jnp.ones((4, 4), bool)
    with pytest.raises(TypeError, match="out_axes must be an int, a sequence of ints"):
        sx.fan_in(mask, "in")
    with pytest.raises(ValueError, match="out_axes must name at least one axis"):
        sx.fan_in(mask, ())
    with pytest.raises(ValueError, match="which share axis 1"):
        sx.fan_in(mask, -1, 1)
    with pytest.raises(ValueError, match=r"batch_axes must lie in \[-2, 2\)"):
        sx.fan_in(mask, -1, 3)
    with pytest.raises(TypeError, match="out_axes patterns must be strings, got 0"):
        sx.scale_by_sparseopt(out_axes={0: -1})
    with pytest.raises(ValueError, match="for an array of 2 dimensions, got 2 for 'a/kernel'"):
        sx.scale_to_fan_in({"a": {"kernel": jnp.ones((4, 4))}}, {"a": {"kernel": mask}}, {"a/*": 2})
    tx = sx.sparse_training(
        sx.sparseopt(0.1),
        distribution=sx.ERK(0.5),
        topology=sx.Static(),
        out_axes={"atention/*": (-2, -1)},
    )
    with pytest.raises(ValueError, match="out_axes pattern 'atention/\\*' matches none of the"):
        tx.init({"attention": {"kernel": jnp.ones((4, 2, 3))}})
    tx = sx.scale_by_sparseopt(batch_axes={"blok": 0})
    with pytest.raises(ValueError, match="batch_axes pattern 'blok' matches none of the leaves: k"):
        tx.update({"k": jnp.ones((4, 4))}, tx.init(None), masks={"k": mask})
