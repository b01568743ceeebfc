"""FLOPs against counts worked by hand and XLA's own analysis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning

import sparseopt_jax as sx
from sparseopt_jax.flops import flops
from sparseopt_jax.model_flops import LayerFLOPs, ModelFLOPs

NHWC = ("NHWC", "HWIO", "NHWC")


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def mask(shape, active):
    """A NumPy mask with its first ``active`` weights True."""
    return (np.arange(np.prod(shape)) < active).reshape(shape)


def conv(x, kernel, strides=(1, 1), padding=((0, 0), (0, 0)), **options):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC, **options)


def upsampled(x, kernel, strides, padding):
    return lax.conv_transpose(x, kernel, strides, padding, dimension_numbers=NHWC)


def check(function, shapes, x, dense, densities=None, other=0, activations=0):
    """Count ``function(params, x)``: ``dense`` FLOPs by path, and the densities' share of them."""
    densities = {"w": 0.25} if densities is None else densities
    params = {path: array(*shape) for path, shape in shapes.items()}
    count = flops(function, params, densities, array(*x))
    assert count.layers == {p: LayerFLOPs(n, n * densities.get(p, 1.0)) for p, n in dense.items()}
    assert (count.other, count.activations) == (other, activations)


# -- networks counted by hand


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    return hidden @ params["b"]["kernel"]


MLP = {"a": {"kernel": array(12, 20), "bias": array(20)}, "b": {"kernel": array(20, 7)}}


def mlp_masks(a, b):
    bias = np.ones(20, bool)
    return {"a": {"kernel": mask((12, 20), a), "bias": bias}, "b": {"kernel": mask((20, 7), b)}}


def test_mlp():
    """2 * 5 * 12 * 20 and 2 * 5 * 20 * 7; bias and ReLU 5 * 20 each."""
    count = flops(mlp, MLP, mlp_masks(31, 140), array(5, 12))
    assert count.layers == {
        "a/kernel": LayerFLOPs(dense=2400, sparse=2 * 5 * 31),
        "b/kernel": LayerFLOPs(dense=1400, sparse=1400.0),
    }
    assert (count.activations, count.other) == (0, 200)
    assert (count.dense, count.sparse) == (4000, 310 + 1400 + 200)


@pytest.mark.parametrize(
    ("function", "kernel", "x", "dense"),
    [
        # 4x4 outputs of 5 channels, each over 3 * 3 * 3 inputs, those in the padding included.
        (lambda w, x: conv(x, w, (2, 2), "SAME"), (3, 3, 3, 5), (2, 8, 8, 3), 2 * 160 * 27),
        # Two groups, and depthwise: an output reads the inputs of its group.
        (lambda w, x: conv(x, w, feature_group_count=2), (3, 3, 4, 16), (1, 7, 7, 8), 2 * 400 * 36),
        (lambda w, x: conv(x, w, feature_group_count=8), (3, 3, 1, 16), (1, 7, 7, 8), 2 * 400 * 9),
        # Stride and window 2: each of 10x10 outputs gets one tap of 3 channels from one input.
        (lambda w, x: upsampled(x, w, (2, 2), "VALID"), (2, 2, 3, 4), (1, 5, 5, 3), 2 * 400 * 3),
        # Inputs 3 apart after a position of padding, 0 a 0 0 b: of five taps two meet an input.
        (
            lambda w, x: conv(x, w, padding=[(1, 0), (0, 0)], lhs_dilation=(3, 1)),
            *((1, 1, 1, 4), (1, 2, 1, 1), 2 * 2 * 4),
        ),
    ],
    ids=["strided", "groups", "depthwise", "transposed", "between"],
)
def test_convolutions(function, kernel, x, dense):
    check(lambda params, x: function(params["w"], x), {"w": kernel}, x, {"w": dense})


