"""Every optimizer of optax inside ``sparse_training``: one row each, and what must hold for it."""

import contextlib
import functools
import importlib
import pathlib
import re

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from jax.sharding import AxisType

import sparseopt_jax as sx
from tests import optimizers
from tests.optimizer_runs import (
    TOPOLOGIES,
    UPDATE_STEPS,
    assert_close,
    assert_same_bits,
    assert_same_run,
    changed_kinds,
    check,
    check_topologies,
    counters,
    dense_run,
    explicit_mode_refuses,
    last_move,
    make_step,
    on_eight_devices,
    on_one_device,
    place,
    savable,
    sparse,
    sparse_run,
    start,
    topologies_and_seeds,
    watched,
)
from tests.optimizers import EXCLUDED, RATE_ENDS_AT, STEPS, make_params, rate_of

pytestmark = pytest.mark.usefixtures("standard_promotion")

with jax.numpy_dtype_promotion("standard"):
    ROWS, PARTS, STATELESS = optimizers.classified()

every_optimizer = pytest.mark.parametrize("name", ROWS)


@pytest.fixture
def row(name):
    context = contextlib.nullcontext()
    if ROWS[name].broadcasts_ranks:
        context = jax.numpy_rank_promotion("allow")
    with context:
        yield ROWS[name]


def watched_tx(row):
    return lambda topology, key: sparse(watched(row.make(rate_of(row))), topology, key)


# --- the table itself ---------------------------------------------------------------------------


def test_every_public_transformation_is_a_row_or_excluded():
    found = set(optimizers.transformations())
    assert set(EXCLUDED) <= found, "excluded, but not in optax any more"
    covered = set(ROWS) - set(optimizers.VARIANTS) | set(PARTS) | set(STATELESS)
    assert covered == found - set(EXCLUDED)
    assert {*optimizers.ARGUMENTS, *optimizers.EXTRA_ARGUMENTS} <= found
    assert len(ROWS) >= 50


# Rules that keep moving weights by themselves once the learning rate is 0: momentum or averages
# behind the learning rate, or a rate that multiplies only a part of the step.
GO_ON_WITHOUT_A_RATE = {
    "optax.adafactor, factored",
    "optax.lars",
    "optax.optimistic_adam",
    "optax.rmsprop, initial_scale",
    "optax.contrib.dadapt_adamw",
    "optax.contrib.madgrad",
    "optax.contrib.schedule_free_adamw",
    "optax.contrib.schedule_free_sgd",
}

# A rule that computes each weight anew, from its initial value, and moves it there by the
# difference. Where that sum is rounded, the step after takes the last bit: on jax 0.12 one weight
# of 272 does, in the dense control.
ROUNDS_ONCE_MORE = {"optax.contrib.cocob"}


@every_optimizer
def test_counts_zeros_slots_and_schedules(name, row):
    """Static, SET and RigL, two seeds each, under jit, vmap and scan, beside a dense control."""
    dense_moved, dense_finite, dense_state = jax.jit(
        dense_run(lambda: row.make(rate_of(row)), row.extra)
    )()
    keys = jax.random.split(jax.random.key(0), 2)
    run = sparse_run(watched_tx(row), row.extra)
    record, (_, state) = jax.jit(topologies_and_seeds(run, keys))()
    check(record, finite=np.asarray(dense_finite).all())
    check_topologies(record)

    # No counter lags behind the dense run's, and the learning rate ends on the same step.
    for path, count in counters(dense_state).items():
        assert (counters(state)[f".inner_state.inner{path}"] == count).all()
    if row.takes_schedule and name not in GO_ON_WITHOUT_A_RATE:
        last = {RATE_ENDS_AT - 1} | ({RATE_ENDS_AT} if name in ROUNDS_ONCE_MORE else set())
        assert last_move(dense_moved) in last
        for moved in np.asarray(record.moved).reshape(-1, STEPS):
            assert last_move(moved) in last


# Optimizers that fail by themselves on bfloat16 parameters: one pulls back a cotangent of another
# dtype, one turns its bfloat16 statistics into float32.
NOT_BFLOAT16 = {
    "optax.scale_by_backtracking_linesearch",
    "optax.scale_by_distance_over_gradients",
}


