"""Density schedules: their counts against Python's integers, where they start, and bad input."""

import dataclasses
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

import sparseopt_jax as sx
from tests.helpers import KERNELS, flat, make_params

SIZES = {path: math.prod(shape) for path, shape in KERNELS.items()}
LARGEST = 2**31 - 1
HALF = {path: size // 2 for path, size in SIZES.items()}

# --- counts ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Given(sx.Schedule):
    """Of which the part that is ahead is given at each step."""

    parts: tuple[float, ...]
    initial_sparsity: float = 0.0

    @property
    def end_step(self):
        return len(self.parts) - 1

    def remaining(self, step):
        return jnp.asarray(self.parts)[jnp.minimum(step, self.end_step)]


def count(millionths, initial, final):
    """What is left of the way, rounded towards ``final``, in Python's integers."""
    left = millionths * abs(initial - final) // 1_000_000
    return final + left if initial > final else final - left


SIZE = st.integers(0, LARGEST) | st.sampled_from((0, 1, 999_999, 1_000_000, LARGEST - 1, LARGEST))


@given(
    st.lists(st.integers(0, 1_000_000), min_size=4, max_size=4),
    st.lists(SIZE, min_size=3, max_size=3),
    st.lists(SIZE, min_size=3, max_size=3),
)
def test_counts_of_any_size_are_exact(millionths, initial, final):
    schedule = Given(tuple(m / 1e6 for m in millionths))
    for step, part in enumerate(millionths):
        found = schedule.count_at(step, np.array(initial), np.array(final))
        assert found.dtype == jnp.int32
        assert found.tolist() == [count(part, a, b) for a, b in zip(initial, final, strict=True)]


FORMULAS = {
    "cubic": (sx.Cubic, lambda left: left**3),
    "linear": (sx.Linear, lambda left: left),
    "one-shot": (lambda begin, end: sx.OneShot(end), lambda left: float(left > 0)),
    "optax": (
        # Down from 0.95 to 0.8, on the way of a square.
        lambda begin, end: sx.from_optax(
            optax.polynomial_schedule(0.95, 0.8, 2, end - begin, begin), end
        ),
        lambda left: left**2,
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
@given(st.integers(0, 40_000), st.integers(1, 40_000), st.data())
def test_counts_follow_the_formula_at_any_step(name, begin, length, data):
    """To within the millionth that six decimals are; the ends exactly."""
    make, formula = FORMULAS[name]
    schedule, end = make(begin, begin + length), begin + length
    steps = st.integers(0, end + 1_000) | st.sampled_from((0, begin, end - 1, end, LARGEST))
    for step in (0, begin, end, data.draw(steps)):
        if name == "one-shot":
            left = float(step < end)
        else:
            left = min(max((end - step) / length, 0.0), 1.0)
        found = int(schedule.count_at(step, LARGEST, 1_000))
        exact = 1e6 * formula(left)
        slack = 0 if left in (0.0, 1.0) else 4 if name == "optax" else 1
        nearest = range(max(0, round(exact) - slack), min(10**6, round(exact) + slack) + 1)
        assert found in {count(m, LARGEST, 1_000) for m in nearest}


def test_zhu_and_guptas_table():
    """s(t) = 0.9 - 0.4 (1 - t / 8)^3 from step 10 on, every eighth of the way; 1,000 weights."""
    schedule = sx.Cubic(begin_step=10, end_step=18, initial_sparsity=0.5)
    parts = [0.9 - 0.4 * (1 - n / 8) ** 3 for n in range(9)]
    expected = [500] * 11 + [math.floor(round(1000 - 1000 * s, 6)) for s in parts[1:]] + [100] * 3
    at = jax.jit(jax.vmap(lambda step: schedule.count_at(step, 500, 100)))
    assert at(jnp.arange(22)).tolist() == expected
    assert expected[10:18] == [500, 367, 268, 197, 150, 121, 106, 100]


def test_steps_are_shares_of_a_run():
    for make in (sx.Cubic, sx.Linear):
        shares = make(0.1, np.float32(0.5), total_steps=np.int64(2_000))
        assert shares == make(200, 1_000, total_steps=2_000)
        assert type(shares.end_step) is type(shares.begin_step) is int
        # An int is a step, also where shares could be meant.
        assert make(0, 1, total_steps=2_000).end_step == 1
    assert sx.OneShot(0.25, total_steps=1_001).end_step == 250
    assert sx.Cubic(0.0, 1.0, total_steps=7).end_step == 7
    topology = sx.RigL(10, 0.3, end_step=0.75, begin_step=0.1, total_steps=1_000)
    assert (topology.first_update, topology.end_step) == (100, 750)
    assert sx.Prune(10, end_step=0.5, total_steps=100).end_step == 50
    assert sx.ACDC(10, end_step=0.5, begin_step=0.1, total_steps=100).end_step == 50


def test_a_schedule_of_optax_states_its_ends():
    schedule = sx.from_optax(optax.linear_schedule(0.25, 0.75, 8), 8)
    assert (schedule.initial_sparsity, schedule.end_step) == (0.25, 8)
    assert schedule.final_sparsity == 0.75
    # (-0.7 + 0.8) is 0.10000002 in float32.
    assert sx.from_optax(optax.linear_schedule(0.1, 0.8, 8), 8).initial_sparsity == 0.1
    assert sx.Cubic(0, 8).final_sparsity is None
    # After its end nothing is asked of the function any more.
    beyond = sx.from_optax(lambda step: 0.1 * step.astype(jnp.float32), 5)
    assert [int(beyond.count_at(step, 100, 50)) for step in (0, 1, 5, 9)] == [100, 90, 50, 50]


# --- where runs start ------------------------------------------------------------------------

CUBIC = sx.Cubic(0, 100, initial_sparsity=0.5)
TOPOLOGY = sx.RigL(10, 0.3, 1_000)


class OneInTen:
    """A distribution without a sparsity."""

    def layer_counts(self, layers):
        return {path: math.prod(shape) // 10 for path, shape in layers.items()}


UNIFORM = sx.Uniform(0.9)
STARTS = {
    "dense": (sx.ERK(0.8), 0.0, SIZES),
    "erk": (sx.ERK(0.8), 0.5, sx.ERK(0.5).layer_counts(KERNELS)),
    "er": (sx.ER(0.8), 0.4, sx.ER(0.4).layer_counts(KERNELS)),
    "first layer": (UNIFORM, 0.5, HALF | {"Conv_0/kernel": 360}),
    "global": (sx.Global(0.8, floor=80), 0.5, sx.Global(0.5, floor=80).layer_counts(KERNELS)),
    "overrides": (
        sx.ERK(0.8, {"Dense_1/*": 0.25}),
        0.5,
        sx.ERK(0.5, {"Dense_1/*": 0.25}).layer_counts(KERNELS),
    ),
    # No less than in the end: 70 % of the convolution.
    "per layer": (
        sx.PerLayer({"Conv_0/*": 0.3, "Dense_0/*": 0.9}),
        0.5,
        {"Conv_0/kernel": 252, "Dense_0/kernel": 300, "Dense_1/kernel": 300},
    ),
    "own": (OneInTen(), 0.5, HALF),
    "mapping": (
        {"Conv_0/*": sx.PerLayer({"*": 0.75}), "Dense_0/*": sx.ERK(0.9)},
        0.5,
        HALF | {"Dense_1/kernel": 300},
    ),
    "shadowed": (
        {"*": sx.ERK(0.8), "Dense*": sx.ERK(0.9, {"Dense_1/*": 0.5})},
        0.5,
        sx.ERK(0.5).layer_counts(KERNELS),
    ),
}


def test_runs_start_at_the_initial_sparsity():
    params = make_params()
    schedules = {s: sx.Linear(0, 100, initial_sparsity=s) for s in (0.0, 0.4, 0.5)}
    txs = {
        name: sx.sparse_training(
            optax.sgd(0.1), distribution=one, topology=TOPOLOGY, schedule=schedules[sparsity]
        )
        for name, (one, sparsity, _) in STARTS.items()
    }
    masks = jax.jit(lambda p: {name: sx.get_masks(tx.init(p)) for name, tx in txs.items()})(params)
    for name, (_, _, expected) in STARTS.items():
        found = {path: int(mask.sum()) for path, mask in flat(masks[name]).items()}
        assert {path: found[path] for path in KERNELS} == expected, name
        assert found["Dense_0/bias"] == 20


def test_layers_of_stacks_start_each_at_their_own_count():
    """Two layers of 4 x 8: 32 weights to begin with, 3 and 29 in the end, 16 of each before."""
    params = {"kernel": jnp.ones((2, 4, 8))}
    distribution = sx.PerLayer({"kernel/0": 29 / 32, "kernel/1": 3 / 32})
    tx = sx.sparse_training(
        optax.sgd(0.1), distribution=distribution, topology=TOPOLOGY, schedule=CUBIC, batch_axes=0
    )
    assert sx.get_masks(tx.init(params))["kernel"].sum(axis=(1, 2)).tolist() == [16, 29]


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sx.Cubic(10, 10), ValueError, r"end_step must come after begin_step=10, got 10"),
        (lambda: sx.Linear(10, 9), ValueError, r"got 9; OneShot\(step\) prunes at once"),
        (lambda: sx.Cubic(-1, 10), ValueError, "begin_step must be at least 0, got -1"),
        (lambda: sx.Cubic(0, 2**31), ValueError, "end_step must be at most 2147483647"),
        (lambda: sx.Cubic(0, 0.5), TypeError, "end_step must be an int, got 0.5; a share of a"),
        (lambda: sx.Cubic("0", 5), TypeError, "begin_step must be an int, got '0' of type str"),
        (lambda: sx.Cubic(True, 5), TypeError, "begin_step must be an int, got True"),
        (lambda: sx.Linear(0, 1.5, total_steps=9), ValueError, r"lie in \[0, 1\], got 1\.5"),
        (lambda: sx.Linear(0, math.nan, total_steps=9), ValueError, r"in \[0, 1\], got nan"),
        (lambda: sx.Linear(0, 5, total_steps=0), ValueError, "total_steps must be at least 1"),
        (lambda: sx.Linear(0, 5, total_steps=2.0), TypeError, "total_steps must be an int"),
        # Two shares of a short run that are one step.
        (lambda: sx.Cubic(0.1, 0.12, total_steps=10), ValueError, "come after begin_step=1, got 1"),
        (lambda: sx.OneShot(-1), ValueError, "step must be at least 0, got -1"),
        (lambda: sx.OneShot(0.5), TypeError, "step must be an int, got 0.5; a share"),
        (lambda: sx.OneShot(5, 1.0), ValueError, r"initial_sparsity must lie in \[0, 1\).* 1\.0"),
        (lambda: sx.Cubic(0, 5, -0.1), ValueError, r"initial_sparsity must lie .* got -0\.1"),
        (lambda: sx.Cubic(0, 5, math.nan), ValueError, "initial_sparsity must lie .* got nan"),
        (lambda: sx.Cubic(0, 5, "0.5"), TypeError, r"initial_sparsity must be a number in \[0, 1"),
        (lambda: sx.from_optax(0.5, 5), TypeError, "schedule must be a function .*got 0.5"),
        (lambda: sx.from_optax(lambda: 0.5, 5), TypeError, "schedule must be a function"),
        (lambda: sx.from_optax(lambda step: 0.5, 0), ValueError, "end_step must be at least 1"),
        (lambda: sx.from_optax(lambda step: 0.5, 5.0), TypeError, "end_step must be an int"),
        (lambda: sx.Prune(0, 10), ValueError, "interval must be at least 1, got 0"),
        (lambda: sx.Prune(10, 9), ValueError, "end_step must not come before begin_step"),
        (lambda: sx.Prune(1, 9, drop_by="sign"), ValueError, "drop_by must be one of 'magnitude'"),
        (lambda: sx.Prune(1, 9, skip_step=1), TypeError, "skip_step must be True or False, got 1"),
        (lambda: sx.Prune(1, 0.5), TypeError, "end_step must be an int, got 0.5; a share"),
        (lambda: sx.ACDC(10, 40), ValueError, "even number of intervals .*: 30 or 50, got 40"),
        (lambda: sx.ACDC(10, 35), ValueError, "after the first change at 10, .* 30 or 50, got 35"),
        (lambda: sx.ACDC(10, 5), ValueError, "end_step must not come before begin_step"),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


ERK = sx.ERK(0.8)
MASKS = jax.tree.map(lambda p: np.ones(p.shape, bool), make_params())
PRUNE = sx.Prune(10, 100)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": 0.5}, TypeError, r"such as Cubic\(0, 1000\), or None, got 0\.5"),
        (
            {"schedule": optax.linear_schedule(0, 0.5, 10)},
            TypeError,
            r"schedule must be .*; from_optax\(schedule, end_step\) makes one",
        ),
        (
            {"schedule": CUBIC, "topology": sx.Static()},
            ValueError,
            r"schedule=Cubic.* is of no use to topology=Static\(\).* Prune\(interval, end_step\)",
        ),
        ({"schedule": CUBIC, "topology": {"*": sx.Static()}}, ValueError, "is of no use to topol"),
        ({"schedule": CUBIC, "topology": sx.ACDC(10, 30)}, ValueError, "is of no use to topology"),
        (
            {"topology": PRUNE},
            ValueError,
            r"Prune.* needs a density schedule, .* schedule=Cubic\(begin_step=0, end_step=100\)",
        ),
        ({"topology": {"Dense*": PRUNE, "*": TOPOLOGY}}, ValueError, "Prune.* needs a density"),
        # An end between two updates, and one after the last.
        (
            {"topology": sx.RigL(30, 0.3, 110), "schedule": CUBIC},
            ValueError,
            r"ends at step 100, after the last update of RigL.* at step 90: its final counts",
        ),
        ({"topology": sx.Prune(1, 99), "schedule": CUBIC}, ValueError, "after the last update"),
        (
            {"topology": {"Conv*": TOPOLOGY, "*": sx.SET(1, 0.3, 9)}, "schedule": CUBIC},
            ValueError,
            "ends at step 100, after the last update of SET",
        ),
        (
            {"topology": sx.SET(10, 0.3, 500, drop_by="sign"), "schedule": CUBIC},
            ValueError,
            r"drop_by='sign' keeps the number of weights, .* drop_by='magnitude' can",
        ),
        (
            {"distribution": None, "masks": MASKS, "schedule": CUBIC},
            ValueError,
            r"masks cannot be followed by Cubic.*: give a distribution in their place",
        ),
        (
            {"distribution": None, "masks": MASKS, "topology": sx.ACDC(10, 30)},
            ValueError,
            r"masks cannot be followed by the schedule of ACDC.*: give a distribution",
        ),
    ],
)
def test_what_does_not_go_together(options, error, message):
    given = {"distribution": ERK, "topology": TOPOLOGY} | options
    with pytest.raises(error, match=message):
        sx.sparse_training(optax.sgd(0.1), **given)


def ending_at(sparsity, start=0.0):
    return sx.from_optax(optax.linear_schedule(start, sparsity, 100), 100)


UP = Given((1.0,) * 10 + (0.4,) * 10 + (0.5,) * 10 + (0.0,))
linear = optax.linear_schedule(0.0, 0.8, 100)
ELSEWHERE = r"schedule must end at the sparsity of distribution=.*, 0\.8, but schedule\(100\) is "


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": ending_at(0.7)}, ELSEWHERE + r"0\.7: change either"),
        ({"schedule": ending_at(0.7), "topology": PRUNE}, ELSEWHERE),
        (
            {"schedule": ending_at(0.9), "distribution": {"Conv*": sx.ERK(0.9), "*": ERK}},
            ELSEWHERE + r"0\.9",
        ),
        ({"schedule": ending_at(0.8, start=1.0)}, r"schedule\(0\) must lie in \[0, 1\).* got 1\.0"),
        ({"schedule": ending_at(0.8, start=-0.5)}, r"schedule\(0\) must lie in .* got -0\.5"),
        ({"schedule": ending_at(1.5)}, r"schedule\(100\) must lie in \[0, 1\).* got 1\.5"),
        ({"schedule": ending_at(math.nan)}, r"schedule\(0\) must lie in \[0, 1\).* got nan"),
        ({"schedule": ending_at(0.8, start=0.8)}, "schedule must change between step 0 and end_st"),
        # To 0.95 and back.
        (
            {"schedule": sx.from_optax(lambda s: jnp.where(s == 50, 0.95, linear(s)), 100)},
            r"must stay between .* at step 50 the part .* ahead is -0\.1875, outside \[0, 1\]",
        ),
        ({"schedule": Given((1.0,) * 10 + (math.nan, 0.0))}, "at step 10 the part .* is nan"),
        (
            {"schedule": UP, "topology": PRUNE},
            "asks for more weights at step 20 than at the update before, and Prune only prunes",
        ),
        (
            {"schedule": sx.Linear(0, 100, 0.9), "topology": PRUNE},
            r"initial_sparsity=0\.9 leaves layer 'Conv_0/kernel' .* Prune only prunes: lower it",
        ),
    ],
)
def test_schedules_that_lead_elsewhere(options, message):
    """Each is an error of ``init``, before anything is drawn or compiled."""
    given = {"distribution": ERK, "topology": TOPOLOGY} | options
    tx = sx.sparse_training(optax.sgd(0.1), **given)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tx.init, make_params())


