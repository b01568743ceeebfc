"""Diagnostics against NumPy in float64, hand-worked values and known spectra."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparseopt_jax.diagnostics import (
    gradient_norm,
    gradient_skew,
    hessian_top_eigenvalue,
    mask_churn,
)
from tests import oracles
from tests.helpers import KERNELS, flat, make_params, random_masks


def compiled(function, *arguments):
    """Each program runs once, so it is compiled with as little effort as possible."""
    lowered = jax.jit(function).lower(*arguments)
    program = lowered.compile(compiler_options={"xla_backend_optimization_level": "0"})
    return program(*arguments)


# --- gradient_skew ---------------------------------------------------------------------------


def angle_and_ratio(raw, corrected):
    """In float64, by the cosine: a formula of its own, good where the angle is not tiny."""
    a, b = raw.ravel().astype(np.float64), corrected.ravel().astype(np.float64)
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    return np.arccos(cosine), np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize(("average_over", "out_axes"), [("layer", 0), ("network", -1), (None, 0)])
def test_skew_equals_numpy(average_over, out_axes):
    grads = make_params(seed=3)
    grads["Dense_1"]["kernel"] *= np.float32(1e-30)  # squares of it are 0 in float32
    masks = random_masks(grads)
    options = {"average_over": average_over, "out_axes": out_axes}
    skew = compiled(functools.partial(gradient_skew, **options), grads, masks)
    # The embedding is a matrix too, dense here.
    assert set(skew) == {*KERNELS, "Embed_0/embedding"}
    factors = oracles.sparseopt_factors(flat(masks), average_over, out_axes)
    for path in KERNELS:
        raw = np.where(flat(masks)[path], flat(grads)[path], 0).astype(np.float64)
        angle, ratio = angle_and_ratio(raw, raw * factors[path])
        assert angle > 0.05
        np.testing.assert_allclose(skew[path].angle, angle, rtol=2e-6, err_msg=path)
        np.testing.assert_allclose(skew[path].norm_ratio, ratio, rtol=1e-6, err_msg=path)
        assert skew[path].angle.dtype == skew[path].norm_ratio.dtype == np.float32
    assert [float(x) for x in skew["Embed_0/embedding"]] == [0, 1]


def test_amplification_is_the_papers():
    """At 90 %, 95 % and 97 % sparsity in all neurons: 3.2, 4.5 and 5.8, and no rotation."""
    expected = {100: 3.2, 50: 4.5, 30: 5.8}
    masks = {kept: np.repeat(np.arange(1000) < kept, 4).reshape(1000, 4) for kept in expected}
    rng = np.random.default_rng(0)
    grads = {kept: rng.normal(size=(1000, 4)).astype(np.float32) for kept in expected}
    skew = compiled(functools.partial(gradient_skew, average_over=None), grads, masks)
    for kept, ratio in expected.items():
        assert round(float(skew[str(kept)].norm_ratio), 1) == ratio
        assert float(skew[str(kept)].angle) < 1.2e-7  # two roundings of 6e-8
    # Equal fan-in, averaged over the layer: the identity, and seen as exactly that.
    for angle, ratio in compiled(gradient_skew, grads, masks).values():
        assert (float(angle), float(ratio)) == (0, 1)


@pytest.mark.parametrize("neurons", [1000, 100_000])
def test_small_angles_are_right(neurons):
    """One of many neurons has lost one of 100 weights; the arc cosine in float32 would give 0.

    With g = 1 at one weight of each neuron, c differs from g in one of them by 1 - sqrt(0.99), and
    the part of that along g is 1 / neurons of it.
    """
    mask = np.ones((100, neurons), bool)
    mask[99, 0] = False
    grads = np.zeros(mask.shape, np.float32)
    grads[0] = 1
    raw, corrected = np.ones(neurons), np.ones(neurons)
    corrected[0] = np.sqrt(0.99)
    along = corrected @ raw / neurons
    expected = np.linalg.norm(corrected - along * raw) / (along * np.sqrt(neurons))
    assert expected < 2e-4
    got = jax.jit(gradient_skew)(grads, mask)[""].angle
    np.testing.assert_allclose(got, expected, atol=1.2e-7)


def test_skew_of_a_stack_is_that_of_its_layers():
    rng = np.random.default_rng(0)
    grads = {"stack": rng.normal(size=(8, 3, 6)).astype(np.float32), "w": np.ones((4, 2), "f")}
    masks = {"stack": rng.random((8, 3, 6)) < 0.5, "w": np.array([[1, 1], [0, 1]] * 2, bool)}
    skew = compiled(functools.partial(gradient_skew, batch_axes={"stack": 1}), grads, masks)
    assert skew["stack"].angle.shape == (3,)
    assert skew["w"].angle.shape == ()
    for i in range(3):
        g, m = grads["stack"][:, i], masks["stack"][:, i]
        raw = np.where(m, g, 0)
        angle, ratio = angle_and_ratio(raw, raw * oracles.sparseopt_factors({"": m})[""])
        np.testing.assert_allclose(skew["stack"].angle[i], angle, rtol=2e-6)
        np.testing.assert_allclose(skew["stack"].norm_ratio[i], ratio, rtol=1e-6)


def test_skew_of_zeros_and_of_what_is_not_finite():
    mask = np.array([[1, 1], [0, 1], [0, 1]], bool)
    skew = jax.jit(gradient_skew)
    zeros, ones = np.zeros((3, 2), np.float32), np.ones((3, 2), np.float32)
    for got in (skew(zeros, mask), skew(ones, np.zeros((3, 2), bool))):
        assert (float(got[""].angle), float(got[""].norm_ratio)) == (0, 1)
    for bad in (np.nan, np.inf):
        grads = np.ones((3, 2), np.float32)
        grads[0, 0] = bad
        assert np.isnan(skew(grads, mask)[""]).all()
        # An inactive weight's gradient does not matter.
        grads[0, 0], grads[1, 0] = 1, bad
        assert np.isfinite(skew(grads, mask)[""]).all()


def test_skew_of_bfloat16_is_corrected_in_float32_and_layers_are_chosen():
    grads = make_params(ml_dtypes.bfloat16)
    masks = random_masks(grads)
    skew = jax.jit(functools.partial(gradient_skew, layers=lambda path: "Dense" in path))
    got = skew(grads, masks)
    assert set(got) == {"Dense_0/kernel", "Dense_1/kernel"}
    wide = skew(jax.tree.map(lambda g: g.astype(np.float32), grads), masks)
    for path, expected in wide.items():
        # A factor rounded to bfloat16 would be off by up to 4e-3.
        np.testing.assert_allclose(got[path], expected, rtol=1e-6, err_msg=path)


def test_skew_errors():
    grads, masks = {"w": np.ones((3, 2), np.float32)}, {"w": np.ones((3, 2), bool)}
    with pytest.raises(TypeError, match="masks leaf 'w' must be a bool array, got float32"):
        gradient_skew(grads, grads)
    with pytest.raises(ValueError, match=r"shape \(3, 2\), but its parameter has \(2, 3\)"):
        gradient_skew({"w": grads["w"].T}, masks)
    with pytest.raises(ValueError, match="out_axes must lie in"):
        gradient_skew(grads, masks, out_axes=2)


# --- mask_churn ------------------------------------------------------------------------------


def test_churn_by_hand():
    """2 of 4, 1 of 1 and 0 of 6 active weights are new: 3 of 11 together."""
    earlier = {
        "a": {"kernel": np.array([[1, 1, 1], [1, 0, 0]], bool), "bias": np.ones(3, bool)},
        "b": {"kernel": np.array([[1, 1], [1, 0]], bool)},
        "c": {"kernel": np.ones((3, 2), bool)},
        "d": {"kernel": np.ones((3, 2), bool)},
    }
    masks = {
        "a": {"kernel": np.array([[1, 0, 1], [0, 1, 1]], bool), "bias": np.ones(3, bool)},
        "b": {"kernel": np.array([[0, 0], [0, 1]], bool)},
        "c": {"kernel": np.ones((3, 2), bool)},
        "d": {"kernel": np.zeros((3, 2), bool)},
    }
    got = jax.jit(mask_churn)(masks, earlier)
    assert list(got.layers) == ["a/kernel", "b/kernel", "c/kernel", "d/kernel"]
    assert [float(share) for share in got.layers.values()] == [0.5, 1, 0, 0]
    assert got.total == np.float32(3 / 11)
    assert got.total.dtype == got.layers["a/kernel"].dtype == np.float32
    assert not any(map(float, jax.tree.leaves(mask_churn(masks, masks))))


def test_churn_of_chosen_leaves():
    masks = {"e": np.eye(3, dtype=bool), "b": np.array([1, 1, 0, 1], bool)}
    earlier = {"e": ~masks["e"], "b": np.array([0, 1, 1, 1], bool)}
    got = mask_churn(masks, earlier, prunable=lambda path, leaf: leaf.ndim == 1)
    assert list(got.layers) == ["b"]
    assert got.total == got.layers["b"] == np.float32(1 / 3)


def test_churn_errors():
    masks = {"w": np.ones((3, 2), bool)}
    with pytest.raises(ValueError, match=r"earlier must have the leaves of masks; .* v, w"):
        mask_churn(masks, {"v": masks["w"]})
    with pytest.raises(ValueError, match=r"earlier leaf 'w' has shape \(2, 3\), but .* \(3, 2\)"):
        mask_churn(masks, {"w": masks["w"].T})
    with pytest.raises(TypeError, match="earlier leaf 'w' must be a bool array, got int8"):
        mask_churn(masks, {"w": masks["w"].astype(np.int8)})
    with pytest.raises(ValueError, match="prunable chooses no leaf of masks, which has norm"):
        mask_churn({"norm": masks["w"]}, {"norm": masks["w"]})
    with pytest.raises(TypeError, match="prunable must be a function"):
        mask_churn(masks, masks, prunable="w")


# --- gradient_norm ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_norm_equals_numpy(dtype):
    """4,000 values near 100: in float16 the squares overflow, in bfloat16 the sum would stall."""
    rng = np.random.default_rng(0)
    grads = {"a": rng.normal(100, 1, (40, 50)).astype(dtype), "b": np.full(2000, 100, dtype)}
    masks = {"a": rng.random((40, 50)) < 0.3, "b": rng.random(2000) < 0.9}
    exact = [grads[name].astype(np.float64) for name in "ab"]
    got = jax.jit(gradient_norm)(grads, masks)
    active = [g[masks[name]] for g, name in zip(exact, "ab", strict=True)]
    for value, weights in ((got, active), (jax.jit(gradient_norm)(grads), exact)):
        assert value.dtype == np.float32
        expected = np.sqrt(sum((g**2).sum() for g in weights))
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_norm_counts_what_is_not_finite_only_where_active():
    grads, masks = np.array([3, 4, np.nan], np.float32), np.array([1, 1, 0], bool)
    assert float(gradient_norm(grads, masks)) == 5
    assert np.isnan(gradient_norm(grads))
    assert float(gradient_norm({})) == 0
    with pytest.raises(ValueError, match="masks must have the tree structure of params"):
        gradient_norm({"w": np.ones(3, np.float32)}, {"v": np.ones(3, bool)})
    with pytest.raises(TypeError, match="must be a bool array"):
        gradient_norm(np.ones(3, np.float32), np.ones(3, np.float32))


# --- hessian_top_eigenvalue ------------------------------------------------------------------


def top(loss, params, masks=None, **options):
    def run(params, key, masks):
        return hessian_top_eigenvalue(loss, params, key, masks=masks, **options)

    return compiled(run, params, jax.random.key(0), masks)


def random_hessian(spectrum, seed=0):
    """A symmetric matrix of this spectrum, float64."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(len(spectrum), len(spectrum))))
    return (basis * np.asarray(spectrum)) @ basis.T