@every_optimizer
def test_bfloat16(name, row):
    """RigL, and the state saved with flax.serialization and restored at the end of it."""
    params = functools.partial(make_params, jnp.bfloat16)
    dense = jax.jit(dense_run(lambda: row.make(rate_of(row)), row.extra, params))
    if name in NOT_BFLOAT16:
        with pytest.raises(TypeError):
            dense()
        return
    _, finite, _ = dense()
    run = sparse_run(watched_tx(row), row.extra, params)
    record, (last, state) = jax.jit(lambda key: run(TOPOLOGIES["rigl"], key))(jax.random.key(0))
    check(record, finite=np.asarray(finite).all())
    assert np.asarray(record.masks_changed)[UPDATE_STEPS[0]]
    assert {p.dtype.name for p in jax.tree.leaves(last)} == {"bfloat16"}
    state = savable(state)
    blank = jax.tree.map(jnp.zeros_like, state)
    restored = flax.serialization.from_bytes(blank, flax.serialization.to_bytes(state))
    assert_same_bits(state, restored)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in ROWS]
    + [(name, "bfloat16") for name in ROWS if name not in NOT_BFLOAT16],
)
def test_a_step_changes_no_dtype(name, row, dtype):
    """Nor any shape or weak type, so that the second call needs no compilation.

    Where an optimizer changes one by itself, the dense control does so too.
    """
    params = jax.eval_shape(lambda: make_params(dtype))
    inner = row.make(rate_of(row))
    by_itself = changed_kinds(inner, row.extra, params, lambda state: state)
    tx = sparse(inner, TOPOLOGIES["rigl"])
    assert changed_kinds(tx, row.extra, params, lambda state: state.inner_state) == by_itself
    assert changed_kinds(tx, row.extra, params, lambda s: s._replace(inner_state=())) == {}
    # The statistics of line searches are weakly typed at first.
    assert all(".info." in path for path in by_itself)


def test_stateless_transformations():
    """All of those that keep no state, one after the other in one chain."""
    chain = optax.chain(*(row.make(rate_of(row)) for row in STATELESS.values()))
    run = sparse_run(lambda topology, key: sparse(watched(chain), topology, key), ("value",))
    keys = jax.random.split(jax.random.key(0), 2)
    record, _ = jax.jit(topologies_and_seeds(run, keys))()
    check(record, finite=True)


@pytest.mark.parametrize("name", ["optax.adam", "optax.lamb", "optax.contrib.muon"])
def test_vmap_over_seeds_equals_single_runs(name, row):
    rigl = functools.partial(sparse_run(watched_tx(row), row.extra), TOPOLOGIES["rigl"])
    keys = jax.random.split(jax.random.key(0), 2)
    batched, (batched_params, _) = jax.jit(jax.vmap(rigl))(keys)
    single = jax.jit(rigl)
    for i, key in enumerate(keys):
        record, (params, _) = single(key)
        np.testing.assert_array_equal(record.masks, batched.masks[i])
        assert_close(params, jax.tree.map(lambda x, i=i: x[i], batched_params))


def test_stale_slots_are_seen(monkeypatch):
    """The watch itself: without the reset it finds both of Adam's moments of a dropped weight."""
    # The package's function of this name hides the module.
    module = importlib.import_module("sparseopt_jax.sparse_training")
    monkeypatch.setattr(module, "reset_inactive", lambda state, *_: state)
    run = sparse_run(watched_tx(ROWS["optax.adam"]), steps=7)
    record, _ = jax.jit(lambda key: run(TOPOLOGIES["rigl"], key))(jax.random.key(0))
    stale = np.asarray(record.stale)
    assert stale[UPDATE_STEPS[0] - 1] == 0
    assert stale[UPDATE_STEPS[0]] > 0


@pytest.mark.parametrize("name", ["optax.adam", "optax.rmsprop, initial_scale"])
def test_slots_after_an_update_by_hand(name, row):
    """update_topology resets the slots of what it drops and of what it grows, too."""
    tx = sx.sparse_training(
        watched(row.make(1e-2)),
        distribution=sx.ERK(0.7),
        topology=TOPOLOGIES["rigl"],
        automatic=False,
    )
    carry = jax.jit(lambda: start(tx, make_params()))()
    step = jax.jit(make_step(tx, row.extra))
    carry = step(*step(*carry))
    params, state = carry
    before = sx.get_masks(state)
    update = jax.jit(lambda p, s: sx.update_topology(tx, s, p, jax.grad(optimizers.loss)(p)))
    params, state = update(params, state)
    changed = jax.tree.map(lambda m, n: bool((m != n).any()), before, sx.get_masks(state))
    assert changed["Dense_0"]["kernel"]
    assert changed["Dense_1"]["kernel"]
    assert int(step(params, state)[1].inner_state.stale) == 0


@pytest.mark.parametrize("shape", [(16, 8), (8, 8)])
def test_a_projector_of_its_matrix_shape_is_no_slot(shape):
    """GaLore's projector, and for a square its moments, are not kept per weight: they stay."""
    tx = sx.sparse_training(
        optax.contrib.galore(1e-2), distribution=sx.ERK(0.5), topology=sx.Static()
    )
    rng = np.random.default_rng(0)
    carry = start(tx, {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)})
    step = jax.jit(make_step(tx, ()))
    for _ in range(3):
        carry = step(*carry)
        projector = np.asarray(carry[1].inner_state[0].projector["kernel"])
        assert projector.shape == shape
        np.testing.assert_allclose(projector.T @ projector, np.eye(8), atol=1e-5)


