"""A small sparse training run, shared by the tests of the wrapper."""

import jax
import numpy as np
import optax

import sparseopt_jax as sx

RIGL = sx.RigL(interval=3, drop_fraction=0.4, end_step=1_000)
SET = sx.SET(interval=3, drop_fraction=0.4, end_step=1_000)


def make_tx(inner=None, topology=RIGL, distribution=None, **options):
    inner = optax.sgd(0.1, 0.9) if inner is None else inner
    distribution = sx.ERK(0.7) if distribution is None else distribution
    return sx.sparse_training(inner, distribution=distribution, topology=topology, **options)


def start(tx, params):
    @jax.jit
    def init(params):
        opt_state = tx.init(params)
        return sx.apply_masks(params, sx.get_masks(opt_state)), opt_state

    return init(params)


@jax.jit
def random_grads(key, params):
    keys = jax.random.split(key, len(jax.tree.leaves(params)))
    leaves, structure = jax.tree.flatten(params)
    drawn = [
        jax.random.normal(k, p.shape).astype(p.dtype) for k, p in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def step_fn(tx):
    @jax.jit
    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def run(tx, params, steps, seed=0):
    params, opt_state = start(tx, params)
    step = step_fn(tx)
    for i in range(steps):
        params, opt_state = step(params, opt_state, random_grads(jax.random.key(seed + i), params))
    return params, opt_state


def check_zeros(params, opt_state):
    masks = jax.tree.leaves(sx.get_masks(opt_state))
    for p, m in zip(jax.tree.leaves(params), masks, strict=True):
        np.testing.assert_array_equal(np.asarray(p, np.float32)[~np.asarray(m)], 0)


def counts(masks):
    return jax.tree.map(lambda m: np.asarray(m).sum(), masks)
