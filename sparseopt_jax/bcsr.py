"""Kernels of dense layers as ``jax.experimental.sparse.BCSR``, for inference on CPUs."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt_jax.axes import AxesByPath, kernel_axes
from sparseopt_jax.layout import out_axes_of
from sparseopt_jax.masks import fitting
from sparseopt_jax.trees import boxed_like, is_absent, path_str, unboxed

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any

# jaxlib's product takes as many examples at a time, and those that are left one by one, each of
# which then costs as much as a group.
_GROUP = 8


def to_bcsr(params: PyTree, masks: PyTree, *, out_axes: AxesByPath | None = None) -> PyTree:
    """The sparse kernels of dense layers in compressed rows, one for each neuron.

    A product then costs time for active weights alone, where ``bcsr_matmul`` or ``@`` reads the
    kernel. On CPUs jaxlib has a program of its own for it, in float32 and float64. What it saves
    depends on the machine, whose dense product it competes with: on two cores with AVX-512, layers
    of 1024 and 2048 inputs and outputs and batches of 8 to 32, the dense product took 3.2 to 6.4
    times as long at a sparsity of 0.99, 1.0 to 2.1 times at 0.95, and 0.4 to 1.2 at 0.9; for a
    single example 3.4 to 3.9, 0.6 to 0.7 and 0.3 to 0.4. ``python -m experiments.benchmarks.bcsr``
    prints that table for the machine at hand. There is nothing to gain on other devices, nor from
    convolutions, which stay as they are.

    Args:
      params: pytree of arrays.
      masks: concrete bool arrays of the same paths and shapes; None for leaves that stay dense.
      out_axes: which of a kernel's two axes is that of the neurons, see ``scale_by_sparseopt``.

    Returns:
      ``params`` with a ``BCSR`` of shape (out, in) in the place of each leaf of two dimensions
      whose mask is not True everywhere; it holds the active weights, zeros included, with int32
      indices. All other leaves are those that were given.

    Raises:
      TypeError: a mask is not bool, or traced.
      ValueError: structure or shapes differ, or the axes do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> params = {"kernel": jnp.arange(12.0).reshape(4, 3), "bias": jnp.zeros(3)}
      >>> masks = {"kernel": jnp.eye(4, 3, dtype=bool), "bias": None}
      >>> sparse = sx.to_bcsr(params, masks)
      >>> sparse["kernel"].shape, sparse["kernel"].data.tolist()
      ((3, 4), [0.0, 4.0, 8.0])
      >>> sx.bcsr_matmul(jnp.ones((1, 4)), sparse["kernel"]).tolist()
      [[0.0, 4.0, 8.0]]
    """
    # It takes a quarter of a second to import, which other users would pay for.
    from jax.experimental.sparse import BCSR

    weights = unboxed(params)
    given = fitting(masks, weights)
    axes = out_axes_of(weights, out_axes, concerns=lambda path, leaf: leaf.ndim == 2)

    def convert(keys: tuple[Any, ...], leaf: Any, mask: Any) -> Any:
        if is_absent(mask) or np.ndim(leaf) != 2:
            return leaf
        path = path_str(keys)
        if isinstance(mask, jax.core.Tracer):
            raise TypeError(
                f"masks leaf {path!r} is traced: to_bcsr reads the masks' values, so call it "
                "outside of jax.jit and other transformations"
            )
        active, weight = np.asarray(mask), jnp.asarray(leaf)
        if active.all():
            return leaf
        if kernel_axes(path, 2, axes).out == (1,):
            active, weight = active.T, weight.T
        rows, columns = np.nonzero(active)
        starts = np.searchsorted(rows, np.arange(active.shape[0] + 1))
        data = weight[rows, columns]
        indices, indptr = (jnp.asarray(part, jnp.int32) for part in (columns, starts))
        return BCSR((data, indices, indptr), shape=active.shape)

    return boxed_like(jax.tree_util.tree_map_with_path(convert, weights, given), params)


def bcsr_matmul(x: Array, kernel: Any) -> Array:
    """``x @ kernel`` where the kernel (in, out) may be one of ``to_bcsr``'s.

    Of kernels that are (out, in) in the dense model, as in Equinox, ``kernel @ x`` goes on as it
    did for a vector x.

    Args:
      x: array of shape (..., in).
      kernel: ``BCSR`` of shape (out, in), or a dense array of shape (in, out), which is multiplied
        as usual, so that a model can read both.

    Returns:
      Array of shape (..., out).

    Raises:
      ValueError: the number of inputs differs.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> kernel, x = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]), jnp.ones((5, 3))
      >>> sparse = sx.to_bcsr(kernel, kernel != 0)
      >>> jax.jit(sx.bcsr_matmul)(x, sparse)[0].tolist(), (x @ kernel)[0].tolist()
      ([4.0, 2.0], [4.0, 2.0])
    """
    from jax.experimental.sparse import BCSR

    if not isinstance(kernel, BCSR):
        product: Array = x @ kernel
        return product
    neurons, inputs = kernel.shape
    if x.ndim == 0 or x.shape[-1] != inputs:
        raise ValueError(
            f"x must have shape (..., {inputs}) for a kernel of {inputs} inputs, got {x.shape}"
        )
    examples = x.reshape(-1, inputs)
    padded = jnp.pad(examples, ((0, -len(examples) % _GROUP), (0, 0)))
    outputs = (kernel @ padded.T).T
    return outputs[: len(examples)].reshape(*x.shape[:-1], neurons)
