"""The wrapper: whole runs against NumPy, steps worked by hand, nesting, devices, bad input."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax as sx
from tests import oracles
from tests.helpers import flat, make_params
from tests.training import (
    RIGL,
    SET,
    check_zeros,
    counts,
    make_tx,
    random_grads,
    run,
    start,
    step_fn,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")

# --- the whole run against NumPy -------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("grow_by", ["gradient", "corrected_gradient"])
@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_rigl_with_sparseopt_equals_numpy_step_by_step(nesterov, grow_by, accumulate_steps):
    """Topology first, then masked gradient, reset slots, SparseOpt, decay, momentum; 40 steps."""
    rate, momentum, decay, interval, alpha, end = 0.05, 0.9, 1e-3, 4, 0.5, 30
    topology = sx.RigL(interval, alpha, end, grow_by=grow_by, accumulate_steps=accumulate_steps)
    inner = sx.sparseopt(rate, momentum, nesterov, decay)
    params = jax.tree.map(jnp.asarray, make_params())
    tx = make_tx(inner, topology)
    params, opt_state = start(tx, params)
    step = step_fn(tx)

    w = {path: np.float64(p) for path, p in flat(params).items()}
    masks = {path: np.asarray(m) for path, m in flat(sx.get_masks(opt_state)).items()}
    kernels = [path for path in w if path.endswith("kernel")]
    trace = {path: np.zeros_like(p) for path, p in w.items()}
    summed = {path: np.zeros_like(w[path]) for path in kernels}
    for t in range(40):
        grads = random_grads(jax.random.key(t), params)
        g = {path: np.float64(x) for path, x in flat(grads).items()}
        steps_to_update = (-t) % interval
        if steps_to_update < accumulate_steps and interval <= t + steps_to_update <= end:
            summed = {path: summed[path] + g[path] for path in kernels}
        if interval <= t <= end and t % interval == 0:
            fraction = oracles.drop_fraction_at(alpha, end, t)
            factors = oracles.sparseopt_factors({p: masks[p] for p in kernels}, None)
            for path in kernels:
                score = summed[path] * (factors[path] if grow_by == "corrected_gradient" else 1)
                masks[path], _ = oracles.rigl_layer(masks[path], w[path], score, fraction)
                summed[path] = np.zeros_like(w[path])
        factors = oracles.sparseopt_factors({p: masks[p] for p in kernels}, "layer")
        for path in w:
            m = masks[path]
            u = np.where(m, g[path], 0) * factors.get(path, 1)
            u = u + decay * np.where(m, w[path], 0) * (w[path].ndim >= 2)
            trace[path] = u + momentum * np.where(m, trace[path], 0)
            u = u + momentum * trace[path] if nesterov else trace[path]
            w[path] = np.where(m, w[path] - rate * u, 0)
        params, opt_state = step(params, opt_state, grads)
        for path, m in flat(sx.get_masks(opt_state)).items():
            np.testing.assert_array_equal(np.asarray(m), masks[path], err_msg=f"{path}, step {t}")
        for path, p in flat(params).items():
            np.testing.assert_allclose(np.asarray(p), w[path], rtol=1e-4, atol=1e-5)
    if accumulate_steps == 1:
        assert opt_state.accumulator == ()


@pytest.mark.parametrize("topology", [RIGL, SET], ids=["rigl", "set"])
def test_slots_of_changed_weights_start_again(topology):
    """Adam after one update: changed weights have the moments of a first step, or none."""
    params = make_params()
    tx = make_tx(optax.adam(1e-2), topology)
    before_params, before = run(tx, params, 3)
    grads = random_grads(jax.random.key(99), params)
    _, after = step_fn(tx)(before_params, before, grads)
    old, new = flat(sx.get_masks(before)), flat(sx.get_masks(after))
    mu, nu = flat(after.inner_state[0].mu), flat(after.inner_state[0].nu)
    g = flat(grads)
    grown_in_all = 0
    for path in new:
        o, n = np.asarray(old[path]), np.asarray(new[path])
        grown, dropped = n & ~o, o & ~n
        grown_in_all += grown.sum()
        np.testing.assert_array_equal(np.asarray(mu[path])[dropped], 0)
        np.testing.assert_array_equal(np.asarray(nu[path])[dropped], 0)
        np.testing.assert_allclose(
            np.asarray(mu[path])[grown], 0.1 * np.asarray(g[path])[grown], rtol=1e-5
        )
        np.testing.assert_allclose(
            np.asarray(nu[path])[grown], 0.001 * np.asarray(g[path])[grown] ** 2, rtol=1e-5
        )
    assert grown_in_all > 0


def test_slots_return_to_an_initial_value_that_is_not_zero():
    """Adagrad starts its sums at 0.1; weights dropped in an update have that again."""
    tx = make_tx(optax.adagrad(0.1, initial_accumulator_value=0.1), RIGL)
    _, opt_state = run(tx, make_params(), 4)
    sums, masks = flat(opt_state.inner_state[0].sum_of_squares), flat(sx.get_masks(opt_state))
    for path, m in masks.items():
        np.testing.assert_array_equal(np.asarray(sums[path])[~np.asarray(m)], np.float32(0.1))


def test_drop_and_regrow_in_one_update_keeps_weight_and_momentum():
    """Of four weights, two active; the smaller one has the larger gradient and comes straight back.

    fraction 0.9 / 2 * (1 + cos(0)) = 0.9 at step 0: floor(1.8) = 1 is dropped.
    """
    params = {"kernel": jnp.array([[1.0, 2.0], [0.0, 0.0]])}
    tx = sx.sparse_training(
        optax.sgd(0.5, 0.5),
        topology=sx.RigL(interval=100, drop_fraction=0.9, end_step=100, begin_step=0),
        masks={"kernel": params["kernel"] != 0},
    )
    opt_state = tx.init(params)
    trace = opt_state.inner_state[0]._replace(trace={"kernel": jnp.array([[4.0, 8.0], [0, 0]])})
    opt_state = opt_state._replace(inner_state=(trace, *opt_state.inner_state[1:]))
    grads = {"kernel": jnp.array([[6.0, 0.0], [5.0, 1.0]])}
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    # Momentum 6 + 0.5 * 4 = 8 and 0 + 0.5 * 8 = 4; weights 1 - 0.5 * 8 and 2 - 0.5 * 4.
    assert params["kernel"].tolist() == [[-3.0, 0.0], [0.0, 0.0]]
    assert sx.get_masks(opt_state)["kernel"].tolist() == [[True, True], [False, False]]


def test_skip_step_moves_no_weight_but_the_schedule_goes_on():
    rates = optax.piecewise_constant_schedule(1.0, {4: 0.0})
    topology = sx.RigL(interval=3, drop_fraction=0.4, end_step=9, skip_step=True)
    tx = make_tx(optax.sgd(rates, 0.9), topology)
    before, state = run(tx, make_params(), 3)
    after, new = step_fn(tx)(before, state, random_grads(jax.random.key(3), before))
    masks = flat(sx.get_masks(new))
    old_trace, new_trace = (flat(s.inner_state[0].trace) for s in (state, new))
    for path, m in masks.items():
        m = np.asarray(m)
        np.testing.assert_array_equal(np.asarray(flat(after)[path]), flat(before)[path] * m)
        was = np.asarray(flat(sx.get_masks(state))[path])
        kept = np.where(m & was, np.asarray(old_trace[path]), 0)
        np.testing.assert_array_equal(np.asarray(new_trace[path]), kept)
    assert int(new.step) == 4
    assert int(new.inner_state[1].count) == 4
    # The fifth update is at rate 0 already: the schedule did not wait.
    last, _ = step_fn(tx)(after, new, random_grads(jax.random.key(4), before))
    jax.tree.map(np.testing.assert_array_equal, last, after)


# --- identities ------------------------------------------------------------------------------


@pytest.mark.parametrize("average_over", ["layer", "network", None])
def test_dense_masks_give_plain_sgd_bit_for_bit(average_over):
    """Not jitted: which products and sums a compiled program rounds as one is the compiler's."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4)), "bias": jnp.ones(4)}
    runs = {}
    for name, tx in {
        "sparse": make_tx(
            sx.sparseopt(0.1, weight_decay=1e-2, average_over=average_over),
            sx.Static(),
            sx.ERK(0.0),
        ),
        "plain": optax.chain(
            optax.add_decayed_weights(1e-2, {"kernel": True, "bias": False}), optax.sgd(0.1, 0.9)
        ),
    }.items():
        p, opt_state = params, tx.init(params)
        for i in range(4):
            grads = random_grads(jax.random.key(i), p)
            updates, opt_state = tx.update(grads, opt_state, p)
            p = optax.apply_updates(p, updates)
        runs[name] = p
    jax.tree.map(np.testing.assert_array_equal, runs["sparse"], runs["plain"])


