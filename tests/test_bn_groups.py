"""Batch normalisation within groups of examples: against NumPy, parts of a batch, and shard_map."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparseopt_jax import models
from sparseopt_jax.models import layers
from tests.model_variables import KEY, images, random_variables, shapes, train_step


class Norm(nn.Module):
    """``layers.batch_norm`` alone."""

    bn_groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        return layers.batch_norm(
            x.astype(self.dtype), train=train, name="norm", groups=self.bn_groups,
            dtype=self.dtype, param_dtype=jnp.float32,
        )  # fmt: skip


def varied(*shape, seed=1):
    """Images whose means and scales differ between examples, and so between groups."""
    steps = np.linspace(0.5, 2, shape[0], dtype=np.float32).reshape(-1, *[1] * (len(shape) - 1))
    return steps * (1 + images(*shape, seed=seed))


def close(got, expected, rtol=1e-5, atol=2e-6):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), got, expected)


# --- what is computed ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("shape", "groups"), [((12, 5), 3), ((8, 3, 2, 4), 4), ((6, 3, 3, 2), 6)])
def test_groups_against_numpy_over_two_steps(shape, groups, dtype):
    model = Norm(groups, dtype)
    variables = unflatten_dict(random_variables(model, shape), sep="/")
    step = train_step(model)
    expected = {name: np.float64(v) for name, v in variables["batch_stats"]["norm"].items()}
    scale, bias = (variables["params"]["norm"][name] for name in ("scale", "bias"))
    for seed in (1, 2):
        x = varied(*shape, seed=seed)
        y, new = step(variables, x)
        variables = variables | new
        assert y.dtype == dtype
        # The statistics are those of the rounded input, and not rounded themselves.
        parts = np.split(np.float64(x.astype(dtype)), groups)
        means = [part.reshape(-1, shape[-1]).mean(axis=0) for part in parts]
        variances = [part.reshape(-1, shape[-1]).var(axis=0) for part in parts]
        normalised = [
            (part - mean) / np.sqrt(var + 1e-5) * scale + bias
            for part, mean, var in zip(parts, means, variances, strict=True)
        ]
        rounding = 1e-5 if dtype == jnp.float32 else 2.0**-8
        close(np.float64(y), np.concatenate(normalised), rtol=rounding, atol=1e-5)
        for name, values in (("mean", means), ("var", variances)):
            expected[name] = 0.9 * expected[name] + 0.1 * np.mean(values, axis=0)
            assert new["batch_stats"]["norm"][name].dtype == jnp.float32
            close(new["batch_stats"]["norm"][name], expected[name])


MODELS = {
    "mlp": functools.partial(models.MLP, (6, 5), 3),
    "basic": functools.partial(models.ResNet, (1, 1), False, 3, 4, stem="conv3x3"),
    "bottleneck": functools.partial(models.ResNet, (1,), True, 3, 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_groups_is_the_model_without_on_each_part(name):
    shape = (12, 8, 8, 1)
    grouped, plain = MODELS[name](bn_groups=3), MODELS[name]()
    variables, x = unflatten_dict(random_variables(plain, shape), sep="/"), varied(*shape)
    got = train_step(grouped)(variables, x)
    step = train_step(plain)
    parts = [step(variables, part) for part in np.split(x, 3)]
    logits = np.concatenate([logits for logits, _ in parts])
    stats = jax.tree.map(lambda *values: np.mean(values, axis=0), *(new for _, new in parts))
    close(got, (logits, stats))
    assert np.abs(step(variables, x)[0] - logits).max() > 0.1


def test_one_group_is_batch_norm_of_flax_bit_for_bit():
    x = varied(8, 3, 3, 4)
    values = unflatten_dict(random_variables(Norm(1), x.shape), sep="/")
    flax = nn.BatchNorm(momentum=0.9, epsilon=1e-5, use_running_average=False)
    inner = {collection: tree["norm"] for collection, tree in values.items()}
    y, new = jax.jit(lambda v, x: flax.apply(v, x, mutable=["batch_stats"]))(inner, x)
    got_y, got = train_step(Norm(1))(values, x)
    np.testing.assert_array_equal(got_y, y)
    jax.tree.map(np.testing.assert_array_equal, got["batch_stats"]["norm"], new["batch_stats"])


def test_gradient_is_finite_where_a_group_is_constant():
    """A group of one example has variance 0: its result is the bias."""
    model = models.MLP((6,), 3, bn_groups=4)
    values = unflatten_dict(random_variables(model, (4, 5)), sep="/")

    @jax.jit
    @jax.value_and_grad
    def gradient(params, x):
        logits, _ = model.apply(values | {"params": params}, x, train=True, mutable=["batch_stats"])
        return logits.sum()

    total, gradients = gradient(values["params"], varied(4, 5))
    params = values["params"]
    hidden = np.maximum(params["norm0"]["bias"], 0)
    logits = hidden @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(total, 4 * logits.sum(), rtol=1e-4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("name", MODELS)
def test_variables_and_evaluation_do_not_depend_on_groups(name):
    grouped, plain = MODELS[name](bn_groups=8), MODELS[name]()
    x = images(1, 8, 8, 1)  # a batch of 1, in init and in evaluation
    assert shapes(grouped, *x.shape) == shapes(plain, *x.shape)
    # Initialised in training mode as well, where no statistic is taken in.
    in_training = jax.eval_shape(
        functools.partial(grouped.init, train=True), KEY, jnp.zeros((16, 8, 8, 1))
    )
    assert flatten_dict(in_training, sep="/") == shapes(plain, *x.shape)
    values = unflatten_dict(random_variables(plain, x.shape), sep="/")
    logits, expected = (jax.jit(model.apply)(values, x) for model in (grouped, plain))
    np.testing.assert_array_equal(logits, expected)


def test_init_in_training_takes_in_no_statistics():
    model = Norm(2)
    x = varied(4, 3)
    variables = model.init(KEY, x, train=True)["batch_stats"]["norm"]
    np.testing.assert_array_equal(variables["mean"], np.zeros(3))
    np.testing.assert_array_equal(variables["var"], np.ones(3))


def test_groups_reach_every_function_and_count_in_equality():
    for make in (models.ResNet8, models.ResNet20, models.ResNet18, models.ResNet50, models.MLP):
        assert make(bn_groups=4).bn_groups == 4
        assert make().bn_groups == 1
        assert make(bn_groups=4) != make()
        assert make(bn_groups=1) == make()


# --- on eight devices ------------------------------------------------------------------------

MESHES = {"8": ((8,), ("data",)), "4x2": ((4, 2), ("data", "fsdp"))}
SHAPE = (32, 8, 8, 3)
MAKE = MODELS["basic"]
LABELS = np.eye(3, dtype=np.float32)[np.arange(32) % 3]


def make_step(model):
    """(variables, x, labels) -> loss, logits, gradients and new statistics."""

    def step(variables, x, labels):
        def loss(params):
            given = variables | {"params": params}
            logits, new = model.apply(given, x, train=True, mutable=["batch_stats"])
            return -(jax.nn.log_softmax(logits) * labels).sum(axis=-1).mean(), (logits, new)

        (value, (logits, new)), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return value, logits, grads, new["batch_stats"]

    return step


@functools.cache
def example():
    values = random_variables(MAKE(), SHAPE)
    return unflatten_dict(values, sep="/"), varied(*SHAPE), LABELS


def on_mesh(name, mode=AxisType.Auto):
    """The example, its images sharded over all devices of a mesh."""
    sizes, names = MESHES[name]
    mesh = jax.make_mesh(sizes, names, axis_types=(mode,) * len(sizes))
    variables, x, labels = example()
    variables = jax.device_put(variables, NamedSharding(mesh, P()))
    return (variables, *jax.device_put((x, labels), NamedSharding(mesh, P(names))))


@functools.cache
def on_one_device(groups):
    return jax.device_get(jax.jit(make_step(MAKE(bn_groups=groups)))(*example()))


@functools.cache
def by_shard_map():
    """Flax's batch normalisation by the statistics of each device, which knows of no groups."""
    step = make_step(MAKE())

    def local(variables, x, labels):
        value, logits, grads, stats = step(variables, x, labels)
        value, grads, stats = jax.lax.pmean((value, grads, stats), "data")
        return value, logits, grads, stats

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": (P(), P("data"), P(), P())}
    # Otherwise the gradient of replicated parameters would come summed over devices already.
    sharded = jax.shard_map(local, mesh=mesh, check_vma=False, **specs)
    return jax.device_get(jax.jit(sharded)(*example()))


