"""FLOPs of loops, branches and stacked layers, worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sparseopt_jax.flops import flops
from sparseopt_jax.model_flops import LayerFLOPs
from tests.test_flops import array, check, mask


def test_scan_over_stacked_layers():
    """Three layers of different densities: together those of the layers one by one."""
    active = (5, 16, 40)
    stack = np.stack([mask((8, 8), n) for n in active])

    def scanned(params, x):
        return lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, params["w"])

    count = flops(scanned, {"w": array(3, 8, 8)}, {"w": stack}, array(4, 8))
    assert count.layers == {"w": LayerFLOPs(dense=3 * 2 * 4 * 64, sparse=2 * 4 * sum(active))}
    assert count.other == 3 * 4 * 8


def repeated(body, x, times):
    return lax.scan(lambda h, _: (body(h), None), x, None, length=times)[0]


def counted(w, x):
    n = lax.while_loop(lambda i: i < 9, lambda i: i + 2, jnp.int32(x.shape[0]))
    return x @ w[0], n


def iterated(w, x):
    for layer in w:
        x = jnp.tanh(x @ layer)
    return x


by_scalar = (np.ones(3, np.float32), np.arange(3))


@pytest.mark.parametrize(
    ("function", "products", "other"),
    [
        (lambda w, x: x @ w[0] @ w[0], 2, 0),
        (lambda w, x: lax.fori_loop(0, 3, lambda i, h: h @ w[i], x), 3, 0),
        (lambda w, x: repeated(lambda h: repeated(lambda h: h @ w[0], h, 3), x, 5), 15, 0),
        # Kernels that a scan prepares one by one, 3 of 8 x 8.
        (lambda w, x: x @ lax.scan(lambda _, k: (None, -k), None, w)[1], 3, 3 * 64),
        # A while loop of integers is free.
        (counted, 1, 0),
        (iterated, 3, 3 * 32),
        # Scans with constants and slices alone, with a carry alone, with one slice, with none.
        (lambda w, x: lax.map(lambda row: row @ w[0], x), 1, 0),
        (lambda w, x: lax.scan(lambda c, _: ((c[0] @ c[1], c[1]), None), (x, w[0]), None, 2), 2, 0),
        (lambda w, x: lax.scan(lambda h, k: (h @ k, h + h), x, w[:1]), 1, 32),
        (lambda w, x: (x @ w[0], lax.scan(lambda h, k: (h @ k, h + h), x, w[:0])), 1, 0),
        # One that carries a constant along, one whose slices are scalars.
        (lambda w, x: lax.scan(lambda h, k: (h @ k, w[0]), x, w), 3, 0),
        (lambda w, x: lax.scan(lambda h, s: (s[0] * (h @ w[0]), None), x, by_scalar), 3, 3 * 32),
        (lambda w, x: lax.scan(jax.checkpoint(lambda h, k: (h @ k, h + h)), x, w), 3, 3 * 32),
        (lambda w, x: lax.scan(lambda h, k: (h @ k, h + h), x, w, reverse=True), 3, 3 * 32),
    ],
    ids=range(14),
)
def test_products_with_layers_of_a_stack(function, products, other):
    """Each of 2 * 4 * 8 * 8."""
    dense = {"w": products * 512}
    check(lambda p, x: function(p["w"], x), {"w": (3, 8, 8)}, (4, 8), dense, other=other)


@pytest.mark.parametrize("densities", [{"w": 0.25}, {}])
def test_recurrent_network(densities):
    """The state starts as a parameter, larger than the kernel, and becomes an activation."""

    def recurrent(params, xs):
        def step(carry, x):
            h, w = carry
            return (jnp.tanh(h @ w + x), w), None

        return lax.scan(step, (params["h"], params["w"]), xs)[0][0]

    dense, other = {"w": 5 * 2 * 20 * 64}, 5 * 2 * (20 * 8)
    check(recurrent, {"h": (20, 8), "w": (8, 8)}, (5, 20, 8), dense, densities, other)


def test_cond_costs_its_dearest_branch():
    def either(p, x):
        return lax.cond(x[0, 0] > 0, lambda x: x @ p["a"], lambda x: x @ p["b"] @ p["a"], x)

    shapes = {"a": (8, 6), "b": (8, 8)}
    check(either, shapes, (4, 8), {"a": 384, "b": 512}, {"a": 0.5, "b": 0.5})
