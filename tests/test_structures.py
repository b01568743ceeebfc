"""Patterns of masks: exact ones, in exact numbers, from every source, against NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sparseopt_jax as sx
from tests import oracles

pytestmark = pytest.mark.usefixtures("standard_promotion")

# All patterns in one model. Nothing divides the last two kernels: one is plain, one stays dense.
SHAPES = {
    "nm": (16, 6),
    "nm_conv": (2, 2, 8, 5),
    "blocks": (8, 12),
    "blocks_conv": (3, 3, 4, 6),
    "neurons": (2, 2, 3, 9),
    "fan": (11, 7),
    "fan_conv": (3, 3, 2, 5),
    "plain": (9, 7),
    "nm_dense": (5, 3),
}
STRUCTURES = {
    "nm*": sx.NM(2, 4),
    "blocks*": sx.Blocks((2, 3)),
    "neurons": sx.Neurons(),
    "fan*": sx.ConstantFanIn(),
}
SPARSITY = {"nm_dense": 0.0, "nm*": 0.5, "blocks*": 0.7, "neurons": 0.57, "fan*": 0.6, "plain": 0.8}
DISTRIBUTION = sx.PerLayer(SPARSITY)
COUNTS = DISTRIBUTION.layer_counts(SHAPES)


def kind_of(name):
    return "dense" if name == "nm_dense" else name.split("_")[0]


def members(name, mask):
    """A mask as (groups, members, weights of a member), by hand."""
    *_, inputs, neurons = mask.shape
    match kind_of(name):
        case "nm":  # Of each four inputs, at each place of the window and for each neuron.
            parts = mask.reshape(-1, inputs // 4, 4, neurons)
            return np.moveaxis(parts, 2, -1).reshape(-1, 4, 1)
        case "blocks":
            parts = mask.reshape(-1, inputs // 2, 2, neurons // 3, 3)
            return np.moveaxis(parts, 2, 3).reshape(1, -1, 6)
        case "neurons":
            return mask.reshape(1, -1, neurons).swapaxes(1, 2)
        case "fan":
            return mask.reshape(-1, neurons).T[..., None]
    return mask.reshape(1, -1, 1)


def rounded(name, count):
    """How many members each group keeps of ``count`` weights, as the classes document it."""
    groups, of_group, weights = members(name, np.empty(SHAPES[name])).shape
    # The nearest number, halves up, or one that is not too large.
    found = math.floor(count / weights + 0.5) if groups == 1 else count // groups
    return min(max(found, 1), of_group)


def check(masks, counts=COUNTS):
    for name, mask in masks.items():
        parts = members(name, np.asarray(mask))
        assert (parts.all(-1) == parts.any(-1)).all(), name
        assert (parts.any(-1).sum(-1) == rounded(name, counts[name])).all(), name


def normal(seed, shapes=None):
    rng = np.random.default_rng(seed)
    shapes = SHAPES if shapes is None else shapes
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


# --- masks ------------------------------------------------------------------------------------


def test_initial_masks():
    """Different keys give different masks, under vmap those of each key alone."""
    params = normal(0)

    def draw(key):
        return sx.init_masks(key, params, DISTRIBUTION, structure=STRUCTURES)

    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(draw))(keys)
    alone = jax.jit(draw)(keys[0])
    for i in range(3):
        check({name: mask[i] for name, mask in together.items()})
    for name, mask in alone.items():
        np.testing.assert_array_equal(mask, together[name][0])
        assert (together[name][0] != together[name][1]).any() == (name != "nm_dense"), name


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_masks_of_scores_are_the_largest_members(dtype):
    """Ties and NaN among them; blocks and neurons count by the sum of their scores."""
    scores = normal(1)
    for name, score in scores.items():
        score.reshape(-1)[::3] = 0.5
        if kind_of(name) in ("nm", "fan", "plain"):
            score.reshape(-1)[::7] = np.nan
        scores[name] = score.astype(dtype)
    masks = jax.jit(lambda s: sx.masks_from_scores(s, DISTRIBUTION, STRUCTURES))(scores)
    check(masks)
    for name, mask in masks.items():
        parts = members(name, scores[name].astype(np.float64))
        found = members(name, np.asarray(mask)).any(-1)
        for own, chosen in zip(parts.sum(-1), found, strict=True):
            expected = oracles.top_k_mask(own, rounded(name, COUNTS[name]))
            if kind_of(name) in ("blocks", "neurons"):  # Sums of float32: ties may fall either way.
                assert np.sort(own[chosen])[0] >= np.sort(own[~chosen])[-1] - 1e-5, name
            else:
                np.testing.assert_array_equal(chosen, expected, name)


# Where another layout has the axes of (window, in, out); None: an axis that is split in two.
LAYOUTS = {
    "out first": (lambda k: np.moveaxis(k, (-1, -2), (0, 1)), {"out_axes": 0}),
    "heads": (lambda k: k.reshape(*k.shape[:-1], 2, -1), {"out_axes": (-2, -1)}),
    "stacked": (lambda k: np.stack([k, -k], 1), {"batch_axes": 1}),
}


@pytest.mark.parametrize(
    "structure", [sx.NM(1, 4), sx.Blocks((2, 1)), sx.Neurons(), sx.ConstantFanIn()], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, structure):
    """The masks are those of Flax's layout, laid out alike."""
    lay_out, axes = LAYOUTS[layout]
    shape = (8, 6) if layout == "heads" else (3, 2, 8, 6)
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    quarter = sx.Uniform(0.75, dense_first=False)

    @functools.partial(jax.jit, static_argnames=tuple(axes))
    def masks_of(kernel, **axes):
        return sx.masks_from_scores({"w": kernel}, quarter, structure, **axes)["w"]

    expected = [masks_of(kernel), masks_of(-kernel)]
    found = np.asarray(masks_of(lay_out(kernel), **axes))
    if layout == "stacked":
        np.testing.assert_array_equal(found, np.stack(expected, 1))
    else:
        np.testing.assert_array_equal(found, lay_out(np.asarray(expected[0])))


