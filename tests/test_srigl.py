"""SRigL (constant fan-in) against its rules in NumPy, update after update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax as sx
from tests import oracles
from tests.helpers import KERNELS, flat, make_params

pytestmark = pytest.mark.usefixtures("standard_promotion")

FRACTION = 0.4


def largest(values, k, where):
    return oracles.top_k_mask(np.abs(values), k, where)


def srigl_layer(mask, w, grad, count, fraction, ablate=None, of_dense=False):
    """One layer's new mask, (inputs, neurons); ``count`` is what its density gives it.

    Follows the rules of Lasby et al. one by one; all values are different.
    """
    dense, neurons = w.shape
    everywhere = np.ones(w.shape, bool)
    n_active = mask.sum()
    n_drop = oracles.n_drop(fraction, n_active)
    n_keep = n_active - n_drop
    left = np.ones(neurons, bool)
    if ablate is not None:
        salient = largest(w, n_keep, mask) | largest(grad, n_drop, everywhere)
        found = salient.sum(axis=0)
        threshold = ablate
        if ablate < 1:
            threshold = max(1, int(ablate * (dense if of_dense else count // neurons)))
        fewest = max(1, count // dense)
        threshold = min(threshold, np.sort(found)[::-1][fewest - 1])
        left = found >= threshold
    fan_in = min(count // left.sum(), dense)
    kept = largest(w, n_keep, mask & left)
    new = np.zeros(w.shape, bool)
    for j in np.flatnonzero(left):
        own = largest(w[:, j], fan_in, kept[:, j])
        new[:, j] = own | largest(grad[:, j], fan_in - own.sum(), ~own)
    return new


def distinct(rng, shape):
    """Magnitudes that are all different, heavy-tailed, so that some neurons have few that count."""
    size = int(np.prod(shape))
    values = (rng.permutation(size) + 1.0) / size
    values = (
        values * np.exp(1.5 * rng.normal(size=shape[-1]))[None].repeat(size // shape[-1], 0).ravel()
    )
    return (values * rng.choice([-1, 1], size)).reshape(shape).astype(np.float32)


ABLATIONS = {
    "none": {},
    "share": {"ablate": 0.3},
    "share of dense": {"ablate": 0.12, "of_dense": True},
    "number": {"ablate": 3},
}


@pytest.mark.parametrize("settings", ABLATIONS.values(), ids=ABLATIONS)
def test_updates_of_several_layers(settings):
    """Counts that neurons do not divide; five updates, each from what the one before left."""
    shapes = {"conv": (3, 3, 3, 10), "wide": (30, 20), "other": (30, 20)}
    density = {"conv": 0.38, "wide": 0.18, "other": 0.4}
    structure = sx.ConstantFanIn(**settings)
    distribution = sx.PerLayer({name: 1 - d for name, d in density.items()})
    counts = distribution.layer_counts(shapes)
    topology = sx.RigL(interval=1, drop_fraction=lambda step: FRACTION, end_step=100)
    tx = sx.sparse_training(
        optax.sgd(0.1), distribution=distribution, topology=topology, structure=structure
    )
    rng = np.random.default_rng(0)
    weights = {name: distinct(rng, shape) for name, shape in shapes.items()}
    state = tx.init(weights)
    expected = {n: np.asarray(m).reshape(-1, m.shape[-1]) for n, m in sx.get_masks(state).items()}
    for name, mask in expected.items():
        assert (mask.sum(0) == counts[name] // mask.shape[1]).all(), name
    update = jax.jit(lambda state, params, grads: tx.update(grads, state, params)[1])
    state = state._replace(step=jnp.int32(1))
    ablated = 0
    for _ in range(5):
        weights = {name: distinct(rng, shape) for name, shape in shapes.items()}
        grads = {name: distinct(rng, shape) for name, shape in shapes.items()}
        masked = sx.apply_masks(weights, sx.get_masks(state))
        state = update(state, masked, grads)
        for name, mask in sx.get_masks(state).items():
            shape = expected[name].shape
            expected[name] = srigl_layer(
                expected[name],
                np.asarray(masked[name]).reshape(shape),
                grads[name].reshape(shape),
                counts[name],
                FRACTION,
                **settings,
            )
            np.testing.assert_array_equal(np.asarray(mask).reshape(shape), expected[name], name)
            fan_in = expected[name].sum(0)
            assert len(set(fan_in[fan_in > 0])) == 1
            ablated += (fan_in == 0).sum()
    assert (ablated > 0) == bool(settings)


def test_the_threshold_by_hand():
    """Six neurons of four inputs, and eight weights, which two neurons can hold.

    These two have two salient weights each, the others one.
    """
    mask = jnp.zeros((4, 6), bool).at[0].set(True).at[1, :2].set(True)
    w = jnp.where(mask, jnp.arange(24.0, 0, -1).reshape(4, 6), 0)
    grads = jnp.zeros((4, 6)).at[2, 0].set(9).at[3, 1].set(8).at[3, 5].set(1)
    topology = sx.RigL(interval=1, drop_fraction=lambda step: 0.25, end_step=9)
    # Of 24..17 the last two go, so that each neuron has one; 0 and 1 get one more by gradient.
    # A number that nobody reaches falls to what as many neurons have as hold the weights.
    for ablate in (2, 1e12):
        layers = sx.describe_layers({"w": mask}, structure=sx.ConstantFanIn(ablate=ablate))
        update = jax.jit(lambda *trees, layers=layers: topology.update(*trees, layers))
        new = update(jax.random.key(0), 1, {"w": mask}, {"w": w}, {"w": grads})["w"]
        assert new.sum(0).tolist() == [4, 4, 0, 0, 0, 0]


@pytest.mark.parametrize("ablate", [0.29, 0.57, 0.58, 1e-9, 0.999999])
def test_a_share_is_not_off_by_a_rounding(ablate):
    """0.29 of 100 weights are 29, and 0.57 of 100 are 57."""
    structure = sx.ConstantFanIn(ablate=ablate)
    needed = structure.salient_needed(jnp.array([100, 1]), 7)
    assert needed.tolist() == [max(1, round(ablate * 10**6) * 100 // 10**6), 1]


def test_counts_with_erk():
    """The floor of what ERK gives a layer over its neurons, at least one."""
    params = make_params()
    for sparsity in (0.5, 0.9, 0.99):
        masks = sx.init_masks(
            jax.random.key(0), params, sx.ERK(sparsity), structure=sx.ConstantFanIn()
        )
        density = oracles.erk_density(KERNELS, sparsity)
        for path, expected in oracles.expected_counts(density, KERNELS).items():
            mask = np.asarray(flat(masks)[path])
            neurons = mask.shape[-1]
            fan_in = max(1, int(round(expected) // neurons))
            assert (mask.reshape(-1, neurons).sum(0) == fan_in).all(), (path, sparsity)


def test_sparseopt_is_the_identity():
    """Its per-layer average corrects nothing where all neurons have one fan-in."""
    params = make_params()
    masks = sx.init_masks(jax.random.key(0), params, sx.ERK(0.8), structure=sx.ConstantFanIn())
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(p.dtype), params)
    scale = sx.scale_by_sparseopt(average_over="layer")
    scaled, _ = scale.update(grads, scale.init(params), masks=masks)
    jax.tree.map(np.testing.assert_array_equal, scaled, grads)
