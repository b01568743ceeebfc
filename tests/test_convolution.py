"""The models' convolution against XLA's: values, derivatives, devices, and other platforms."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparseopt_jax as sx
from experiments.hlo import collectives
from sparseopt_jax import models
from sparseopt_jax.models import convolution as module
from sparseopt_jax.models.convolution import convolution
from tests.model_variables import KEY, images

NHWC = ("NHWC", "HWIO", "NHWC")


def by_xla(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of a few examples each, in images as small as these."""
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4 * 8 * 8 * 3 * (3 + 5) * 2)


def close(got, expected, tolerance=1e-5):
    """Equal within ``tolerance`` of the largest element of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.float64(a), np.float64(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-30))


def derivatives(convolve, strides, padding):
    """A function of x, kernel and their tangents: the result, its tangent, two gradients."""

    def run(x, kernel, dx, dkernel):
        def function(x, kernel):
            return convolve(x, kernel, strides, padding)

        y, tangent = jax.jvp(function, (x, kernel), (dx, dkernel))
        _, transpose = jax.vjp(function, x, kernel)
        return y, tangent, transpose(jnp.sin(y))

    return jax.jit(run)


def arguments(x_shape, kernel_shape, dtype=jnp.float32):
    shapes = (x_shape, kernel_shape) * 2
    return [jnp.asarray(images(*s, seed=i), dtype) for i, s in enumerate(shapes)]


SAME_7, SAME_3, NONE = (((n, n), (n, n)) for n in (3, 1, 0))
CASES = {
    # (batch, height, width, c_in), (height, width, c_in, c_out) of the kernel, strides, padding
    "3x3": ((24, 8, 8, 3), (3, 3, 3, 5), (1, 1), SAME_3),
    "3x3 stride 2, odd": ((15, 9, 7, 3), (3, 3, 3, 5), (2, 2), SAME_3),
    "3x3 SAME, stride 2": ((7, 8, 6, 3), (3, 3, 3, 5), (2, 2), "SAME"),
    "7x7 stride 2": ((6, 14, 15, 3), (7, 7, 3, 4), (2, 2), SAME_7),
    "1x1": ((6, 6, 5, 3), (1, 1, 3, 5), (1, 1), NONE),
    "1x1 stride 2": ((8, 6, 5, 3), (1, 1, 3, 5), (2, 2), NONE),
    "1x1 padded": ((3, 4, 5, 3), (1, 1, 3, 5), (1, 1), ((2, 0), (0, 1))),
    "2x3, uneven padding": ((5, 7, 9, 2), (2, 3, 2, 4), (1, 2), ((3, 0), (0, 1))),
    "VALID": ((4, 6, 6, 2), (3, 2, 2, 3), (1, 1), "VALID"),
    "window over the result": ((16, 2, 2, 6), (3, 3, 6, 5), (1, 1), SAME_3),
    "7x7 over 3x3": ((5, 5, 5, 2), (7, 7, 2, 3), (2, 2), SAME_7),
    "no examples": ((0, 6, 6, 2), (3, 3, 2, 3), (1, 1), SAME_3),
    "no result": ((2, 2, 6, 2), (3, 3, 2, 3), (1, 1), "VALID"),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_xla(case):
    x, kernel, strides, padding = CASES[case]
    given = arguments(x, kernel)
    got, expected = (derivatives(f, strides, padding)(*given) for f in (convolution, by_xla))
    assert [leaf.shape for leaf in jax.tree.leaves(got)] == [
        leaf.shape for leaf in jax.tree.leaves(expected)
    ]
    if got[0].size:
        close(got, expected)


@pytest.mark.parametrize("case", ["3x3", "3x3 stride 2, odd", "1x1", "window over the result"])
def test_half_precision_is_rounded_once(case):
    x, kernel, strides, padding = CASES[case]
    given = arguments(x, kernel, jnp.bfloat16)
    in_float32 = [leaf.astype(jnp.float32) for leaf in given]

    def gradients(convolve, x, kernel, dy):
        _, transpose = jax.vjp(lambda x, k: convolve(x, k, strides, padding), x, kernel)
        return transpose(dy.astype(x.dtype))

    dy = jnp.asarray(images(*by_xla(*given[:2], strides, padding).shape, seed=9), jnp.bfloat16)
    got = jax.jit(functools.partial(gradients, convolution))(*given[:2], dy)
    expected = jax.jit(functools.partial(gradients, by_xla))(*in_float32[:2], dy)
    assert {leaf.dtype for leaf in got} == {jnp.dtype(jnp.bfloat16)}
    for a, b in zip(got, expected, strict=True):
        # A rounding to eight bits, and what is left of float32 sums where they cancel.
        np.testing.assert_allclose(np.float64(a), b, rtol=2.0**-8, atol=1e-4 * np.abs(b).max())


def test_eager_seeds_and_steps():
    """Without jit; images and kernels of several seeds, and of several steps of a scan."""
    x, kernel, strides, padding = CASES["3x3"]
    xs = jnp.asarray(images(3, *x))
    kernels = jnp.asarray(images(3, *kernel, seed=2))

    def gradients(convolve, x, kernel):
        return jax.grad(lambda x, k: (convolve(x, k, strides, padding) ** 3).sum(), (0, 1))(
            x, kernel
        )

    ours, expected = (functools.partial(gradients, f) for f in (convolution, by_xla))
    one_by_one = [expected(*pair) for pair in zip(xs, kernels, strict=True)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one)
    close(ours(xs[0], kernels[0]), one_by_one[0])
    close(jax.jit(jax.vmap(ours))(xs, kernels), expected)
    steps = jax.jit(lambda *pairs: lax.scan(lambda c, pair: (c, ours(*pair)), 0, pairs)[1])
    close(steps(xs, kernels), expected)


@pytest.mark.parametrize("case", ["3x3", "window over the result"])
def test_second_derivatives(case):
    x, kernel, strides, padding = CASES[case]
    given = arguments(x, kernel)

    def products(convolve):
        def loss(x, kernel):
            return jnp.tanh(convolve(x, kernel, strides, padding)).sum()

        def run(x, kernel, *tangents):
            gradient = jax.grad(loss, (0, 1))
            along = jax.jvp(gradient, (x, kernel), tangents)[1]
            slope = jax.grad(lambda *at: jax.jvp(loss, at, tangents)[1], (0, 1))(x, kernel)
            top = sx.hessian_top_eigenvalue(lambda k: loss(x, k), kernel, KEY, iterations=2)
            return along, slope, top.eigenvalue

        return jax.jit(run)(*given)

    got, expected = products(convolution), products(by_xla)
    close(got, expected, 1e-4)
    close(got[0], got[1], 1e-4)


# --- devices -----------------------------------------------------------------------------------


def loss_of_three(kernels, x):
    """Of a 1x1, a 3x3 and, of images of 2x2, a kernel that is larger than its result."""
    for kernel, stride in zip(kernels, (1, 2, 1), strict=True):
        pad = (kernel.shape[0] // 2,) * 2
        x = convolution(x, kernel, (stride, stride), (pad, pad))
    return (x**2).sum()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_devices_of_a_batch_send_gradients_alone(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    kernels = [images(n, n, 3, 3, seed=n) / n for n in (1, 3, 3)]
    x = images(32, 4, 4, 3)
    expected = jax.jit(jax.grad(loss_of_three, (0, 1)))(kernels, x)
    given = (
        jax.device_put(kernels, NamedSharding(mesh, P())),
        jax.device_put(x, NamedSharding(mesh, P("data"))),
    )
    compiled = jax.jit(jax.grad(loss_of_three, (0, 1))).lower(*given).compile()
    close(compiled(*given), expected)
    sent = collectives(compiled.as_text())
    assert set(sent) == {"all-reduce"}
    # Of each kernel once, whatever the number of blocks.
    assert sent["all-reduce"].bytes == 4 * (9 + 81 + 81)


def test_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    kernels = [images(n, n, 3, 3, seed=n) / n for n in (1, 3, 3)]
    x = images(32, 4, 4, 3)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    def gradient(kernels, x):
        return jax.grad(lambda kernels: lax.psum(loss_of_three(kernels, x), "data"))(kernels)

    close(jax.jit(gradient)(kernels, x), jax.jit(jax.grad(loss_of_three))(kernels, x))


# --- in the models -------------------------------------------------------------------------------


def network(**options):
    """With all kinds of convolution, the last 3x3 ones larger than their results."""
    return models.ResNet(
        (1, 1), bottleneck=True, num_classes=3, base_channels=4, width=1, **options
    )


def lowered(model, platform):
    """The text of the gradient's program for a platform that need not be there."""
    x = jnp.zeros((4, 16, 16, 3))
    variables = jax.eval_shape(model.init, KEY, x)

    def loss(params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        logits, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return logits.sum(), new

    traced = jax.jit(jax.grad(loss, has_aux=True)).trace(
        variables["params"], variables["batch_stats"], x
    )
    return traced.lower(lowering_platforms=(platform,)).as_text()


def operations(text):
    """How often each operation is there with its options and types, wherever it stands."""
    lines = re.sub(r"%[\w:#]+|@\w+", "", text).splitlines()
    named = [line.strip() for line in lines if re.search(r"(stablehlo|chlo)\.", line)]
    # Of a choice between platforms one branch is left, which holds the operations.
    chosen = re.compile(r"stablehlo\.(case|return|constant dense<[01]> : tensor<i32>)")
    return collections.Counter(line for line in named if not chosen.search(line))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_programs_for_other_platforms_are_the_same(platform):
    fast, plain = (
        operations(lowered(network(fast_cpu_convolutions=flag), platform)) for flag in (True, False)
    )
    assert sum(n for line, n in plain.items() if "stablehlo.convolution" in line) > 20
    assert fast == plain


def test_the_flag():
    def kinds(**options):
        text = lowered(network(**options), "cpu")
        return text.count("stablehlo.convolution"), text.count("stablehlo.while")

    # Nine kernels, and no gradient of the images. The 3x3 one of the last block is larger than its
    # result: no convolution is left of its three. Those of the others' kernels are loops.
    assert kinds(fast_cpu_convolutions=False) == (9 + 8 + 9, 0)
    assert kinds() == (8 + 7, 8)
    with pytest.raises(TypeError, match="fast_cpu_convolutions must be True or False, got 'no'"):
        network(fast_cpu_convolutions="no")


def test_flops_are_those_of_plain_convolutions():
    x = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)

    def count(flag):
        model = network(fast_cpu_convolutions=flag)
        variables = jax.eval_shape(model.init, KEY, x)
        sparse = {"stage2_block0/conv2/kernel": 0.25, "stage1_block0/conv1/kernel": 0.5}
        return sx.flops(
            lambda params, stats, x: model.apply({"params": params, "batch_stats": stats}, x),
            variables["params"], sparse, variables["batch_stats"], x,
        )  # fmt: skip

    assert count(True) == count(False)
