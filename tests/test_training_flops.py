"""FLOPs of whole runs, against sums worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax as sx

# Two layers that take 2 * 20 * 20 and 2 * 20 * 5 FLOPs forward.
PARAMS = {"one": jnp.ones((20, 20)), "two": jnp.ones((20, 5)), "bias": jnp.ones(5)}


def network(params, x):
    return x @ params["one"] @ params["two"] + params["bias"][None]


COUNT = sx.flops(network, PARAMS, None, jnp.ones((1, 20)))
ONE, TWO = (COUNT.layers[name].dense for name in ("one", "two"))
REST = COUNT.dense - ONE - TWO
TENTH = sx.Uniform(0.9, dense_first=False)
STEPS = 100


def total(topology, distribution=TENTH, schedule=None, steps=STEPS, **options):
    return sx.training_flops(
        COUNT,
        PARAMS,
        steps,
        topology=topology,
        distribution=distribution,
        schedule=schedule,
        **options,
    )


def of_passes(one, two=None):
    """Of a run in which the layers make so many dense passes."""
    return float(STEPS * 3 * REST + one * ONE + (one if two is None else two) * TWO)


def test_the_network_that_is_counted():
    assert (ONE, TWO) == (800, 200)
    assert COUNT.dense >= 1000


# Passes of a layer at a density d: 3 d a step; 2 d + 1 on steps that need the dense gradient.
RIGL = sx.RigL(10, 0.3, 75)
D = 0.1
PASSES = {
    "static": (sx.Static(), None, 100 * 3 * D),
    "set": (sx.SET(10, 0.3, 75), None, 100 * 3 * D),
    # Updates on 10, 20, ..., 70.
    "rigl": (RIGL, None, 93 * 3 * D + 7 * (2 * D + 1)),
    "rigl, random growth": (sx.RigL(10, 0.3, 75, grow_by="random"), None, 100 * 3 * D),
    # Four steps before each.
    "rigl, accumulating": (
        sx.RigL(10, 0.3, 75, accumulate_steps=4), None, 72 * 3 * D + 28 * (2 * D + 1)
    ),
    "momentum": (sx.RigL(10, 0.3, 75, grow_by=sx.Momentum()), None, 100 * (2 * D + 1)),
    # Step 40 was dense still, before its update.
    "prune once": (sx.Prune(40, 40), sx.OneShot(40), 41 * 3 + 59 * 3 * D),
    # The schedule's step falls between two updates; half dense before.
    "prune late": (sx.Prune(20, 80), sx.OneShot(30, 0.5), 41 * 3 * 0.5 + 59 * 3 * D),
    # After the updates on 20, 40, 60, 80: a fifth of 0.9 less each.
    "linear": (
        sx.Prune(20, 100), sx.Linear(0, 100), 3 * (21 + 20 * (0.82 + 0.64 + 0.46) + 19 * 0.28)
    ),
    # An eighth of the way is 45 weights of 360, and 11 of 90.
    "cubic": (
        sx.Prune(20, 40), sx.Cubic(0, 40),
        (3 * (21 + 20 * 85 / 400 + 59 * D), 3 * (21 + 20 * 21 / 100 + 59 * D)),
    ),
    # Dense to 20, then sparse, dense, sparse.
    "acdc": (sx.ACDC(20, 60), None, 3 * (21 * 1 + 20 * D + 20 * 1 + 39 * D)),
    # Dense to 40; then the gradient of all weights is needed on 60, where it is ranked.
    "dense, then rigl": (
        sx.RigL(20, 0.3, 60, begin_step=40), sx.OneShot(40),
        41 * 3 + 58 * 3 * D + 2 * D + 1,
    ),
    "granet": (
        sx.RigL(20, 0.3, 100), sx.Linear(0, 100),
        3 * 21 + sum(19 * 3 * d + 2 * d + 1 for d in (0.82, 0.64, 0.46)) + 19 * 3 * 0.28,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSES)
def test_sums_by_hand(name):
    topology, schedule, passes = PASSES[name]
    expected = of_passes(*passes) if isinstance(passes, tuple) else of_passes(passes)
    assert total(topology, schedule=schedule) == pytest.approx(expected, rel=1e-9)


def test_shorter_runs_and_single_steps():
    assert total(sx.Static(), steps=1) == pytest.approx(3 * (REST + D * 1000))
    # A run that ends before the first update, and one that has it as its last step.
    assert total(RIGL, steps=10) == pytest.approx(10 * total(sx.Static(), steps=1))
    assert total(RIGL, steps=11) - total(RIGL, steps=10) == pytest.approx(
        3 * REST + (2 * D + 1) * 1000
    )


def test_layers_differ():
    """By topology, by distribution; of no topology; of no distribution."""
    regimes = {"one": RIGL, "two": sx.Static()}
    rigl = PASSES["rigl"][2]
    assert total(regimes) == pytest.approx(of_passes(rigl, 30))
    # A layer of no topology keeps what it begins with: with a schedule, its final density too.
    assert total({"one": RIGL}) == pytest.approx(of_passes(rigl, 30))
    pruned = PASSES["prune once"][2]
    assert total({"one": sx.Prune(40, 40)}, schedule=sx.OneShot(40)) == pytest.approx(
        of_passes(pruned, 30)
    )
    assert total(regimes, {"one": TENTH}) == pytest.approx(of_passes(rigl, 300))
    assert total(sx.Static(), sx.PerLayer({"two": 0.5})) == pytest.approx(of_passes(300, 150))
    assert total(RIGL, TENTH, prunable=lambda path, leaf: path == "two") == pytest.approx(
        of_passes(300, rigl)
    )


def test_patterns_round_densities():
    """40 of 400 weights in 5 x 5 blocks are 2 of 16, and 10 of 100 the 1 of 4 that there is."""
    found = total(sx.Static(), structure={"one": sx.Blocks((5, 5)), "two": sx.Neurons()})
    assert found == pytest.approx(of_passes(3 * STEPS * 50 / 400, 3 * STEPS * 20 / 100))
    # On the way each four keep what is not too many.
    quarter = sx.Uniform(0.75, dense_first=False)
    way = total(sx.Prune(20, 40), quarter, sx.Linear(0, 40), structure=sx.NM(1, 4))
    half = 0.5  # 62.5 % are 2.5 of 4.
    assert way == pytest.approx(of_passes(3 * (21 * 1 + 20 * half + 59 * 0.25)))


def test_counts_are_those_of_a_run():
    """The densities of each step are what ``sparse_training`` has then."""
    topology, schedule = sx.Prune(3, 12), sx.Cubic(1, 11, initial_sparsity=0.25)
    tx = sx.sparse_training(
        optax.sgd(0.1), distribution=sx.ERK(0.8), topology=topology, schedule=schedule
    )
    params, opt_state, step = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
    expected = 0
    for _ in range(14):
        active = {n: int(np.sum(m)) for n, m in sx.get_masks(opt_state).items()}
        # A multiply-add with each active weight.
        expected += 3 * (2 * active["one"] + 2 * active["two"] + int(REST))
        updates, opt_state = step(PARAMS, opt_state, params)
        params = optax.apply_updates(params, updates)
    found = total(topology, sx.ERK(0.8), schedule, steps=14)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 1.0}, TypeError, "steps must be an int"),
        ({"topology": 3}, TypeError, r"topology must be a value such as Static\(\), got 3"),
        ({"distribution": 0.9}, TypeError, r"distribution must be a value such as ERK.* got 0\.9"),
        ({"distribution": None}, TypeError, "distribution must be a value .* got None"),
        ({"schedule": 0.5}, TypeError, "schedule must be a density schedule"),
        ({"topology": sx.Prune(1, 9)}, ValueError, "Prune.* needs a density schedule"),
        ({"schedule": sx.Linear(0, 90), "topology": RIGL}, ValueError, "after the last update"),
        ({"structure": "2:4"}, TypeError, "structure must be a value such as"),
    ],
)
def test_bad_settings(change, error, message):
    with pytest.raises(error, match=message):
        total(**{"topology": sx.Static()} | change)


def test_what_is_counted_is_named():
    with pytest.raises(TypeError, match="count must be what flops returns, got 100"):
        sx.training_flops(100, PARAMS, 5, topology=sx.Static(), distribution=TENTH)
