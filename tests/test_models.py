"""The models' parameters, shapes, dtypes, transformations and arguments.

Parameters are counted against torchvision's published numbers and by hand. What the models compute
is checked in test_models_numpy.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparseopt_jax import models
from tests import oracles
from tests.model_variables import KEY, images, random_variables, shapes, train_step


def count(model, *input_shape):
    return sum(v.size for k, v in shapes(model, *input_shape).items() if k.startswith("params/"))


# --- parameters ------------------------------------------------------------------------------


def test_parameter_counts_of_torchvision():
    assert count(models.ResNet18(), 1, 224, 224, 3) == 11_689_512
    assert count(models.ResNet50(), 1, 224, 224, 3) == 25_557_032
    # Another number of classes changes the head alone: 2,048 weights and a bias for each.
    assert count(models.ResNet50(10), 1, 32, 32, 3) == 25_557_032 - 990 * 2049


def test_resnet50_kernels_against_the_table():
    found = [v.shape for k, v in shapes(models.ResNet50(), 1, 224, 224, 3).items() if "kernel" in k]
    assert sorted(found) == sorted(shape for shape, _ in oracles.resnet50_layers().values())


def test_resnet20_parameter_counts_by_hand():
    stem = 9 * 3 * 16
    stage1 = 6 * (9 * 16 * 16)
    stage2 = 9 * 16 * 32 + 5 * (9 * 32 * 32)
    stage3 = 9 * 32 * 64 + 5 * (9 * 64 * 64)
    # A scale and a bias for each channel of the 7, 6 and 6 convolutions of each width.
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    head = 64 * 10 + 10
    identity = stem + stage1 + stage2 + stage3 + norms + head
    assert identity == 269_722  # the 0.27 M of He et al. (2016), table 6
    between = 16 * 32 + 32 * 64
    norms = 2 * (32 + 64)
    for shortcut, extra in (
        ("identity", 0),
        ("conv1x1", between + norms),
        ("conv3x3", 9 * between + norms),
    ):
        assert count(models.ResNet20(shortcut=shortcut), 1, 32, 32, 3) == identity + extra
    assert count(models.ResNet20(), 1, 32, 32, 3) == identity + 9 * between + norms


def test_depth_and_width():
    def convolutions(model):
        return {k: v.shape for k, v in shapes(model, 1, 16, 16, 3).items() if k.endswith("kernel")}

    for depth in (8, 14, 32):
        named = [k for k in convolutions(models.SmallResNet(depth)) if "shortcut" not in k]
        assert len(named) == depth
    narrow, wide = convolutions(models.ResNet20()), convolutions(models.ResNet20(width=4))
    for path, shape in narrow.items():
        c_in = shape[-2] if "conv_stem" in path else 4 * shape[-2]
        c_out = shape[-1] if "head" in path else 4 * shape[-1]
        assert wide[path] == (*shape[:-2], c_in, c_out)


def test_mlp_parameter_counts_by_hand():
    def mlp(norm):
        return count(models.MLP((300, 100), num_classes=10, norm=norm), 2, 28, 28)

    kernels = 784 * 300 + 300 * 100 + 100 * 10
    assert mlp("none") == kernels + 300 + 100 + 10  # biases
    assert mlp("batch") == mlp("layer") == kernels + 2 * 300 + 2 * 100 + 10  # scales and biases
    assert count(models.MLP((), num_classes=10), 2, 784) == 7850


def test_paths_users_rely_on():
    def bn(path):
        stats = [f"batch_stats/{path}/{name}" for name in ("mean", "var")]
        return [*stats, *(f"params/{path}/{name}" for name in ("scale", "bias"))]

    expected = ["params/conv_stem/kernel", "params/head/kernel", "params/head/bias", *bn("bn_stem")]
    for stage in (1, 2, 3):
        layers = ("1", "2") if stage == 1 else ("1", "2", "_shortcut")
        for layer in layers:
            expected.append(f"params/stage{stage}_block0/conv{layer}/kernel")
            expected += bn(f"stage{stage}_block0/bn{layer}")
    assert sorted(shapes(models.ResNet8(), 1, 8, 8, 3)) == sorted(expected)

    head = ["params/head/bias", "params/head/kernel"]
    for norm, layers in (
        ("none", ["params/dense0/bias", "params/dense0/kernel"]),
        ("layer", ["params/dense0/kernel", "params/norm0/bias", "params/norm0/scale"]),
        ("batch", ["params/dense0/kernel", *bn("norm0")]),
    ):
        assert sorted(shapes(models.MLP(norm=norm), 1, 8)) == sorted(layers + head)


@pytest.mark.parametrize("shape", [(64, 512), (3, 3, 16, 64)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_he_normal(shape, dtype):
    kernel = jax.device_get(models.he_normal(KEY, shape, dtype))
    assert kernel.dtype == dtype
    assert kernel.shape == shape
    flat = np.float64(kernel).ravel()
    std = np.sqrt(2 / np.prod(shape[:-1]))
    # Five standard errors, for a normal distribution's mean, variance and fourth moment.
    error = 5 / np.sqrt(flat.size)
    assert abs(flat.mean()) < error * std
    assert abs(np.mean(flat**2) / std**2 - 1) < error * np.sqrt(2)
    assert abs(np.mean(flat**4) / std**4 - 3) < error * np.sqrt(96)
    if dtype == jnp.float32:
        initializer = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        np.testing.assert_allclose(kernel, initializer(KEY, shape), rtol=1e-6)


def test_every_kernel_starts_he_normal_and_differs():
    model = models.ResNet8(num_classes=10, width=2)
    variables = jax.device_get(jax.jit(model.init)(KEY, jnp.zeros((1, 8, 8, 3))))
    variables = flatten_dict(variables, sep="/")
    starts = {"scale": 1, "bias": 0, "mean": 0, "var": 1}
    firsts = set()
    for path, leaf in variables.items():
        kind = path.split("/")[-1]
        if kind == "kernel":
            ratio = np.var(leaf) * np.prod(leaf.shape[:-1]) / 2
            assert abs(ratio - 1) < 5 * np.sqrt(2 / leaf.size), path
            firsts.add(float(leaf.ravel()[0]))
        else:
            assert (leaf == starts[kind]).all(), path
    assert len(firsts) == len([path for path in variables if path.endswith("kernel")])


@pytest.mark.parametrize("model", [models.ResNet8, models.ResNet50, models.MLP])
def test_kernel_init_reaches_every_kernel(model):
    drawn = []

    def kernel_init(key, shape, dtype):
        drawn.append(tuple(shape))
        return jnp.zeros(shape, dtype)

    found = shapes(model(kernel_init=kernel_init), 1, 32, 32, 3)
    assert sorted(set(drawn)) == sorted({v.shape for k, v in found.items() if "kernel" in k})
    assert len(drawn) >= sum("kernel" in k for k in found)


def test_zero_init_residual_is_the_last_scale_of_each_block():
    for bottleneck, last in ((False, "bn2"), (True, "bn3")):
        options = {"num_classes": 3, "base_channels": 2, "kernel_init": nn.initializers.ones}
        model = models.ResNet((1, 1), bottleneck=bottleneck, zero_init_residual=True, **options)
        variables = jax.device_get(jax.jit(model.init)(KEY, jnp.zeros((1, 32, 32, 3))))
        for path, leaf in flatten_dict(variables["params"], sep="/").items():
            if path.endswith("scale"):
                assert (leaf == (0 if f"/{last}/" in path else 1)).all(), path


# --- shapes and dtypes -----------------------------------------------------------------------


def stage_outputs(model, *input_shape):
    def run(x):
        return model.init_with_output(KEY, x, capture_intermediates=True, mutable=True)

    logits, variables = jax.eval_shape(run, jnp.zeros(input_shape))
    outputs = flatten_dict(variables["intermediates"], sep="/")
    return logits, {path.removesuffix("/__call__"): out[0].shape for path, out in outputs.items()}


def test_resnet50_spatial_sizes():
    logits, outputs = stage_outputs(models.ResNet50(), 2, 224, 224, 3)
    assert logits.shape == (2, 1000)
    assert outputs["conv_stem"] == (2, 112, 112, 64)
    for stage, last, side, channels in (
        (1, 2, 56, 256),
        (2, 3, 28, 512),
        (3, 5, 14, 1024),
        (4, 2, 7, 2048),
    ):
        assert outputs[f"stage{stage}_block0"] == (2, side, side, channels)
        assert outputs[f"stage{stage}_block{last}"] == (2, side, side, channels)
        assert f"stage{stage}_block{last + 1}" not in outputs
        # v1.5: the first 1x1 convolution still works on the larger picture.
        larger = 2 * side if stage > 1 else side
        assert outputs[f"stage{stage}_block0/conv1"] == (2, larger, larger, channels // 4)


@pytest.mark.parametrize("size", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (9, 17, 2)])
def test_small_resnet_halves_twice(size):
    height, width, _ = size
    _, outputs = stage_outputs(models.ResNet20(shortcut="identity"), 2, *size)
    assert outputs["stage1_block2"] == (2, height, width, 16)
    assert outputs["stage2_block2"] == (2, -(-height // 2), -(-width // 2), 32)
    assert outputs["stage3_block2"] == (2, -(-height // 4), -(-width // 4), 64)


MODELS = {
    "resnet8": lambda **k: models.ResNet8(num_classes=7, base_channels=4, **k),
    "bottleneck": lambda **k: models.ResNet((1, 1), bottleneck=True, num_classes=7, **k),
    "mlp_batch": lambda **k: models.MLP((16,), num_classes=7, **k),
    "mlp_layer": lambda **k: models.MLP((16,), num_classes=7, norm="layer", **k),
    "mlp_none": lambda **k: models.MLP((16,), num_classes=7, norm="none", **k),
}


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", MODELS)
def test_dtypes(name, dtype, param_dtype):
    model = MODELS[name](dtype=dtype, param_dtype=param_dtype)

    def run(x):
        variables = model.init(KEY, x)
        return variables, model.apply(
            variables, x, train=True, mutable=["batch_stats", "intermediates"],
            capture_intermediates=True,
        )  # fmt: skip

    variables, (logits, new) = jax.eval_shape(run, jnp.zeros((2, 32, 32, 3)))
    assert logits.dtype == jnp.float32
    assert logits.shape == (2, 7)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype(param_dtype)}
    for collection in (variables, new):
        for leaf in jax.tree.leaves(collection.get("batch_stats", {})):
            assert leaf.dtype == jnp.float32
    for path, (out, *_) in flatten_dict(new["intermediates"], sep="/").items():
        at_the_end = path in ("__call__", "head/__call__")
        assert out.dtype == (jnp.float32 if at_the_end else dtype), path


def test_bfloat16_compute_is_close_to_float32():
    shape = (4, 16, 16, 3)
    kinds = {dtype: models.ResNet8(5, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)}
    variables = unflatten_dict(random_variables(kinds[jnp.float32], shape), sep="/")
    (exact, exact_new), (rounded, rounded_new) = (
        train_step(model)(variables, images(*shape)) for model in kinds.values()
    )
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded, exact, atol=0.05 * np.abs(exact).max())
    # The statistics of a bfloat16 network: averages of many roundings, so closer than 2**-8.
    for a, b in zip(jax.tree.leaves(rounded_new), jax.tree.leaves(exact_new), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.01, atol=0.005)


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_no_batch_stats_without_batch_norm(norm):
    model = models.MLP((6,), num_classes=3, norm=norm)
    x = images(4, 8)
    variables = model.init(KEY, x)
    assert set(variables) == {"params"}
    logits, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
    assert not new
    np.testing.assert_array_equal(logits, model.apply(variables, x, train=False))


def test_integer_images_are_cast():
    model = models.MLP((6,), num_classes=3)
    x = np.arange(32, dtype=np.uint8).reshape(4, 8)
    variables = model.init(KEY, x)
    np.testing.assert_array_equal(model.apply(variables, x), model.apply(variables, x * 1.0))


# --- transformations -------------------------------------------------------------------------

TINY = models.ResNet((1, 1), num_classes=3, base_channels=4, stem="conv3x3")


def test_vmap_over_seeds():
    model = models.ResNet((1,), num_classes=3, base_channels=4, stem="conv3x3")
    x = images(4, 8, 8, 1)
    keys = jax.random.split(KEY, 3)

    @jax.jit
    def run(key):
        variables = model.init(key, x)
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    together = jax.device_get(jax.jit(jax.vmap(run))(keys))
    for i, key in enumerate(keys):
        alone = jax.device_get(run(key))
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)
    assert not np.allclose(together[0][0], together[0][1])


def test_sharded_batch_is_normalised_as_a_whole():
    assert jax.device_count() >= 8
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    # Each device's images have another mean, which its own statistics would take away.
    x = images(16, 8, 8, 1) + np.arange(16, dtype=np.float32)[:, None, None, None]
    variables = unflatten_dict(random_variables(TINY, x.shape), sep="/")
    step = train_step(TINY)
    alone = jax.device_get(step(variables, x))
    sharded = step(
        jax.device_put(variables, NamedSharding(mesh, P())),
        jax.device_put(x, NamedSharding(mesh, P("data"))),
    )
    assert len(sharded[0].sharding.device_set) == 8
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_parameter():
    x = images(8, 8, 8, 1)
    values = unflatten_dict(random_variables(TINY, x.shape), sep="/")

    @jax.jit
    @jax.grad
    def gradient(params):
        variables = {"params": params, "batch_stats": values["batch_stats"]}
        logits, _ = TINY.apply(variables, x, train=True, mutable=["batch_stats"])
        return jnp.mean(jax.nn.log_softmax(logits)[:, 0])

    gradients = jax.device_get(gradient(values["params"]))
    for path, leaf in flatten_dict(gradients, sep="/").items():
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 1e-6, path


# --- bad arguments ---------------------------------------------------------------------------

BAD = [
    (lambda: models.ResNet20(shortcut="conv"), ValueError, r"shortcut.*'conv3x3'.*got 'conv'"),
    (lambda: models.ResNet50(shortcut=None), ValueError, "shortcut.*got None"),
    (lambda: models.ResNet((1,), stem="large"), ValueError, "stem.*'conv7x7_pool'.*got 'large'"),
    (lambda: models.MLP(norm="group"), ValueError, "norm.*'batch', 'layer', 'none'.*got 'group'"),
    (lambda: models.SmallResNet(depth=18), ValueError, r"depth.*6 n \+ 2.*got 18"),
    (lambda: models.SmallResNet(depth=2), ValueError, r"depth.*6 n \+ 2.*got 2"),
    (lambda: models.SmallResNet(depth="20"), TypeError, "depth.*got '20'"),
    (lambda: models.ResNet20(num_classes=0), ValueError, "num_classes.*at least 1.*got 0"),
    (lambda: models.ResNet18(num_classes=-1), ValueError, "num_classes.*at least 1.*got -1"),
    (lambda: models.MLP(num_classes=10.0), TypeError, "num_classes.*int.*got 10.0"),
    (lambda: models.ResNet20(width=0), ValueError, "width.*at least 1.*got 0"),
    (lambda: models.ResNet50(width=0.5), TypeError, "width.*int.*got 0.5"),
    (lambda: models.ResNet50(width=True), TypeError, "width.*int.*got True"),
    (lambda: models.ResNet50(base_channels=0), ValueError, "base_channels.*at least 1.*got 0"),
    (lambda: models.ResNet(()), ValueError, r"stage_sizes.*at least one stage.*got \(\)"),
    (lambda: models.ResNet((2, 0)), ValueError, r"stage_sizes\[1\].*at least 1.*got 0"),
    (lambda: models.ResNet(3), TypeError, "stage_sizes.*sequence.*got 3"),
    (lambda: models.MLP(features=512), TypeError, "features.*sequence.*got 512"),
    (lambda: models.MLP(features=(8, 0)), ValueError, r"features\[1\].*at least 1.*got 0"),
    (lambda: models.MLP(dtype=jnp.int32), ValueError, "^dtype.*bfloat16.*got.*int32"),
    (lambda: models.ResNet18(dtype=None), ValueError, "^dtype.*bfloat16.*got None"),
    (lambda: models.ResNet8(param_dtype="int8"), ValueError, "param_dtype.*float32.*got 'int8'"),
    (lambda: models.ResNet8(kernel_init=1.0), TypeError, r"kernel_init.*function.*got 1\.0"),
    (lambda: models.ResNet20(depth=8), TypeError, "depth"),
    (lambda: models.ResNet50(bottleneck=False), TypeError, "bottleneck"),
    (lambda: models.ResNet18(groups=2), TypeError, "groups"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_inputs_of_the_wrong_rank():
    with pytest.raises(ValueError, match=r"x must have shape \(batch, height, .*got \(8, 8, 1\)"):
        models.ResNet8().init(KEY, jnp.zeros((8, 8, 1)))
    with pytest.raises(ValueError, match=r"x must have shape \(batch, \.\.\.\), got \(8,\)"):
        models.MLP().init(KEY, jnp.zeros(8))


def test_models_are_values():
    assert models.ResNet20(num_classes=5) == models.SmallResNet(20, 5)
    assert hash(models.MLP(features=[8, 8])) == hash(models.MLP(features=(8, 8)))
