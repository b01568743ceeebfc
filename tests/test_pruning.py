"""Runs along a density schedule: against NumPy, for any gradients, on one device and on eight."""

import functools
import math

import flax.serialization
import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sparseopt_jax as sx
from sparseopt_jax.explicit import varying_as
from tests import oracles

pytestmark = pytest.mark.usefixtures("standard_promotion")

STEPS, INTERVAL, LAST = 24, 3, 21
SHAPES = {
    "conv": (3, 3, 2, 8),
    "dense": (12, 8),
    "head": (8, 16),
    "stack": (2, 6, 8),
    "bias": (16,),
}
# The layers, as distributions know them: a name, its leaf, and where it lies in it.
LAYERS = {name: (name, ...) for name in ("conv", "dense", "head")}
LAYERS |= {f"stack/{i}": ("stack", i) for i in range(2)}
LAYER_SHAPES = {name: SHAPES[leaf][place is not ... :] for name, (leaf, place) in LAYERS.items()}
SIZES = {name: math.prod(shape) for name, shape in LAYER_SHAPES.items()}
FINAL = sx.ERK(0.8).layer_counts(LAYER_SHAPES)
UPDATES = range(INTERVAL, LAST + 1, INTERVAL)

PRUNE = sx.Prune(INTERVAL, LAST)
RIGL = sx.RigL(INTERVAL, 0.4, end_step=30)
SET = sx.SET(INTERVAL, 0.4, end_step=30)
CUBIC = sx.Cubic(begin_step=2, end_step=17)


def make_tx(topology, schedule=CUBIC, distribution=None, inner=None, **options):
    return sx.sparse_training(
        optax.sgd(0.1) if inner is None else inner,
        distribution=sx.ERK(0.8) if distribution is None else distribution,
        topology=topology,
        schedule=schedule,
        batch_axes={"stack": 0},
        **options,
    )


def drawn(seed, steps=()):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(*steps, *s)).astype(np.float32) for name, s in SHAPES.items()}


PARAMS, GRADS = drawn(0), drawn(1, (STEPS,))
# A weight that is pruned first; then a gradient of it is NaN on the step of one update.
PARAMS["dense"][0, 0], GRADS["dense"][:, 0, 0], GRADS["dense"][9, 0, 0] = 1e-9, 0.0, np.nan
# All of these are alike, on the steps of updates as well.
GRADS["head"][12:14] = np.where(np.arange(16) % 2, 0.5, -0.5)


def start(tx, params):
    opt_state = tx.init(params)
    return sx.apply_masks(params, sx.get_masks(opt_state)), opt_state


def train(tx, carry, grads):
    """The last parameters and state, and parameters and masks after each step."""

    def step(carry, grads):
        params, opt_state = carry
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), (params, sx.get_masks(opt_state))

    return jax.lax.scan(step, carry, grads)


def trained(tx, grads=GRADS, params=PARAMS):
    return jax.jit(lambda p, g: train(tx, start(tx, p), g))(params, grads)


@functools.cache
def alone(name):
    """A run of one of ``TXS`` on one device."""
    return jax.tree.map(np.asarray, trained(TXS[name]))


def counts_of(masks):
    """By layer, int (..., steps)."""
    return {
        name: np.sum(
            masks[leaf] if place is ... else np.moveaxis(masks[leaf], -3, 0)[place],
            axis=tuple(range(-len(LAYER_SHAPES[name]), 0)),
        )
        for name, (leaf, place) in LAYERS.items()
    }


def check_zeros(params, masks):
    for name, mask in masks.items():
        assert not np.asarray(params[name])[~np.asarray(mask)].any(), name