def test_a_structure_of_ones_own():
    """Diagonals of a square kernel cannot be said by axes; whole rows of inputs can."""

    class Inputs(sx.Structure):
        def split(self, shape, axes):
            return sx.Split(shape, (), axes.incoming, axes.out)

    scores = {"w": jnp.array([[1.0, 1.0], [5.0, -9.0], [0.0, 3.0], [1.0, 2.5]])}
    half = sx.Uniform(0.5, dense_first=False)
    masks = sx.masks_from_scores(scores, half, Inputs())
    assert masks["w"].tolist() == [[False] * 2, [False] * 2, [True] * 2, [True] * 2]
    topology = sx.RigL(interval=1, drop_fraction=0.9, end_step=10)
    layers = sx.describe_layers(masks, structure=Inputs())
    weights = sx.apply_masks(scores, masks)
    new = topology.update(jax.random.key(0), 1, masks, weights, scores, layers)
    # One of the two goes, the lighter; the input with the largest gradients comes.
    assert new["w"].tolist() == [[False] * 2, [True] * 2, [False] * 2, [True] * 2]


# --- runs -------------------------------------------------------------------------------------

STEPS = 8
TOPOLOGIES = {
    "rigl": (sx.RigL(1, 0.5, 100), None),
    "set": (sx.SET(1, 0.5, 100), None),
    "granet": (sx.RigL(1, 0.5, 100), sx.Linear(1, 5, initial_sparsity=0.2)),
    "prune": (sx.Prune(1, 100), sx.Linear(1, 5)),
    "acdc": (sx.ACDC(2, 6), None),
}


def hostile_gradients():
    """Of each step: most at random, one all zeros, one of ties, one with NaN in some layers."""
    steps = [normal(i) for i in range(STEPS)]
    steps[2] = jax.tree.map(np.zeros_like, steps[2])
    steps[4] = jax.tree.map(np.sign, steps[4])
    for name in ("nm", "blocks", "fan"):
        steps[6][name].reshape(-1)[3] = np.nan if name == "nm" else np.inf
    return jax.tree.map(lambda *leaves: np.stack(leaves), *steps)


def make_tx(topology, schedule=None, **options):
    return sx.sparse_training(
        optax.sgd(0.1, 0.9),
        distribution=DISTRIBUTION,
        topology=topology,
        schedule=schedule,
        structure=STRUCTURES,
        **options,
    )


def trained(tx, params, grads):
    """Masks at first and after each step, and the last parameters; a skipped NaN moves nothing."""

    def step(carry, own):
        params, state = carry
        updates, state = tx.update(own, state, params)
        updates = jax.tree.map(lambda u: jnp.where(jnp.isfinite(u), u, 0), updates)
        params = sx.apply_masks(optax.apply_updates(params, updates), sx.get_masks(state))
        return (params, state), (params, sx.get_masks(state))

    state = tx.init(params)
    first = sx.get_masks(state)
    _, (every, masks) = jax.lax.scan(step, (sx.apply_masks(params, first), state), grads)
    return first, every, masks


