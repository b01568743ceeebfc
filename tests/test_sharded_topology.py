"""A topology update on sharded parameters: what it communicates, and that it is one device's."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sparseopt_jax as sx
from experiments.hlo import collectives
from sparseopt_jax.models import ResNet50

pytestmark = pytest.mark.usefixtures("standard_promotion")

# Layers as in a ResNet: 3 inputs; two of one shape, with more inputs than outputs; a square stack.
SHAPES = {
    "first": (3, 3, 3, 40),
    "reduce_1": (1, 1, 64, 16),
    "reduce_2": (1, 1, 64, 16),
    "stacked": (2, 3, 3, 16, 16),
    "scale": (64,),
}
MESHES = [(8, 1), (4, 2), (1, 8)]  # data, fsdp
TOPOLOGIES = {"rigl": sx.RigL(10, 0.3, 100), "set": sx.SET(10, 0.3, 100)}


def make_tx(topology):
    return sx.sparse_training(
        sx.sparseopt(0.1),
        distribution=sx.PerLayer({"*": 0.8}),
        topology=TOPOLOGIES[topology],
        batch_axes={"stacked": 0},
    )


def random_tree(seed):
    """Of one decimal, so that there are ties."""
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=s).round(1), jnp.float32) for n, s in SHAPES.items()}


def update_only(tx, params, opt_state, grads):
    return sx.update_topology(tx, opt_state, params, grads)


def whole_step(tx, params, opt_state, grads):
    return tx.update(grads, opt_state, params)


@functools.cache
def on_one_device(topology):
    """Parameters, the state before an update, gradients, and the state after the update."""
    tx = make_tx(topology)
    params = random_tree(0)
    opt_state = jax.jit(tx.init)(params)
    params = sx.apply_masks(params, sx.get_masks(opt_state))
    opt_state = opt_state._replace(step=jnp.int32(10))
    grads = random_tree(1)
    _, updated = jax.jit(functools.partial(update_only, tx))(params, opt_state, grads)
    return params, opt_state, grads, updated


def sharded_axis(shape, devices):
    """From 1,024 elements on the largest axis that divides evenly, of those the last."""
    even = [axis for axis, size in enumerate(shape) if size % devices == 0]
    if not even or math.prod(shape) < 1024:
        return None
    return max(even, key=lambda axis: (shape[axis], axis))


def on_mesh(mesh, leaf):
    spec = [None] * leaf.ndim
    if (axis := sharded_axis(leaf.shape, mesh.shape["fsdp"])) is not None:
        spec[axis] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*spec))


def most_bytes(shapes, devices):
    """4 bytes for each neuron whose inputs are on several devices, and 12 numbers for each layer.

    These are its counts: of active weights, of what is not finite, of what is not 0, and in each of
    three searches (RigL compiles two) of what reaches three candidates, with one pass of each.
    """
    total = 0
    for shape in shapes:
        axis = sharded_axis(shape, devices)
        layers = shape[0] if len(shape) == 5 else 1
        if devices > 1 and len(shape) > 1 and axis is not None:
            neurons = 0 if axis == len(shape) - 1 else shape[-1] * layers
            total += 4 * neurons + 48 * layers
    return total


@pytest.mark.parametrize(
    ("mesh_shape", "topology", "function"),
    [(shape, topology, update_only) for shape in MESHES for topology in TOPOLOGIES]
    + [((1, 8), "rigl", whole_step)],
)
def test_an_update_sums_counts_and_gathers_nothing(mesh_shape, topology, function):
    """No weight, score or mask leaves its device, and what comes out is what one device gives."""
    tx = make_tx(topology)
    *given, expected = on_one_device(topology)
    mesh = jax.make_mesh(mesh_shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    shardings = jax.tree.map(functools.partial(on_mesh, mesh), given[0])
    params, grads = jax.device_put((given[0], given[2]), (shardings, shardings))
    state_shardings = sx.state_shardings(tx, params)
    opt_state = jax.device_put(given[1], state_shardings)
    update = jax.jit(functools.partial(function, tx), out_shardings=(shardings, state_shardings))
    compiled = update.lower(params, opt_state, grads).compile()

    devices, found = mesh.shape["fsdp"], collectives(compiled.as_text())
    # A CPU gathers partial counts and adds them up; other devices add them on the way (for a TPU
    # tests/test_compile_check.py has that).
    gathered = re.findall(r" = (\S+) all-gather\(", compiled.as_text())
    assert found.keys() == ({"all-reduce", "all-gather"} if devices > 1 else set())
    for result in gathered:
        elements = math.prod(int(n) for n in re.match(r"s32\[([\d,]+)\]", result)[1].split(","))
        assert elements <= 2 * devices, result  # of a stack of two layers at most
    moved = found["all-reduce"].bytes if devices > 1 else 0
    assert moved <= most_bytes(SHAPES.values(), devices), found

    _, updated = compiled(params, opt_state, grads)
    for name in ("activity", "fan_in", "changed_at"):
        got, wanted = getattr(updated, name), getattr(expected, name)
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
    changed = jax.tree.map(
        lambda a, b: bool((a != b).any()), sx.get_masks(expected), sx.get_masks(given[1])
    )
    assert changed == {name: name != "scale" for name in SHAPES}


def test_an_update_of_resnet50_moves_less_than_128_kb():
    """The programs above say how much it is for each neuron and layer, with one pass of each loop.

    RigL searches four times, among equal scores included, in at most 16 passes each; a pass moves
    three numbers for every layer.
    """
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(ResNet50().init, jax.random.key(0), images)
    shapes = [leaf.shape for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim > 1]
    assert len(shapes) == 54
    for devices in (2, 8, 64, 256):
        assert 4 * 54 < most_bytes(shapes, devices) < 128 * 1024 - 62 * 12 * 54