def scheduled(step, initial=SIZES, final=FINAL):
    """What GMP's formula gives each layer at a step, rounded towards the end."""
    left = round(1e6 * min(1.0, max(0.0, (17 - step) / 15)) ** 3)
    return {n: final[n] + left * (initial[n] - final[n]) // 10**6 for n in final}


# --- against NumPy ---------------------------------------------------------------------------


def by_numpy(drop_fraction):
    """Masks of each layer after each step: prune to the count, then replace a cosine share."""
    weights = {name: PARAMS[leaf][place].copy() for name, (leaf, place) in LAYERS.items()}
    masks = {name: np.ones_like(w, bool) for name, w in weights.items()}
    found = {name: [] for name in LAYERS}
    for step in range(STEPS):
        for name, (leaf, place) in LAYERS.items():
            grad, w, mask = GRADS[leaf][step][place], weights[name], masks[name]
            if step in UPDATES:
                new = oracles.top_k_mask(abs(w), scheduled(step)[name], where=mask)
                if drop_fraction and not np.isfinite(grad).all():
                    new = mask
                elif drop_fraction:
                    share = round(1e6 * oracles.drop_fraction_at(drop_fraction, 30, step))
                    n_drop = share * int(new.sum()) // 10**6
                    kept = oracles.top_k_mask(abs(w), new.sum() - n_drop, where=new)
                    new = kept | oracles.top_k_mask(abs(grad), n_drop, where=~kept)
                masks[name] = mask = new
            weights[name] = np.where(mask, w - np.float32(0.1) * grad, np.float32(0))
            found[name].append(mask)
    return found, weights


MIXED = (
    {"conv": PRUNE, "dense": SET, "head": sx.ACDC(INTERVAL, 15), "stack": RIGL},
    CUBIC,
    {"stack*": sx.Global(0.8, floor=5), "*": sx.ERK(0.8)},
)
TXS = {
    "gmp": make_tx(PRUNE),
    "granet": make_tx(RIGL),
    "mixed": make_tx(*MIXED),
}


@pytest.mark.parametrize(("name", "drop_fraction"), [("gmp", 0.0), ("granet", 0.4)])
def test_pruning_with_and_without_growth_equals_numpy(name, drop_fraction, monkeypatch):
    """GMP and GraNet, layers of a stack too, under jit and scan."""
    if drop_fraction:  # Growth breaks ties by the key, so there may be none.
        monkeypatch.setitem(GRADS, "head", drawn(2, (STEPS,))["head"])
    (params, _), (every, masks) = jax.tree.map(np.asarray, trained(TXS[name]))
    expected, weights = by_numpy(drop_fraction)
    for layer, (leaf, place) in LAYERS.items():
        inside = (slice(None), place)
        np.testing.assert_array_equal(masks[leaf][inside], np.stack(expected[layer]), layer)
        np.testing.assert_allclose(params[leaf][place], weights[layer], rtol=1e-5, atol=1e-6)
    check_zeros(every, masks)
    grown = sum(int((m[1:] & ~m[:-1]).sum()) for m in masks.values())
    assert grown > 50 if drop_fraction else grown == 0


# --- counts, for any gradients ---------------------------------------------------------------

# A run with each kind of gradient, all of them in one program under vmap.
HOSTILE = {
    "normal": lambda g, leaf: g,
    "ties": lambda g, leaf: np.sign(g),
    "zero": lambda g, leaf: 0 * g,
    "huge": lambda g, leaf: g * np.float32(1e30),
    "inf": lambda g, leaf: np.where(np.arange(STEPS) == 8, np.inf, g.T).T if leaf == "head" else g,
    "nan": lambda g, leaf: np.where(np.arange(STEPS) >= 8, np.nan, g.T).T if leaf == "head" else g,
}
PLAIN = drawn(3, (STEPS,))
HOSTILE_GRADS = {
    leaf: np.stack([kind(g, leaf).astype(np.float32) for kind in HOSTILE.values()])
    for leaf, g in PLAIN.items()
}


def phases(step):
    """Of AC/DC: dense up to step 3, then sparse, dense from 6, ..., sparse from 15 on."""
    return SIZES if step < 3 or 6 <= step < 9 or 12 <= step < 15 else FINAL


def at_once(step):
    return SIZES if step < 9 else FINAL


HALF = sx.ERK(0.5).layer_counts(LAYER_SHAPES)


def halfway(step):
    left = round(1e6 * min(1.0, max(0.0, (15 - step) / 15)))
    return {n: FINAL[n] + left * (HALF[n] - FINAL[n]) // 10**6 for n in FINAL}


ONE_SHOT = sx.OneShot(9)
# The topology, its schedule, the counts by step, and whether gradients say when to wait.
RUNS = {
    "gmp": (PRUNE, CUBIC, scheduled, False),
    "random": (sx.Prune(INTERVAL, LAST, drop_by="random"), CUBIC, scheduled, False),
    "granet": (RIGL, CUBIC, scheduled, True),
    "set, from half": (SET, sx.Linear(0, 15, initial_sparsity=0.5), halfway, True),
    "dense, then RigL": (RIGL, ONE_SHOT, at_once, True),
    "acdc": (sx.ACDC(INTERVAL, 15), None, phases, False),
}


@pytest.mark.parametrize("name", RUNS)
def test_counts_are_those_of_the_schedule(name):
    topology, schedule, expected, waits = RUNS[name]
    tx = make_tx(topology, schedule)
    (_, _), (params, masks) = jax.jit(jax.vmap(lambda g: train(tx, start(tx, PARAMS), g)))(
        HOSTILE_GRADS
    )
    masks = jax.tree.map(np.asarray, masks)
    check_zeros(params, masks)
    wanted = {
        layer: [expected(step - step % INTERVAL)[layer] for step in range(STEPS)]
        for layer in LAYERS
    }
    for layer, found in counts_of(masks).items():
        for kind, counts in zip(HOSTILE, found, strict=True):
            if kind == "zero" and waits:
                assert set(counts.tolist()) == {wanted[layer][0]}
            elif kind in ("inf", "nan") and layer == "head":
                # Its weights are not finite after step 8, and its topology stays.
                assert counts.tolist() == wanted[layer][:9] + [wanted[layer][8]] * (STEPS - 9)
            else:
                assert counts.tolist() == wanted[layer], (layer, kind)


def test_one_threshold_over_all_layers():
    """Global counts by magnitude as it goes: its total is the schedule's, whatever the ties."""
    distribution = sx.Global(0.8, floor=6, overrides={"head": 0.5})
    inside = [name for name in LAYERS if name != "head"]
    final = distribution.layer_counts(LAYER_SHAPES)
    totals = [{"all": sum(of[name] for name in inside)} for of in (SIZES, final)]
    # Zeros among the weights, and a layer of small ones, which comes down to its floor.
    params = PARAMS | {"dense": 1e-3 * PARAMS["dense"], "conv": np.round(PARAMS["conv"])}
    still = {leaf: np.full_like(g, 1e-9) for leaf, g in PLAIN.items()}
    _, (_, masks) = trained(make_tx(PRUNE, CUBIC, distribution), still, params)
    masks = jax.tree.map(np.asarray, masks)
    counts = counts_of(masks)
    for step in range(STEPS):
        at = step - step % INTERVAL
        total = sum(counts[name][step] for name in inside)
        assert total == scheduled(at, *totals)["all"]
        assert counts["head"][step] == scheduled(at, SIZES, final)["head"]
    assert counts["dense"][-1] == 6
    # The largest of what the floor leaves: no layer but the one of small weights is on it.
    left = np.concatenate([np.abs(params[n][masks[n][-1]]) for n in ("conv", "stack")])
    gone = np.concatenate([np.abs(params[n][~masks[n][-1]]) for n in ("conv", "stack")])
    assert left.min() >= gone.max()


def test_one_threshold_counts_on_weights_that_are_there():
    """A layer comes to lie at 0, with those that the other one has lost."""
    params = {"a": np.float32(0.01) * PARAMS["head"], "b": PARAMS["head"][:, :8]}
    tx = sx.sparse_training(
        optax.sgd(1.0),
        distribution=sx.Global(0.75),
        schedule=sx.Linear(0, 12),
        topology=sx.Prune(INTERVAL, 12),
    )
    grads = {name: np.zeros((8, *p.shape), np.float32) for name, p in params.items()}
    grads["b"][4] = params["b"]
    (end, _), (_, masks) = jax.tree.map(np.asarray, trained(tx, grads, params))
    assert not end["b"].any()
    # 128 + 64 weights, then 144 / 12 less each step, at steps 3 and 6.
    counts = {name: mask.sum(axis=(1, 2)).tolist() for name, mask in masks.items()}
    assert counts == {"a": [128] * 3 + [92] * 5, "b": [64] * 6 + [28] * 2}


def test_one_threshold_over_the_layers_that_follow():
    """Layers that stay, and what the settings say of them, do not count."""
    distribution = sx.Global(0.8, floor=12, overrides={"head": 0.5})
    final = distribution.layer_counts(LAYER_SHAPES)
    topology = {"head": sx.Static(), "conv": sx.Static(), "dense": RIGL, "stack": PRUNE}
    _, (_, masks) = jax.tree.map(np.asarray, trained(make_tx(topology, CUBIC, distribution)))
    counts = counts_of(masks)
    for name in ("head", "conv"):
        assert set(counts[name].tolist()) == {final[name]}
    assert counts["dense"][-1] == final["dense"]
    assert counts["stack/0"][-1] + counts["stack/1"][-1] == final["stack/0"] + final["stack/1"]


# --- what comes back, what stays -------------------------------------------------------------


def test_dense_phases_bring_all_weights_back_at_zero_with_fresh_slots():
    tx = make_tx(sx.ACDC(INTERVAL, 15), None, inner=optax.adam(0.1))
    step = jax.jit(tx.update)
    params, opt_state = jax.jit(functools.partial(start, tx))(PARAMS)
    came_back = 0
    for i in range(17):
        grads = {name: g[i] for name, g in PLAIN.items()}
        before, old = params, opt_state
        updates, opt_state = step(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        masks, were = sx.get_masks(opt_state), sx.get_masks(old)
        for name in ("conv", "dense", "stack"):
            grown = np.asarray(masks[name]) & ~np.asarray(were[name])
            came_back += grown.sum()
            assert not np.asarray(before[name])[grown].any()
            first = 0.1 * grads[name]
            mu, slot = (s.inner_state[0].mu[name] for s in (opt_state, old))
            kept = np.where(grown, first, 0.9 * slot + first)
            np.testing.assert_allclose(mu, np.where(masks[name], kept, 0), rtol=1e-5, atol=1e-7)
        check_zeros(params, masks)
    # At steps 6 and 12.
    assert came_back == 2 * sum(SIZES[n] - FINAL[n] for n in LAYERS if n != "head")


def test_frozen_layers_keep_theirs():
    frozen = {name: name in ("head", "stack") for name in SHAPES}
    inner = optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), frozen))
    (params, _), (_, masks) = trained(make_tx(*MIXED, inner=inner), PLAIN)
    for name in ("head", "stack"):
        assert masks[name].all()
        np.testing.assert_array_equal(params[name], PARAMS[name])
    plain = {name: SHAPES[name] for name in ("conv", "dense", "head")}
    assert int(masks["conv"][-1].sum()) == sx.ERK(0.8).layer_counts(plain)["conv"]


