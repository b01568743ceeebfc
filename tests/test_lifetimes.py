"""What a transformation holds on to: no array, no tracer, no backend, nothing of the user's."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax as sx
from tests.helpers import make_params
from tests.training import RIGL, SET, make_tx, random_grads, start, step_fn

pytestmark = pytest.mark.usefixtures("standard_promotion")


def donating(tx):
    return jax.jit(
        lambda params, opt_state, grads: tx.update(grads, opt_state, params), donate_argnums=1
    )


@pytest.mark.parametrize("seed", [0, np.int64(0), "key"])
def test_a_second_run_after_one_that_donated_its_state(seed):
    """What ``init`` gives is new each time, and the same each time."""
    params = jax.tree.map(jnp.asarray, make_params())
    tx = make_tx(seed=jax.random.key(0) if seed == "key" else seed)
    step = donating(tx)
    ends = []
    for _ in range(2):
        opt_state = tx.init(params)
        for _ in range(4):
            _, opt_state = step(params, opt_state, params)
        ends.append(jax.tree.map(np.asarray, opt_state))
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.parametrize("transform", [jax.eval_shape, lambda f: jax.jit(f)()])
def test_made_inside_of_a_transformation_it_works_outside(transform):
    params, made = make_params(), []

    def make():
        made.append(make_tx(sx.sparseopt(0.1), SET))
        return made[0].init(params)

    transform(make)
    start(made[0], params)


CONSTRUCTORS = """
import jax, optax, sparseopt_jax as sx
from sparseopt_jax.models import MLP, ResNet20
made = [
    sx.sparse_training(
        optax.chain(sx.zero_inactive(), inner, sx.keep_params_masked()),
        distribution={"a*": sx.ERK(0.9), "*": sx.PerLayer({"*": 0.5})},
        topology={"a*": sx.Static(), "*": sx.RigL(100, 0.3, 1000, accumulate_steps=4)},
        seed=3,
        grown_warmup=sx.adam_bias_correction(),
    )
    for inner in (
        sx.sparseopt(0.1, weight_decay=1e-4), sx.sparseopt_ham(optax.linear_schedule(1.0, 0.0, 9)),
        sx.sparseopt_adamw(1e-3), sx.sparseopt_lion(1e-4), sx.sparseopt_muon(0.02),
        sx.ham(optax.sgd(0.1), 0.1),
    )
]
made += [sx.SET(10, 0.3, 100), sx.Uniform(0.5), sx.ER(0.5), MLP(), ResNet20(num_classes=10)]
try:
    jax.devices()
except RuntimeError as error:
    assert "unheard_of" in str(error), error
    print("no backend until here")
"""


def test_constructors_start_no_backend():
    """With a platform that does not exist, whatever makes an array raises."""
    environment = os.environ | {"JAX_PLATFORMS": "unheard_of"}
    run = subprocess.run(
        [sys.executable, "-c", CONSTRUCTORS], env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == "no backend until here", run.stderr


@pytest.mark.parametrize("way", ["given", "set", "numpy"])
def test_masks_of_the_user_stay_the_users(way):
    """Neither donated, nor one buffer for two layers, nor changed with the user's array."""
    params = {"a": jnp.ones((4, 6)), "b": jnp.ones((4, 6))}
    one = jnp.asarray(np.arange(24).reshape(4, 6) % 3 == 0)
    one = np.array(one) if way == "numpy" else one
    masks = {"a": one, "b": one}
    if way == "set":
        tx = make_tx()
        opt_state = sx.set_masks(tx.init(params), masks)
    else:
        tx = sx.sparse_training(optax.sgd(0.1), masks=masks, topology=RIGL)
        opt_state = tx.init(params)
    _, after = donating(tx)(params, opt_state, params)
    expected = np.arange(24).reshape(4, 6) % 3 == 0
    np.testing.assert_array_equal(one, expected)
    if way == "numpy":
        one[:] = False
    for mask in sx.get_masks(after).values():
        np.testing.assert_array_equal(mask, expected)


TOPOLOGIES = {
    "rigl": sx.RigL(1, 0.3, 100),
    "accumulating": sx.RigL(2, 0.3, 100, begin_step=1, accumulate_steps=2, skip_step=True),
    "corrected": sx.RigL(1, 0.3, 100, grow_by="corrected_gradient"),
    "set": sx.SET(1, 0.3, 100),
    "by_sign": sx.SET(1, 0.3, 100, drop_by="sign"),
    "random": sx.RigL(1, 0.3, 100, drop_by="random", grow_by="random"),
    "acdc": sx.ACDC(1, 51),
}


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_without_jit_nothing_compiles_after_the_first_update(topology):
    """The first topology update is that of step 1; and the masks are those of a jitted loop."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if "backend_compile" in event else None
    )
    tx = make_tx(sx.sparseopt(0.1), topology)
    params = {"kernel": jax.random.normal(jax.random.key(0), (12, 8)), "bias": jnp.ones(8)}
    first, opt_state = start(tx, params)
    plain = jitted = first, opt_state
    step = step_fn(tx)
    grads = [random_grads(jax.random.key(i), params) for i in range(6)]
    for i, g in enumerate(grads):
        jitted = step(*jitted, g)
        before = len(compiled)
        updates, opt_state = tx.update(g, plain[1], plain[0])
        plain = optax.apply_updates(plain[0], updates), opt_state
        assert i < 4 or len(compiled) == before
    masks, others = (sx.get_masks(state) for _, state in (plain, jitted))
    jax.tree.map(np.testing.assert_array_equal, masks, others)
    assert (np.asarray(masks["kernel"]) != np.asarray(first["kernel"] != 0)).any()


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_no_key_is_used_twice(topology):
    params = {"kernel": jax.random.normal(jax.random.key(0), (12, 8))}
    tx = make_tx(topology=topology)
    with jax.debug_key_reuse(True):
        opt_state = tx.init(params)
        for _ in range(3):
            _, opt_state = jax.jit(tx.update)(params, opt_state, params)
        for _ in range(2):
            _, opt_state = tx.update(params, opt_state, params)