def attention(params, x):
    """Self-attention of 2 heads of 4 on sequences of 6 with 8 channels, without its softmax."""
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, params[name]) for name in "qkv")
    scores = jnp.einsum("bthk,bshk->bhts", q, k)
    mixed = jnp.einsum("bhts,bshk->bthk", scores, v)
    return jnp.einsum("bthk,hkd->btd", mixed, params["out"])


def test_attention():
    """Scores and mixture read no parameter: 3 sequences, 2 heads, 6 x 6 pairs, 4 channels."""
    shapes = dict.fromkeys("qkv", (8, 2, 4)) | {"out": (2, 4, 8)}
    densities = {"q": 0.5, "k": 0.25, "v": 0.125, "out": 0.75}
    dense = dict.fromkeys([*"qkv", "out"], 2 * (3 * 6) * 8 * 8)
    check(attention, shapes, (3, 6, 8), dense, densities, activations=2 * (2 * 3 * 2 * 36 * 4))


def test_scanned_stack_of_flax_layers():
    """Four blocks, rematerialised, with LayerNorm and GELU between their two products."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            y = nn.Dense(32, use_bias=False)(nn.LayerNorm(use_scale=False, use_bias=False)(x))
            return x + nn.Dense(8, use_bias=False)(jax.nn.gelu(y)), None

    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    stack = nn.scan(nn.remat(Block), length=4, **axes)()
    params = jax.eval_shape(stack.init, jax.random.key(0), array(2, 8), None)["params"]
    densities = {"Dense_0/kernel": 0.25, "Dense_1/kernel": 0.5}

    def forward(params, x):
        return stack.apply({"params": params}, x, None)

    count = flops(forward, params, densities, array(2, 8))
    each = 4 * 2 * (2 * 8 * 32)
    assert count.layers == {path: LayerFLOPs(each, each * d) for path, d in densities.items()}


# -- a second implementation: XLA's analysis of the program before it is optimised


@pytest.mark.parametrize(
    ("function", "kernel", "x"),
    [
        (lambda w, x: jax.nn.relu(x @ w + 1.0) @ w.T, (12, 20), (5, 12)),
        (lambda w, x: jnp.einsum("bij,bjk->bik", w, x), (3, 4, 5), (3, 5, 6)),
        (lambda w, x: conv(x, w, (2, 2)), (3, 3, 4, 8), (2, 9, 9, 4)),
        (lambda w, x: conv(x, w, feature_group_count=4), (3, 2, 1, 8), (2, 9, 8, 4)),
        (lambda w, x: conv(x, w, batch_group_count=2), (3, 3, 4, 8), (4, 9, 9, 4)),
        (lambda w, x: conv(x, w, rhs_dilation=(2, 3)), (3, 2, 4, 8), (2, 9, 9, 4)),
        (lambda w, x: upsampled(x, w, (2, 3), [(0, 0), (0, 0)]), (3, 3, 4, 8), (2, 9, 9, 4)),
        (
            lambda w, x: conv(x, w, (1, 2), lhs_dilation=(2, 2), rhs_dilation=(2, 1)),
            *((3, 3, 4, 8), (2, 9, 9, 4)),
        ),
    ],
    ids=["mlp", "batched", "stride", "groups", "batch_groups", "dilated", "transposed", "both"],
)
def test_xla_counts_the_same(function, kernel, x):
    """Without padding: XLA leaves out the positions that lie in it."""
    lowered = jax.jit(function).lower(array(*kernel), array(*x))
    count = flops(function, array(*kernel), None, array(*x))
    assert count.dense == lowered.cost_analysis()["flops"]


# -- everything that is no product


@pytest.mark.parametrize(
    ("function", "other"),
    [
        (lambda x: x + x, 24),
        (lambda x: jnp.exp(x) * 2.0, 48),
        (jax.nn.relu, 24),
        (lambda x: jnp.sum(x, axis=0), 24),
        (lambda x: jnp.max(x), 24),
        (lambda x: jnp.cumsum(x, axis=0), 24),
        # Row maximum (again with -inf), difference, exponential, sum, quotient.
        (lambda x: jax.nn.softmax(x), 24 + 4 + 24 + 24 + 24 + 24),
        (lambda x: nn.max_pool(x[None, :, :, None], (2, 2), strides=(2, 2)), 6 * 4),
        (lambda x: x.at[0].add(x[1]), 6),
        (lambda x: jnp.where(x > 0, x, jnp.zeros_like(x)), 0),
        (lambda x: x.T.reshape(8, 3)[::2].astype(jnp.bfloat16), 0),
        (lambda x: jnp.concatenate([x, x])[jnp.array([1, 3])], 0),
        (lambda x: jnp.sort(x), 0),
        (lambda x: x.astype(jnp.int32) + 1, 0),
        (lambda x: (x + x, jnp.argmax(x))[1], 0),  # a sum that nothing uses
    ],
    ids=range(15),
)
def test_other_operations(function, other):
    check(lambda params, x: function(x), {}, (4, 6), {}, {}, other)


def test_a_polynomial_costs_as_many_operations_as_it_has_terms():
    """By Horner's rule, two each; jax 0.10 begins it at zero, with a fourth term."""
    count = flops(lambda _, x: jnp.polyval(jnp.arange(4.0), x), {}, None, array(4, 6))
    assert count.other in (2 * 3 * 24, 2 * 4 * 24)