def test_same_seed_same_run_bit_for_bit():
    tx = make_tx(sx.sparseopt(0.1), SET, seed=7)
    first, second = run(tx, make_params(), 10), run(tx, make_params(), 10)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    other = run(make_tx(sx.sparseopt(0.1), SET, seed=8), make_params(), 10)
    masks, others = (sx.get_masks(s)["Dense_0"]["kernel"] for _, s in (first, other))
    assert (np.asarray(masks) != np.asarray(others)).any()


@pytest.mark.parametrize("kind", ["int", "key", "legacy", "array"])
def test_seed_is_an_int_or_a_key_of_either_kind(kind):
    seed = {
        "int": 3,
        "key": jax.random.key(3),
        "legacy": jax.random.PRNGKey(3),
        "array": jnp.int32(3),
    }[kind]
    masks = sx.get_masks(make_tx(seed=seed).init(make_params()))
    expected = sx.get_masks(make_tx(seed=3).init(make_params()))
    jax.tree.map(np.testing.assert_array_equal, masks, expected)


# --- a loop that schedules updates itself ----------------------------------------------------


def test_update_topology_by_hand_equals_the_automatic_one():
    automatic, manual = make_tx(), make_tx(automatic=False)
    params, opt_state = run(automatic, make_params(), 12)
    by_hand, state = start(manual, make_params())
    step = step_fn(manual)
    update = jax.jit(functools.partial(sx.update_topology, manual))
    for i in range(12):
        grads = random_grads(jax.random.key(i), by_hand)
        if i in (3, 6, 9):
            by_hand, state = update(state, by_hand, grads)
        by_hand, state = step(by_hand, state, grads)
    jax.tree.map(np.testing.assert_array_equal, params, by_hand)
    jax.tree.map(np.testing.assert_array_equal, opt_state, state)


