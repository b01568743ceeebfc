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
    NNX_KERNELS,
    Case,
    EquinoxNet,
    NNXNet,
    X,
    Y,
    arrays,
    equinox,
    flat,
    linen,
    nnx_pure_dict,
    nnx_state,
)

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
    values = [
        rng.random(p.shape) < 0.5 if path in case.kernels else np.ones(p.shape, bool)
        for path, p in flat(case.params).items()
    ]
    own = jax.tree.unflatten(jax.tree.structure(case.params), values)
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
    case, tx = done.case, transformation(None)

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


def mean_square(model):
    return jnp.mean((model(X) - Y) ** 2)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("kind", [nnx.Optimizer, nnx.ModelAndOptimizer])
def test_nnx_optimizer(kind):
    """Its state's leaves are in variables of other kinds than the model's."""
    model, tx = NNXNet(nnx.Rngs(0)), transformation(None)
    optimizer = kind(model, tx, wrt=nnx.Param)

    def params():
        return nnx.state(model, nnx.Param)

    def masks():
        return sx.get_masks(optimizer.opt_state)

    nnx.update(model, sx.apply_masks(params(), masks()))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(mean_square)(model)
        optimizer.update(*((model, grads) if kind is nnx.Optimizer else (grads,)))

    for _ in range(OWN_STEPS):
        step(model, optimizer)
    done = run(nnx_state)
    check_same_run(arrays(params()), arrays(masks()), done)
    expected = done.masks[OWN_STEPS]
    assert sx.summary(params(), masks()) == sx.summary(expected, expected)

    # By hand: masks into the state, a topology update, and the loop goes on with both.
    structure = jax.tree.structure(optimizer.opt_state)
    wider = masks()
    wider["layers"][1]["kernel"] = np.ones((16, 3), bool)
    optimizer.opt_state = sx.set_masks(optimizer.opt_state, wider)
    before = arrays(masks())
    assert before["layers/1/kernel"].all()
    sparse, optimizer.opt_state = sx.update_topology(
        tx, optimizer.opt_state, params(), nnx.grad(mean_square)(model)
    )
    nnx.update(model, sparse)
    assert jax.tree.structure(optimizer.opt_state) == structure
    step(model, optimizer)
    after = arrays(masks())
    assert (before["layers/0/kernel"] != after["layers/0/kernel"]).any()
    for path, weights in arrays(params()).items():
        assert after[path].sum() == before[path].sum()
        np.testing.assert_array_equal(weights[~after[path]], 0, err_msg=path)


@pytest.mark.parametrize("wrap", ["multi_steps", "partition"])
def test_nnx_optimizer_around_what_is_wrapped(wrap):
    """A topology update by hand of a state in an optimizer's variables, deep in another's."""
    model, sparse = NNXNet(nnx.Rngs(0)), transformation(None)

    def labels(params):
        return jax.tree.map_with_path(lambda path, _: "b" if "conv" in str(path) else "a", params)

    if wrap == "partition":
        outer = sparse = optax.partition({"a": sparse, "b": optax.sgd(RATE, 0.9)}, labels)
    else:
        outer = optax.MultiSteps(sparse, 2).gradient_transformation()
    optimizer = nnx.Optimizer(model, outer, wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    grads = jax.tree.map(jnp.cos, params)
    before = arrays(sx.get_masks(optimizer.opt_state))
    moved, opt_state = sx.update_topology(sparse, optimizer.opt_state, params, grads)
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    assert jax.tree.structure(opt_state) == jax.tree.structure(optimizer.opt_state)
    after = arrays(sx.get_masks(opt_state))
    assert ("conv/kernel" in after) == (wrap == "multi_steps")
    path = "layers/0/kernel"
    assert (after[path] != before[path]).any()
    np.testing.assert_array_equal(arrays(moved)[path][~after[path]], 0)
    again = sx.set_masks(opt_state, sx.get_masks(optimizer.opt_state))
    np.testing.assert_array_equal(arrays(sx.get_masks(again))[path], before[path])


def test_boxes_of_nnx_make_no_difference():
    """Masks in an optimizer's variables against the same masks as plain arrays."""
    model = NNXNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, transformation(None), wrt=nnx.Param)
    params, boxed = nnx.state(model, nnx.Param), sx.get_masks(optimizer.opt_state)
    assert isinstance(boxed["conv"]["kernel"], nnx.Variable)
    assert not isinstance(boxed["conv"]["kernel"], nnx.Param)
    plain = nnx.to_pure_dict(boxed)
    earlier = jax.tree.map(jnp.ones_like, plain)
    grads = jax.tree.map(jnp.cos, params)
    tx, topology = sx.scale_by_sparseopt(), sx.SET(1, 0.3, 9)
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)
    functions = {
        "apply": lambda masks: sx.apply_masks(params, masks),
        "gain": lambda masks: sx.scale_to_fan_in(params, masks),
        "norm": lambda masks: sx.gradient_norm(grads, masks),
        "skew": lambda masks: sx.gradient_skew(grads, masks),
        "churn": lambda masks: sx.mask_churn(earlier, masks),
        "density": sx.density,
        "fan-in": sx.fan_in_statistics,
        "scaled": lambda masks: tx.update(grads, tx.init(params), masks=masks)[0],
        "topology": lambda masks: topology.update(jax.random.key(0), 1, masks, params, grads),
        "flops": lambda masks: (
            sx.flops(lambda p, x: nnx.merge(graphdef, p, rest)(x), params, masks, X[:1]).sparse
        ),
    }
    for name, function in functions.items():
        found, expected = arrays(function(boxed)), arrays(function(plain))
        assert found.keys() == expected.keys(), name
        for path, array in expected.items():
            np.testing.assert_array_equal(found[path], array, err_msg=f"{name} {path}")
    for name in ("apply", "gain", "scaled"):
        assert jax.tree.structure(functions[name](boxed)) == jax.tree.structure(params), name
    del plain["layers"][1]["kernel"]
    with pytest.raises(ValueError, match=r"missing: layers/1/kernel; .*nnx\.state\(model"):
        sx.apply_masks(params, plain)


