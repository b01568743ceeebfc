"""Other regimes for other layers: by path pattern, and side by side in ``optax.partition``."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax as sx
from tests.helpers import flat, make_params
from tests.training import check_zeros, make_tx, random_grads, run, start, step_fn

pytestmark = pytest.mark.usefixtures("standard_promotion")

RIGL = sx.RigL(3, 0.4, 1_000)
SET = sx.SET(2, 0.4, 1_000)


def changed(before, after):
    old, new = flat(before), flat(after)
    return {path for path in old if (np.asarray(old[path]) != np.asarray(new[path])).any()}


# --- mappings --------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", [RIGL, SET], ids=["rigl", "set"])
def test_layers_whose_topology_stays(topology):
    for rest in ("Conv_0/*", "Dense_1/*"), ("*",):
        regimes = {"Dense_0/*": sx.Static()} | dict.fromkeys(rest, topology)
        tx = make_tx(topology=regimes)
        _, opt_state = start(tx, make_params())
        params, after = run(tx, make_params(), 8)
        moved = changed(sx.get_masks(opt_state), sx.get_masks(after))
        assert moved == {"Conv_0/kernel", "Dense_1/kernel"}
        check_zeros(params, after)
    # Layers that no pattern matches keep their masks too.
    tx = make_tx(topology={"Dense_1/*": topology})
    _, after = run(tx, make_params(), 8)
    assert changed(sx.get_masks(opt_state), sx.get_masks(after)) == {"Dense_1/kernel"}


def test_each_topology_keeps_its_own_schedule():
    """RigL at 3, 6, 9, SET at 2, 4, 6, 8; slots of what grew are reset then, and only then."""
    tx = make_tx(optax.adam(1e-2), {"Conv_0/*": RIGL, "*": SET})
    params, opt_state = start(tx, make_params())
    step = step_fn(tx)
    for i in range(10):
        grads = random_grads(jax.random.key(i), params)
        params, new = step(params, opt_state, grads)
        moved = changed(sx.get_masks(opt_state), sx.get_masks(new))
        expected = {"Conv_0/kernel"} if i in (3, 6, 9) else set()
        expected |= {"Dense_0/kernel", "Dense_1/kernel"} if i in (2, 4, 6, 8) else set()
        assert moved == expected
        old, masks = flat(sx.get_masks(opt_state)), flat(sx.get_masks(new))
        mu, before = flat(new.inner_state[0].mu), flat(opt_state.inner_state[0].mu)
        for path in ("Conv_0/kernel", "Dense_0/kernel", "Dense_1/kernel"):
            grown = np.asarray(masks[path]) & ~np.asarray(old[path])
            start_at = np.where(grown, 0, np.asarray(before[path]))
            g = np.where(masks[path], flat(grads)[path], 0)
            stays = np.where(masks[path], start_at, 0)
            np.testing.assert_allclose(mu[path], 0.9 * stays + 0.1 * g, rtol=1e-5, atol=1e-7)
        opt_state = new
        check_zeros(params, opt_state)


def test_one_pattern_for_all_is_the_value_itself():
    ends = [run(make_tx(topology=t), make_params(), 7) for t in (RIGL, {"*": RIGL})]
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_some_accumulate_and_some_do_not():
    summed = sx.RigL(4, 0.4, 1_000, accumulate_steps=3)
    tx = make_tx(topology={"Dense_0/*": summed, "*": SET})
    params, opt_state = start(tx, make_params())
    assert list(flat(opt_state.accumulator)) == ["Dense_0/kernel"]
    step = step_fn(tx)
    grads = [random_grads(jax.random.key(i), params) for i in range(5)]
    for g in grads:
        before = params, opt_state
        params, opt_state = step(params, opt_state, g)
    # The sums over steps 2, 3 and 4, ranked by the same topology with the same key.
    total = jax.tree.map(lambda *g: sum(g), *grads[2:])
    _, by_hand = sx.update_topology(
        make_tx(topology={"Dense_0/*": summed, "*": SET}), before[1], before[0], total
    )
    masks, expected = (sx.get_masks(state)["Dense_0"]["kernel"] for state in (opt_state, by_hand))
    np.testing.assert_array_equal(masks, expected)
    assert (masks != sx.get_masks(before[1])["Dense_0"]["kernel"]).any()


def test_distributions_by_path():
    shapes = {"Conv_0/kernel": 360, "Dense_0/kernel": 600, "Dense_1/kernel": 300}
    tx = make_tx(distribution={"Conv_0/*": sx.PerLayer({"*": 0.5}), "Dense_0/*": sx.ERK(0.9)})
    masks = flat(sx.get_masks(tx.init(make_params())))
    kept = {path: int(masks[path].sum()) for path in shapes}
    assert kept == {"Conv_0/kernel": 180, "Dense_0/kernel": 60, "Dense_1/kernel": 300}
    # Each sees its layers only: the budget of ERK is that of the two dense layers.
    tx = make_tx(distribution={"Dense*": sx.ERK(0.8)})
    masks = flat(sx.get_masks(tx.init(make_params())))
    alone = sx.ERK(0.8).layer_counts({"Dense_0/kernel": (30, 20), "Dense_1/kernel": (20, 15)})
    assert {path: int(masks[path].sum()) for path in alone} == alone


def test_bad_mappings():
    params = make_params()
    with pytest.raises(ValueError, match="topology pattern 'Dense_9' matches none of the layers"):
        make_tx(topology={"Dense_9": RIGL}).init(params)
    with pytest.raises(ValueError, match="distribution pattern 'x/' matches none of the layers"):
        make_tx(distribution={"x/": sx.ERK(0.5)}).init(params)
    with pytest.raises(ValueError, match="topology must name at least one pattern"):
        make_tx(topology={})
    with pytest.raises(TypeError, match=r"topology must be a value .* 'Dense.*' for 'Conv\*'"):
        make_tx(topology={"Conv*": "Dense"})
    with pytest.raises(TypeError, match="distribution patterns must be strings, got 3"):
        make_tx(distribution={3: sx.ERK(0.5)})


# --- side by side ----------------------------------------------------------------------------

LABELS = {
    "Conv_0": "encoder",
    "BatchNorm_0": "encoder",
    "Dense_0": "head",
    "Dense_1": "head",
    "Embed_0": "encoder",
    "temperature": "encoder",
}


def several(automatic=True):
    return optax.partition(
        {
            "encoder": sx.sparse_training(
                optax.sgd(0.1, 0.9),
                distribution=sx.ERK(0.5),
                topology=RIGL,
                automatic=automatic,
            ),
            "head": sx.sparse_training(
                optax.adam(1e-2),
                distribution=sx.ERK(0.8),
                topology=SET,
                seed=1,
                automatic=automatic,
            ),
        },
        LABELS,
    )


AROUND = {
    "alone": lambda tx: tx,
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda x: tx)(x=0.1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


@pytest.mark.parametrize("name", AROUND)
def test_several_in_one_state(name):
    """Masks of all of them in one tree; each follows its own schedule and keeps its own counts."""
    tx, params = AROUND[name](several()), jax.tree.map(jnp.asarray, make_params())
    params, opt_state = start(tx, params)
    masks = sx.get_masks(opt_state)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    assert int(masks["Conv_0"]["kernel"].sum()) == 180
    dense = int(masks["Dense_0"]["kernel"].sum()) + int(masks["Dense_1"]["kernel"].sum())
    assert dense == 180  # A fifth of 900.
    assert masks["Conv_0"]["bias"].all()
    step = step_fn(tx)
    steps = 7 * (2 if name == "MultiSteps" else 1)
    for i in range(steps):
        params, opt_state = step(params, opt_state, random_grads(jax.random.key(i), params))
        check_zeros(params, opt_state)
    after = sx.get_masks(opt_state)
    assert changed(masks, after) == {"Conv_0/kernel", "Dense_0/kernel", "Dense_1/kernel"}
    assert jax.tree.map(jnp.sum, masks) == jax.tree.map(jnp.sum, after)
    explored = flat(sx.get_explored(opt_state))
    kernels = [explored[path] for path in explored if path.endswith("kernel")]
    rate = sum(int(e.sum()) for e in kernels) / sum(e.size for e in kernels)
    np.testing.assert_allclose(sx.itop_rate(opt_state), rate, rtol=1e-6)
    assert "3 sparse leaves: 360 of 1,260" in sx.summary(params, after)
    given = jax.tree.map(lambda m: jnp.roll(m, 1), after)
    opt_state = sx.set_masks(opt_state, given)
    jax.tree.map(np.testing.assert_array_equal, sx.get_masks(opt_state), given)
    blank = jax.tree.map(jnp.zeros_like, opt_state)
    saved = flax.serialization.to_bytes(opt_state)
    restored = flax.serialization.from_bytes(blank, saved)
    jax.tree.map(np.testing.assert_array_equal, restored, opt_state)


@pytest.mark.parametrize("name", AROUND)
def test_update_topology_of_several(name):
    """Both topologies move, and nothing else in the state does, whatever is wrapped around."""
    inner = several(automatic=False)
    tx = AROUND[name](inner)
    params, opt_state = start(tx, jax.tree.map(jnp.asarray, make_params()))
    grads = random_grads(jax.random.key(0), params)
    for _ in range(2):
        params, opt_state = step_fn(tx)(params, opt_state, grads)
    new_params, new = jax.jit(functools.partial(sx.update_topology, inner))(
        opt_state, params, grads
    )
    moved = changed(sx.get_masks(opt_state), sx.get_masks(new))
    assert moved == {"Conv_0/kernel", "Dense_0/kernel", "Dense_1/kernel"}
    check_zeros(new_params, new)
    others = {
        path for path in changed(opt_state, new) if not path.split("/")[-3].startswith("activity")
    }
    assert all("fan_in" in path or "changed_at" in path for path in others)


def test_a_partition_with_a_part_that_is_not_sparse():
    """Leaves that no ``sparse_training`` has count as dense."""
    tx = optax.partition(
        {"sparse": make_tx(optax.sgd(0.1), RIGL), "dense": optax.adam(1e-2)},
        {path: "dense" if path.startswith("Dense") else "sparse" for path in LABELS},
    )
    params = jax.tree.map(jnp.asarray, make_params())
    opt_state = tx.init(params)
    masks = sx.get_masks(opt_state)
    params = sx.apply_masks(params, masks)
    np.testing.assert_array_equal(params["Dense_0"]["kernel"], make_params()["Dense_0"]["kernel"])
    assert int((params["Conv_0"]["kernel"] != 0).sum()) == 108
    assert "1 sparse leaf: 108 of 360 weights" in sx.summary(params, masks)
    grads = random_grads(jax.random.key(0), params)
    params, opt_state = sx.update_topology(tx, opt_state, params, grads)
    opt_state = sx.set_masks(opt_state, masks)
    jax.tree.map(np.testing.assert_array_equal, sx.get_masks(opt_state), masks)


def test_a_wrapper_that_skips_steps_is_not_the_transformation_to_update():
    inner = several(automatic=False)
    tx = optax.MultiSteps(inner, 2).gradient_transformation()
    params = jax.tree.map(jnp.asarray, make_params())
    with pytest.raises(TypeError, match="tx must be what sparse_training returned, or an"):
        sx.update_topology(tx, tx.init(params), params, params)
    with pytest.raises(TypeError, match="tx must be what sparse_training returned, or an"):
        sx.update_topology(make_tx(topology=RIGL), inner.init(params), params, params)


def test_nesting_is_refused():
    inner = make_tx(topology=RIGL)
    for nested in (inner, optax.chain(optax.clip(1.0), inner), optax.MultiSteps(inner, 2)):
        with pytest.raises(
            (ValueError, TypeError), match=r"another sparse_training|MultiSteps goes"
        ):
            make_tx(nested).init(make_params())