def test_masks_and_topology_of_a_nested_state():
    sparse = make_tx(automatic=False)
    tx = optax.MultiSteps(optax.apply_if_finite(sparse, 3), 2)
    params = jax.tree.map(jnp.asarray, make_params())
    opt_state = tx.init(params)
    params = sx.apply_masks(params, sx.get_masks(opt_state))
    grads = random_grads(jax.random.key(0), params)
    step = step_fn(tx.gradient_transformation())
    for _ in range(4):
        params, opt_state = step(params, opt_state, grads)
    old = sx.get_masks(opt_state)
    new_params, new_state = sx.update_topology(sparse, opt_state, params, grads)
    new = sx.get_masks(new_state)
    assert counts(old) == counts(new)
    assert (old["Dense_0"]["kernel"] != new["Dense_0"]["kernel"]).any()
    assert jax.tree.structure(new_state) == jax.tree.structure(opt_state)
    check_zeros(new_params, new_state)


@pytest.mark.parametrize("wrapper", ["multi_steps", "apply_if_finite", "inject_hyperparams"])
def test_wrappers_around_it(wrapper):
    """Counts and zeros hold after 12 calls; the topology follows the wrapped steps."""
    if wrapper == "multi_steps":
        tx = optax.MultiSteps(make_tx(), 2).gradient_transformation()
    elif wrapper == "apply_if_finite":
        tx = optax.apply_if_finite(make_tx(), 5)
    else:
        tx = optax.inject_hyperparams(lambda rate: make_tx(sx.sparseopt(rate)))(rate=0.1)
    params, opt_state = start(tx, make_params())
    first = sx.get_masks(opt_state)
    step = step_fn(tx)
    for i in range(12):
        grads = random_grads(jax.random.key(i), params)
        params, opt_state = step(params, opt_state, grads)
    masks = sx.get_masks(opt_state)
    assert counts(masks) == counts(first)
    assert (masks["Dense_0"]["kernel"] != first["Dense_0"]["kernel"]).any()
    check_zeros(params, opt_state)


