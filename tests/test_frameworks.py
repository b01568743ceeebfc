"""Every pytree: a small model of each framework trains sparsely, and its masks fit its params."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import sparseopt_jax as sx
from tests import oracles
from tests.framework_models import (
    CASES,
    Case,
    EquinoxNet,
    NNXNet,
    X,
    Y,
    equinox,
    linen,
    nnx_pure_dict,
    nnx_state,
)
from tests.helpers import flat

STEPS, RATE, SPARSITY = 12, 0.1, 0.8


def transformation(out_axes):
    return sx.sparse_training(
        sx.sparseopt(RATE, out_axes=out_axes),
        distribution=sx.ERK(SPARSITY),
        topology=sx.RigL(interval=3, drop_fraction=0.3, end_step=100),
        out_axes=out_axes,
    )


@dataclasses.dataclass
class Run:
    """A case, its step, and what 12 steps gave; the lists start before the first step."""

    case: Case
    step: Callable[[Any, Any], Any]
    initial_state: Any
    params: Any = None
    opt_state: Any = None
    first_grads: dict[str, np.ndarray] | None = None
    losses: list[float] = dataclasses.field(default_factory=list)
    weights: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)
    masks: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)
    fan_in: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)

    def record(self, params, opt_state):
        self.weights.append(arrays(params))
        self.masks.append(arrays(sx.get_masks(opt_state)))
        self.fan_in.append(arrays(opt_state.fan_in))


@functools.cache
def run(build):
    """Each case is compiled and trained once, for all tests of it."""
    with jax.numpy_dtype_promotion("standard"):
        case = build()
        tx = transformation(case.out_axes)

        @jax.jit
        def init(params):
            opt_state = tx.init(params)
            return sx.apply_masks(params, sx.get_masks(opt_state)), opt_state

        @jax.jit
        def step(params, opt_state):
            loss, grads = jax.value_and_grad(case.loss)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss, grads

        params, opt_state = init(case.params)
        done = Run(case, step, opt_state)
        done.record(params, opt_state)
        for _ in range(STEPS):
            params, opt_state, loss, grads = step(params, opt_state)
            done.record(params, opt_state)
            done.losses.append(float(loss))
            done.first_grads = done.first_grads or arrays(grads)
        done.params, done.opt_state = params, opt_state
    return done


@pytest.fixture(scope="module", params=CASES, ids=[build.__name__ for build in CASES])
def done(request):
    """The run of each case in turn: pytest does all tests of one before the next."""
    return run(request.param)


def arrays(tree):
    return {path: np.asarray(leaf) for path, leaf in flat(tree).items()}


def test_default_prunable_takes_the_kernels_and_nothing_else(done):
    case = done.case
    shapes = {path: shape for path, (shape, _) in case.kernels.items()}
    leaves = flat(case.params)
    assert set(leaves) == set(shapes) | set(case.dense)
    assert {path: leaves[path].shape for path in shapes} == shapes
    assert set(done.fan_in[0]) == set(shapes)
    expected = oracles.expected_counts(oracles.erk_density(shapes, SPARSITY), shapes)
    counts = {path: done.masks[0][path].sum() for path in shapes}
    assert counts == {path: round(expected[path]) for path in shapes}
    for path in case.dense:
        assert done.masks[0][path].all(), path


def test_training_keeps_counts_zeros_and_dense_leaves_and_lowers_the_loss(done):
    case = done.case
    for weights, masks in zip(done.weights, done.masks, strict=True):
        for path, mask in masks.items():
            assert mask.dtype == np.bool_
            assert mask.sum() == done.masks[0][path].sum(), path
            np.testing.assert_array_equal(weights[path][~mask], 0, err_msg=path)
    for path in case.kernels:
        assert (done.masks[0][path] != done.masks[-1][path]).any(), path
    for path in case.dense:
        assert done.masks[-1][path].all(), path
        assert (done.weights[0][path] != done.weights[-1][path]).any(), path
    assert done.losses[-1] < 0.6 * done.losses[0], done.losses


def test_fan_in_and_factor_follow_the_frameworks_axes(done):
    """Fan-in on every step, and the whole first update, against NumPy."""
    for masks, fan_in in zip(done.masks, done.fan_in, strict=True):
        for path, (_, axes) in done.case.kernels.items():
            counted = oracles.fan_in(masks[path], axes)
            np.testing.assert_array_equal(
                fan_in[path], oracles.along_out_axes(counted, masks[path].ndim, axes), err_msg=path
            )
    for path, mask in done.masks[0].items():
        factor = 1.0
        if path in done.case.kernels:
            axes = done.case.kernels[path][1]
            factor = oracles.sparseopt_factors({path: mask}, out_axes=axes)[path]
            assert np.ptp(factor) > 0, path
        stepped = done.weights[0][path] - RATE * factor * done.first_grads[path]
        np.testing.assert_allclose(
            done.weights[1][path], np.where(mask, stepped, 0), rtol=1e-5, atol=1e-6, err_msg=path
        )


@pytest.mark.usefixtures("standard_promotion")
def test_the_model_itself_runs_with_the_sparse_params(done):
    """The containers that training returned fit the framework's model, as those before did."""
    case, predict = done.case, jax.jit(done.case.predict)
    assert jax.tree.structure(done.params) == jax.tree.structure(case.params)
    outputs = np.asarray(predict(done.params, X))
    assert outputs.shape == Y.shape
    assert not np.allclose(outputs, predict(case.params, X), atol=0.1)
    _, _, loss, _ = done.step(done.params, done.opt_state)
    np.testing.assert_allclose(np.mean((outputs - Y) ** 2), loss, rtol=1e-5)


