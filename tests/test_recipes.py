"""The recipes: what a factor does ahead of and after the adaptive scaling, each against NumPy."""

import functools

import jax
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import sparseopt_jax as sx
from sparseopt_jax.ham import ham
from sparseopt_jax.recipes import sparseopt_adamw, sparseopt_ham, sparseopt_lion, sparseopt_muon
from tests import oracles
from tests.helpers import flat, random_masks
from tests.training import check_zeros, counts, make_tx

pytestmark = pytest.mark.usefixtures("standard_promotion")


def assert_same_bits(got, expected):
    for path, a in flat(expected).items():
        b = np.asarray(flat(got)[path])
        assert b.dtype == a.dtype, path
        assert b.tobytes() == np.asarray(a).tobytes(), path


def make_params(seed=0):
    """A convolution and two dense layers of 16 inputs, with and without bias."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "Conv_0": {"kernel": normal(2, 2, 4, 6)},
        "Dense_0": {"kernel": normal(16, 9), "bias": normal(9)},
        "Dense_1": {"kernel": normal(16, 12)},
    }


def dense_masks(params):
    return jax.tree.map(lambda w: np.ones(w.shape, bool), params)


# Programs that run a few times compile several times faster this way.
QUICK = {"xla_backend_optimization_level": "0"}


def run(tx, params, steps, masks=None, compiler_options=None):
    """Updates and weights of each step, with gradients that depend on the step alone."""
    extra = {} if masks is None else {"masks": masks}

    @functools.partial(jax.jit, compiler_options=compiler_options)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, **extra)
        return updates, optax.apply_updates(params, updates), state

    state, out = tx.init(params), []
    for t in range(steps):
        updates, params, state = step(params, state, make_params(seed=100 + t))
        out.append((flat(updates), flat(params)))
    return out


# --- where the factor acts -------------------------------------------------------------------

FAMILIES = {
    "sgd": lambda: optax.sgd(1.0, 0.9),
    "adam": lambda: optax.adam(1.0),
    "lion": lambda: optax.lion(1.0, weight_decay=0.0),
    "muon": lambda: optax.contrib.muon(1.0),
}


def factor_and_mask(inputs, neurons):
    """Fan-ins from 2 % to all, and their factors of about 0.25 to 2."""
    rng = np.random.default_rng(0)
    active = np.maximum(1, np.round(np.geomspace(0.02, 1, neurons) * inputs))
    mask = np.argsort(rng.random((inputs, neurons)), axis=0) < active
    return oracles.sparseopt_factors({"w": mask})["w"].astype(np.float32), mask


def updates_without_and_with_factor_ahead(family, inputs, neurons, gradient_scale=1.0):
    """The tenth update, in float64 and masked, from equal gradients but for the factor."""
    factor, mask = factor_and_mask(inputs, neurons)
    tx = FAMILIES[family]()
    params = {"w": np.zeros(mask.shape, np.float32)}
    update = jax.jit(lambda g, state: tx.update({"w": g}, state, params))
    rng = np.random.default_rng(1)
    grads = rng.normal(size=(10, *mask.shape)).astype(np.float32) * mask * gradient_scale
    results = []
    for f in (np.float32(1), factor):
        state = tx.init(params)
        for g in grads.astype(np.float32):
            u, state = update(g * f, state)
        results.append(np.float64(u["w"]) * mask)
    return *results, factor


def relative_change(plain, other):
    return np.linalg.norm(other - plain) / np.linalg.norm(plain)


@pytest.mark.parametrize(
    ("family", "gradient_scale", "low", "high"),
    [
        # Measured 0.58, 1.2e-7, 5.7e-5, 0. Adam: its eps of 1e-8 over the gradient's size.
        ("sgd", 1.0, 0.5, 0.7),
        ("adam", 1.0, 0, 3e-7),
        ("adam", 1e-4, 1e-5, 2e-4),
        ("lion", 1.0, 0, 0),
    ],
)
def test_a_factor_ahead_cancels_in_adam_and_lion(family, gradient_scale, low, high):
    plain, ahead, factor = updates_without_and_with_factor_ahead(family, 512, 64, gradient_scale)
    assert low <= relative_change(plain, ahead) <= high
    # After the scaling it acts as fully as ahead of SGD.
    assert 0.5 < relative_change(plain, plain * factor) < 0.7
    if family == "sgd":
        np.testing.assert_allclose(ahead, plain * factor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "neurons", "low", "high"),
    [
        # Measured 0.13, 0.18 and 0.93.
        (512, 64, 0.0, 0.25),
        (64, 64, 0.0, 0.25),
        (64, 512, 0.85, 1.0),
    ],
)
def test_how_much_of_a_factor_ahead_muon_lets_through(inputs, neurons, low, high):
    """The power of the factor with which the norms of the neurons' updates go: 1 is all of it.

    With G the momentum and D the factors, orthogonalisation gives (G D^2 G^T)^(-1/2) G D. With few
    inputs the first term is one matrix for all neurons, and D remains. With few neurons it is the
    same as G D (D G^T G D)^(-1/2), which for orthogonal columns of G does not depend on D.
    """
    plain, ahead, factor = updates_without_and_with_factor_ahead("muon", inputs, neurons)
    norms = np.linalg.norm(ahead, axis=0) / np.linalg.norm(plain, axis=0)
    power = np.polyfit(np.log(factor[0]), np.log(norms), 1)[0]
    assert low <= power <= high
    assert relative_change(plain, ahead) < 0.7 * relative_change(plain, plain * factor)


RECIPES = {
    "adamw": (sparseopt_adamw, optax.adamw, 0.1),
    "lion": (sparseopt_lion, optax.lion, 0.1),
    "muon": (sparseopt_muon, optax.contrib.muon, 0.1),
}


@pytest.mark.parametrize("name", RECIPES)
def test_after_the_scaling_the_ratio_is_the_factor(name):
    """Four steps with fan-ins of 16, 4 and 1 of 16: factors of 1, 1/2 and 1/4, which are exact."""
    recipe, plain, rate = RECIPES[name]
    params = make_params()
    masks = dense_masks(params)
    for part in masks.values():
        kernel = part["kernel"].reshape(16, -1)
        kernel[4:, 1::3] = False
        kernel[1:, 2::3] = False
        part["kernel"] = kernel.reshape(part["kernel"].shape)
    options = {"weight_decay": 0.0} | ({"ns_steps": 2} if name == "muon" else {})
    ours = run(recipe(rate, average_over=None, **options), params, 4, masks)
    theirs = run(plain(rate, **options), params, 4)
    for (got, _), (expected, _) in zip(ours, theirs, strict=True):
        for path, u in expected.items():
            factor = np.float32([1, 0.5, 0.25] * 4)[: u.shape[-1]] if u.ndim >= 2 else 1
            np.testing.assert_array_equal(got[path], np.asarray(u) * factor, err_msg=path)


# --- against optax and NumPy -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scheduled"), [("adamw", False), ("adamw", True), ("lion", False), ("muon", True)]
)
def test_dense_masks_are_the_plain_optimizer(name, scheduled):
    """With optax's default arguments, decay included; four steps."""
    recipe, plain, rate = RECIPES[name]
    if scheduled:
        rate = optax.exponential_decay(rate, 1, 0.8)
    params = make_params()
    ours, theirs = run(recipe(rate), params, 4, dense_masks(params)), run(plain(rate), params, 4)
    for got, expected in zip(ours, theirs, strict=True):
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b)