def test_set_masks_changes_counts_and_refreshes_the_fan_in():
    tx = make_tx(sx.sparseopt(0.1), sx.Static())
    params = jax.tree.map(jnp.asarray, make_params())
    opt_state = tx.init(params)
    masks = jax.tree.map(np.array, sx.get_masks(opt_state))
    masks["Dense_0"]["kernel"][:] = False
    masks["Dense_0"]["kernel"][:7, :3] = True
    opt_state = sx.set_masks(opt_state, masks)
    expected = [[7] * 3 + [0] * 17]
    assert opt_state.fan_in["Dense_0"]["kernel"].tolist() == expected
    params = sx.apply_masks(params, masks)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, opt_state, params)
    factor = np.sqrt(7 / (7 * 3 / 20))
    got = np.asarray(updates["Dense_0"]["kernel"])[:7, :3]
    np.testing.assert_allclose(got, -0.1 * factor, rtol=1e-6)


# --- transforms and devices ------------------------------------------------------------------


def test_vmap_over_seeds_equals_single_runs():
    params = jax.tree.map(jnp.asarray, make_params())
    tx = make_tx(sx.sparseopt(0.1), SET)

    def init(key):  # The key is in the state, so one `update` serves all seeds.
        opt_state = make_tx(sx.sparseopt(0.1), SET, seed=key).init(params)
        return sx.apply_masks(params, sx.get_masks(opt_state)), opt_state

    def train(init, step, key):
        p, opt_state = init(key)
        for i in range(7):
            p, opt_state = step(p, opt_state, random_grads(jax.random.key(i), params))
        return p, sx.get_masks(opt_state)

    keys = jax.random.split(jax.random.key(0), 3)
    step = step_fn(tx)
    batched, masks = train(
        jax.jit(jax.vmap(init)), jax.jit(jax.vmap(step, in_axes=(0, 0, None))), keys
    )
    for i in range(3):
        own, own_masks = jax.tree.map(lambda x, i=i: x[i], (batched, masks))
        single, single_masks = train(jax.jit(init), step, keys[i])
        jax.tree.map(np.testing.assert_array_equal, own_masks, single_masks)
        chex.assert_trees_all_close(own, single, rtol=1e-5, atol=1e-6)
    kernels = np.asarray(masks["Dense_0"]["kernel"])
    assert (kernels[0] != kernels[1]).any()
    assert (kernels[1] != kernels[2]).any()


def test_a_mapped_step_searches_within_the_loop_only():
    """A loop that is mapped runs while any copy wants to; what is outside of it, on every step."""
    tx, params = make_tx(sx.sparseopt(0.1), RIGL), jax.tree.map(jnp.asarray, make_params())
    copies, opt_state = jax.tree.map(lambda x: jnp.stack([x] * 3), (params, tx.init(params)))
    equations = jax.make_jaxpr(jax.vmap(tx.update))(copies, opt_state, copies).eqns
    loops = [str(e) for e in equations if e.primitive.name == "while"]
    others = [str(e) for e in equations if e.primitive.name != "while"]
    assert ["name=drop_and_grow" in text for text in loops] == [True]
    assert not any("top_k" in text or "while[" in text for text in others)