def reduced(text):
    """The number of values in each all-reduce of a compiled program."""
    results = re.findall(r"= (.*) all-reduce(?:-start)?\(", text)
    dimensions = [re.findall(r"\w+\[([\d,]*)\]", result) for result in results]
    return [
        sum(math.prod(map(int, filter(None, d.split(",")))) for d in each) for each in dimensions
    ]


MODES = [("8", AxisType.Auto), ("4x2", AxisType.Auto), ("4x2", AxisType.Explicit)]


@pytest.mark.parametrize(("mesh", "mode"), MODES)
def test_as_many_groups_as_devices_equal_statistics_of_each_device(mesh, mode):
    arguments = on_mesh(mesh, mode)
    step = jax.jit(make_step(MAKE(bn_groups=8))).lower(*arguments).compile()
    got = jax.device_get(step(*arguments))
    close(got, by_shard_map())
    # Loss, gradients and new statistics, each once: nothing is sent in order to normalise.
    needed = 1 + sum(leaf.size for tree in got[2:] for leaf in jax.tree.leaves(tree))
    assert sum(reduced(step.as_text())) == needed


def test_one_device_reproduces_eight():
    close(on_one_device(8), by_shard_map())
    assert np.abs(on_one_device(2)[1] - by_shard_map()[1]).max() > 0.1


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_groups_that_lie_on_several_devices(mode):
    got = jax.jit(make_step(MAKE(bn_groups=2)))(*on_mesh("4x2", mode))
    close(jax.device_get(got), on_one_device(2))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("groups", "reductions"), [(1, 5), (8, 0), (16, 0)])