def adamw_direction(t, g, state, nesterov):
    m, v = state
    m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
    m_hat = m / (1 - 0.8 ** (t + 1))
    if nesterov:
        m_hat = 0.8 * m / (1 - 0.8 ** (t + 2)) + 0.2 * g / (1 - 0.8 ** (t + 1))
    return m_hat / (np.sqrt(v / (1 - 0.95 ** (t + 1)) + 1e-3) + 1e-2), (m, v)


def lion_direction(t, g, state, _):
    m, v = state
    return np.sign(0.8 * m + 0.2 * g), (0.95 * m + 0.05 * g, v)


@pytest.mark.parametrize(
    ("recipe", "options", "direction"),
    [
        (sparseopt_adamw, {"eps": 1e-2, "eps_root": 1e-3}, adamw_direction),
        (sparseopt_adamw, {"eps": 1e-2, "eps_root": 1e-3, "nesterov": True}, adamw_direction),
        (sparseopt_lion, {}, lion_direction),
    ],
    ids=["adamw", "nadamw", "lion"],
)
@pytest.mark.parametrize("average_over", ["layer", "network"])
def test_adamw_and_lion_equal_numpy(recipe, options, direction, average_over):
    """Five steps: scaling, factor, decoupled decay of the leaves that decay, decaying rate."""
    tx = recipe(
        optax.exponential_decay(0.1, 1, 0.8),
        0.8,
        0.95,
        weight_decay=0.3,
        mask=lambda tree: jax.tree.map(lambda w: w.ndim >= 2, tree),
        average_over=average_over,
        **options,
    )
    params = make_params()
    masks = random_masks(params)
    factors = oracles.sparseopt_factors(flat(masks), average_over)
    w = {path: np.float64(p) for path, p in flat(params).items()}
    state = {path: (np.zeros_like(p), np.zeros_like(p)) for path, p in w.items()}
    for t, (_, got) in enumerate(run(tx, params, 5, masks, QUICK)):
        for path, g in flat(make_params(seed=100 + t)).items():
            d, state[path] = direction(t, np.float64(g), state[path], "nesterov" in options)
            decay = 0.3 * w[path] if w[path].ndim >= 2 else 0
            w[path] = w[path] - 0.1 * 0.8**t * (d * factors[path] + decay)
            np.testing.assert_allclose(got[path], w[path], rtol=3e-6, atol=3e-6, err_msg=path)


