"""HAM against NumPy: the rule, its limits, its place inside and around other transformations."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import sparseopt_jax as sx
from sparseopt_jax.ham import HamState, ham
from tests import oracles
from tests.helpers import flat, make_params, random_masks
from tests.training import check_zeros, counts, make_tx, start, step_fn

pytestmark = pytest.mark.usefixtures("standard_promotion")


def exponent_of(stepped, grad, rate, alpha, beta):
    """HAM's exponents in float64; tensors of fewer than two dimensions have none."""
    return np.clip(rate * (-alpha * np.sign(stepped) * np.float64(grad) - beta), -5, 5)


def assert_close(got, before, stepped, exponent, path=""):
    """To float32 roundings: of weights and steps of order one, and of the exponent and its rate."""
    w = np.asarray(stepped)
    growth = np.exp(exponent) if w.ndim >= 2 else 1.0
    error = np.abs(np.float64(got) - w * growth)
    size = (1 + growth) * (1 + np.abs(before) + np.abs(w))
    assert (error <= 2e-7 * (1 + np.abs(exponent)) * size).all(), path


def assert_same_bits(got, expected):
    for path, a in flat(expected).items():
        b = np.asarray(flat(got)[path])
        assert b.dtype == a.dtype, path
        assert b.tobytes() == np.asarray(a).tobytes(), path


def one_step(tx, params, grads, **extra):
    @jax.jit
    def step(params, grads):
        return tx.update(grads, tx.init(params), params, **extra)

    return step(params, grads)


def make_small(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "Dense_0": {
            "kernel": rng.normal(size=(12, 10)).astype(np.float32),
            "bias": rng.normal(size=10).astype(np.float32),
        }
    }


SMALL = make_small()


# --- against NumPy ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inner", "alpha", "beta", "clamped"),
    [
        ("sgd", 4.0, 0.05, False),
        ("sgd", 200.0, 1e-3, True),
        ("sparseopt", 4.0, 0.05, False),
        ("sparseopt", 200.0, 1e-3, True),
    ],
)
def test_equals_numpy(inner, alpha, beta, clamped):
    """Eight steps with a decaying rate, around SGD with momentum and around SparseOpt.

    Random gradients would let the weights grow by e^5 a step, so each step starts at new weights.
    """
    schedule = optax.exponential_decay(0.2, transition_steps=1, decay_rate=0.8)
    decay = 0.0 if inner == "sgd" else 5e-2
    base = optax.sgd(schedule, 0.9) if inner == "sgd" else sx.sparseopt(schedule, 0.9, True, decay)
    tx = ham(base, schedule, alpha, beta)
    step_oracle = oracles.SGD(lambda t: 0.2 * 0.8**t, 0.9, inner == "sparseopt", decay)
    state = tx.init(make_params())

    @jax.jit
    def step(params, state, grads, masks):
        updates, state = tx.update(grads, state, params, masks=masks)
        return optax.apply_updates(params, updates), state

    exponents = []
    for t in range(8):
        params, grads = make_params(seed=t), make_params(seed=100 + t)
        masks = random_masks(grads, density=1.0 if inner == "sgd" else 0.3, seed=t)
        before = {path: np.float64(w) for path, w in flat(params).items()}
        stepped = step_oracle.step(before, flat(grads), flat(masks))
        params, state = step(params, state, grads, masks)
        for path, w in flat(params).items():
            g = flat(grads)[path]
            exponent = exponent_of(stepped[path], g, 0.2 * 0.8**t, alpha, beta)
            assert_close(w, before[path], stepped[path], exponent, (path, t))
            exponents.append(exponent.ravel())
    assert isinstance(state, HamState)
    assert int(state.step) == 8
    exponents = np.concatenate(exponents)
    assert (exponents == 5).any() == (exponents == -5).any() == clamped
    assert (np.abs(exponents) < 5).any()


