"""state_shardings, and training on eight devices in Auto and in Explicit mesh mode."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sparseopt_jax as sx

pytestmark = pytest.mark.usefixtures("standard_promotion")

MODES = [AxisType.Auto, AxisType.Explicit]
SPECS = {"wide": ("data", "fsdp"), "tall": (None, "fsdp"), "bias": ()}


def make_params():
    keys = jax.random.split(jax.random.key(0))
    shapes = {"wide": (16, 8), "tall": (16, 8)}
    params = {n: jax.random.normal(k, shapes[n]) for n, k in zip(shapes, keys, strict=True)}
    return params | {"bias": jnp.zeros(8)}


def make_mesh(mode):
    return jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(mode,) * 2)


def on_mesh(params, mode):
    mesh = make_mesh(mode)
    shardings = {name: NamedSharding(mesh, PartitionSpec(*SPECS[name])) for name in params}
    return jax.device_put(params, shardings), shardings


def make_tx(inner=None, topology=None):
    return sx.sparse_training(
        sx.sparseopt(0.1) if inner is None else inner,
        distribution=sx.ERK(0.7),
        topology=sx.RigL(3, 0.4, 100) if topology is None else topology,
    )


TOPOLOGIES = {
    "rigl": sx.RigL(3, 0.4, 100, accumulate_steps=2),
    "corrected": sx.RigL(3, 0.4, 100, grow_by="corrected_gradient"),
    "set": sx.SET(3, 0.4, 100),
    "sign": sx.SET(3, 0.4, 100, drop_by="sign"),
    "static": sx.Static(),
}


@pytest.mark.parametrize("mode", MODES, ids=["auto", "explicit"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_training_on_a_mesh_equals_one_device(mode, topology):
    """Same bytes of all weights; the state keeps its shardings; one compilation."""
    tx = make_tx(topology=TOPOLOGIES[topology])

    def train(params, opt_state, step):
        for i in range(8):
            params, opt_state = step(params, opt_state, jnp.float32(i))
        return params, opt_state

    def step(params, opt_state, i):
        grads = jax.tree.map(lambda p: jnp.cos(p * (i + 1)), params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = make_params()
    opt_state = jax.jit(tx.init)(params)
    masked = sx.apply_masks(params, sx.get_masks(opt_state))
    expected, state = train(masked, opt_state, jax.jit(step))

    params, param_shardings = on_mesh(params, mode)
    shardings = sx.state_shardings(tx, params)
    opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
    params = sx.apply_masks(params, sx.get_masks(opt_state))
    # In Explicit mode types carry the shardings; in Auto mode the compiler must be told.
    out = (param_shardings, shardings) if mode == AxisType.Auto else None
    on_eight = jax.jit(step, out_shardings=out)
    got, opt_state = train(params, opt_state, on_eight)

    assert on_eight._cache_size() == 1
    jax.tree.map(
        lambda a, s: a.sharding == s or pytest.fail(str((a.sharding, s))), opt_state, shardings
    )
    jax.tree.map(np.testing.assert_array_equal, opt_state.activity, state.activity)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


@pytest.mark.parametrize("mode", MODES, ids=["auto", "explicit"])
def test_what_is_kept_per_weight_is_sharded_as_its_weight(mode):
    """Adam with accumulation inside MultiSteps; bytes, moments, sums, fan-in."""
    inner = make_tx(optax.adam(0.1), TOPOLOGIES["rigl"])
    tx = optax.MultiSteps(inner, 2)
    params, _ = on_mesh(make_params(), mode)
    shardings = sx.state_shardings(tx, params)
    state = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    full = {"wide": ("data", "fsdp"), "tall": (None, "fsdp")}

    def specs(tree):
        return {
            k: tuple(v.spec) for k, v in tree.items() if isinstance(v, NamedSharding) and k in full
        }

    sparse = shardings.inner_opt_state
    for tree in (
        sparse.activity,
        sparse.accumulator,
        sparse.inner_state[0].mu,
        sparse.inner_state[0].nu,
        shardings.acc_grads,
    ):
        assert specs(tree) == full
    # Fan-in has a size of 1 on the incoming axis.
    assert specs(sparse.fan_in) == {"wide": (None, "fsdp"), "tall": (None, "fsdp")}
    for scalar in (sparse.step, sparse.key, sparse.changed_at, shardings.mini_step):
        assert scalar.is_fully_replicated


def test_slots_that_are_not_per_weight():
    """L-BFGS stacks copies of the parameters, Adafactor keeps row and column statistics."""
    params, _ = on_mesh(make_params(), AxisType.Auto)
    memory = sx.state_shardings(optax.scale_by_lbfgs(4), params).diff_params_memory
    assert memory["wide"].spec == PartitionSpec(None, "data", "fsdp")
    rows = sx.state_shardings(optax.scale_by_factored_rms(min_dim_size_to_factor=2), params).v_row
    assert rows["wide"].is_fully_replicated


def test_shapes_with_shardings_are_enough():
    params, shardings = on_mesh(make_params(), AxisType.Auto)
    shapes = jax.tree.map(
        lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params, shardings
    )
    tx = make_tx()
    assert jax.tree.leaves(sx.state_shardings(tx, shapes)) == jax.tree.leaves(
        sx.state_shardings(tx, params)
    )


def test_lookahead_keeps_two_copies_sharded():
    params, _ = on_mesh(make_params(), AxisType.Auto)
    tx = make_tx(optax.lookahead(optax.sgd(0.1, 0.9), 5, 0.5))
    both = optax.LookaheadParams.init_synced(params)
    shardings = sx.state_shardings(tx, both)
    assert shardings.activity["wide"].spec == PartitionSpec("data", "fsdp")
    trace = shardings.inner_state.fast_state[0].trace
    assert trace["wide"].spec == PartitionSpec("data", "fsdp")


def test_params_without_a_mesh_are_refused():
    with pytest.raises(ValueError, match="NamedShardings of one mesh, found none"):
        sx.state_shardings(make_tx(), make_params())
    params, _ = on_mesh(make_params(), AxisType.Auto)
    other, _ = on_mesh(make_params(), AxisType.Explicit)
    with pytest.raises(ValueError, match=r"of one mesh, found 'bias' on .* 'wide' on"):
        sx.state_shardings(make_tx(), params | {"wide": other["wide"]})