def test_muon_scales_decays_and_steps_each_of_its_parts():
    """Two steps: optax's directions, times the factor, decayed and stepped by kind of leaf."""
    params = make_params()
    masks = random_masks(params)
    options = {
        "ns_coeffs": "dion",
        "ns_steps": 5,
        "beta": 0.8,
        "eps": 1e-3,
        "mu_dtype": "bfloat16",
        "nesterov": False,
        "adaptive": True,
        "preconditioning": "aol",
        "adam_b1": 0.7,
        "adam_b2": 0.8,
        "adam_eps_root": 1e-2,
        "consistent_rms": 0.2,
        "muon_weight_dimension_numbers": {
            "Conv_0": {"kernel": MuonDimensionNumbers((0, 1, 2), 3)},
            "Dense_0": {"kernel": MuonDimensionNumbers(), "bias": None},
            "Dense_1": {"kernel": None},
        },
    }
    tx = sparseopt_muon(
        0.5,
        weight_decay=0.3,
        weight_decay_mask={"Conv_0": False, "Dense_0": True, "Dense_1": True},
        adam_weight_decay=0.1,
        adam_learning_rate=0.25,
        **options,
    )
    ours = run(tx, params, 2, masks, QUICK)
    plain = run(optax.contrib.muon(1.0, **options), params, 2, None, QUICK)
    rates = {"Conv_0/kernel": (0.5, 0.0), "Dense_0/kernel": (0.5, 0.3)}
    factors = oracles.sparseopt_factors(flat(masks))
    before = flat(params)
    for (got, after), (directions, _) in zip(ours, plain, strict=True):
        for path, u in directions.items():
            rate, decay = rates.get(path, (0.25, 0.1))
            expected = rate * (np.asarray(u) * factors[path] - decay * np.asarray(before[path]))
            np.testing.assert_allclose(got[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)
        before = after
    # A tree of dimension numbers does not fit the tree without leaves that map_params tries.
    marked = optax.tree.map_params(tx, lambda slot: "slot", tx.init(params))
    assert jax.tree.leaves(marked).count("slot") == 2 + 2 * 2


def test_sparseopt_ham_states_the_rate_once():
    """The same as by hand, bit for bit, and HAM's step from the raw gradient, by NumPy."""
    rate = optax.exponential_decay(0.2, 1, 0.8)
    options = {"momentum": 0.8, "nesterov": True, "weight_decay": 0.05}
    params = make_params()
    masks = random_masks(params)
    tx = sparseopt_ham(rate, **options, alpha=3.0, beta=0.1, average_over="network")
    by_hand = ham(sx.sparseopt(rate, **options, average_over="network"), rate, 3.0, 0.1)
    ours, theirs = run(tx, params, 3, masks), run(by_hand, params, 3, masks)
    for (a, _), (b, _) in zip(ours, theirs, strict=True):
        assert_same_bits(a, b)
    sgd = oracles.SGD(lambda t: 0.2 * 0.8**t, 0.8, True, 0.05, "network")
    w = {path: np.float64(p) for path, p in flat(params).items()}
    for t, (_, got) in enumerate(ours):
        w = sgd.step(w, flat(make_params(seed=100 + t)), flat(masks))
        for path, g in flat(make_params(seed=100 + t)).items():
            if w[path].ndim >= 2:
                w[path] *= np.exp(0.2 * 0.8**t * (-3 * np.sign(w[path]) * g - 0.1))
            np.testing.assert_allclose(got[path], w[path], rtol=1e-5, atol=1e-5, err_msg=path)


# --- options, and in sparse_training ---------------------------------------------------------

ALL = (sparseopt_ham, sparseopt_adamw, sparseopt_lion, sparseopt_muon)


@pytest.mark.parametrize("recipe", ALL)
def test_options_of_sparseopt_reach_it(recipe):
    """Each of them changes the update of the kernels that it should change, and of no others."""
    params = {"a": make_params()["Dense_0"], "b": make_params()["Dense_1"]}
    masks = {"a": random_masks(params["a"]), "b": random_masks(params["b"])}
    grads = jax.tree.map(np.ones_like, params)
    more = {"ns_steps": 1} if recipe is sparseopt_muon else {}
    kernels = {"a/kernel", "b/kernel"}
    changes = {
        "average_over": (None, kernels),
        "out_axes": (0, kernels),
        "layers": (lambda path: path.startswith("a"), {"b/kernel"}),
        # A stack of vectors, which has no neurons.
        "batch_axes": ({"a/kernel": 0}, {"a/kernel"}),
    }

    def updates(**options):
        tx = recipe(0.1, **options, **more)

        @functools.partial(jax.jit, compiler_options=QUICK)
        def update(grads):
            return tx.update(grads, tx.init(params), params, masks=masks)[0]

        return flat(update(grads))

    default = updates()
    for option, (value, expected) in changes.items():
        got = updates(**{option: value})
        changed = {path for path, u in got.items() if not np.array_equal(u, default[path])}
        assert changed == expected, option
        with pytest.raises((TypeError, ValueError), match=option):
            recipe(0.1, **{option: "neither"})
    tx = recipe(0.1, **more)
    state = tx.init(params)
    with pytest.raises(sx.MissingMasksError):
        tx.update(grads, state, params)


@pytest.mark.parametrize("recipe", ALL)
def test_in_sparse_training(recipe):
    """RigL, seven steps: exact zeros and constant counts while the masks move."""
    params = {name: make_params()[name] for name in ("Conv_0", "Dense_0")}
    options = {}
    if recipe is sparseopt_muon:
        options["ns_steps"] = 2
        options["muon_weight_dimension_numbers"] = {
            "Conv_0": {"kernel": MuonDimensionNumbers((0, 1, 2), 3)},
            "Dense_0": {"kernel": MuonDimensionNumbers(), "bias": None},
        }
    tx = make_tx(recipe(0.01, **options))
    quick = functools.partial(jax.jit, compiler_options=QUICK)
    opt_state = quick(tx.init)(params)
    first = sx.get_masks(opt_state)

    @quick
    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for t in range(7):
        grads = {name: make_params(seed=t)[name] for name in params}
        params, opt_state = step(params, opt_state, grads)
        check_zeros(params, opt_state)
    masks = sx.get_masks(opt_state)
    assert counts(masks) == counts(first)
    for path in ("Conv_0/kernel", "Dense_0/kernel"):
        assert (flat(first)[path] != flat(masks)[path]).any()
        assert np.isfinite(flat(params)[path]).all()