@pytest.mark.parametrize("topology", [RIGL, SET], ids=["rigl", "set"])
def test_eight_devices_choose_the_same_masks_as_one(topology):
    params = {"kernel": jax.random.normal(jax.random.key(0), (48, 32)), "bias": jnp.zeros(32)}
    tx = make_tx(sx.sparseopt(0.1), topology)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    _, alone = run(tx, params, 10)
    _, spread = run(tx, jax.device_put(params, rows), 10)
    jax.tree.map(np.testing.assert_array_equal, sx.get_masks(alone), sx.get_masks(spread))


def test_one_compilation_serves_all_steps_and_dtypes_are_stable():
    tx = make_tx(sx.sparseopt(0.1))
    params, opt_state = start(tx, jax.tree.map(jnp.asarray, make_params()))
    step = step_fn(tx)
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype), opt_state)
    for i in range(5):
        params, opt_state = step(params, opt_state, random_grads(jax.random.key(i), params))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), opt_state) == kinds
    assert step._cache_size() == 1


# --- bad input -------------------------------------------------------------------------------


def test_bad_arguments():
    params = {"kernel": jnp.ones((4, 4))}
    with pytest.raises(TypeError, match="inner must be an optax gradient transformation"):
        make_tx(inner=0.1)
    with pytest.raises(TypeError, match="distribution must be a value such as ERK"):
        make_tx(distribution=sx.ERK)
    with pytest.raises(TypeError, match="topology must be a value such as Static"):
        make_tx(topology=sx.RigL)
    with pytest.raises(TypeError, match="seed must be an int or"):
        make_tx(seed="0")
    with pytest.raises(TypeError, match="seed must be an int or one JAX random key"):
        make_tx(seed=jnp.ones(3))
    with pytest.raises(TypeError, match="automatic must be True or False"):
        make_tx(automatic=1)
    with pytest.raises(ValueError, match="accumulate_steps=2 needs automatic=True"):
        make_tx(topology=sx.RigL(5, 0.3, 10, accumulate_steps=2), automatic=False)
    with pytest.raises(ValueError, match="prunable chooses no leaf of params"):
        make_tx().init({"bias": jnp.ones(3)})
    with pytest.raises(TypeError, match="'kernel' has dtype int32"):
        make_tx().init({"kernel": jnp.ones((4, 4), jnp.int32)})
    with pytest.raises(ValueError, match="out_axes must lie in"):
        make_tx(out_axes=2).init(params)


def test_bad_calls():
    params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    tx = make_tx()
    opt_state = tx.init(params)
    with pytest.raises(ValueError, match="params is missing"):
        tx.update(params, opt_state)
    wider = {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"'kernel' has shape \(4, 4\), but its parameter has"):
        tx.update(wider, opt_state, wider)
    with pytest.raises(ValueError, match="missing: bias"):
        sx.set_masks(opt_state, {"kernel": jnp.ones((4, 4), bool)})
    with pytest.raises(TypeError, match="'bias' must be a bool array, got float32"):
        sx.set_masks(opt_state, params)
    partly = {"kernel": jnp.ones((4, 4), bool), "bias": jnp.zeros(4, bool)}
    with pytest.raises(ValueError, match="'bias' must be True everywhere, got 4 inactive"):
        sx.set_masks(opt_state, partly)
    with pytest.raises(ValueError, match="must hold a state of sparse_training, found none"):
        sx.get_masks(optax.sgd(0.1).init(params))
    with pytest.raises(TypeError, match="tx must be what sparse_training returned"):
        sx.update_topology(optax.sgd(0.1), opt_state, params, params)
    with pytest.raises(TypeError, match="opt_state must be a SparseTrainingState"):
        tx.update(params, (opt_state,), params)
