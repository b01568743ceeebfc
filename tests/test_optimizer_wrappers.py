"""optax's wrappers inside and around ``sparse_training``: one row each, and what must hold."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType

import sparseopt_jax as sx
from tests.optimizer_runs import (
    TOPOLOGIES,
    UPDATE_STEPS,
    assert_same_bits,
    assert_same_run,
    changed_kinds,
    check,
    check_topologies,
    dense_run,
    on_eight_devices,
    on_one_device,
    sparse,
    sparse_run,
    start,
    topologies_and_seeds,
    watched,
)
from tests.optimizers import EXCLUDED, STEPS, loss, make_params, schedule

pytestmark = pytest.mark.usefixtures("standard_promotion")

adam = functools.partial(optax.adam, schedule)
KERNELS = {"Dense_0": {"kernel": True, "bias": False}, "Dense_1": {"kernel": True}}
FROZEN = {"Dense_0": {"kernel": True, "bias": False}, "Dense_1": {"kernel": False}}
LABELS = {"Dense_0": {"kernel": "adam", "bias": "sgd"}, "Dense_1": {"kernel": "sgd"}}
GROUPS = {"adam": optax.adam(1e-2), "sgd": optax.sgd(1e-2, 0.9)}


def every_third(step):
    return step % 3 == 0


def sam(**options):
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    return optax.contrib.sam(optax.sgd(1e-2, 0.9), adversary, **options)


# What goes inside: sparse_training(row). Names begin with that of the wrapper in optax.
INSIDE = {
    "optax.chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), adam(), optax.ema(0.9)),
    "optax.named_chain": lambda: optax.named_chain(("clip", optax.clip(1.0)), ("adam", adam())),
    "optax.masked": lambda: optax.masked(adam(), KERNELS),
    "optax.masked, prefix": lambda: optax.masked(adam(), {"Dense_0": True, "Dense_1": False}),
    "optax.masked, function": lambda: optax.masked(
        adam(), lambda params: jax.tree.map(lambda p: p.ndim == 2, params)
    ),
    "optax.partition": lambda: optax.partition(GROUPS, LABELS),
    "optax.partition, prefix": lambda: optax.partition(
        GROUPS, {"Dense_0": "adam", "Dense_1": "sgd"}
    ),
    "optax.conditionally_transform": lambda: optax.chain(
        optax.conditionally_transform(optax.scale_by_adam(), lambda step: step >= 7),
        optax.scale(-1e-2),
    ),
    "optax.conditionally_mask": lambda: optax.conditionally_mask(adam(), every_third),
    "optax.flatten": lambda: optax.flatten(adam()),
    "optax.freeze": lambda: optax.chain(adam(), optax.freeze(FROZEN)),
    "optax.selective_transform": lambda: optax.selective_transform(adam(), freeze_mask=FROZEN),
    "optax.apply_if_finite": lambda: optax.apply_if_finite(adam(), 3),
    "optax.inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(schedule),
    "optax.MultiSteps": lambda: optax.MultiSteps(adam(), 3).gradient_transformation(),
    "optax.snapshot": lambda: optax.chain(adam(), optax.snapshot("step", lambda step: step)),
    "optax.lookahead": lambda: optax.lookahead(adam(), 4, 0.5),
    "optax.lookahead, reset_state": lambda: optax.lookahead(adam(), 4, 0.5, reset_state=True),
    "optax.contrib.mechanize": lambda: optax.contrib.mechanize(optax.sgd(1e-2, 0.9)),
    "optax.contrib.sam": sam,
    "optax.contrib.sam, opaque": functools.partial(sam, opaque_mode=True),
    "optax.contrib.schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(1e-2), 1e-2),
    "optax.contrib.split_real_and_imaginary": lambda: optax.contrib.split_real_and_imaginary(
        adam()
    ),
    "sparseopt": lambda: sx.sparseopt(schedule, weight_decay=1e-3),
}
EXTRA = {"optax.contrib.sam, opaque": ("grad_fn",)}

# What goes around: row(make) with make(learning_rate) = sparse_training(sgd(learning_rate)).
AROUND = {
    "optax.MultiSteps": lambda make: optax.MultiSteps(make(1e-2), 2).gradient_transformation(),
    "optax.MultiSteps, skipping": lambda make: optax.MultiSteps(
        make(1e-2), 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "optax.apply_if_finite": lambda make: optax.apply_if_finite(make(1e-2), 5),
    "optax.inject_hyperparams": lambda make: optax.inject_hyperparams(make)(schedule),
    "optax.conditionally_mask": lambda make: optax.conditionally_mask(make(1e-2), every_third),
    "optax.chain, before it": lambda make: optax.chain(optax.clip_by_global_norm(1.0), make(1e-2)),
    "optax.named_chain, before it": lambda make: optax.named_chain(
        ("clip", optax.clip(1.0)), ("sparse", make(1e-2))
    ),
}

# Seven rows that stand for the ways in which a state can be nested, on eight devices.
ON_A_MESH = ("optax.masked", "optax.partition, prefix", "optax.contrib.sam", "optax.lookahead")
AROUND_ON_A_MESH = ("optax.MultiSteps", "optax.apply_if_finite", "optax.inject_hyperparams")


def start_of(name, dtype=jnp.float32):
    """The parameters in the form that the optimizer takes."""
    params = make_params(dtype)
    return optax.LookaheadParams.init_synced(params) if "lookahead" in name else params


def around(row, topology, key=0, watch=lambda inner: inner):
    return row(lambda learning_rate: sparse(watch(optax.sgd(learning_rate, 0.9)), topology, key))


def test_every_wrapper_of_optax_is_here():
    named = {part for name in (*INSIDE, *AROUND) for part in name.split(", ")}
    missing = {name for name, reason in EXCLUDED.items() if "test_optimizer_wrappers" in reason}
    assert missing - named == {  # They have tests of their own.
        "optax.measure_with_ema",
        "optax.monitor",
        "optax.contrib.differentially_private_aggregate",
    }


# --- inside -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INSIDE)
def test_inside(name):
    """Static, SET and RigL, two seeds each, under jit, vmap and scan, beside a dense control."""
    extra, begin = EXTRA.get(name, ()), functools.partial(start_of, name)
    if name != "sparseopt":  # It needs masks.
        _, finite, _ = jax.jit(dense_run(INSIDE[name], extra, begin))()
        assert np.asarray(finite).all()
    run = sparse_run(
        lambda topology, key: sparse(watched(INSIDE[name]()), topology, key), extra, begin
    )
    keys = jax.random.split(jax.random.key(0), 2)
    record, (_, state) = jax.jit(topologies_and_seeds(run, keys))()
    check(record, finite=True)
    check_topologies(record)
    if "named_chain" not in name:  # Its state is an OrderedDict, which msgpack does not take.
        assert_same_bits(state, restored(state))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", INSIDE)
def test_a_step_inside_changes_no_dtype(name, dtype):
    params = jax.eval_shape(lambda: start_of(name, dtype))
    inner, extra = INSIDE[name](), EXTRA.get(name, ())
    by_itself = {}
    if name != "sparseopt":
        by_itself = changed_kinds(inner, extra, params, lambda state: state)
    tx = sparse(inner, TOPOLOGIES["rigl"])
    assert changed_kinds(tx, extra, params, lambda state: state.inner_state) == by_itself
    assert changed_kinds(tx, extra, params, lambda s: s._replace(inner_state=())) == {}


def restored(state):
    blank = jax.tree.map(jnp.zeros_like, state)
    return flax.serialization.from_bytes(blank, flax.serialization.to_bytes(state))


# --- around -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AROUND)
def test_around(name):
    run = sparse_run(lambda topology, key: around(AROUND[name], topology, key, watched))
    keys = jax.random.split(jax.random.key(0), 2)
    record, (_, state) = jax.jit(topologies_and_seeds(run, keys))()
    check(record, finite=True)
    changed = np.asarray(record.masks_changed)
    for topology, steps in zip(TOPOLOGIES, changed, strict=True):
        assert steps.any(axis=1).all() == (topology != "static")
    if "named_chain" not in name:
        assert_same_bits(state, restored(state))


@pytest.mark.parametrize("name", AROUND)
def test_topology_updates_follow_the_wrapped_steps(name):
    """The masks change where the wrapper's calls reach the fifth, tenth, ... step within."""
    run = sparse_run(lambda topology, key: around(AROUND[name], topology, key, watched))
    record, _ = jax.jit(lambda key: run(TOPOLOGIES["set"], key))(jax.random.key(0))
    calls = np.arange(STEPS)
    if "MultiSteps" in name:
        calls = calls[1::2]
    elif "conditionally" in name:
        calls = calls[::3]
    expected = [call for step, call in enumerate(calls) if step in UPDATE_STEPS]
    assert np.flatnonzero(record.masks_changed).tolist() == expected