def test_all_reduces_of_the_forward_pass(mesh, groups, reductions):
    """One for each of the five normalisations, or none where devices hold whole groups."""
    variables, x, _ = on_mesh(mesh)
    model = MAKE(bn_groups=groups)
    forward = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])[0])
    text = forward.lower(variables, x).compile().as_text()
    assert len(reduced(text)) == reductions
    assert not re.search("all-gather|all-to-all|collective-permute|reduce-scatter", text)


# --- bad arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [models.ResNet8, models.ResNet50, models.MLP])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "bn_groups must be at least 1, got 0"),
        (-8, ValueError, "bn_groups must be at least 1, got -8"),
        (2.0, TypeError, r"bn_groups must be an int, got 2\.0"),
        (True, TypeError, "bn_groups must be an int, got True"),
        (None, TypeError, "bn_groups must be an int, got None"),
    ],
)
def test_bad_numbers_of_groups(make, value, error, message):
    with pytest.raises(error, match=message):
        make(bn_groups=value)


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_groups_without_batch_normalisation(norm):
    with pytest.raises(ValueError, match=f"bn_groups must be 1 .*bn_groups=2 and norm='{norm}'"):
        models.MLP((6,), norm=norm, bn_groups=2)
    assert models.MLP((6,), norm=norm, bn_groups=1) == models.MLP((6,), norm=norm)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 12])
def test_a_batch_that_the_groups_do_not_divide(name, batch):
    model, x = MODELS[name](bn_groups=8), jnp.zeros((batch, 8, 8, 1))
    variables = jax.eval_shape(model.init, KEY, x)
    with pytest.raises(ValueError, match=rf"must divide .*bn_groups=8 and a batch of {batch}\b"):
        jax.eval_shape(train_step(model), variables, x)
    assert jax.eval_shape(model.apply, variables, x).shape == (batch, 3)
