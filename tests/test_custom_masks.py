"""Given masks, masks changed by hand, layers that stay, averages, the explored set, restoring."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax as sx
from sparseopt_jax import activity as bits
from tests.helpers import flat, make_params, random_masks
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


# --- given masks -----------------------------------------------------------------------------


def given(masks, topology=RIGL, inner=None):
    inner = optax.adam(1e-2) if inner is None else inner
    return sx.sparse_training(inner, masks=masks, topology=topology)


def test_training_starts_from_given_masks():
    params = make_params()
    masks = random_masks(params)
    tx = given(masks)
    jax.tree.map(np.testing.assert_array_equal, sx.get_masks(tx.init(params)), masks)
    trained, opt_state = run(tx, params, 8)
    check_zeros(trained, opt_state)
    assert counts(sx.get_masks(opt_state)) == counts(masks)
    assert (
        np.asarray(sx.get_masks(opt_state)["Dense_0"]["kernel"]) != masks["Dense_0"]["kernel"]
    ).any()


def test_slots_start_from_the_given_masks():
    """Schedule-free averages start at the weights, so they must be those of the given masks."""
    params = make_params()
    masks = random_masks(params)
    tx = given(masks, inner=optax.contrib.schedule_free_sgd(0.1))
    z = tx.init(params).inner_state.z
    expected = jax.tree.map(np.multiply, params, masks)
    jax.tree.map(np.testing.assert_array_equal, z, expected)


def test_given_masks_are_checked():
    params = make_params()
    masks = random_masks(params)
    with pytest.raises(ValueError, match=r"either distribution, .* or masks .* got neither"):
        sx.sparse_training(optax.sgd(0.1), topology=RIGL)
    with pytest.raises(ValueError, match="got both"):
        sx.sparse_training(optax.sgd(0.1), topology=RIGL, distribution=sx.ERK(0.5), masks=masks)
    with pytest.raises(ValueError, match="missing: "):
        given({"kernel": masks["Dense_0"]["kernel"]}).init(params)
    with pytest.raises(TypeError, match="must be a bool array, got float32"):
        given(params).init(params)
    wrong = masks | {"Dense_0": {"kernel": masks["Dense_0"]["kernel"].T, "bias": np.ones(20, bool)}}
    with pytest.raises(ValueError, match=r"'Dense_0/kernel' has shape \(20, 30\)"):
        given(wrong).init(params)
    partly = masks | {"Dense_0": masks["Dense_0"] | {"bias": np.zeros(20, bool)}}
    with pytest.raises(ValueError, match="'Dense_0/bias' must be True everywhere, got 20 inactive"):
        given(partly).init(params)


# --- masks changed by hand between steps -----------------------------------------------------


def test_masks_changed_by_hand_between_steps():
    """Half the active weights of one layer go; the rest trains on, exactly that sparse."""
    tx = make_tx(optax.adam(1e-2))
    params, opt_state = run(tx, make_params(), 4)
    masks = jax.tree.map(np.array, sx.get_masks(opt_state))
    kernel = masks["Dense_0"]["kernel"]
    rows, columns = np.nonzero(kernel)
    kernel[rows[::2], columns[::2]] = False
    opt_state = sx.set_masks(opt_state, masks)
    params = sx.apply_masks(params, masks)
    step = step_fn(tx)
    for i in range(8):
        params, opt_state = step(params, opt_state, random_grads(jax.random.key(i), params))
        assert counts(sx.get_masks(opt_state)) == counts(masks)
        check_zeros(params, opt_state)


def test_weights_made_active_by_hand_start_from_the_initial_slots():
    """RMSProp's average starts at 1 here and decays without a gradient; new weights have a 1."""
    tx = make_tx(optax.rmsprop(0.1, decay=0.5, initial_scale=1.0), sx.Static())
    params, opt_state = run(tx, make_params(), 4)
    old = np.asarray(sx.get_masks(opt_state)["Dense_0"]["kernel"])
    masks = sx.get_masks(opt_state)
    masks["Dense_0"]["kernel"] = jnp.ones_like(old)
    opt_state = sx.set_masks(opt_state, masks)
    grads = random_grads(jax.random.key(9), params)
    _, opt_state = step_fn(tx)(params, opt_state, grads)
    nu = np.asarray(opt_state.inner_state[0].nu["Dense_0"]["kernel"])
    g = np.asarray(grads["Dense_0"]["kernel"])
    np.testing.assert_allclose(nu[~old], (0.5 + 0.5 * g**2)[~old], rtol=1e-6)
    assert not np.allclose(nu[old], (0.5 + 0.5 * g**2)[old], rtol=1e-3)
    # On the next step they keep what they have.
    _, later = step_fn(tx)(params, opt_state, jax.tree.map(jnp.zeros_like, grads))
    nu_later = np.asarray(later.inner_state[0].nu["Dense_0"]["kernel"])
    np.testing.assert_allclose(nu_later[~old], 0.5 * nu[~old], rtol=1e-6)