# -- which operand is the kernel


by_vjp, by_jvp, by_partitioning = (
    wrap(lambda w, x: x @ w) for wrap in (jax.custom_vjp, jax.custom_jvp, custom_partitioning)
)
by_vjp.defvjp(lambda w, x: (x @ w, None), lambda _, g: (g, g))
by_jvp.defjvps(None, None)
by_partitioning.def_partition(
    partition=lambda *_: None,
    infer_sharding_from_operands=lambda *_: None,
    sharding_rule="a b, c a -> c b",
)


@pytest.mark.parametrize(
    ("use", "other"),
    [
        (lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), 0),
        (lambda w, x: (w.T @ x.T).T, 0),
        (lambda w, x: x @ w.reshape(2, 4, 6).reshape(8, 6), 0),
        (lambda w, x: x @ (-w), 48),
        (lambda w, x: x @ (w * 0.5), 48),
        (lambda w, x: x @ (w / jnp.max(w)), 96),
        (lambda w, x: x @ jnp.where(np.ones((8, 6), bool), w, jnp.zeros_like(w)), 0),
        (lambda w, x: x @ (w * np.ones((8, 6), np.float32)), 48),
        (lambda w, x: x @ (w * jnp.abs(w)), 96),
        (lambda w, x: x @ lax.stop_gradient(w), 0),
        (lambda w, x: jnp.concatenate([x @ part for part in jnp.split(w, 3, 1)], axis=1), 0),
        (lambda w, x: jnp.concatenate([x @ w[:, :2], x @ w[:, 2:]], axis=1), 0),
        (lambda w, x: x @ jnp.concatenate([w[:4], w[4:]], axis=0), 0),
        (lambda w, x: jax.jit(lambda w: x @ w)(w), 0),
        (lambda w, x: jax.checkpoint(lambda w, x: x @ w)(w, x), 0),
        (lambda w, x: jax.vmap(lambda row: row @ w)(x), 0),
        (lambda w, x: lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: w[:4] @ w[:6], w), 0),
        (lambda w, x: jnp.matmul(*lax.optimization_barrier((x, w))), 0),
        (
            lambda w, x: jnp.concatenate(
                [x @ part for part in jnp.unstack(w.reshape(8, 2, 3), axis=1)]
            ),
            0,
        ),
        (lambda w, x: x @ jnp.stack([w[:, :3], w[:, 3:]], axis=1).reshape(8, 6), 0),
        (lambda w, x: x @ jnp.tile(w[:, :3], (1, 2)), 0),
        (by_vjp, 0),
        (by_jvp, 0),
        (by_partitioning, 0),
    ],
    ids=range(24),
)
def test_kernel_is_followed(use, other):
    """However the kernel gets there, 2 * 4 * 8 * 6 and a quarter of it."""
    check(lambda p, x: use(p["w"], x), {"w": (8, 6)}, (4, 8), {"w": 384}, other=other)