def quadratic(hessian):
    """A loss of {"a": (n - 2,), "b": (1, 2)} with this Hessian, and the point to take it at.

    The gradient is not zero there, and must not matter.
    """
    matrix = jnp.asarray(hessian, jnp.float32)

    def loss(params):
        w = jnp.concatenate([params["a"], params["b"][0]])
        return 0.5 * w @ jnp.matmul(matrix, w, precision="highest") + jnp.sum(w)

    return loss, {"a": jnp.ones(len(hessian) - 2), "b": jnp.ones((1, 2))}


def vectors_of(tree, ndim=0):
    """The leaves as one float64 vector, or several along ``ndim`` leading axes."""
    leaves = [np.asarray(tree[name], np.float64) for name in "ab"]
    return np.concatenate([x.reshape(*x.shape[:ndim], -1) for x in leaves], axis=-1)


SPECTRA = (
    (-10, -3, -1, 0, 0.5, 1, 1.5, 2),  # the largest in magnitude is negative
    (-10, -9, -8, -6, -5, -4, -2, -1.5),  # all are; the iterations left over must not give 0
    (3,) * 8,  # any vector is an eigenvector: over after one iteration
    (-3,) * 8,
    (0, 0, 0, 0, 0, 0, 4, 5),  # rank 2: three iterations span all
    (0, 0, 0, 0, 0, 0, -4, -5),
    (0,) * 8,
    (1e-6, 2e-6, 3e-6, 4e-6, 5e-6, 6e-6, 7e-6, 8e-6),
    (-5e6, -4e6, -3e6, -2e6, -1e6, 0, 1e6, 2e6),
)