def test_skipped_steps_move_no_weight():
    tx = make_tx(sx.Prune(INTERVAL, LAST, skip_step=True))
    _, (params, masks) = jax.tree.map(np.asarray, trained(tx, PLAIN))
    for step in range(1, STEPS):
        expected = np.where(masks["conv"][step], params["conv"][step - 1], 0)
        stays = (params["conv"][step] == expected).all()
        assert stays == (step in UPDATES)


# --- the same by other ways ------------------------------------------------------------------


def test_a_run_that_resumes_goes_on_where_it_was():
    """From bytes, in the middle of the schedule, with nothing but the state."""
    tx = TXS["mixed"]
    half = jax.jit(functools.partial(train, tx))
    parts = [{n: g[i : i + 12] for n, g in GRADS.items()} for i in (0, 12)]
    again = jax.jit(functools.partial(start, tx))(PARAMS)
    middle, _ = half(again, parts[0])
    saved = flax.serialization.to_bytes(middle)
    (_, opt_state), (_, masks) = half(flax.serialization.from_bytes(again, saved), parts[1])
    (_, expected), (_, every) = alone("mixed")
    jax.tree.map(np.testing.assert_array_equal, opt_state, expected)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[12:]), masks, every)


def test_updates_by_hand_are_those_of_the_schedule():
    """Also at steps of the loop's own: counts follow the number of steps."""
    tx = make_tx(RIGL, automatic=False)
    update = jax.jit(functools.partial(sx.update_topology, tx))
    step = jax.jit(tx.update)
    params, opt_state = jax.jit(functools.partial(start, tx))(PARAMS)
    _, (_, expected) = alone("granet")
    for i in range(14):
        grads = {name: g[i] for name, g in GRADS.items()}
        if i in UPDATES:
            params, opt_state = update(opt_state, params, grads)
        updates, opt_state = step(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        masks = sx.get_masks(opt_state)
        jax.tree.map(lambda m, e, i=i: np.testing.assert_array_equal(m, e[i]), masks, expected)
    params, opt_state = sx.update_topology(
        make_tx(sx.Prune(1_000, 2_000), automatic=False), opt_state, params, params
    )
    found = {n: int(c) for n, c in counts_of(sx.get_masks(opt_state)).items()}
    assert found == scheduled(14)


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_eight_devices_choose_the_masks_of_one(mode):
    """A topology of each kind with its schedule; axes of 8 are sharded, stacks too."""
    tx = TXS["mixed"]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(mode,))
    along = {name: [*[None] * (len(shape) - 1), "x"] for name, shape in SHAPES.items()}
    along["head"] = ["x"]
    placed = {name: NamedSharding(mesh, PartitionSpec(*axes)) for name, axes in along.items()}
    params = jax.device_put(PARAMS, placed)
    shardings = sx.state_shardings(tx, params)
    opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
    params = sx.apply_masks(params, sx.get_masks(opt_state))

    def step(grads, opt_state, params):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    step = jax.jit(step, out_shardings=(placed, shardings) if mode == AxisType.Auto else None)
    _, (_, expected) = alone("mixed")
    for i in range(STEPS):
        grads = jax.device_put({name: g[i] for name, g in GRADS.items()}, placed)
        params, opt_state = step(grads, opt_state, params)
        masks = sx.get_masks(opt_state)
        jax.tree.map(lambda m, e, i=i: np.testing.assert_array_equal(m, e[i]), masks, expected)


def test_inside_shard_map_with_its_checks():
    """One model a device, which differ by a factor that no choice depends on."""
    tx = TXS["mixed"]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def one(params, grads):
        params, grads = jax.tree.map(lambda a: a[0], (params, grads))
        # A scan wants its carry to vary from the start.
        _, (_, masks) = train(tx, varying_as(start(tx, params), params), grads)
        return jax.tree.map(lambda m: m[None], masks)

    own = PartitionSpec("x")
    each = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=own, out_specs=own))
    two = jax.tree.map(lambda a: np.stack([a, -2 * a]), (PARAMS, GRADS))
    masks = each(*two)
    _, (_, expected) = alone("mixed")
    jax.tree.map(lambda m, e: np.testing.assert_array_equal(m, [e, e]), masks, expected)