def test_editing_the_masks_one_got_does_not_edit_the_state():
    opt_state = make_tx().init(make_params())
    masks = sx.get_masks(opt_state)
    masks["Dense_0"]["kernel"] = None
    assert sx.get_masks(opt_state)["Dense_0"]["kernel"] is not None


# --- averages --------------------------------------------------------------------------------


def test_an_average_of_the_weights_is_sparse_only_where_masks_are_applied():
    """The recipe of the README: masks move, so an average holds weights that are gone."""
    tx = make_tx(optax.sgd(0.1))
    params, opt_state = start(tx, make_params())
    average = optax.ema(0.9)
    ema_state = average.init(params)
    step = step_fn(tx)
    for i in range(8):
        params, opt_state = step(params, opt_state, random_grads(jax.random.key(i), params))
        mean, ema_state = average.update(params, ema_state)
    masks = sx.get_masks(opt_state)
    active = int(masks["Dense_0"]["kernel"].sum())
    assert np.count_nonzero(mean["Dense_0"]["kernel"]) > active
    sparse = sx.apply_masks(mean, masks)
    assert np.count_nonzero(sparse["Dense_0"]["kernel"]) <= active
    check_zeros(sparse, opt_state)


# --- the explored set ------------------------------------------------------------------------


# Before and after: active, ever active, age in updates. First an ordinary update, then a second one
# between the same two steps, in which ages stay.
CHANGES = [
    ((1, 1, 63), True, (1, 1, 63), (1, 1, 63)),  # active from the start
    ((1, 1, 62), True, (1, 1, 63), (1, 1, 62)),
    ((1, 1, 0), True, (1, 1, 1), (1, 1, 0)),  # grown in the update before
    ((1, 1, 5), False, (0, 1, 0), (0, 1, 0)),  # dropped
    ((0, 1, 0), True, (1, 1, 0), (1, 1, 0)),  # regrown
    ((0, 0, 0), True, (1, 1, 0), (1, 1, 0)),  # grown for the first time
    ((0, 1, 0), False, (0, 1, 0), (0, 1, 0)),
    ((0, 0, 0), False, (0, 0, 0), (0, 0, 0)),
]


@pytest.mark.parametrize("again", [False, True])
def test_the_byte_of_a_weight(again):
    before = jnp.array([a | e << 1 | age << 2 for (a, e, age), *_ in CHANGES], jnp.uint8)
    mask = jnp.array([active for _, active, *_ in CHANGES])
    after = bits.changed(before, mask, again)
    expected = [row[3 if again else 2] for row in CHANGES]
    for i, of in enumerate((bits.is_active, bits.is_explored, bits.age)):
        assert np.asarray(of(after)).astype(int).tolist() == [row[i] for row in expected]
    assert after.dtype == jnp.uint8
    young = np.asarray(bits.is_young(after) & mask)
    assert young.tolist() == [bool(a) and age == 0 for a, _, age in expected]