def test_schedules_that_do_not():
    """Up and down is what RigL follows; layers that no schedule concerns do not have to agree."""
    for options in (
        {"schedule": UP},
        {"schedule": sx.Linear(0, 100, 0.9)},
        {"schedule": ending_at(0.8)},
        {"schedule": ending_at(0.9), "distribution": sx.PerLayer({"*": 0.8})},
        {
            "schedule": ending_at(0.9),
            "distribution": {"Conv*": ERK, "*": sx.ERK(0.9)},
            "topology": {"Dense*": TOPOLOGY},
        },
        # With no updates of its own, when one falls is up to the loop.
        {"schedule": sx.Cubic(0, 10_000), "automatic": False},
    ):
        given = {"distribution": ERK, "topology": TOPOLOGY} | options
        jax.eval_shape(sx.sparse_training(optax.sgd(0.1), **given).init, make_params())


def test_keep_top_k_checks_where_its_schedule_leads():
    with pytest.raises(ValueError, match=ELSEWHERE):
        sx.keep_top_k(ERK, ending_at(0.7)).init(make_params())
    with pytest.raises(ValueError, match="at step 3 the part of the way that is ahead is 1"):
        sx.keep_top_k(ERK, Given((1.0, 1.0, 1.0, 1.5, 0.0))).init(make_params())
    sx.keep_top_k(ERK, ending_at(0.8)).init(make_params())
