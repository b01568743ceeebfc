"""What is dropped and grown by: criteria, schedules of the fraction, and policies of one's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax as sx
from tests import oracles
from tests.helpers import chi_square_bound, subset_chi_square

pytestmark = pytest.mark.usefixtures("standard_promotion")

KEY = jax.random.key(0)


def half(step):
    """A drop fraction."""
    return 0.5


def layer(seed=0, shape=(8, 6)):
    """A mask of 20 weights, the weights, and a gradient; no two are alike."""
    rng = np.random.default_rng(seed)
    mask = oracles.top_k_mask(rng.random(shape), 20)
    weight, grad = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    return mask, np.where(mask, weight, np.float32(0)), grad


def updated(topology, mask, weight, grad, key=KEY, step=1):
    trees = ({"kernel": leaf} for leaf in (mask, weight, grad))
    return np.asarray(topology.update(key, step, *trees)["kernel"])


# --- what to drop by -------------------------------------------------------------------------


def flatness(weight, gradient):
    return weight / (0.1 + jnp.abs(gradient))


CRITERIA = {
    "magnitude": ("magnitude", lambda w, g: w),
    "saliency": ("saliency", lambda w, g: w * g),
    "function": (flatness, lambda w, g: w / (np.float32(0.1) + abs(g))),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_the_smallest_by_each_criterion_go(name):
    """10 of 20 by half, each another 10."""
    drop_by, by_hand = CRITERIA[name]
    mask, weight, grad = layer()
    score = abs(by_hand(weight, grad))
    kept = oracles.top_k_mask(score, 10, where=mask)
    grown = oracles.top_k_mask(abs(grad), 10, where=~kept)
    rigl = sx.RigL(1, half, 10, drop_by=drop_by)
    np.testing.assert_array_equal(updated(rigl, mask, weight, grad), kept | grown)
    others = [
        oracles.top_k_mask(abs(f(weight, grad)), 10, where=mask) for _, f in CRITERIA.values()
    ]
    assert sum((kept == other).all() for other in others) == 1
    # SET and Prune keep the same.
    new = updated(sx.SET(1, half, 10, drop_by=drop_by), mask, weight, grad)
    assert new[kept].all()
    assert new.sum() == 20
    trees = ({"kernel": leaf} for leaf in (mask, weight, grad))
    pruned = sx.Prune(1, 10, drop_by=drop_by).update(KEY, 1, *trees, planned(mask, 10))
    np.testing.assert_array_equal(pruned["kernel"], kept)


def planned(mask, count):
    """What a density schedule tells a topology."""
    layer = sx.describe_layers({"kernel": mask})["kernel"]
    return {"kernel": dataclasses.replace(layer, planned=jnp.int32(count))}


@pytest.mark.parametrize("count", [8, 20, 30])
def test_a_share_of_what_stays_is_replaced(count):
    """Of the 20 that there are, or of fewer; what is missing grows too."""
    mask, weight, grad = layer()
    kept = oracles.top_k_mask(abs(weight), min(count, 20) // 2, where=mask)
    expected = kept | oracles.top_k_mask(abs(grad), count - kept.sum(), where=~kept)
    trees = ({"kernel": leaf} for leaf in (mask, weight, grad))
    found = sx.RigL(1, half, 10).update(KEY, 1, *trees, planned(mask, count))["kernel"]
    np.testing.assert_array_equal(found, expected)


def test_dropped_at_random_all_subsets_are_alike():
    """3 of 5 stay, whatever their weights; grown is the one that has a gradient."""
    mask = np.array([[True] * 5 + [False]])
    weight = np.array([[1e-6, 1.0, 1e3, -5.0, 0.0, 0.0]], np.float32)
    grad = np.array([[1e-3] * 5 + [9.0]], np.float32)
    topology = sx.RigL(1, lambda step: 0.2, 10, drop_by="random")
    keys = jax.random.split(KEY, 4_000)
    trees = [{"kernel": leaf} for leaf in (mask, weight, grad)]
    new = jax.jit(jax.vmap(lambda key: topology.update(key, 1, *trees)["kernel"]))(keys)
    assert new[..., 5].all()
    chi_square, freedom = subset_chi_square(new[:, 0, :5], 5, 4)
    assert chi_square < chi_square_bound(freedom)


@pytest.mark.parametrize("drop_by", ["saliency", "random", lambda w, g: jnp.ones_like(g)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_criterion_hides_a_weight_that_is_not_finite(drop_by, value):
    mask, weight, grad = layer()
    weight[tuple(np.argwhere(mask)[0])] = value
    for topology in (
        sx.RigL(1, half, 10, drop_by=drop_by),
        sx.RigL(1, half, 10, drop_by=drop_by, grow_by="random"),
        sx.SET(1, half, 10, drop_by=drop_by),
        sx.Prune(1, 10, drop_by=drop_by),
    ):
        np.testing.assert_array_equal(updated(topology, mask, weight, grad), mask)


def test_growing_at_random_is_set():
    mask, weight, grad = layer()
    for drop_by in ("magnitude", "saliency", "random"):
        rigl = sx.RigL(1, half, 10, drop_by=drop_by, grow_by="random")
        expected = updated(sx.SET(1, half, 10, drop_by=drop_by), mask, weight, grad)
        np.testing.assert_array_equal(updated(rigl, mask, weight, grad), expected)
        assert not rigl.needs_dense_gradient


# --- momentum --------------------------------------------------------------------------------

SHAPES = {"one": (6, 5), "two": (5, 7)}


def test_growth_by_momentum_equals_numpy():
    """SNFS: m <- 0.8 m + 0.2 g on every step; one gradient of infinity is left out of it."""
    rng = np.random.default_rng(0)
    params = {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
    grads = [
        {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()} for _ in range(9)
    ]
    tx = sx.sparse_training(
        optax.sgd(1e-3),
        distribution=sx.Uniform(0.5, dense_first=False),
        topology=sx.RigL(4, half, 8, grow_by=sx.Momentum(0.8)),
    )
    opt_state = tx.init(params)
    masks = jax.tree.map(np.asarray, sx.get_masks(opt_state))
    params = sx.apply_masks(params, masks)
    # Where no weight is, on the step of the first update.
    at = tuple(np.argwhere(~masks["two"])[0])
    grads[4]["two"][at] = np.inf
    step = jax.jit(tx.update)
    average = {n: np.zeros(s) for n, s in SHAPES.items()}
    for i, grad in enumerate(grads):
        updates, opt_state = step(grad, opt_state, params)
        for name in SHAPES:
            new = 0.8 * average[name] + 0.2 * grad[name].astype(np.float64)
            if i in (4, 8) and np.isfinite(new).all():
                w = np.asarray(params[name])
                n_drop = int(masks[name].sum()) // 2
                kept = oracles.top_k_mask(abs(w), masks[name].sum() - n_drop, where=masks[name])
                masks[name] = kept | oracles.top_k_mask(abs(new), n_drop, where=~kept)
            average[name] = np.where(np.isfinite(new), new, average[name])
            np.testing.assert_allclose(
                opt_state.accumulator[name], average[name], rtol=1e-5, atol=1e-6
            )
        params = optax.apply_updates(params, updates)
        jax.tree.map(np.testing.assert_array_equal, sx.get_masks(opt_state), masks)
    assert opt_state.accumulator["one"].dtype == jnp.float32


def test_only_layers_of_momentum_have_an_average():
    topology = {"one": sx.RigL(4, half, 8, grow_by=sx.Momentum()), "two": sx.RigL(4, half, 8)}
    tx = sx.sparse_training(optax.sgd(0.1), distribution=sx.ERK(0.5), topology=topology)
    opt_state = jax.eval_shape(tx.init, {n: jnp.ones(s) for n, s in SHAPES.items()})
    assert [leaf.shape for leaf in jax.tree.leaves(opt_state.accumulator)] == [SHAPES["one"]]


# --- the fraction ----------------------------------------------------------------------------


def test_the_fraction_follows_any_schedule():
    """Linear from 0.5 to 0 over ten steps, of 20 weights: 10, 8, 6, ... go."""
    falling = optax.linear_schedule(0.5, 0.0, 10)
    mask, weight, grad = layer()
    for topology in (sx.RigL(1, falling, 10), sx.SET(1, falling, 10)):
        fractions = topology.drop_fraction_at(jnp.arange(12))
        assert np.allclose(fractions, np.maximum(0.5 - 0.05 * np.arange(12), 0), atol=1e-6)
    outside = np.where(mask, np.float32(0), grad)  # All that goes is replaced by others.
    moved = [
        int((mask & ~updated(sx.RigL(1, falling, 10), mask, weight, outside, step=step)).sum())
        for step in (0, 2, 4, 10, 12)
    ]
    assert moved == [10, 8, 6, 0, 0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sx.RigL(1, lambda: 0.5, 9), TypeError, "drop_fraction must be a function"),
        (lambda: sx.RigL(1, "0.5", 9), TypeError, "drop_fraction must be a number in .*got '0.5'"),
        (lambda: sx.SET(1, 1.0, 9), ValueError, r"drop_fraction must lie in \(0, 1\).* got 1\.0"),
        (lambda: sx.RigL(1, 0.3, 9, drop_by="sign"), ValueError, "drop_by must be .* got 'sign'"),
        (lambda: sx.SET(1, 0.3, 9, drop_by=3), ValueError, r"or a function \(weight, gradient\)"),
        (lambda: sx.RigL(1, 0.3, 9, drop_by=abs), TypeError, "drop_by must be a function of "),
        (lambda: sx.RigL(1, 0.3, 9, grow_by="moment"), ValueError, r"or Momentum\(decay\), got 'm"),
        (lambda: sx.RigL(1, 0.3, 9, grow_by=sx.Momentum), ValueError, "grow_by must be one of"),
        (
            lambda: sx.RigL(4, 0.3, 9, grow_by=sx.Momentum(), accumulate_steps=2),
            ValueError,
            r"accumulate_steps must be 1 with grow_by=Momentum\(decay=0\.9\).* got 2",
        ),
        (lambda: sx.Momentum(1.0), ValueError, r"decay must lie in \(0, 1\), got 1\.0"),
        (lambda: sx.Momentum(float("nan")), ValueError, "decay must lie in .* got nan"),
        (lambda: sx.Momentum("0.9"), TypeError, r"decay must be a number in \(0, 1\), got '0\.9'"),
        (
            lambda: updated(sx.RigL(1, 0.3, 9, drop_by=lambda w, g: (w * g).sum()), *layer()),
            ValueError,
            r"drop_by must return a floating score for each weight, \(8, 6\), got float32 of shap",
        ),
        (
            lambda: updated(sx.Prune(1, 9, drop_by=lambda w, g: w > 0), *layer()),
            ValueError,
            "drop_by must return a floating score .* got bool of shape",
        ),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- policies of one's own -------------------------------------------------------------------


class ConstantFanInRigL(sx.Topology):
    """A third of each neuron's weights, the smallest, give way to its largest gradients."""

    interval = 10

    def update(self, key, step, masks, params, scores, layers=None):
        def neuron(mask, weight, gradient):
            kept = sx.top_k_mask(abs(weight), mask.sum() - mask.sum() // 3, where=mask)
            return kept | sx.top_k_mask(abs(gradient), mask.sum() // 3, where=~kept)

        def leaf(mask, weight, gradient, layer):
            each = neuron
            for axis in sorted(layer.axes.out + layer.axes.batch):
                each = jax.vmap(each, axis, axis)
            return each(mask, weight, gradient)

        return jax.tree.map(leaf, masks, params, scores, layers)


def test_a_policy_in_ten_lines_keeps_every_fan_in():
    """Kernels of a dense layer, of a convolution, of a stack, and one that is (out, in)."""
    shapes = {"conv": (3, 3, 2, 5), "dense": (12, 7), "stack": (2, 9, 4), "turned": (5, 12)}
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
    tx = sx.sparse_training(
        optax.sgd(0.1),
        distribution=sx.Uniform(0.5, dense_first=False),
        structure=sx.ConstantFanIn(),
        topology=ConstantFanInRigL(),
        out_axes={"turned": 0},
        batch_axes={"stack": 0},
    )

    def run(params):
        opt_state = tx.init(params)
        params = sx.apply_masks(params, sx.get_masks(opt_state))

        def step(carry, i):
            params, opt_state = carry
            grads = jax.tree.map(
                lambda p: jnp.cos(i + 30 * jnp.arange(p.size).reshape(p.shape)), params
            )
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), sx.get_masks(opt_state)

        return jax.lax.scan(step, (params, opt_state), jnp.arange(21))[1]

    masks = jax.tree.map(np.asarray, jax.jit(run)(params))
    fan_ins = {
        "conv": masks["conv"].sum(axis=(1, 2, 3)),
        "dense": masks["dense"].sum(axis=1),
        "stack": masks["stack"].sum(axis=2),
        "turned": masks["turned"].sum(axis=2),
    }
    for (name, found), fan_in in zip(fan_ins.items(), (9, 6, 4, 6), strict=True):
        assert (found == fan_in).all()
        every = masks[name].reshape(21, -1)
        changed = np.flatnonzero((every[1:] != every[:-1]).any(axis=1)) + 1
        assert changed.tolist() == [10, 20]
        # A third of each, and no more.
        assert (every[20] & ~every[19]).sum() <= found[0].size * (fan_in // 3)


class Recorder(sx.Topology):
    interval = 5

    def __init__(self):
        self.seen = {}

    def update(self, key, step, masks, params, scores, layers=None):
        for name, layer in layers.items():
            self.seen[int(step), name] = layer, layer.count(masks[name]).tolist()
        return masks


def test_what_a_policy_is_told_of_layers():
    shapes = {"conv": (3, 3, 2, 4), "stack": (2, 8, 4), "turned": (4, 8)}
    params = {n: jnp.ones(s) for n, s in shapes.items()}
    options = {"out_axes": {"turned": 0}, "batch_axes": {"stack": 0}}
    topology, schedule = Recorder(), sx.Linear(0, 10)
    tx = sx.sparse_training(
        optax.sgd(0.1),
        distribution=sx.Uniform(0.5, dense_first=False),
        topology=topology,
        schedule=schedule,
        structure={"turned": sx.NM(2, 4)},
        **options,
    )
    opt_state = tx.init(params)
    for step in (5, 10):
        opt_state = opt_state._replace(step=jnp.int32(step))
        _, opt_state = sx.update_topology(tx, opt_state, params, params)
    assert sorted(topology.seen) == [(step, name) for step in (5, 10) for name in shapes]
    axes = {
        name: (layer.axes.incoming, layer.axes.out, layer.axes.batch)
        for (_, name), (layer, _) in topology.seen.items()
    }
    assert axes == {
        "conv": ((0, 1, 2), (3,), ()),
        "stack": ((1,), (2,), (0,)),
        "turned": ((1,), (0,), ()),
    }
    counts = {at: count for at, (_, count) in topology.seen.items()}
    assert counts == {
        (5, "conv"): 54, (5, "stack"): [24, 24], (5, "turned"): 24,
        (10, "conv"): 36, (10, "stack"): [16, 16], (10, "turned"): 16,
    }  # fmt: skip
    patterns = {name: layer.structure for (_, name), (layer, _) in topology.seen.items()}
    assert patterns == {"conv": None, "stack": None, "turned": sx.NM(2, 4)}
    assert {layer.path for layer, _ in topology.seen.values()} == set(shapes)
    # Without a schedule as many as there are.
    described = sx.describe_layers(sx.get_masks(opt_state), **options)
    masks = {name: jnp.arange(np.prod(s)).reshape(s) < 10 for name, s in shapes.items()}
    assert {n: one.planned for n, one in described.items()} == dict.fromkeys(shapes)
    counts = {n: one.count(masks[n]).tolist() for n, one in described.items()}
    assert counts == {"conv": 10, "stack": [10, 0], "turned": 10}


def test_policies_that_are_wrong():
    class Returns(sx.Topology):
        interval = 1

        def __init__(self, change):
            self.change = change

        def update(self, key, step, masks, params, scores, layers=None):
            return self.change(masks)

    class Never(sx.Topology):
        def update(self, *arguments):
            raise AssertionError

    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 2))}

    def make_tx(topology):
        return sx.sparse_training(optax.sgd(0.1), distribution=sx.ERK(0.5), topology=topology)

    with pytest.raises(TypeError, match=r"interval of .*Never.* must be an int, got None"):
        make_tx(Never())
    wanted = r"update of .*Returns.* must return masks .* given, \['bool\[4, 4\]', 'bool\[4, 2\]'\]"
    for change in (
        lambda masks: jax.tree.map(lambda m: 1.0 * m, masks),
        lambda masks: jax.tree.map(lambda m: m.T, masks),
        lambda masks: {"a": masks["a"]},
        lambda masks: None,
    ):
        tx = make_tx(Returns(change))
        opt_state = tx.init(params)
        with pytest.raises(TypeError, match=wanted):
            sx.update_topology(tx, opt_state, params, params)
