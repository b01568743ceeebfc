"""Kernels in compressed rows: the same products, by the active weights alone."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.sparse import BCSR

import sparseopt_jax as sx


def layer(inputs=12, outputs=7, seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.random((inputs, outputs)) < 0.3
    mask[:, 2] = False  # a neuron without inputs
    return np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32), mask


@pytest.mark.parametrize("shape", [(), (0,), (1,), (8,), (13,), (2, 3), (2, 0)])
def test_products_are_those_of_the_dense_kernel(shape):
    kernel, mask = layer()
    x = np.random.default_rng(1).normal(size=(*shape, 12)).astype(np.float32)
    sparse = sx.to_bcsr({"kernel": kernel}, {"kernel": mask})["kernel"]
    found = jax.jit(sx.bcsr_matmul)(x, sparse)
    expected = np.einsum("...i,io->...o", x.astype(np.float64), kernel)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sx.bcsr_matmul(jnp.asarray(x), kernel), expected, 1e-5, 1e-6)


def test_rows_are_neurons_and_hold_the_active_weights():
    """By hand; an active weight that is 0 is held too."""
    kernel = jnp.array([[1.0, 0, 0], [2, 3, 0], [0, 4, 0]])
    mask = jnp.array([[True, False, False], [True, True, False], [True, True, False]])
    sparse = sx.to_bcsr(kernel, mask)
    assert isinstance(sparse, BCSR)
    assert sparse.shape == (3, 3)
    assert sparse.data.tolist() == [1, 2, 0, 3, 4]
    assert sparse.indices.tolist() == [0, 1, 2, 1, 2]
    assert sparse.indptr.tolist() == [0, 3, 5, 5]
    assert sparse.indices.dtype == sparse.indptr.dtype == jnp.int32


def test_the_product_costs_no_dense_one():
    kernel, mask = layer()
    sparse = sx.to_bcsr(kernel, mask)
    text = jax.jit(sx.bcsr_matmul).lower(jnp.ones((8, 12)), sparse).compile().as_text()
    assert "custom_call_target" in text
    assert " dot(" not in text


def test_only_sparse_kernels_of_dense_layers_change():
    kernel, mask = layer()
    params = {
        "a": {"kernel": kernel, "bias": np.ones(7, np.float32)},
        "dense": {"kernel": np.ones((7, 3), np.float32)},
        "conv": {"kernel": np.zeros((3, 3, 2, 4), np.float32)},
        "unmasked": {"kernel": np.ones((2, 2), np.float32)},
    }
    masks = {
        "a": {"kernel": mask, "bias": np.ones(7, bool)},
        "dense": {"kernel": np.ones((7, 3), bool)},
        "conv": {"kernel": np.zeros((3, 3, 2, 4), bool)},
        "unmasked": None,
    }
    sparse = sx.to_bcsr(params, masks)
    assert sparse["a"]["kernel"].shape == (7, 12)
    for path in ("dense", "conv", "unmasked"):
        assert sparse[path]["kernel"] is params[path]["kernel"]
    assert sparse["a"]["bias"] is params["a"]["bias"]


def test_modules_hold_compressed_kernels():
    linear = eqx.nn.Linear(12, 7, key=jax.random.key(0))
    mask = np.random.default_rng(0).random((7, 12)) < 0.3
    masks = eqx.tree_at(lambda m: (m.weight, m.bias), linear, (mask, None))
    linear = sx.apply_masks(linear, masks)
    x = jnp.arange(12.0)
    np.testing.assert_allclose(
        sx.to_bcsr(linear, masks)(x), linear(x), rtol=1e-5, atol=1e-5
    )  # Equinox's own weight @ x

    state = nnx.state(nnx.Linear(12, 7, rngs=nnx.Rngs(0)), nnx.Param)
    masks = jax.tree.map(lambda leaf: leaf < 0.1, state)
    sparse = sx.to_bcsr(sx.apply_masks(state, masks), masks)
    assert sparse["kernel"][...].shape == (7, 12)


def test_bad_arguments():
    kernel, mask = layer()
    with pytest.raises(TypeError, match="call it outside"):
        jax.jit(lambda m: sx.to_bcsr(kernel, m))(mask)
    with pytest.raises(TypeError, match="bool"):
        sx.to_bcsr(kernel, kernel)
    with pytest.raises(ValueError, match="tree structure"):
        sx.to_bcsr({"kernel": kernel}, {"weight": mask})
    with pytest.raises(ValueError, match=r"\(..., 12\) for a kernel of 12 inputs, got \(3, 7\)"):
        sx.bcsr_matmul(jnp.ones((3, 7)), sx.to_bcsr(kernel, mask))
