"""Scores for pruning at initialisation: SNIP, GraSP and SynFlow, as pure functions of a loss.

The largest scores are the weights to keep, whichever of the three: ``masks_from_scores`` takes them
as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from sparseopt_jax.trees import boxed_like, is_array, unboxed

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any
Function: TypeAlias = Callable[..., Any]


def snip_scores(loss: Callable[..., Array], params: PyTree, *args: Any) -> PyTree:
    """SNIP's connection sensitivity, ``|w * dL/dw|``; the largest are to be kept.

    That is the magnitude of the loss's derivative by a gate ``c`` of the weight at ``c = 1``, where
    the model computes with ``c * w``. The paper divides by the sum over the network, which changes
    no order.

    Args:
      loss: ``(params, *args) -> scalar``, over all examples that the scores are to see.
      params: pytree of arrays; those that are not floating are passed on and have a score of 0.
      *args: further arguments of ``loss``, such as a batch.

    Returns:
      Scores of the structure, shapes and dtypes of ``params``, at least 0; None in the place of
      leaves that are no arrays of numbers.

    Raises:
      ValueError: ``loss`` returns something else than one floating scalar.

    Source: Lee et al., SNIP (arXiv 1810.02340).

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> def loss(params, x):
      ...     return jnp.sum(params["kernel"] * x)
      >>> x = jnp.array([[1.0, 2.0], [0.0, -3.0]])
      >>> sx.snip_scores(loss, {"kernel": jnp.array([[5.0, -1.0], [9.0, 1.0]])}, x)["kernel"]
      Array([[5., 2.],
             [0., 3.]], dtype=float32)
    """
    weights, value = _of_weights(_scalar("loss", loss), params, args)
    grads = jax.grad(value)(weights)
    return _scores(params, jax.tree.map(lambda w, g: jnp.abs(w * g), weights, grads))


def grasp_scores(loss: Callable[..., Array], params: PyTree, *args: Any) -> PyTree:
    """GraSP's scores, ``w * Hg``; the largest are to be kept.

    ``g`` is the loss's gradient and ``H`` its Hessian. Removing a weight lowers half the gradient's
    squared norm by its score, to first order: what is kept keeps the gradient flow. The paper's
    ``S(-w) = -w * Hg`` has the other sign, and there the largest are removed.

    Args:
      loss: ``(params, *args) -> scalar``, twice differentiable. The paper's loss divides the
        logits by a temperature of 200.
      params: pytree of arrays; those that are not floating are passed on and have a score of 0.
      *args: further arguments of ``loss``, such as a batch.

    Returns:
      Scores of the structure, shapes and dtypes of ``params``, of either sign; None in the place of
      leaves that are no arrays of numbers.

    Raises:
      ValueError: ``loss`` returns something else than one floating scalar.

    Source: Wang et al., GraSP (arXiv 2002.07376).

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> def loss(params):  # g = (2, 3) * w and H = diag(2, 3).
      ...     return jnp.sum(jnp.array([[1.0, 1.5]]) * params["kernel"] ** 2)
      >>> sx.grasp_scores(loss, {"kernel": jnp.array([[1.0, 2.0]])})["kernel"].tolist()
      [[4.0, 36.0]]
    """
    weights, value = _of_weights(_scalar("loss", loss), params, args)
    grad = jax.grad(value)
    products = jax.jvp(grad, (weights,), (grad(weights),))[1]
    return _scores(params, jax.tree.map(jnp.multiply, weights, products))


def synflow_scores(apply: Function, params: PyTree, *args: Any) -> PyTree:
    """SynFlow's scores, ``|w| * dR/d|w|`` with ``R`` the sum of outputs of the net of ``|w|``.

    With inputs of ones, ``R`` is the sum over all paths of the product of the magnitudes on them,
    and a score is the part of ``R`` whose paths lead through the weight. No data are needed.

    The net should be linear where all its weights and inputs are positive, as one of ReLUs is:
    leave other activations out of ``apply``, and give it batch norms that use running statistics.
    ``R`` grows with the depth. Where it leaves the range of float32, a smaller constant input
    scales all scores alike (if biases are 0), or take float64, as the authors do.

    The paper prunes in a hundred rounds, since one alone may empty a layer; after round ``t`` of
    ``n`` a density of ``(1 - sparsity) ** (t / n)`` is left. The example has five.

    Args:
      apply: ``(params, *args) -> outputs``, an array or a tree of arrays, which are summed.
      params: pytree of arrays; those that are not floating are passed on and have a score of 0.
      *args: further arguments of ``apply``; the input is to be ones.

    Returns:
      Scores of the structure, shapes and dtypes of ``params``, at least 0; None in the place of
      leaves that are no arrays of numbers.

    Raises:
      ValueError: ``apply`` returns no floating arrays.

    Source: Tanaka et al., SynFlow (arXiv 2006.05467), algorithm 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> def apply(params, x):
      ...     return jax.nn.relu(x @ params["a"]["kernel"]) @ params["b"]["kernel"]
      >>> key_a, key_b = jax.random.split(jax.random.key(0))
      >>> params = {"a": {"kernel": jax.random.normal(key_a, (4, 8))},
      ...           "b": {"kernel": jax.random.normal(key_b, (8, 2))}}
      >>> kept, rounds = params, 5
      >>> for t in range(1, rounds + 1):
      ...     scores = sx.synflow_scores(apply, kept, jnp.ones((1, 4)))
      ...     masks = sx.masks_from_scores(scores, sx.Global(1 - 0.25 ** (t / rounds)))
      ...     kept = sx.apply_masks(kept, masks)
      >>> int(masks["a"]["kernel"].sum() + masks["b"]["kernel"].sum())
      12
    """
    weights, total = _of_weights(_total(apply), params, args)
    magnitudes = jax.tree.map(jnp.abs, weights)
    grads = jax.grad(total)(magnitudes)
    return _scores(params, jax.tree.map(jnp.multiply, magnitudes, grads))


def _of_weights(
    function: Function, params: PyTree, args: tuple[Any, ...]
) -> tuple[PyTree, Function]:
    """The floating leaves, None for others; and the function of them alone."""
    leaves = unboxed(params)
    weights = jax.tree.map(
        lambda p: p if is_array(p) and jnp.issubdtype(p.dtype, jnp.floating) else None, leaves
    )

    def of_weights(weights: PyTree) -> Array:
        return function(boxed_like(_filled(weights, leaves), params), *args)

    return jax.tree.map(jnp.asarray, weights), of_weights


def _filled(tree: PyTree, others: PyTree) -> PyTree:
    """``tree`` with what ``others`` has wherever it is None."""
    return jax.tree.map(
        lambda own, other: other if own is None else own, tree, others, is_leaf=lambda a: a is None
    )


def _scores(params: PyTree, of_weights: PyTree) -> PyTree:
    """The scores of floating leaves, held as ``params``, with zeros for other arrays."""

    def zeros(leaf: Any) -> Array | None:
        ranked = is_array(leaf) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        return jnp.zeros_like(leaf) if ranked else None

    others = jax.tree.map(zeros, unboxed(params))
    return boxed_like(_filled(of_weights, others), params)


def _scalar(name: str, function: Function) -> Function:
    """The function, which raises unless it returns one floating scalar."""

    def checked(*args: Any) -> Array:
        value = function(*args)
        if getattr(value, "shape", None) == () and jnp.issubdtype(value.dtype, jnp.floating):
            return value
        raise ValueError(
            f"{name} must return one floating scalar, an array of shape (), got {value}"
        )

    return checked


def _total(apply: Function) -> Function:
    """The sum of all outputs."""

    def total(*args: Any) -> Array:
        outputs = apply(*args)
        leaves = jax.tree.leaves(outputs)
        if not leaves or not all(
            is_array(y) and jnp.issubdtype(y.dtype, jnp.floating) for y in leaves
        ):
            raise ValueError(f"apply must return floating arrays, got {outputs}")
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(jnp.float32, *leaves)
        return sum((jnp.sum(y, dtype=dtype) for y in leaves), jnp.zeros((), dtype))

    return total