def test_what_is_not_finite_changes_nothing():
    """apply_if_finite and MultiSteps that skip hold the whole state, topology included."""
    for name in ("optax.apply_if_finite", "optax.MultiSteps, skipping"):
        tx = around(AROUND[name], TOPOLOGIES["rigl"])
        params, state = jax.jit(lambda tx=tx: start(tx, make_params()))()
        grads = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
        updates, after = jax.jit(tx.update)(grads, state, params)
        assert_same_bits(sx.get_masks(state), sx.get_masks(after))
        assert all((np.asarray(u) == 0).all() for u in jax.tree.leaves(updates))


def test_what_changes_its_updates_breaks_zeros():
    """The wrapper must be outermost: halved, the update -w of a dropped weight leaves w / 2."""
    run = sparse_run(
        lambda topology, key: optax.chain(
            sparse(watched(optax.sgd(1e-2)), topology, key), optax.scale(0.5)
        )
    )
    record, _ = jax.jit(lambda key: run(TOPOLOGIES["rigl"], key))(jax.random.key(0))
    assert np.asarray(record.zeros_hold)[: UPDATE_STEPS[0]].all()
    assert not np.asarray(record.zeros_hold)[UPDATE_STEPS[0]]


def by_hand(tx, grads_of, steps=UPDATE_STEPS[0] + 2):
    """A loop over steps, for what no scan can hold; asserts counts and zeros."""
    params, state = jax.jit(lambda: start(tx, make_params()))()
    first = jax.tree.leaves(sx.get_masks(state))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grads_of(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        now = jax.tree.leaves(sx.get_masks(state))
        for p, m, n in zip(jax.tree.leaves(params), now, first, strict=True):
            assert (np.asarray(p)[~np.asarray(m)] == 0).all()
            assert np.asarray(m).sum() == np.asarray(n).sum()
    assert any((np.asarray(m) != np.asarray(n)).any() for m, n in zip(now, first, strict=True))
    return state


def test_private_gradients_go_before_it():
    """One gradient per example comes in, one gradient goes on to sparse_training."""
    private = optax.contrib.differentially_private_aggregate(1.0, 0.1, key=jax.random.key(0))

    def one_per_example(params):
        return jax.vmap(lambda c: jax.grad(lambda p: c * loss(p))(params))(jnp.arange(1.0, 5.0))

    sgd = sparse(optax.sgd(1e-2, 0.9), TOPOLOGIES["rigl"])
    by_hand(optax.chain(private, sgd), one_per_example)


def test_monitor_inside():
    """It puts its measurements into its state on the first step only, which scan cannot hold."""
    measure = optax.measure_with_ema(optax.tree.norm, 0.9)
    monitored = optax.chain(optax.monitor({"norm": measure}), adam())
    state = by_hand(sparse(monitored, TOPOLOGIES["rigl"]), jax.grad(loss))
    assert float(optax.tree.get(state, "norm")) > 0


# --- devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", [*ON_A_MESH, *(f"around: {name}" for name in AROUND_ON_A_MESH)])
def test_eight_devices_equal_one(name, kind):
    if name.startswith("around: "):
        tx = around(AROUND[name.removeprefix("around: ")], TOPOLOGIES["rigl"])
    else:
        tx = sparse(INSIDE[name](), TOPOLOGIES["rigl"])
    first = jax.jit(lambda: start(tx, start_of(name)))()
    alone, programs = on_one_device(tx, (), first)
    assert programs == 1
    assert_same_run(alone, on_eight_devices(tx, (), first, kind))