def test_known_spectra():
    hessians = np.stack([random_hessian(spectrum) for spectrum in SPECTRA])

    def run(matrix, key):
        loss, params = quadratic(matrix)
        return hessian_top_eigenvalue(loss, params, key)  # 30 iterations in 8 dimensions

    keys = jax.random.split(jax.random.key(0), len(SPECTRA))
    got = compiled(jax.vmap(run), jnp.asarray(hessians, jnp.float32), keys)
    assert got.eigenvalue.dtype == got.residual.dtype == np.float32
    for i, v in enumerate(vectors_of(got.eigenvector, ndim=1)):
        largest, size = max(SPECTRA[i]), np.abs(SPECTRA[i]).max()
        # Rounding of float32: 6e-8 of the largest in magnitude, some tens of times.
        np.testing.assert_allclose(got.eigenvalue[i], largest, atol=2e-6 * size, rtol=0)
        np.testing.assert_allclose(np.linalg.norm(v), 1, rtol=1e-5)
        np.testing.assert_allclose(hessians[i] @ v, largest * v, atol=1e-5 * size)
        assert float(got.residual[i]) <= 1e-5 * size


@pytest.mark.parametrize("iterations", [1, 3, 12])
def test_residual_is_that_of_the_vector_and_bounds_the_error(iterations):
    spectrum = np.concatenate([np.linspace(-4, 2, 200), [3.0]])
    hessian = random_hessian(spectrum)
    got = top(*quadratic(hessian), iterations=iterations)
    v, value = vectors_of(got.eigenvector), float(got.eigenvalue)
    residual = np.linalg.norm(hessian @ v - value * v)
    np.testing.assert_allclose(got.residual, residual, rtol=1e-4, atol=1e-5)
    assert np.abs(spectrum - value).min() <= residual + 1e-5
    np.testing.assert_allclose(value, v @ hessian @ v, rtol=1e-5, atol=1e-5)
    assert value <= 3 + 1e-5


