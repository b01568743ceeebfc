"""Flax's partitioning metadata: parameters whose boxes say how they are sharded, on two devices."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import sparseopt_jax as sx
from tests.framework_models import X, Y, arrays, flat

# Of which the last comes after a topology update.
STEPS = 4

MESH = jax.make_mesh(
    (2,), ("model",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,)
)


class PartitionedNet(nn.Module):
    box: Callable[..., Any]

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        bias = self.box(nn.initializers.zeros, ("model",))
        x = nn.Dense(16, True, kernel_init=self.box(init, (None, "model")), bias_init=bias)(x)
        return nn.Dense(3, kernel_init=self.box(init, ("model", None)))(nn.tanh(x))


PARTITIONED = {"Dense_0/kernel": jax.P(None, "model"), "Dense_1/kernel": jax.P("model", None)}


def accumulating():
    """RigL with gradients summed over two steps: the sums are kept per weight too."""
    return sx.sparse_training(
        sx.sparseopt(0.1),
        distribution=sx.ERK(0.8),
        topology=sx.RigL(interval=3, drop_fraction=0.3, end_step=100, accumulate_steps=2),
    )


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_linen_partitioned_params_on_two_devices(box):
    """Flax's own recipe: shardings from the metadata of the abstract TrainState."""
    net, tx, x = PartitionedNet(box), accumulating(), X.reshape(len(X), -1)

    def create():
        params = net.init(jax.random.key(0), x)["params"]
        state = TrainState.create(apply_fn=net.apply, params=params, tx=tx)
        return state.replace(params=sx.apply_masks(params, sx.get_masks(state.opt_state)))

    def step(state):
        def loss(params):
            return jnp.mean((net.apply({"params": params}, x) - Y) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    shardings = nn.get_sharding(jax.eval_shape(create), MESH)
    with jax.set_mesh(MESH):
        state = jax.jit(create, out_shardings=shardings)()
        jitted = jax.jit(step, in_shardings=(shardings,), out_shardings=shardings)
        for _ in range(STEPS):
            state = jitted(state)
    for tree in (state.params, state.opt_state.activity, state.opt_state.accumulator):
        assert {k: a.sharding.spec for k, a in flat(tree).items() if "kernel" in k} == PARTITIONED
    masks = arrays(sx.get_masks(state.opt_state))
    for path, count in arrays(state.opt_state.fan_in).items():
        np.testing.assert_array_equal(count[0], masks[path].sum(0), err_msg=path)

    # The same on one device, from parameters without boxes: they have other leaves to fit.
    plain = nn.meta.unbox(create().params)
    opt_state = tx.init(plain)
    alone = TrainState(0, net.apply, sx.apply_masks(plain, sx.get_masks(opt_state)), tx, opt_state)
    alone_step = jax.jit(step)
    for _ in range(STEPS):
        alone = alone_step(alone)
    for path, mask in arrays(sx.get_masks(alone.opt_state)).items():
        np.testing.assert_array_equal(masks[path], mask, err_msg=path)
        np.testing.assert_allclose(
            flat(state.params)[path], flat(alone.params)[path], rtol=1e-4, atol=1e-5, err_msg=path
        )
    # Boxes in one place and none in another.
    sparse = sx.apply_masks(nn.meta.unbox(state.params), sx.get_masks(state.opt_state))
    grads = jax.tree.map(jnp.cos, sparse)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    assert jax.tree.structure(updates) == jax.tree.structure(sparse)
    assert jax.tree.structure(opt_state) == jax.tree.structure(state.opt_state)
    moved, _ = sx.update_topology(tx, opt_state, state.params, grads)
    assert jax.tree.structure(moved) == jax.tree.structure(state.params)
    found = sx.state_shardings(tx, state.params)
    assert jax.tree.structure(found) == jax.tree.structure(opt_state)
    assert {k: s.spec for k, s in flat(found.activity).items() if "kernel" in k} == PARTITIONED
    assert found.fan_in["Dense_0"]["kernel"].spec == jax.P(None, "model")


class PartitionedNNX(nnx.Module):
    def __init__(self, rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
        bias = nnx.with_partitioning(nnx.initializers.zeros, ("model",))
        self.first = nnx.Linear(36, 16, kernel_init=init, bias_init=bias, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.first(x.reshape(len(x), -1)))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("kind", list(jax.sharding.AxisType)[:2], ids=str)
def test_nnx_on_a_mesh(kind):
    """Made under ``set_mesh``, where NNX shards each variable at once by its metadata."""
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2], axis_types=(kind,))
    with jax.set_mesh(mesh):
        model = PartitionedNNX(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, accumulating(), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(model, nnx.grad(lambda m: jnp.mean((m(X) - Y[:, :1]) ** 2))(model))

        nnx.update(
            model, sx.apply_masks(nnx.state(model, nnx.Param), sx.get_masks(optimizer.opt_state))
        )
        first = arrays(sx.get_masks(optimizer.opt_state))
        for _ in range(STEPS):
            step(model, optimizer)
        masks = sx.get_masks(optimizer.opt_state)
        optimizer.opt_state = sx.set_masks(optimizer.opt_state, masks)
    kernel, mask = (flat(t)["first/kernel"] for t in (nnx.state(model, nnx.Param), masks))
    assert kernel.sharding.spec == mask.sharding.spec == jax.P(None, "model")
    assert mask.sum() == first["first/kernel"].sum()
    assert (np.asarray(mask) != first["first/kernel"]).any()
    np.testing.assert_array_equal(np.asarray(kernel)[~np.asarray(mask)], 0)