def test_joined_kernels_share_the_product():
    """A fused projection of 2 + 4 columns: each part by its own size and density."""

    def fused(params, x):
        return x @ jnp.concatenate([params["a"], params["b"]], axis=1)

    shapes = {"a": (8, 2), "b": (8, 4)}
    check(fused, shapes, (4, 8), {"a": 128, "b": 256}, {"a": 0.5, "b": 0.25})


@pytest.mark.parametrize("densities", [{"w": 0.25}, {"w": 0.25, "queries": 0.5}, {}])
def test_sparser_or_larger_of_two_kernels_counts(densities):
    """Learned queries times a kernel: the kernel's density, not the product of both."""

    def attend(params, x):
        return (params["queries"] @ params["w"]) @ x

    shapes = {"queries": (4, 8), "w": (8, 6)}
    check(attend, shapes, (6, 2), {"w": 384}, densities, activations=2 * 4 * 6 * 2)


@pytest.mark.parametrize("densities", [{"w": 0.25}, {}])
def test_weight_normalisation(densities):
    """The gain of each neuron is a parameter too, and smaller than the kernel that it scales."""

    def normalised(params, x):
        return x @ (params["gain"] * params["w"])

    check(normalised, {"gain": (1, 6), "w": (8, 6)}, (4, 8), {"w": 384}, densities, other=48)


def test_activations_scaled_by_a_parameter_are_no_kernels():
    """Not the input, a product, nor what a scan stacks, though each is larger than a kernel."""

    def scaled(params, x):
        hidden = (x * params["s"][None]) @ params["a"]
        hidden = (hidden * params["s"][None]) @ params["b"]
        hidden = lax.scan(lambda _, row: (None, -row), None, hidden)[1]
        return (hidden * params["s"][None]) @ params["c"]

    dense = dict.fromkeys("abc", 2 * 50 * 64)
    shapes = {"s": (8,)} | dict.fromkeys("abc", (8, 8))
    check(scaled, shapes, (50, 8), dense, {}, other=4 * 50 * 8)


# -- what may be given


def test_densities_in_place_of_masks():
    """By path, or as a tree such as sx.density gives."""
    x = array(5, 12)
    by_masks = flops(mlp, MLP, mlp_masks(60, 35), x)
    assert flops(mlp, MLP, {"a/kernel": 0.25, "b/kernel": 0.25}, x) == by_masks
    assert flops(mlp, MLP, sx.density(mlp_masks(60, 35)), x) == by_masks
    dense = flops(mlp, MLP, {}, x)
    assert dense == flops(mlp, MLP, None, x)
    assert dense.sparse == dense.dense


def test_nothing_runs_and_other_arguments_pass_through():
    def model(params, batch, scale, *, kind):
        assert (scale, kind) == (2, "plain")
        assert isinstance(batch["x"], jax.core.Tracer)
        return batch["x"] @ params["w"]

    params, batch = {"w": array(8, 6, dtype=jnp.bfloat16)}, {"x": jnp.ones((4, 8), jnp.bfloat16)}
    assert flops(model, params, {"w": 0.25}, batch, 2, kind="plain").sparse == 96.0