def test_long_runs_stay_orthogonal():
    """A dominant eigenvalue converges at once; from there on plain Lanczos loses orthogonality.

    The vector's norm is then not 1, nor is its residual the one that was promised.
    """
    spectrum = np.concatenate([np.linspace(0, 1, 150), [1.0001, 1000]])
    hessian = random_hessian(-spectrum)
    got = top(*quadratic(hessian), iterations=120)
    v = vectors_of(got.eigenvector)
    np.testing.assert_allclose(np.linalg.norm(v), 1, rtol=1e-5)
    assert np.linalg.norm(hessian @ v - float(got.eigenvalue) * v) <= float(got.residual) + 1e-3
    np.testing.assert_allclose(got.eigenvalue, 0, atol=1e-3)


@functools.cache
def network():
    """A two-layer net with cross-entropy, and its Hessian in float64 by jax.hessian."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(24, 6)).astype(np.float32)
    labels = np.eye(3, dtype=np.float32)[rng.integers(0, 3, 24)]
    params = {
        "a": rng.normal(0, 0.6, (6, 5)).astype(np.float32),
        "b": rng.normal(0, 0.6, (5, 3)).astype(np.float32),
    }

    def loss(params):
        logits = jnp.tanh(x.astype(params["a"].dtype) @ params["a"]) @ params["b"]
        return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=1))

    blocks = compiled(jax.hessian(loss), params)
    rows = [
        np.concatenate([np.reshape(blocks[i][j], (params[i].size, -1)) for j in "ab"], axis=1)
        for i in "ab"
    ]
    return loss, params, np.concatenate(rows).astype(np.float64)


def test_network_equals_jax_hessian():
    loss, params, hessian = network()
    eigenvalues = np.linalg.eigvalsh(hessian)
    got = top(loss, params, iterations=45)
    np.testing.assert_allclose(got.eigenvalue, eigenvalues[-1], rtol=3e-6)
    # The smallest, as the docstring has it.
    got = top(lambda p: -loss(p), params, iterations=45)
    np.testing.assert_allclose(-got.eigenvalue, eigenvalues[0], atol=3e-6 * eigenvalues[-1])


def test_masked_network_equals_the_submatrix():
    """At densities of 0.5 and 0.1, with a single active weight, and with none."""
    loss, params, hessian = network()
    rng = np.random.default_rng(2)
    uniform = {name: rng.random(p.shape) for name, p in params.items()}
    one = np.sort(vectors_of(uniform))[0]
    masks = {
        name: np.stack([u < d for d in (0.5, 0.1, one + 1e-9, 0)]) for name, u in uniform.items()
    }
    run = jax.vmap(lambda m: hessian_top_eigenvalue(loss, params, jax.random.key(0), masks=m))
    got = compiled(run, masks)
    vectors = vectors_of(got.eigenvector, ndim=1)
    for i, mask in enumerate(vectors_of(masks, ndim=1)):
        active = np.flatnonzero(mask)
        assert not vectors[i][mask == 0].any()
        if len(active):
            block = hessian[np.ix_(active, active)]
            expected = np.linalg.eigvalsh(block)[-1]
            assert expected < 0.9 * np.linalg.eigvalsh(hessian)[-1]
            np.testing.assert_allclose(got.eigenvalue[i], expected, rtol=3e-6)
            np.testing.assert_allclose(np.linalg.norm(vectors[i]), 1, rtol=1e-5)
    assert len(active) == 0
    assert (float(got.eigenvalue[-1]), float(got.residual[-1])) == (0, 0)


def test_float64_parameters_stay_so():
    with jax.enable_x64(True):
        matrix = jnp.diag(jnp.array([1.0, 2.0, 2.0 + 1e-9]))
        got = top(lambda w: 0.5 * w @ matrix @ w, jnp.ones(3), iterations=4)
        assert got.eigenvalue.dtype == np.float64
        np.testing.assert_allclose(got.eigenvalue, 2 + 1e-9, rtol=1e-13)


def test_not_finite_derivatives_give_nan():
    loss, params = quadratic(np.eye(4))
    got = top(lambda p: loss(p) + jnp.sum(jnp.sqrt(p["b"])), params | {"b": jnp.zeros((1, 2))})
    assert np.isnan(got.eigenvalue)


def test_leaves_of_any_rank_and_low_precision():
    """Eigenvalues 3 (a scalar), 2 and 1, beside an empty leaf; bfloat16 is widened for the loss."""
    shapes = {"s": (), "v": (3,), "t": (2, 1, 2), "e": (0, 3)}

    def loss(p):
        assert {x.dtype for x in p.values()} == {np.dtype(np.float32)}
        return 1.5 * p["s"] ** 2 + jnp.sum(p["v"] ** 2) + 0.5 * jnp.sum(p["t"] ** 2)

    got = top(loss, {name: jnp.ones(shape, jnp.bfloat16) for name, shape in shapes.items()})
    np.testing.assert_allclose(got.eigenvalue, 3, rtol=1e-6)
    np.testing.assert_allclose(np.abs(got.eigenvector["s"]), 1, rtol=1e-5)
    assert {name: x.shape for name, x in got.eigenvector.items()} == shapes
    assert got.eigenvalue.dtype == got.eigenvector["v"].dtype == np.float32


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters(kind):
    """Eigenvalues 1 to 16, one and a half times as large in the other leaf; over 8 devices."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("x"))
        scale = jax.device_put(np.arange(1, 17, dtype=np.float32), sharding)
        params = {"a": jnp.ones_like(scale), "b": jnp.ones_like(scale)}
        got = top(
            lambda p: 0.5 * jnp.sum(scale * p["a"] ** 2) + 0.75 * jnp.sum(scale * p["b"] ** 2),
            params,
            {"a": scale > 0, "b": scale < 12},
        )
    np.testing.assert_allclose(got.eigenvalue, 16.5, rtol=1e-6)
    assert len(got.eigenvector["a"].sharding.device_set) == 8