@pytest.mark.parametrize("topology", [RIGL, SET], ids=["rigl", "set"])
def test_explored_set_is_the_union_of_all_masks(topology):
    tx = make_tx(topology=topology)
    params, opt_state = start(tx, make_params())
    step = step_fn(tx)
    union = {p: np.asarray(m) for p, m in flat(sx.get_masks(opt_state)).items()}
    kernels = [path for path in union if path.endswith("kernel")]
    rates = []
    for i in range(11):
        params, opt_state = step(params, opt_state, random_grads(jax.random.key(i), params))
        for path, mask in flat(sx.get_masks(opt_state)).items():
            union[path] = union[path] | np.asarray(mask)
        explored = flat(sx.get_explored(opt_state))
        for path, seen in union.items():
            np.testing.assert_array_equal(explored[path], seen)
        rates.append(float(sx.itop_rate(opt_state)))
        expected = sum(union[p].sum() for p in kernels) / sum(union[p].size for p in kernels)
        np.testing.assert_allclose(rates[-1], expected, rtol=1e-6)
    assert rates[0] < rates[4] < rates[-1] < 1


def test_explored_set_with_updates_and_masks_set_by_hand():
    params = make_params()
    tx = make_tx(automatic=False)
    drawn = tx.init(params)
    masks = random_masks(params)
    # Masks that no step has used have explored nothing.
    opt_state = sx.set_masks(drawn, masks)
    jax.tree.map(np.testing.assert_array_equal, sx.get_explored(opt_state), masks)
    sparse = sx.apply_masks(params, masks)
    grads = random_grads(jax.random.key(0), params)
    sparse, opt_state = step_fn(tx)(sparse, opt_state, grads)
    _, opt_state = sx.update_topology(tx, opt_state, sparse, grads)
    now = sx.get_masks(opt_state)
    expected = jax.tree.map(np.logical_or, masks, now)
    jax.tree.map(np.testing.assert_array_equal, sx.get_explored(opt_state), expected)
    opt_state = sx.set_masks(opt_state, random_masks(params, seed=9))
    expected = jax.tree.map(np.logical_or, expected, random_masks(params, seed=9))
    jax.tree.map(np.testing.assert_array_equal, sx.get_explored(opt_state), expected)


# --- restoring -------------------------------------------------------------------------------


def saved_run():
    tx = make_tx(optax.adam(1e-2))
    params, opt_state = run(tx, make_params(), 5)
    return tx, params, opt_state


def goes_on_alike(tx, params, opt_state, restored_params, restored):
    step = step_fn(tx)
    for i in range(5, 9):
        grads = random_grads(jax.random.key(i), params)
        params, opt_state = step(params, opt_state, grads)
        restored_params, restored = step(restored_params, restored, grads)
    jax.tree.map(np.testing.assert_array_equal, (params, opt_state), (restored_params, restored))


def test_restored_with_flax_serialization_it_goes_on_bit_for_bit():
    tx, params, opt_state = saved_run()
    saved = flax.serialization.to_bytes((params, opt_state))
    restored = flax.serialization.from_bytes((params, tx.init(params)), saved)
    goes_on_alike(tx, params, opt_state, *restored)


def test_restored_with_orbax_it_goes_on_bit_for_bit(tmp_path):
    from orbax.checkpoint import v1 as ocp

    tx, params, opt_state = saved_run()
    ocp.save(tmp_path / "run", {"params": params, "opt_state": opt_state})
    like = {"params": params, "opt_state": jax.jit(tx.init)(params)}
    restored = ocp.load(tmp_path / "run", like)
    goes_on_alike(tx, params, opt_state, restored["params"], restored["opt_state"])


def test_a_restored_state_without_masks_is_an_error():
    """Never a silently dense model, whichever way the masks went missing."""
    tx, params, opt_state = saved_run()
    grads = random_grads(jax.random.key(0), params)
    dense = optax.adam(1e-2).init(params)
    for without in (None, (), {}):
        with pytest.raises(ValueError, match="masks must have the tree structure of params"):
            tx.update(grads, opt_state._replace(activity=without), params)
    as_dict = flax.serialization.to_state_dict(opt_state)
    with pytest.raises(TypeError, match=r"must be a SparseTrainingState .* got dict"):
        tx.update(grads, as_dict, params)
    with pytest.raises(TypeError, match="must be a SparseTrainingState"):
        tx.update(grads, dense, params)
    with pytest.raises(ValueError, match="must hold a state of sparse_training, found none"):
        sx.get_masks(dense)
    del as_dict["activity"]
    with pytest.raises(ValueError, match="activity"):
        flax.serialization.from_state_dict(opt_state, as_dict)