def test_by_hand():
    """Rate 0.1, alpha 200: gradients of 0.1 give exponents of -2 and 2, less 0.1 * beta.

    Gradients of 1 give 20 and are clamped at 5. The step of SGD takes 1 to 0.99, and 0.9.
    """
    params = {"w": jnp.array([[1.0, -1.0, 1.0, -1.0]]), "b": jnp.array([1.0])}
    grads = {"w": jnp.array([[0.1, 0.1, 1.0, 1.0]]), "b": jnp.array([1.0])}
    updates, _ = one_step(ham(optax.sgd(0.1), 0.1, 200.0, 10.0), params, grads)
    e = np.exp
    expected = [0.99 * e(-3) - 1, -1.01 * e(1) + 1, 0.9 * e(-5) - 1, -1.1 * e(5) + 1]
    np.testing.assert_allclose(updates["w"][0], expected, rtol=1e-6)
    assert updates["b"][0] == np.float32(-0.1)


def test_weights_of_zero_stay_zero_and_signs_stay():
    """Where the inner step arrives at exactly 0, whatever the gradient, and from 0 as well."""
    for dtype in (np.float32, ml_dtypes.bfloat16):
        w = np.array([[0.5, -0.25, 0.0, 0.0, 3.0, -3.0]], dtype)
        g = np.array([[0.5, -0.25, 0.0, -0.0, -60.0, -60.0]], dtype)
        tx = ham(optax.sgd(1.0), 1.0, 200.0, 1.0)
        updates, _ = one_step(tx, {"w": w}, {"w": g})
        new = np.float32(optax.apply_updates({"w": w}, updates)["w"][0])
        np.testing.assert_array_equal(new[:4], 0)
        # 3 + 60 and -3 + 60 after the step: the gradient lets both grow, e^5 at most.
        np.testing.assert_allclose(new[4:], np.array([63, 57]) * np.exp(5), rtol=0.01)


def test_only_tensors_of_two_and_more_dimensions():
    params, grads = make_params(), make_params(seed=1)
    got = flat(one_step(ham(optax.sgd(0.1), 0.1), params, grads)[0])
    plain = flat(one_step(optax.sgd(0.1), params, grads)[0])
    for path, u in plain.items():
        assert (np.asarray(got[path]) != np.asarray(u)).any() == (u.ndim >= 2), path
        if u.ndim < 2:
            np.testing.assert_array_equal(got[path], u)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_alpha_and_beta_of_zero_are_the_inner_optimizer_bit_for_bit(dtype):
    params, grads = make_params(dtype), make_params(dtype, seed=1)
    for tree in (params, grads):
        tree["Dense_0"]["kernel"][0, :6] = np.array([np.nan, np.inf, -np.inf, -0.0, 0, 6e-8], dtype)
        tree["Dense_1"]["kernel"][0, :5] = np.array([np.inf, -np.inf, -0.0, 0, 6e-8], dtype)
    # scale(0) gives updates of -0.0 too, in tensors that no NaN exempts.
    for inner in (optax.sgd(0.1, 0.9), optax.scale(0.0)):
        got, state = one_step(ham(inner, 0.1, 0, 0), params, grads)
        expected, inner_state = one_step(inner, params, grads)
        assert_same_bits(got, expected)
        assert_same_bits(state.inner_state, inner_state)


# --- NaN and infinity ------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["gradient", "weights"])
def test_a_tensor_with_nan_takes_the_inner_step_alone(where):
    params, grads = make_params(), make_params(seed=1)
    clean = flat(one_step(ham(optax.sgd(0.1), 0.1), params, grads)[0])
    (grads if where == "gradient" else params)["Dense_0"]["kernel"][3, 4] = np.nan
    got = flat(one_step(ham(optax.sgd(0.1), 0.1), params, grads)[0])
    plain = flat(one_step(optax.sgd(0.1), params, grads)[0])
    for path, u in got.items():
        np.testing.assert_array_equal(u, (plain if path == "Dense_0/kernel" else clean)[path])


def test_infinite_gradients_and_weights():
    """An infinite gradient, clipped inside, is an exponent of 5; infinite weights stay infinite."""
    inner = optax.chain(optax.clip(1.0), optax.sgd(0.1))
    params = {"w": jnp.array([[1.0, -1.0, jnp.inf, -jnp.inf]])}
    grads = {"w": jnp.array([[jnp.inf, jnp.inf, 1.0, 1.0]])}
    updates, _ = one_step(ham(inner, 0.1), params, grads)
    expected = [0.9 * np.exp(-5), -1.1 * np.exp(5), np.inf, -np.inf]
    new = optax.apply_updates(params, updates)["w"][0]
    np.testing.assert_allclose(new, expected, rtol=1e-6, atol=1e-7)  # 1 - 0.99..., rounded
    # Infinity times the sign of a weight of exactly zero is undefined: the inner step alone.
    params, grads = {"w": jnp.array([[0.1, 1.0]])}, {"w": jnp.array([[jnp.inf, 1.0]])}
    updates, _ = one_step(ham(inner, 0.1), params, grads)
    np.testing.assert_array_equal(updates["w"], np.float32([[-0.1, -0.1]]))