@pytest.mark.usefixtures("standard_promotion")
def test_masks_of_ones_own_go_in_and_out(done):
    case = done.case
    rng = np.random.default_rng(2)
    own = jax.tree.map_with_path(
        lambda path, p: (
            rng.random(p.shape) < 0.5
            if jax.tree_util.keystr(path, simple=True, separator="/") in case.kernels
            else np.ones(p.shape, bool)
        ),
        case.params,
    )
    opt_state = sx.set_masks(done.initial_state, own)
    given = arrays(own)
    for path, mask in arrays(sx.get_masks(opt_state)).items():
        np.testing.assert_array_equal(mask, given[path], err_msg=path)
    for path, count in arrays(opt_state.fan_in).items():
        axes = case.kernels[path][1]
        np.testing.assert_array_equal(count.ravel(), oracles.fan_in(given[path], axes).ravel())
    dense = arrays(case.params)
    for path, p in arrays(sx.apply_masks(case.params, own)).items():
        np.testing.assert_array_equal(p, np.where(given[path], dense[path], 0), err_msg=path)
    # Dense params, as from a file: the first step leaves them sparse.
    healed, _, _, _ = done.step(jax.tree.map(jnp.asarray, case.params), opt_state)
    for path, p in arrays(healed).items():
        np.testing.assert_array_equal(p[~given[path]], 0, err_msg=path)


def test_init_masks_have_the_containers_of_the_params(done):
    """Traced only: that of ``sparse_training``, drawn above, is the same function."""
    params = done.case.params
    masks = jax.eval_shape(lambda: sx.init_masks(jax.random.key(3), params, sx.ERK(SPARSITY)))
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    shapes = {path: (leaf.shape, np.dtype(bool)) for path, leaf in flat(params).items()}
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in flat(masks).items()} == shapes


# --- each framework's own loop ---------------------------------------------------------------

# Four steps, of which the last comes after a topology update.
OWN_STEPS = 4


def check_same_run(params, masks, done):
    assert any((done.masks[0][path] != done.masks[OWN_STEPS][path]).any() for path in masks)
    for path, mask in masks.items():
        np.testing.assert_array_equal(mask, done.masks[OWN_STEPS][path], err_msg=path)
        np.testing.assert_array_equal(params[path][~mask], 0, err_msg=path)
        np.testing.assert_allclose(
            params[path], done.weights[OWN_STEPS][path], rtol=1e-4, atol=1e-5, err_msg=path
        )


@pytest.mark.usefixtures("standard_promotion")
def test_linen_train_state():
    done = run(linen)
    case, tx = done.case, transformation(-1)

    @jax.jit
    def create(params):
        state = TrainState.create(apply_fn=case.predict, params=params, tx=tx)
        return state.replace(params=sx.apply_masks(params, sx.get_masks(state.opt_state)))

    @jax.jit
    def step(state):
        return state.apply_gradients(grads=jax.grad(case.loss)(state.params))

    state = create(case.params)
    for _ in range(OWN_STEPS):
        state = step(state)
    check_same_run(arrays(state.params), arrays(sx.get_masks(state.opt_state)), done)


@pytest.mark.usefixtures("standard_promotion")
def test_nnx_optimizer():
    """``nnx.Optimizer`` keeps arrays as variables of its own: pure dicts fit each other."""
    model = NNXNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, transformation(-1), wrt=nnx.Param)

    def masks():
        return nnx.to_pure_dict(sx.get_masks(optimizer.opt_state))

    def params():
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    nnx.update(model, sx.apply_masks(params(), masks()))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(X) - Y) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(OWN_STEPS):
        step(model, optimizer)
    check_same_run(arrays(params()), arrays(masks()), run(nnx_pure_dict))
    with pytest.raises(ValueError, match="masks must have the tree structure of params"):
        sx.apply_masks(nnx.state(model, nnx.Param), sx.get_masks(optimizer.opt_state))


@pytest.mark.usefixtures("standard_promotion")
def test_equinox_loop():
    tx = transformation(0)
    model = EquinoxNet(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    opt_state = jax.jit(tx.init)(params)
    model = eqx.combine(sx.apply_masks(params, sx.get_masks(opt_state)), static)

    @eqx.filter_jit
    def step(model, opt_state):
        grads = eqx.filter_grad(lambda model: jnp.mean((jax.vmap(model)(X) - Y) ** 2))(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = tx.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state

    for _ in range(OWN_STEPS):
        model, opt_state = step(model, opt_state)
    params = eqx.filter(model, eqx.is_inexact_array)
    masks = sx.get_masks(opt_state)
    check_same_run(arrays(params), arrays(masks), run(equinox))
    # Masks have no leaf where params have none, so they go with the arrays, not with the model.
    with pytest.raises(ValueError, match="missing: activation"):
        sx.apply_masks(model, masks)


def test_an_equinox_model_with_its_functions_is_refused():
    with pytest.raises(TypeError, match=r"leaf 'activation' is a .* eqx.filter"):
        transformation(0).init(EquinoxNet(jax.random.key(0)))


def test_a_pattern_that_forgets_nnx_values_is_refused():
    """Paths of an ``nnx.State`` end in ``/value``; the error lists them."""
    tx = transformation({"*/kernel": -1})
    with pytest.raises(ValueError, match=r"matches none.*conv/kernel/value"):
        tx.init(run(nnx_state).case.params)
