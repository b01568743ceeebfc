"""What the inner optimizer is handed on: masks and fan-in, unless it rejects them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax as sx
from tests.helpers import flat, make_params
from tests.training import RIGL, make_tx, random_grads, start

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_masks_go_only_to_an_inner_chain_that_reads_them():
    def strict_update(updates, state, params=None, *, value):
        del params
        return jax.tree.map(lambda u: u * value, updates), state

    strict = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), strict_update)
    params = {"kernel": jnp.ones((4, 4))}
    tx = make_tx(strict, sx.Static(), sx.ERK(0.5))
    updates, _ = tx.update(params, tx.init(params), params, value=3.0)
    assert sorted(set(np.asarray(updates["kernel"]).ravel().tolist())) == [-1.0, 3.0]


def test_a_transformation_as_optax_documents_them_gets_masks():
    """With masks as a keyword of its own; given once, they are handed on again afterwards."""

    def update(updates, state, params=None, *, masks, **extra):
        del params, extra
        return jax.tree.map(lambda u, m: jnp.where(m, -u, 7.0), updates, masks), state

    needs_masks = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    for topology in (sx.Static(), RIGL):
        for inner in (needs_masks, optax.chain(optax.clip(1.0), needs_masks)):
            tx = make_tx(inner, topology, sx.ERK(0.5))
            opt_state = tx.init(params)
            updates, _ = tx.update(params, opt_state, params)
            assert set(np.unique(updates["kernel"]).tolist()) == {-1.0}  # -u and -w
            assert set(np.unique(updates["bias"]).tolist()) == {-1.0}
            dense = jax.tree.map(lambda p: jnp.zeros(p.shape, bool), params)
            given, _ = tx.update(params, opt_state, params, masks=dense)
            assert set(np.unique(given["bias"]).tolist()) == {7.0}
            again, _ = tx.update(params, opt_state, params)
            jax.tree.map(np.testing.assert_array_equal, updates, again)


def test_sparseopt_inside_masked_corrects_what_it_sees():
    """optax.masked hides leaves; the correction of the visible kernel is the same as without."""
    params = jax.tree.map(jnp.asarray, make_params())
    shown = jax.tree.map(lambda p: False, params)
    shown["Dense_0"]["kernel"] = True
    grads = random_grads(jax.random.key(0), params)
    results = {}
    for name, inner in {
        "all": sx.scale_by_sparseopt(),
        "one": optax.masked(sx.scale_by_sparseopt(), shown),
    }.items():
        tx = make_tx(inner, sx.Static())
        p, opt_state = start(tx, params)
        results[name], _ = tx.update(grads, opt_state, p)
    every, one = flat(results["all"]), flat(results["one"])
    differing = {path for path in one if (np.asarray(every[path]) != np.asarray(one[path])).any()}
    assert differing == {"Conv_0/kernel", "Dense_1/kernel"}