def counts_at(topology, schedule, step):
    """What each layer is to have after the update of a step, by hand."""
    size = {name: math.prod(shape) for name, shape in SHAPES.items()}
    if isinstance(topology, sx.ACDC):  # Sparse from 2, dense from 4, sparse from 6 on.
        return size if step < 2 or step in (4, 5) else COUNTS
    if schedule is None:
        return COUNTS
    begin, final = size, {}
    for name in size:
        groups, _, weights = members(name, np.empty(SHAPES[name])).shape
        final[name] = rounded(name, COUNTS[name]) * groups * weights
    if schedule.initial_sparsity:
        begin = {n: max(final[n], round(0.8 * size[n])) for n in size}
    ahead = min(1, max(0, (5 - step) / 4))
    return {n: final[n] + math.floor(ahead * (begin[n] - final[n])) for n in size}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_whole_runs(name):
    topology, schedule = TOPOLOGIES[name]
    grads = hostile_gradients()
    run = jax.jit(functools.partial(trained, make_tx(topology, schedule)))
    first, params, masks = jax.tree.map(np.asarray, run(normal(99), grads))
    check(first, counts_at(topology, schedule, 0))
    changed = set()
    for step in range(STEPS):
        now = {n: m[step] for n, m in masks.items()}
        before = {n: m[step - 1] for n, m in masks.items()} if step else first
        grows = name in ("rigl", "set", "granet")
        stays = {n for n in SHAPES if grows and (not grads[n][step].any())}
        stays |= {n for n in SHAPES if grows and not np.isfinite(grads[n][step]).all()}
        for leaf, mask in now.items():
            np.testing.assert_array_equal(params[leaf][step][~mask], 0)
            if leaf in stays:
                np.testing.assert_array_equal(mask, before[leaf])
        counts = counts_at(topology, schedule, step)
        check({n: m for n, m in now.items() if n not in stays}, counts)
        changed |= {n for n in SHAPES if (now[n] != before[n]).any()}
        if name == "prune":
            assert all((m <= before[n]).all() for n, m in now.items())
    assert changed == set(SHAPES) - {"nm_dense"}


def test_seeds_under_vmap():
    """Each has its own masks, and in each the patterns hold."""
    params, grads = normal(99), jax.tree.map(lambda g: g[:2], hostile_gradients())

    def run(seed):
        return trained(make_tx(TOPOLOGIES["set"][0], seed=seed), params, grads)[2]

    masks = jax.jit(jax.vmap(run))(jnp.arange(2))
    for i in range(2):
        check({n: m[i, -1] for n, m in masks.items()})
    for name in ("nm", "blocks", "neurons", "fan"):
        assert (masks[name][0, 0] != masks[name][1, 0]).any()


# --- devices ----------------------------------------------------------------------------------

SHARDED = {"nm": (16, 8), "blocks": (16, 24), "neurons": (3, 3, 8, 8), "fan": (16, 8)}


def one_update(params, grads):
    tx = sx.sparse_training(
        optax.sgd(0.1),
        distribution=sx.Uniform(0.5, dense_first=False),
        topology=sx.RigL(1, 0.5, 100, begin_step=0),
        structure=STRUCTURES,
    )
    state = tx.init(params)
    weights = sx.apply_masks(params, sx.get_masks(state))
    _, state = tx.update(grads, state, weights)
    scores = sx.masks_from_scores(params, sx.Uniform(0.5, dense_first=False), structure=STRUCTURES)
    return sx.get_masks(state), scores


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(mode):
    """As on one device, whichever axis is sharded."""
    given = normal(0, SHARDED), normal(1, SHARDED)
    expected = jax.jit(one_update)(*given)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(mode,))
    specs = {
        "nm": PartitionSpec("x", None),
        "blocks": PartitionSpec(None, "x"),
        "neurons": PartitionSpec(None, None, "x", None),
        "fan": PartitionSpec("x", None),
    }
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    with jax.set_mesh(mesh):
        found = jax.jit(one_update)(*(jax.device_put(tree, shardings) for tree in given))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    if mode == AxisType.Explicit:
        assert {n: m.sharding.spec for n, m in found[1].items()} == specs


def test_one_model_a_device_in_shard_map():
    given = [
        jax.tree.map(lambda a, b: np.stack([a, b]), normal(i, SHARDED), normal(i + 2, SHARDED))
        for i in range(2)
    ]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def own(*trees):
        masks = one_update(*jax.tree.map(lambda a: a[0], trees))
        return jax.tree.map(lambda m: m[None], masks)

    spec = PartitionSpec("x")
    found = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=spec, out_specs=spec))(*given)
    for i in range(2):
        expected = jax.jit(one_update)(*jax.tree.map(lambda a, i=i: a[i], given))
        jax.tree.map(lambda f, e, i=i: np.testing.assert_array_equal(f[i], e), found, expected)
