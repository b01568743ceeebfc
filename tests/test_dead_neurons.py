"""A model without its dead neurons computes what the whole one computes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax as sx
from sparseopt_jax import models
from sparseopt_jax.dead_neurons import Layer


def variables_of(model, shape, seed=0, *, whole=False):
    """Parameters and statistics as training leaves them: nothing is 0 or 1.

    `whole`: small integers, and normalisation that multiplies by powers of two, so that float32
    computes exactly in any order.
    """
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, *shape)))

    def draw(path, leaf):
        name = path[-1].key
        if whole:
            # 1 / sqrt(var + 1e-5) is 1 in float32 for this one, as NumPy and XLA compute it.
            values = {"var": 1 - 1e-5, "scale": rng.choice([0.5, 1, 2], leaf.shape)}
            drawn = values.get(name, rng.integers(-2, 3, leaf.shape))
        else:
            drawn = rng.normal(size=leaf.shape)
            drawn = np.abs(drawn) + 0.5 if name in ("var", "scale") else drawn
        return np.broadcast_to(drawn, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def outputs(model, variables, shape, whole=False):
    rng = np.random.default_rng(9)
    x = rng.integers(-2, 3, (3, *shape)) if whole else rng.normal(size=(3, *shape))
    return np.asarray(jax.jit(model.apply)(variables, x.astype(np.float32)))


def at(variables, path, kind="params"):
    tree = variables[kind]
    for part in path.split("/"):
        tree = tree[part]
    return tree


def unread(variables, layer, neurons):
    """The next layer reads nothing of these."""
    at(variables, layer)["kernel"][..., neurons, :] = 0


def without_inputs(variables, layer, norm, neurons, value):
    """Neurons without inputs, of which relu(norm(0)) or relu(bias) is `value` (-1: 0)."""
    at(variables, layer)["kernel"][..., neurons] = 0
    if norm is None:
        at(variables, layer)["bias"][neurons] = value
    else:
        at(variables, norm, "batch_stats")["mean"][neurons] = 0
        at(variables, norm)["bias"][neurons] = value


def writable(variables):
    return jax.tree.map(np.array, variables)


def check(model, variables, shape, widths, *, exactly=False):
    removal = sx.remove_dead_neurons(model, variables)
    assert removal.widths == widths
    small = outputs(removal.model, removal.variables, shape, whole=exactly)
    full = outputs(model, variables, shape, whole=exactly)
    assert np.isfinite(full).all()
    assert np.std(full) > 0
    if exactly:
        np.testing.assert_array_equal(small, full)
    else:
        np.testing.assert_allclose(small, full, rtol=2e-4, atol=2e-4 * np.abs(full).max())
    # The variables are those that the smaller model asks for.
    fresh = jax.eval_shape(removal.model.init, jax.random.key(0), jnp.ones((1, *shape)))
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), removal.variables, fresh)
    # And nothing more can be removed.
    again = sx.remove_dead_neurons(removal.model, removal.variables)
    assert again.widths == widths
    return removal


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("exactly", [False, True])
def test_an_mlp_without_outputs_and_inputs(norm, exactly):
    model = models.MLP(features=(9, 8, 7), num_classes=3, norm=norm)
    variables = writable(variables_of(model, (5,), whole=exactly))
    names = [f"norm{i}" if norm == "batch" else None for i in range(3)]
    before = jax.tree.map(np.copy, variables)
    unread(variables, "dense1", [0, 4])
    without_inputs(variables, "dense1", names[1], [2, 3], 2)  # constants into the next mean, bias
    without_inputs(variables, "dense2", names[2], [6], 1)  # into the head's bias
    without_inputs(variables, "dense2", names[2], [5], -1)  # 0
    kept = jax.tree.map(np.copy, variables)
    removal = check(model, variables, (5,), ((7, 6, 5),), exactly=exactly)
    jax.tree.map(np.testing.assert_array_equal, variables, kept)  # what was given stays
    # By hand: the head's bias gains the row of the constant, times relu of what norm makes of 0.
    constant = 1.0
    expected = before["params"]["head"]["bias"] + constant * kept["params"]["head"]["kernel"][6]
    np.testing.assert_allclose(removal.variables["params"]["head"]["bias"], expected, rtol=1e-6)


def test_removal_goes_on_to_a_fixed_point():
    """One neuron in front loses its only reader; one behind its only input."""
    model = models.MLP(features=(4, 4, 4), num_classes=2)
    variables = writable(variables_of(model, (3,)))
    p = variables["params"]
    p["head"]["kernel"][0] = 0  # dense2's 0 goes, the only reader of dense1's 1, that of dense0's 2
    p["dense2"]["kernel"][1, 1:] = 0
    p["dense1"]["kernel"][2, [0, 2, 3]] = 0
    p["dense0"]["kernel"][:, 3] = 0  # the only input of dense1's 3, that of dense2's 3
    p["dense1"]["kernel"][[0, 1, 2], 3] = 0
    p["dense2"]["kernel"][[0, 1, 2], 3] = 0
    check(model, variables, (3,), ((2, 2, 2),))


def test_a_layer_keeps_its_last_neuron():
    model = models.MLP(features=(4,), num_classes=2)
    variables = writable(variables_of(model, (3,)))
    unread(variables, "head", [0, 1, 2, 3])
    variables["params"]["head"]["bias"][:] = [1, 2]
    removal = check(model, variables, (3,), ((1,),))
    assert removal.model.features == (1,)


def test_a_linear_classifier_has_nothing_to_remove():
    model = models.MLP(features=(), num_classes=2)
    check(model, writable(variables_of(model, (3,))), (3,), ((),))


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("shortcut", ["conv3x3", "conv1x1", "identity"])
def test_a_resnets_blocks_lose_inner_channels(bottleneck, shortcut):
    model = models.ResNet((1, 1), bottleneck, 3, 6, stem="conv3x3", shortcut=shortcut)
    variables = writable(variables_of(model, (8, 8, 3)))
    one, two = "stage1_block0", "stage2_block0"
    unread(variables, f"{one}/conv2", [0, 2])
    without_inputs(variables, f"{one}/conv1", f"{one}/bn1", [1], -1)  # 0 in a padding too
    without_inputs(variables, f"{one}/conv1", f"{one}/bn1", [4], 1.5)  # stays: the next is padded
    widths = [[3], [12]]
    if bottleneck:
        unread(variables, f"{two}/conv3", [3])
        # A 1x1 convolution is not padded: the constant moves.
        without_inputs(variables, f"{two}/conv2", f"{two}/bn2", [5, 6], 1.5)
        widths = [[3, 6], [12, 9]]
    removal = check(model, variables, (8, 8, 3), tuple(map(tuple, widths)))
    assert removal.model.inner_channels == tuple(map(tuple, widths))


def test_a_constant_in_a_padded_convolution_would_be_wrong():
    """Why such a neuron stays: moved into the mean, it would be wrong at the border alone."""
    model = models.ResNet((1,), False, 3, 6, stem="conv3x3")
    variables = writable(variables_of(model, (8, 8, 3)))
    without_inputs(variables, "stage1_block0/conv1", "stage1_block0/bn1", [4], 1.5)
    check(model, variables, (8, 8, 3), ((6,),))


def test_only_channels_without_outputs_leave_every_bit():
    model = models.ResNet((1, 1), False, 3, 4, stem="conv3x3", shortcut="identity")
    variables = writable(variables_of(model, (4, 4, 3), whole=True))
    unread(variables, "stage1_block0/conv2", [0, 3])
    unread(variables, "stage2_block0/conv2", [1])
    check(model, variables, (4, 4, 3), ((2,), (7,)), exactly=True)


def test_what_is_read_trains_on_alike():
    """Where only neurons without outputs went, gradients are those of the whole model."""
    model = models.MLP(features=(6, 5), num_classes=2)
    variables = writable(variables_of(model, (4,)))
    unread(variables, "dense1", [1, 3])
    removal = sx.remove_dead_neurons(model, variables)
    x = np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32)

    def gradient(model, variables):
        def loss(params):
            both = variables | {"params": params}
            logits, _ = model.apply(both, x, train=True, mutable=["batch_stats"])
            labels = jnp.arange(16) % 2
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.jit(jax.grad(loss))(variables["params"])

    whole, small = gradient(model, variables), gradient(removal.model, removal.variables)
    kept = [0, 2, 4, 5]
    for name, found in (
        ("dense0", whole["dense0"]["kernel"][:, jnp.array(kept)]),
        ("dense1", whole["dense1"]["kernel"][jnp.array(kept)]),
        ("head", whole["head"]["kernel"]),
    ):
        np.testing.assert_allclose(small[name]["kernel"], found, rtol=1e-4, atol=1e-6)


def test_half_precision_and_masks_at_random():
    """The masks of a sparse net, as they fall, and bfloat16 parameters."""
    model = models.MLP(features=(40, 40), num_classes=4, param_dtype=jnp.bfloat16)
    variables = variables_of(model, (30,))
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), variables["params"])
    masks = sx.init_masks(jax.random.key(0), params, sx.Uniform(0.97, dense_first=False))
    variables["params"] = sx.apply_masks(params, masks)
    removal = sx.remove_dead_neurons(model, variables, jax.ShapeDtypeStruct((1, 30), jnp.float32))
    assert removal.variables["params"]["dense0"]["kernel"].dtype == jnp.bfloat16
    assert all(width < 40 for width in removal.widths[0])
    np.testing.assert_allclose(
        outputs(removal.model, removal.variables, (30,)), outputs(model, variables, (30,)),
        rtol=2e-2, atol=2e-2,
    )  # fmt: skip
    one, two = removal.widths[0]
    sizes = [(30 * 40, 30 * one), (40 * 40, one * two), (40 * 4, two * 4)]
    assert [layer.weights for layer in removal.layers] == sizes
    assert [layer.flops for layer in removal.layers] == [(2 * a, 2 * b) for a, b in sizes]
    assert [layer.neurons for layer in removal.layers] == [(40, one), (40, two), (4, 4)]
    assert f"{2960:,} -> {sum(b for _, b in sizes):,}" in str(removal)
    assert "FLOPs" in str(removal)


def test_chains_name_every_convolution_of_the_blocks():
    chains = models.ResNet50().neuron_chains()
    assert len(chains) == 16
    assert chains[0][2] == Layer("stage1_block0/conv3", "stage1_block0/bn3")
    assert all(len(chain) == 3 for chain in chains)
    assert all(len(chain) == 2 for chain in models.ResNet20().neuron_chains())


def test_bad_arguments():
    mlp = models.MLP(features=(4,), num_classes=2)
    variables = variables_of(mlp, (3,))
    layer = models.MLP(features=(4,), num_classes=2, norm="layer")
    for call, error, message in (
        (lambda: sx.remove_dead_neurons(layer, variables), ValueError, "norm='layer'"),
        (lambda: sx.remove_dead_neurons(object(), variables), TypeError, "MLP or ResNet"),
        (lambda: sx.remove_dead_neurons(mlp, variables["params"]), ValueError, '"params"'),
        (
            lambda: sx.remove_dead_neurons(mlp, {"params": variables["params"]}),
            ValueError,
            "no 'norm0' in 'batch_stats'",
        ),
        (
            lambda: sx.remove_dead_neurons(models.ResNet8(), variables),
            ValueError,
            "no 'stage1_block0/conv1' in 'params'",
        ),
        (lambda: models.ResNet8(inner_channels=[[4]]), ValueError, "1 for each of 3 blocks"),
        (lambda: models.ResNet50(inner_channels=[[4]] * 16), ValueError, "2 for each of 16 bl"),
        (
            lambda: models.ResNet8(inner_channels=[[4], [0], [4]]),
            ValueError,
            r"inner_channels\[1\] must be at least 1",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