# --- dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "gradients"),
    [
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        (np.float32, ml_dtypes.bfloat16),
        (ml_dtypes.bfloat16, np.float32),
    ],
)
def test_low_precision(weights, gradients):
    """Dtypes of state and updates are those of the inner optimizer; values are rounded once."""
    rate, params, grads = 0.125, make_params(weights), make_params(gradients, seed=1)
    inner = optax.sgd(rate, 0.5)
    plain, plain_state = one_step(inner, params, grads)
    updates, state = one_step(ham(inner, rate, 8.0, 0.5), params, grads)
    for ours, inners in ((updates, plain), (state.inner_state, plain_state)):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(inners), strict=True):
            assert a.dtype == b.dtype
    assert state.step.dtype == jnp.int32
    for path, u in flat(updates).items():
        before = np.float64(flat(params)[path])
        stepped = before + np.float64(flat(plain)[path])
        exponent = exponent_of(stepped, flat(grads)[path], rate, 8.0, 0.5)
        expected = stepped * (np.exp(exponent) if stepped.ndim >= 2 else 1) - before
        # Rounding to the updates' type: half a unit in the last place.
        eps = float(ml_dtypes.finfo(u.dtype).eps)
        np.testing.assert_allclose(np.float64(u), expected, rtol=0.51 * eps, atol=1e-5)


def test_strict_promotion():
    """What is ours mixes no dtypes implicitly: bfloat16 weights, integers, a float32 schedule."""
    params, grads = make_params(ml_dtypes.bfloat16), make_params(np.float32, seed=1)
    inner = optax.stateless(lambda g, _: jax.tree.map(lambda x: x.astype(jnp.bfloat16), g))
    tx = ham(inner, lambda step: jnp.float32(0.5) / (1 + step).astype(jnp.float32), 8, 0)
    with jax.numpy_dtype_promotion("strict"):
        updates, _ = one_step(tx, params, grads)
    assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))


# --- inside and around others ----------------------------------------------------------------


def test_in_sparse_training():
    """RigL moves the masks; each step against NumPy, with the masks that the state holds then."""
    schedule = optax.linear_schedule(0.1, 0.01, 10)
    tx = make_tx(ham(sx.sparseopt(schedule, 0.9, False, 1e-2), schedule, 4.0, 0.05))
    params, opt_state = start(tx, SMALL)
    expected_counts = counts(sx.get_masks(opt_state))
    step = step_fn(tx)
    step_oracle = oracles.SGD(lambda t: 0.1 - 0.009 * t, 0.9, False, 1e-2)
    changed = False
    for t in range(8):
        grads = make_small(seed=100 + t)
        before, old = flat(params), sx.get_masks(opt_state)
        params, opt_state = step(params, opt_state, grads)
        new = sx.get_masks(opt_state)
        changed |= bool((old["Dense_0"]["kernel"] != new["Dense_0"]["kernel"]).any())
        masks = {path: np.asarray(m) for path, m in flat(new).items()}
        masked = {path: np.float64(w) * masks[path] for path, w in before.items()}
        grads = {path: np.float64(g) * masks[path] for path, g in flat(grads).items()}
        for path, v in step_oracle.velocity.items():
            step_oracle.velocity[path] = v * masks[path]
        stepped = step_oracle.step(masked, grads, masks)
        for path, w in flat(params).items():
            exponent = exponent_of(stepped[path], grads[path], 0.1 - 0.009 * t, 4.0, 0.05)
            assert_close(w, masked[path], stepped[path], exponent, (path, t))
        check_zeros(params, opt_state)
        assert counts(new) == expected_counts
    assert changed
    assert int(opt_state.inner_state.step) == 8