def test_empty_parameter():
    params, masks = {"w": array(8, 0)}, {"w": np.ones((8, 0), bool)}
    assert flops(lambda p, x: x @ p["w"], params, masks, array(4, 8)).dense == 0


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"a/kernel": 1.5}, ValueError, "'a/kernel': 1.5"),
        ({"a/kernel": float("nan")}, ValueError, "'a/kernel': nan"),
        ({"a/kernel": "0.5"}, TypeError, r"densities in \[0, 1\] by path, got 'a/kernel'"),
        ({"a/kernel": True}, TypeError, "'a/kernel': True"),
        ({"c/kernel": 0.5}, ValueError, "'c/kernel', which is none of the parameters: a/"),
        ({"a": {"kernel": mask((12, 20), 3)}}, ValueError, "missing: a/bias, b/kernel"),
        (jax.tree.map(lambda p: array(*p.shape, dtype=bool), MLP), TypeError, "concrete array"),
        ({"a/bias": 0.5}, ValueError, "makes a/bias sparse, but no matrix product"),
    ],
    ids=range(8),
)
def test_masks_that_cannot_be(masks, error, message):
    with pytest.raises(error, match=message):
        flops(mlp, MLP, masks, array(5, 12))


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("mlp", TypeError, "function must be callable"),
        (lambda p, x: x @ (p["w"] + 1.0), ValueError, "makes w sparse, but no matrix product"),
        (lambda p, x: p["w"][x.astype(int)[0]] @ x.T, ValueError, "makes w sparse"),
        (lambda p, x: jnp.fft.fft(x @ p["w"]), NotImplementedError, "FLOPs of 'fft' are not known"),
        (lambda p, x: jnp.linalg.cholesky(x.T @ x), NotImplementedError, "'cholesky'"),
        (
            lambda p, x: lax.while_loop(lambda h: h[0, 0] < 1, lambda h: h @ p["w"], x),
            *(ValueError, "while loop, whose number of iterations is not known"),
        ),
    ],
    ids=["not_callable", "sum", "rows", "fft", "cholesky", "while"],
)
def test_functions_that_cannot_be_counted(function, error, message):
    with pytest.raises(error, match=message):
        flops(function, {"w": array(8, 8)}, {"w": 0.5}, array(4, 8))


def test_traced_masks_are_refused():
    masks = jax.tree.map(lambda p: jnp.ones(p.shape, bool), MLP)
    with pytest.raises(TypeError, match="concrete array, whose active weights can be counted"):
        jax.jit(lambda masks: flops(mlp, MLP, masks, array(5, 12)).sparse)(masks)


# -- training


@given(
    layers=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 16)), min_size=1, max_size=4),
    other=st.integers(0, 10**6),
    interval=st.integers(1, 60),
    data=st.data(),
)
def test_training_averages_the_steps(layers, other, interval, data):
    """Against steps added up one by one: forward, gradient of activations, gradient of weights."""
    rows = {str(i): LayerFLOPs(n, n * k / 16) for i, (n, k) in enumerate(layers)}
    count = ModelFLOPs(rows, activations=7, other=other)
    dense = sum(n for n, _ in layers) + 7 + other
    sparse = sum(n * k for n, k in layers) / 16 + 7 + other
    assert count.training() == 3 * dense
    schedule = {"interval": interval, "drop_fraction": 0.3, "end_step": 1000}
    assert count.training(sx.Static()) == count.training(sx.SET(**schedule)) == 3 * sparse
    n = data.draw(st.integers(1, interval))
    gradients = [dense if step < n else sparse for step in range(interval + 1)]
    costs = [sparse + sparse + gradient for gradient in gradients]
    found = count.training(sx.RigL(**schedule, accumulate_steps=n))
    assert found == pytest.approx(sum(costs) / len(costs), rel=1e-12)


@given(a=st.integers(0, 16), b=st.integers(0, 16), batch=st.integers(1, 9))
def test_counts_are_linear(a, b, batch):
    """In the density of each layer, and in the batch."""
    densities = {"a/kernel": a / 16, "b/kernel": b / 16}
    count = flops(mlp, MLP, densities, array(batch, 12))
    assert count.sparse == batch * (480 * a / 16 + 280 * b / 16 + 40)
    assert count.dense == batch * 800


@pytest.mark.parametrize("topology", ["rigl", sx.RigL])
def test_unknown_topology(topology):
    with pytest.raises(TypeError, match="topology must be a topology, or None"):
        ModelFLOPs({}, 1, 1).training(topology)