@pytest.mark.usefixtures("standard_promotion")
def test_equinox_loop():
    """As its users write it, with the whole model in the place of params."""
    tx, done = transformation(None), run(equinox)
    model = EquinoxNet(jax.random.key(0))
    opt_state = jax.jit(tx.init)(eqx.filter(model, eqx.is_inexact_array))
    model = sx.apply_masks(model, sx.get_masks(opt_state))
    assert model.activation is jnp.tanh

    @eqx.filter_jit
    def step(model, opt_state):
        grads = eqx.filter_grad(lambda model: jnp.mean((jax.vmap(model)(X) - Y) ** 2))(model)
        updates, opt_state = tx.update(grads, opt_state, model)
        return eqx.apply_updates(model, updates), opt_state, grads

    for _ in range(OWN_STEPS):
        model, opt_state, grads = step(model, opt_state)
    params, masks = eqx.filter(model, eqx.is_inexact_array), sx.get_masks(opt_state)
    check_same_run(arrays(params), arrays(masks), done)
    expected = done.masks[OWN_STEPS]
    assert sx.summary(model, masks) == sx.summary(expected, expected, out_axes=0)

    moved, opt_state = sx.update_topology(tx, opt_state, model, grads)
    assert moved.activation is jnp.tanh
    new = arrays(sx.get_masks(opt_state))
    for path, weights in arrays(eqx.filter(moved, eqx.is_inexact_array)).items():
        np.testing.assert_array_equal(weights[~new[path]], 0, err_msg=path)
    # Those that take masks and no gradient: the model against its arrays alone.
    for function in (sx.apply_masks, sx.scale_to_fan_in):
        whole = eqx.filter(function(model, masks), eqx.is_inexact_array)
        jax.tree.map(np.testing.assert_array_equal, whole, function(params, masks))
    count = [
        sx.flops(lambda m, x: jax.vmap(eqx.combine(m, model))(x), m, masks, X[:1])
        for m in (model, params)
    ]
    assert count[0] == count[1]
    assert count[0].sparse < count[0].dense
    # What is no mask of this model, and what has no gradient.
    without = eqx.tree_at(lambda m: m.layers[0].weight, masks, None)
    with pytest.raises(ValueError, match="missing: layers/0/weight; not in params: none"):
        sx.set_masks(opt_state, without)
    frozen = eqx.tree_at(lambda m: m.layers[0].weight, grads, None)
    with pytest.raises(ValueError, match=r"grads leaf 'layers/0/weight' is None.*eqx.partition"):
        tx.update(frozen, opt_state, model)


@pytest.mark.usefixtures("standard_promotion")
def test_equinox_trains_a_part_of_the_model():
    """The cure that the error above names."""
    tx = transformation(None)
    model = EquinoxNet(jax.random.key(0))
    trains = eqx.tree_at(lambda m: m.layers[0], jax.tree.map(eqx.is_inexact_array, model), False)
    opt_state = tx.init(eqx.partition(model, trains)[0])

    def loss(part, rest):
        return jnp.mean((jax.vmap(eqx.combine(part, rest))(X) - Y) ** 2)

    grads = eqx.filter_grad(loss)(*eqx.partition(model, trains))
    updates, opt_state = tx.update(grads, opt_state, model)
    new = eqx.apply_updates(model, updates)
    np.testing.assert_array_equal(new.layers[0].weight, model.layers[0].weight)
    mask = sx.get_masks(opt_state).layers[1].weight
    assert not mask.all()
    np.testing.assert_array_equal(new.layers[1].weight == 0, ~mask)


def test_an_equinox_model_with_its_functions_is_refused_at_init():
    with pytest.raises(TypeError, match=r"leaf 'activation' is a .* eqx.filter"):
        transformation(None).init(EquinoxNet(jax.random.key(0)))


@pytest.mark.parametrize("case", [nnx_state, nnx_pure_dict])
def test_patterns_see_one_path_however_leaves_are_held(case):
    params = case().params
    tx = transformation({"*/kernel": -1, "layers/0/*": -1})
    opt_state = jax.eval_shape(tx.init, params)
    assert set(flat(opt_state.fan_in)) == set(NNX_KERNELS)
    grads = jax.tree.map(jnp.ones_like, params)
    jax.eval_shape(tx.update, grads, opt_state, params)
    with pytest.raises(ValueError, match=r"pattern 'kernel' matches none.*: conv/bias, "):
        transformation({"kernel": -1}).init(params)