def test_gradients_corrected_ahead_of_both():
    """In a chain HAM's exponent gets the corrected gradient too."""
    params, grads = make_params(), make_params(seed=1)
    masks = random_masks(params)
    chain = optax.chain(sx.scale_by_sparseopt(), ham(optax.sgd(0.1), 0.1, 4.0))
    got = flat(one_step(chain, params, grads, masks=masks)[0])
    factors = oracles.sparseopt_factors(flat(masks))
    for path, u in got.items():
        w, g = np.float64(flat(params)[path]), flat(grads)[path] * factors[path]
        exponent = exponent_of(w - 0.1 * g, g, 0.1, 4.0, 1e-3)
        assert_close(w + np.float64(u), w, w - 0.1 * g, exponent, path)


def test_eager_vmap_and_injected_hyperparameters_agree():
    params, grads = SMALL, make_small(seed=1)
    schedule = optax.linear_schedule(0.1, 0.05, 4)
    tx = ham(optax.sgd(schedule, 0.9), schedule, 4.0)
    injected = optax.inject_hyperparams(lambda rate, alpha: ham(optax.sgd(rate, 0.9), rate, alpha))

    def two_steps(tx, params):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    stacked = jax.tree.map(lambda w: np.stack([np.zeros_like(w), w]), params)
    mapped = jax.jit(jax.vmap(lambda p: two_steps(tx, p)))(stacked)
    runs = [
        two_steps(tx, params),
        jax.jit(lambda p: two_steps(injected(rate=schedule, alpha=4.0), p))(params),
        jax.tree.map(lambda w: w[1], mapped),
    ]
    expected = flat(jax.jit(lambda p: two_steps(tx, p))(params))
    for run in runs:
        for path, w in flat(run).items():
            # Fused or not, roundings of numbers of order one.
            np.testing.assert_allclose(w, expected[path], rtol=1e-6, atol=1e-6)


def test_map_params_finds_the_inner_slots():
    tx = ham(sx.sparseopt(0.1), 0.1)
    params = make_params()
    marked = optax.tree.map_params(
        tx, lambda slot: "slot", tx.init(params), transform_non_params=lambda _: "other"
    )
    assert jax.tree.leaves(marked).count("slot") == len(jax.tree.leaves(params))
    assert marked.step == "other"


@pytest.mark.parametrize("wrapper", ["masked", "partition"])
def test_parts_of_a_tree(wrapper):
    """Leaves that optax hides from it are left to others; those it sees are as without hiding."""
    params, grads, masks = make_params(), make_params(seed=1), random_masks(make_params())
    tx = ham(sx.sparseopt(0.1), 0.1)
    labels = {name: "ham" if name.startswith("Dense") else "sgd" for name in params}
    if wrapper == "masked":
        part = optax.masked(tx, {name: label == "ham" for name, label in labels.items()})
    else:
        part = optax.partition({"ham": tx, "sgd": optax.sgd(1.0)}, labels)
    got = flat(one_step(part, params, grads, masks=masks)[0])
    whole = flat(one_step(tx, params, grads, masks=masks)[0])
    for path, g in flat(grads).items():
        other = g if wrapper == "masked" else -g
        expected = whole[path] if path.startswith("Dense") else other
        np.testing.assert_array_equal(got[path], expected, err_msg=path)


# --- bad input -------------------------------------------------------------------------------


def test_missing_arguments():
    params = make_params()
    tx = ham(sx.sparseopt(0.1), 0.1)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"params is missing.*update\(grads, opt_state, params\)"):
        tx.update(params, state, masks=random_masks(params))
    with pytest.raises(sx.MissingMasksError, match="masks is missing"):
        tx.update(params, state, params)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"inner": sx.sparseopt}, TypeError, "inner must be .*sparseopt"),
        ({"learning_rate": "0.1"}, TypeError, "learning_rate must be a number or .*'0.1'"),
        ({"learning_rate": np.ones(2)}, TypeError, "learning_rate must be a number or"),
        ({"alpha": None}, TypeError, "alpha must be a number, got None"),
        ({"beta": True}, TypeError, "beta must be a number, got True"),
        ({"alpha": -1.0}, ValueError, "alpha must be finite and not negative, got -1.0"),
        ({"beta": float("nan")}, ValueError, "beta must be finite and not negative, got nan"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        ham(**({"inner": optax.sgd(0.1), "learning_rate": 0.1} | arguments))