def test_the_program_does_not_grow_with_the_iterations():
    def operations(n):
        run = functools.partial(hessian_top_eigenvalue, jnp.sum, jnp.ones(3), iterations=n)
        return str(jax.make_jaxpr(run)(jax.random.key(0))).count(" = ")

    assert operations(2) == operations(50) > 50


def test_hessian_errors():
    key, w = jax.random.key(0), {"w": jnp.ones(3)}

    def loss(p):
        return jnp.sum(p["w"] ** 2)

    with pytest.raises(TypeError, match="iterations must be an int"):
        hessian_top_eigenvalue(loss, w, key, iterations=2.0)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        hessian_top_eigenvalue(loss, w, key, iterations=0)
    with pytest.raises(TypeError, match="params leaf 'n' must be floating, got int32"):
        hessian_top_eigenvalue(loss, w | {"n": jnp.int32(1)}, key)
    with pytest.raises(ValueError, match="params must have at least one leaf"):
        hessian_top_eigenvalue(loss, {}, key)
    with pytest.raises(ValueError, match="loss must return one floating scalar"):
        hessian_top_eigenvalue(lambda p: p["w"] ** 2, w, key)
    with pytest.raises(ValueError, match="loss must return one floating scalar"):
        hessian_top_eigenvalue(lambda p: (loss(p), {}), w, key)
    with pytest.raises(ValueError, match="masks leaf 'w' has shape"):
        hessian_top_eigenvalue(loss, w, key, masks={"w": jnp.ones(4, bool)})
