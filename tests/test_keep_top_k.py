"""keep_top_k: exactly the k largest after every step, against a sort in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sparseopt_jax as sx
from tests import oracles
from tests.helpers import KERNELS, flat, make_params
from tests.training import random_grads

pytestmark = pytest.mark.usefixtures("standard_promotion")

HALF = sx.Uniform(0.5, dense_first=False)


def adamw_by_hand(params, grads, rate=0.2, decay=1e-2):
    """Weights after each step of AdamW and after each projection on the k largest, in NumPy."""
    m = jax.tree.map(np.zeros_like, params)
    v = jax.tree.map(np.zeros_like, params)
    counts = sx.ERK(0.8).layer_counts(KERNELS)
    for t, grad in enumerate(grads, 1):
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grad)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, grad)
        params = jax.tree.map(
            lambda p, m, v, t=t: (
                p - rate * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + decay * p)
            ),
            params,
            m,
            v,
        )
        for path, count in counts.items():
            flat(params)[path][~oracles.top_k_mask(np.abs(flat(params)[path]), count)] = 0
    return params


def test_adamw_and_a_projection_after_every_step():
    """Under jit and scan, against float64; moments stay dense, so that zeroed weights return."""
    params = jax.tree.map(lambda p: p / 5, make_params())  # Of the size of a step.
    steps = [jax.tree.map(np.asarray, random_grads(jax.random.key(i), params)) for i in range(8)]
    tx = optax.chain(optax.adamw(0.2, weight_decay=1e-2), sx.keep_top_k(sx.ERK(0.8)))

    def step(carry, grads):
        p, opt_state = carry
        updates, opt_state = tx.update(grads, opt_state, p)
        p = optax.apply_updates(p, updates)
        return (p, opt_state), jax.tree.map(lambda leaf: leaf != 0, p)

    start = jax.tree.map(jnp.asarray, params)
    (trained, opt_state), nonzero = jax.jit(
        lambda p, grads: jax.lax.scan(step, (p, tx.init(p)), grads)
    )(start, jax.tree.map(lambda *leaves: np.stack(leaves), *steps))
    assert int(opt_state[-1].step) == 8
    exact = jax.tree.map(lambda p: np.array(p, np.float64), params)
    expected = adamw_by_hand(exact, steps)
    for path, count in sx.ERK(0.8).layer_counts(KERNELS).items():
        masks = np.asarray(flat(nonzero)[path])
        assert (masks.reshape(8, -1).sum(1) == count).all(), path
        assert (masks[0] & ~masks[-1]).any(), path
        assert (~masks[0] & masks[-1]).any(), path
    for path, leaf in flat(trained).items():
        np.testing.assert_allclose(leaf, flat(expected)[path], rtol=1e-4, atol=1e-6, err_msg=path)


VALUES = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 1.0, 1e-30, 3e38], np.float32)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("density", ["one", "half", "all"])
def test_exactly_k_are_kept_whatever_the_updates(density, dtype):
    """Three models at once: ties, zeros, infinities and NaN in updates; finite weights."""
    rng = np.random.default_rng(0)
    count = {"one": 1, "half": 60, "all": 120}[density]
    w = rng.choice(VALUES[3:9], (3, 12, 10)).astype(dtype)
    u = rng.choice(VALUES, (3, 12, 10)).astype(np.float32)
    tx = sx.keep_top_k(sx.PerLayer({"w": 1 - count / 120}))

    @jax.jit
    @jax.vmap
    def update(u, w):
        updates, _ = tx.update({"w": u}, tx.init({"w": w}), {"w": w})
        return updates["w"], optax.apply_updates({"w": w}, updates)["w"]

    updates, after = map(np.asarray, update(u, w))
    assert updates.dtype == np.float32
    for i in range(3):
        with np.errstate(all="ignore"):
            dense = (w[i].astype(np.float32) + u[i]).astype(dtype)
        kept = oracles.top_k_mask(np.abs(dense.astype(np.float32)), count)
        assert kept.sum() == count
        np.testing.assert_array_equal(updates[i], np.where(kept, u[i], -w[i].astype(np.float32)))
        np.testing.assert_array_equal(
            after[i].astype(np.float32), np.where(kept, dense, 0).astype(np.float32)
        )


class Quarter(sx.Schedule):
    """A quarter of the way left, on each step."""

    initial_sparsity, end_step = 0.0, 1

    def remaining(self, step):
        return 0.25


def kept_at(schedule, steps, params):
    tx = optax.chain(optax.sgd(0.0), sx.keep_top_k(HALF, schedule))

    def step(carry, _):
        p, opt_state = carry
        updates, opt_state = tx.update(params, opt_state, p)
        p = optax.apply_updates(p, updates)
        return (params, opt_state), (p["w"] != 0).sum()

    return jax.lax.scan(step, (params, tx.init(params)), length=steps)[1].tolist()


def test_a_schedule_leads_from_dense_to_the_counts():
    params = {"w": jnp.arange(1.0, 101.0).reshape(10, 10)}
    assert kept_at(sx.Linear(0, 4), 6, params) == [100, 87, 75, 62, 50, 50]
    assert kept_at(sx.Linear(0, 2, initial_sparsity=0.2), 3, params) == [80, 65, 50]
    assert kept_at(sx.OneShot(1), 3, params) == [100, 50, 50]
    assert kept_at(None, 2, params) == [50, 50]


def test_a_structure_holds_after_every_step():
    params = {"w": jax.random.normal(jax.random.key(0), (8, 6))}
    tx = sx.keep_top_k(HALF, structure=sx.NM(2, 4))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    after = np.asarray(optax.apply_updates(params, updates)["w"]).reshape(2, 4, 6)
    dense = np.abs(np.asarray(params["w"])).reshape(2, 4, 6)
    expected = np.argsort(np.argsort(-dense, axis=1), axis=1) < 2
    np.testing.assert_array_equal(after != 0, expected)


def test_each_layer_of_a_stack_keeps_its_own():
    """Stacked along axis 1; the layer with the largest weights gets no more of them."""
    w = np.random.default_rng(0).normal(size=(6, 3, 5)) * np.array([1, 10, 100.0])[:, None]
    params = {"w": jnp.asarray(w, jnp.float32)}
    tx = sx.keep_top_k(HALF, batch_axes={"w": 1})
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    after = optax.apply_updates(params, updates)["w"]
    assert (after != 0).sum((0, 2)).tolist() == [15, 15, 15]


def test_what_optax_masked_hides_and_what_is_not_prunable_passes():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
    tx = optax.masked(sx.keep_top_k(HALF), {"w": True, "b": False, "bias": True})
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["w"].tolist() == [[1.0, 1.0], [-1.0, -1.0]]
    assert updates["b"] is params["b"]
    assert updates["bias"] is params["bias"]


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(mode):
    """As on one device, in a tree whose order is not that of its paths; shardings stay."""
    rng = np.random.default_rng(0)
    layers = {"10": (16, 8), "9-x": (8, 24), "9": (16, 24)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in layers.items()}
    params = [params[name] for name in layers] + [params["9"]] * 8
    distribution = sx.PerLayer({str(i): i / 20 for i in range(11)})
    tx = sx.keep_top_k(distribution, Quarter())

    def step(params):
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        return optax.apply_updates(params, updates)

    expected = jax.jit(step)(params)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(mode,))
    specs = [PartitionSpec("x", None), PartitionSpec(None, "x"), *[PartitionSpec("x", None)] * 9]
    with jax.set_mesh(mesh):
        places = [NamedSharding(mesh, spec) for spec in specs]
        sharded = jax.jit(step)(jax.device_put(params, places))
    jax.tree.map(np.testing.assert_array_equal, sharded, expected)
    if mode == AxisType.Explicit:
        assert [leaf.sharding.spec for leaf in sharded] == specs
    for i, leaf in enumerate(expected):
        final = round((1 - i / 20) * leaf.size)
        assert (leaf != 0).sum() == final + (leaf.size - final) // 4, i


def test_bad_calls():
    params = {"w": jnp.ones((2, 2))}
    tx = sx.keep_top_k(HALF)
    with pytest.raises(ValueError, match="params is missing: keep_top_k needs"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="prunable chooses no leaf of params"):
        tx.init({"bias": jnp.ones(2)})
    with pytest.raises(ValueError, match="params must have the tree structure of updates"):
        tx.update(params, tx.init(params), {"v": params["w"]})
    with pytest.raises(TypeError, match=r"schedule must be a density schedule.* or None, got 0\.9"):
        sx.keep_top_k(HALF, 0.9)
    with pytest.raises(ValueError, match="would keep no weight"):
        sx.keep_top_k(sx.ERK(0.999)).init(params)