# What is shared by many weights, beside counters, keys and statistics of the loss: it stays when
# weights change. Everything else that a row keeps is per weight and starts again.
SHARED = {
    "optax.adafactor": ["v_col (1,)", "v_row (1,)"],
    "optax.adafactor, factored": ["v (1,)", "v_col (16,)", "v_row (8,)"],
    "optax.lbfgs": [
        "curvature_error ()",
        "decrease_error ()",
        "diff_params_memory (3, 8, 16)",
        "diff_updates_memory (3, 8, 16)",
        "learning_rate ()",
        "value ()",
        "weights_memory (3,)",
    ],
    "optax.novograd": ["nu ()"],
    "optax.scale_by_backtracking_linesearch": ["decrease_error ()", "learning_rate ()", "value ()"],
    "optax.scale_by_distance_over_gradients": ["grad_sum_of_squares (1,)", "max_dist ()"],
    "optax.sm3": ["mu (16,)", "mu (8,)"],
    "optax.contrib.dadapt_adamw": ["estim_lr ()", "numerator_weighted ()"],
    "optax.contrib.dog": ["max_dist ()", "sum_sq_norm_grads ()"],
    "optax.contrib.dowg": ["estim_sq_dist ()", "weighted_sq_norm_grads ()"],
    "optax.contrib.galore": ["mu (8, 4)", "nu (8, 4)", "projector (16, 4)"],
    "optax.contrib.momo": ["barf ()", "gamma ()", "lb ()"],
    "optax.contrib.momo_adam": ["barf ()", "gamma ()", "lb ()"],
    "optax.contrib.muon": ["ns_coeffs (3,)"],
    "optax.contrib.prodigy": ["estim_lr ()", "numerator_weighted ()"],
    "optax.contrib.reduce_on_plateau": ["avg_value ()", "best_value ()", "scale ()"],
    "optax.contrib.schedule_free_adamw": ["b1 ()", "max_lr ()", "weight_sum ()"],
    "optax.contrib.schedule_free_sgd": ["b1 ()", "max_lr ()", "weight_sum ()"],
}


def test_what_is_shared_by_many_weights():
    found = {name: optimizers.shared_slots(row) for name, row in ROWS.items()}
    assert {name: slots for name, slots in found.items() if slots} == SHARED
    guides = pathlib.Path(__file__).parents[1] / "docs" / "guides"
    table = (guides / "optimizers.md").read_text(encoding="utf-8")
    table = table[table.index("| stays when weights change |") :]
    named = {name.split(",")[0].rsplit(".", 1)[1] for name in SHARED}
    assert named == set(re.findall(r"`(\w+)`", table[: table.index("| `flatten(...)` |")]))


# --- devices ------------------------------------------------------------------------------------

# Optimizers whose own operations Explicit mode refuses on sharded matrices: products of a matrix
# with its transpose, decompositions, dot products over all parameters.
NOT_EXPLICIT = {
    "optax.lbfgs",
    "optax.scale_by_backtracking_linesearch",
    "optax.contrib.dadapt_adamw",
    "optax.contrib.galore",
    "optax.contrib.momo",
    "optax.contrib.momo_adam",
    "optax.contrib.muon",
    "optax.contrib.prodigy",
}


@every_optimizer
def test_eight_devices_equal_one(name, row):
    """In Auto and Explicit mode; the sharding of weights, masks and per-weight slots stays."""
    inner = row.make(rate_of(row))
    tx = sparse(inner, TOPOLOGIES["rigl"])
    first = jax.jit(lambda: start(tx, make_params()))()
    alone, programs = on_one_device(tx, row.extra, first)
    changed = changed_kinds(inner, row.extra, jax.eval_shape(make_params), lambda state: state)
    assert programs == 1 + bool(changed)
    assert_same_run(alone, on_eight_devices(tx, row.extra, first, AxisType.Auto))
    refused = explicit_mode_refuses(inner, row.extra, place(first[0], AxisType.Explicit))
    assert refused == (name in NOT_EXPLICIT)
    if not refused:
        assert_same_run(alone, on_eight_devices(tx, row.extra, first, AxisType.Explicit))


# --- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["optax.adam", "optax.lbfgs", "optax.sm3", "optax.contrib.muon"])
def test_orbax_restores_the_state_bit_for_bit(name, row, tmp_path):
    tx = sparse(row.make(rate_of(row)), TOPOLOGIES["rigl"])
    carry = jax.jit(lambda: start(tx, make_params()))()
    step = jax.jit(make_step(tx, row.extra))
    for _ in range(7):
        carry = step(*carry)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", carry)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, carry))
    assert_same_bits(carry, restored)
    assert_same_bits(step(*carry), step(*restored))
