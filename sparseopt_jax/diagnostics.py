"""What can be measured while a sparse network trains: gradients, curvature, change of the masks.

All of it is pure and works under ``jax.jit``. Results per layer are dicts by the leaf's path
(``"Dense_0/kernel"``), which a metrics writer can log as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt_jax.axes import AxesByPath, axes_of_stack
from sparseopt_jax.explicit import varying_as
from sparseopt_jax.masks import apply_masks, check_masks, fitting
from sparseopt_jax.preconditioner import neuron_fan_in, scale_by_sparseopt
from sparseopt_jax.prunable import Prunable, default_prunable
from sparseopt_jax.settings import as_int, check_function
from sparseopt_jax.trees import is_masked_node, named_leaves, path_str, unboxed

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


class GradientSkew(NamedTuple):
    """How far the sparsity of its neurons turns and stretches a layer's gradient.

    Attributes:
      angle: float32, in radians, between the raw and the corrected gradient.
      norm_ratio: float32, the raw gradient's norm over the corrected one's.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> skew = sx.gradient_skew({"w": jnp.ones((4, 2))}, {"w": jnp.ones((4, 2), bool)})["w"]
      >>> float(skew.angle), float(skew.norm_ratio)
      (0.0, 1.0)
    """

    angle: Array
    norm_ratio: Array


class MaskChurn(NamedTuple):
    """Share of the active weights that were not active earlier.

    Attributes:
      total: float32 scalar, over all layers together.
      layers: float32 scalar of each layer, by path.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> masks = {"w": jnp.eye(4, dtype=bool)}
      >>> churn = sx.mask_churn(masks, {"w": ~masks["w"]})
      >>> float(churn.layers["w"])
      1.0
    """

    total: Array
    layers: dict[str, Array]


class TopEigenvalue(NamedTuple):
    """The largest eigenvalue of a Hessian, as far as Lanczos has found it.

    Attributes:
      eigenvalue: scalar; float32, or float64 where a parameter is.
      residual: scalar, the norm of H v - eigenvalue * v: some eigenvalue of H lies within this
        distance, up to rounding. Where it is not small, more iterations are needed.
      eigenvector: v, of norm 1, in the structure and shapes of the parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> top = sx.hessian_top_eigenvalue(lambda w: jnp.sum(w**2), jnp.ones(2), jax.random.key(0))
      >>> bool(top.residual < 1e-5)
      True
    """

    eigenvalue: Array
    residual: Array
    eigenvector: PyTree


def gradient_skew(
    grads: PyTree,
    masks: PyTree,
    *,
    out_axes: AxesByPath | None = None,
    batch_axes: AxesByPath = (),
    average_over: str | None = "layer",
    layers: Callable[[str], bool] | None = None,
) -> dict[str, GradientSkew]:
    """Angle and norm ratio between each layer's gradient and the one SparseOpt makes of it.

    With ``average_over="layer"`` the angle is what differences of fan-in within the layer cause,
    and the ratio is near 1. With None the ratio is the layer's amplification, 1/sqrt(1 - s) where
    all neurons have the sparsity s. The angle does not depend on ``average_over``.

    Args:
      grads: gradients of the weights; those of inactive weights are left out of account.
      masks: bool arrays of the same paths and shapes, held in any way.
      out_axes: see ``scale_by_sparseopt``.
      batch_axes: see ``scale_by_sparseopt``.
      average_over: see ``scale_by_sparseopt``.
      layers: see ``scale_by_sparseopt``.

    Returns:
      By path, for the leaves that ``scale_by_sparseopt`` corrects: float32 scalars, or for a stack
      arrays of the shape of its batch axes, a value for each layer. The angle lies in [0, pi/2) and
      is exact to about 1e-7 also where it is small; the correction is computed in float32 whatever
      the gradient's dtype. A gradient of zeros has angle 0 and ratio 1, one that is not finite NaN.

    Raises:
      TypeError, ValueError: as ``scale_by_sparseopt``, and for masks that do not fit.

    Source: SparseOpt (arXiv 2605.27541), which calls this rotation the skew of the gradient.

    Example:
      Fan-in 4 and 1 of 4 with equal gradients: factors 1 and 1/2, so from (1, 1) towards (1, 1/2).

      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> mask = jnp.array([[True, True], [True, False], [True, False], [True, False]])
      >>> grads = {"kernel": jnp.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])}
      >>> skew = sx.gradient_skew(grads, {"kernel": mask}, average_over=None)["kernel"]
      >>> print(f"{skew.angle:.4f} {skew.norm_ratio:.4f}")
      0.3218 1.2649
    """
    tx = scale_by_sparseopt(average_over, out_axes, layers, batch_axes=batch_axes)
    grads = unboxed(grads)
    counts = neuron_fan_in(masks, grads, out_axes, batch_axes, None, layers)
    masks = fitting(masks, grads)
    # By path, the axes that lie within one layer: all of them but a stack's batch axes.
    within = {}
    for path, count in named_leaves(counts).items():
        batch = axes_of_stack(path, count.ndim, batch_axes)
        within[path] = tuple(axis for axis in range(count.ndim) if axis not in batch)

    def to_unit_size(path: tuple[Any, ...], count: Any, gradient: Any, mask: Any) -> Any:
        if is_masked_node(count):
            return gradient
        # Angle and ratio do not depend on the size, and squares neither overflow nor vanish.
        gradient = jnp.where(mask, gradient, jnp.zeros_like(gradient)).astype(jnp.float32)
        over = within[path_str(path)]
        largest = jnp.max(jnp.abs(gradient), axis=over, keepdims=True, initial=0.0)
        return gradient / jnp.where(largest == 0, 1.0, largest)

    raw = jax.tree_util.tree_map_with_path(
        to_unit_size, counts, grads, masks, is_leaf=is_masked_node
    )
    corrected, _ = tx.update(raw, tx.init(raw), masks=masks, fan_in=counts)
    raw, corrected = named_leaves(raw), named_leaves(corrected)
    return {path: _skew(raw[path], corrected[path], over) for path, over in within.items()}


def mask_churn(
    masks: PyTree, earlier: PyTree, *, prunable: Prunable = default_prunable
) -> MaskChurn:
    """Share of the active weights that were not active earlier, of each layer and of all.

    Args:
      masks: bool arrays, as ``get_masks`` gives them.
      earlier: the masks of an earlier step, of the same leaves and shapes.
      prunable: ``(path, leaf) -> bool``, which leaves count: those that may be sparse. Dense layers
        among them count in the total as well.

    Returns:
      A ``MaskChurn``: float32 shares in [0, 1]; 0 for a layer without active weights.

    Raises:
      TypeError: a mask is not bool, or ``prunable`` is not callable.
      ValueError: leaves or shapes differ, or ``prunable`` chooses none.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> earlier = {"kernel": jnp.array([[True, True], [False, False]])}
      >>> masks = {"kernel": jnp.array([[True, False], [True, False]])}
      >>> float(sx.mask_churn(masks, earlier).total)
      0.5
    """
    check_function("prunable", prunable, "path", "leaf")
    now, then = _bool_leaves(masks, "masks"), _bool_leaves(earlier, "earlier")
    if now.keys() != then.keys():
        only = sorted(now.keys() ^ then.keys())
        raise ValueError(f"earlier must have the leaves of masks; only one has {', '.join(only)}")
    active, moved = {}, {}
    for path, mask in now.items():
        if mask.shape != then[path].shape:
            raise ValueError(
                f"earlier leaf {path!r} has shape {then[path].shape}, but masks has {mask.shape}"
            )
        if prunable(path, mask):
            active[path] = jnp.sum(mask, dtype=jnp.int32).astype(jnp.float32)
            moved[path] = jnp.sum(mask & ~then[path], dtype=jnp.int32).astype(jnp.float32)
    if not active:
        raise ValueError(f"prunable chooses no leaf of masks, which has {', '.join(now) or 'none'}")

    def share(part: Array, whole: Array) -> Array:
        return part / jnp.maximum(whole, 1.0)

    # In float32, because the counts of all layers together may not fit int32.
    total = share(sum(moved.values(), jnp.float32(0)), sum(active.values(), jnp.float32(0)))
    return MaskChurn(total, {path: share(moved[path], active[path]) for path in active})


def gradient_norm(grads: PyTree, masks: PyTree | None = None) -> Array:
    """Global L2 norm of a gradient over the active weights.

    Args:
      grads: pytree of floating arrays.
      masks: bool arrays of the same paths and shapes, held in any way, or None for all weights.

    Returns:
      float32 scalar, added up in float32 whatever the dtype of ``grads``. A value that is not
      finite counts only where the weight is active.

    Raises:
      TypeError: a mask is not bool.
      ValueError: structure or shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> grads, masks = jnp.array([3.0, 4.0, 12.0]), jnp.array([True, True, False])
      >>> float(sx.gradient_norm(grads, masks)), float(sx.gradient_norm(grads))
      (5.0, 13.0)
    """
    if masks is not None:
        grads = apply_masks(grads, masks)
    squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def hessian_top_eigenvalue(
    loss: Callable[[PyTree], Array],
    params: PyTree,
    key: Array,
    *,
    masks: PyTree | None = None,
    iterations: int = 30,
) -> TopEigenvalue:
    """The algebraically largest eigenvalue of a loss's Hessian (its sharpness), by Lanczos.

    The largest, not the largest in magnitude: full-batch gradient descent is stable while it stays
    below 2 / learning_rate. The smallest is minus the result for ``lambda p: -loss(p)``.

    Each iteration takes one product of the Hessian with a vector, the derivative of the gradient
    along it, and is orthogonalised against all earlier ones. The memory is that of ``iterations``
    copies of the parameters. For several calls, ``jax.jit`` a function of params, batch and key
    around it; without it every call compiles anew.

    Args:
      loss: function of the parameters alone to a floating scalar; it fixes the batch itself. It is
        given float32 weights where ``params`` has bfloat16 or float16, so that only what it does
        itself is of lower precision.
      params: pytree of floating arrays, where the Hessian is taken; of an Equinox model the arrays
        alone, ``eqx.filter(model, eqx.is_inexact_array)``.
      key: a JAX random key for the first vector.
      masks: bool arrays of the paths and shapes of ``params``. The Hessian is then that of the
        active weights alone, rows and columns of all others left out; set ``params`` to zero there
        first (``apply_masks``) to have the sparse network's.
      iterations: how many products, at least 1. It ends by itself once the vectors span all that
        the first one reaches, at the latest when there are as many as active weights.

    Returns:
      A ``TopEigenvalue``. NaN where derivatives are not finite; 0 where no weight is active.

    Raises:
      TypeError: a parameter is not floating, ``iterations`` no int, or a mask not bool.
      ValueError: ``params`` is empty, ``iterations`` below 1, ``loss`` returns no scalar, or masks
        do not fit.

    Source: Lanczos (1950), with reorthogonalisation done twice (Parlett, The Symmetric Eigenvalue
    Problem, 1980, chapters 6 and 13); sharpness: Cohen et al. (arXiv 2103.00065), section 2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> def loss(w):
      ...     return 0.5 * jnp.sum(jnp.array([1.0, 3.0, -7.0]) * w**2)
      >>> top = sx.hessian_top_eigenvalue(loss, jnp.ones(3), jax.random.key(0))
      >>> print(f"{top.eigenvalue:.4f}")
      3.0000
      >>> mask = jnp.array([True, False, True])
      >>> top = sx.hessian_top_eigenvalue(loss, jnp.ones(3), jax.random.key(0), masks=mask)
      >>> print(f"{top.eigenvalue:.4f}")
      1.0000
    """
    iterations = as_int("iterations", iterations, at_least=1)
    dtype = _checked_dtype(params)
    if masks is None:
        masks = jax.tree.map(lambda p: jnp.ones_like(p, jnp.bool_), params)
    check_masks(masks, params)
    params = jax.tree.map(lambda p: jnp.asarray(p).astype(dtype), params)

    def active(vector: PyTree) -> PyTree:
        return apply_masks(vector, masks)

    def scalar_loss(params: PyTree) -> Array:
        value = loss(params)
        dtype = getattr(value, "dtype", jnp.int32)
        if jnp.issubdtype(dtype, jnp.floating) and value.shape == ():
            return value
        raise ValueError(f"loss must return one floating scalar, an array of shape (), got {value}")

    def product(vector: PyTree) -> PyTree:
        return active(jax.jvp(jax.grad(scalar_loss), (params,), (vector,))[1])

    return _lanczos(product, active(_normal_like(key, params)), iterations)


def _lanczos(product: Callable[[PyTree], PyTree], start: PyTree, iterations: int) -> TopEigenvalue:
    """Lanczos for the largest eigenvalue of a symmetric ``product``; vectors are pytrees."""

    def step(
        carry: tuple[PyTree, PyTree, Array, Array], i: Array
    ) -> tuple[tuple[PyTree, PyTree, Array, Array], tuple[Array, Array, Array]]:
        basis, vector, size, done = carry
        basis = jax.tree.map(
            lambda b, v: jax.lax.dynamic_update_index_in_dim(b, v, i, axis=0), basis, vector
        )
        image = product(vector)
        alpha = _dot(vector, image)
        # Once leaves components of the size of the rounding of what it takes away; twice does not.
        for _ in range(2):
            parts = _dots(basis, image)
            image = jax.tree.map(jnp.subtract, image, _combine(basis, parts))
        beta = jnp.sqrt(_dot(image, image))
        size = jnp.maximum(size, jnp.abs(alpha) + beta)
        # Only rounding is left: the vectors span all that the first one reaches, at the latest when
        # there are as many as active weights.
        ended = done | (beta <= 10 * epsilon * size)
        vector = _scaled(image, jnp.where(ended, 0.0, 1.0 / jnp.where(ended, 1.0, beta)))
        return (basis, vector, size, ended), (alpha, beta, done)

    norm = jnp.sqrt(_dot(start, start))
    epsilon = float(np.finfo(norm.dtype).eps)
    vector = _scaled(start, 1.0 / jnp.where(norm == 0, 1.0, norm))
    basis = jax.tree.map(lambda v: jax.lax.broadcast(jnp.zeros_like(v), (iterations,)), vector)
    # What a product returns may differ between devices inside shard_map where the vector does not.
    carry = varying_as(
        (basis, vector, jnp.zeros_like(norm), jnp.bool_(False)),
        vector,
        jax.make_jaxpr(product)(vector).out_avals,
    )
    (basis, _, size, _), (alphas, betas, unused) = jax.lax.scan(
        step, carry, jnp.arange(iterations, dtype=jnp.int32)
    )
    # Steps after the end get a diagonal below all eigenvalues (within 2 * size by Gershgorin's
    # discs) and no coupling, so that none of them is taken for the largest.
    alphas = jnp.where(unused, -3 * jnp.where(size == 0, 1.0, size), alphas)
    coupling = jnp.diag(jnp.where(unused[1:], 0.0, betas[:-1]), 1)
    tridiagonal = jnp.diag(alphas) + coupling + coupling.T
    finite = jnp.isfinite(tridiagonal).all()
    values, vectors = jnp.linalg.eigh(jnp.where(finite, tridiagonal, 0.0))
    value, weights = (jnp.where(finite, x, jnp.nan) for x in (values[-1], vectors[:, -1]))
    last = jnp.sum(~unused, dtype=jnp.int32) - 1
    return TopEigenvalue(value, jnp.abs(betas[last] * weights[last]), _combine(basis, weights))


def _dot(a: PyTree, b: PyTree) -> Array:
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return functools.reduce(jnp.add, jax.tree.leaves(products))


# Sums of products rather than matrix products: an accelerator rounds the factors of the latter.
def _dots(basis: PyTree, vector: PyTree) -> Array:
    """The scalar products of all vectors of a basis, along its leaves' first axis, with another."""
    products = jax.tree.map(
        lambda b, v: jnp.sum(b * v[None], axis=tuple(range(1, b.ndim))), basis, vector
    )
    return functools.reduce(jnp.add, jax.tree.leaves(products))


def _combine(basis: PyTree, weights: Array) -> PyTree:
    return jax.tree.map(
        lambda b: jnp.sum(b * weights.reshape(-1, *[1] * (b.ndim - 1)), axis=0), basis
    )


def _scaled(vector: PyTree, factor: Array) -> PyTree:
    return jax.tree.map(lambda v: v * factor, vector)


def _normal_like(key: Array, params: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    # Added to zeros, so that in Explicit mesh mode it has the sharding of params.
    normal = [
        jnp.zeros_like(p) + jax.random.normal(k, p.shape, p.dtype)
        for k, p in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, normal)


def _checked_dtype(params: PyTree) -> Any:
    """float64 where a parameter has it, else float32; raises unless all of them are floating."""
    leaves = named_leaves(params)
    if not leaves:
        raise ValueError("params must have at least one leaf, got none")
    for path, leaf in leaves.items():
        dtype = getattr(leaf, "dtype", type(leaf))
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"params leaf {path!r} must be floating, got {dtype}: leave it out of params "
                "and close over it in loss"
            )
    return jnp.float64 if any(p.dtype == jnp.float64 for p in leaves.values()) else jnp.float32


def _skew(raw: Array, corrected: Array, over: tuple[int, ...]) -> GradientSkew:
    def dot(a: Array, b: Array) -> Array:
        return jnp.sum(a * b, axis=over, keepdims=True)

    square, product = dot(raw, raw), dot(raw, corrected)
    nonzero = jnp.where(square == 0, 1.0, square)
    # By the part of the corrected gradient that is orthogonal to the raw one: the cosine could not
    # tell angles below 3e-4 from 0. Where the correction is the identity the part is exactly 0; the
    # second projection takes away what the rounding of the first one's sums left.
    rest = corrected - product / nonzero * raw
    rest -= dot(raw, rest) / nonzero * raw
    angle = jnp.arctan2(jnp.sqrt(dot(rest, rest)), product / jnp.sqrt(nonzero))
    corrected_square = dot(corrected, corrected)
    ratio = jnp.sqrt(square / jnp.where(corrected_square == 0, 1.0, corrected_square))
    ratio = jnp.where((square == 0) & (corrected_square == 0), 1.0, ratio)
    return GradientSkew(jnp.squeeze(angle, over), jnp.squeeze(ratio, over))


def _bool_leaves(tree: PyTree, name: str) -> dict[str, Array]:
    leaves = named_leaves(tree)
    for path, leaf in leaves.items():
        dtype = getattr(leaf, "dtype", type(leaf).__name__)
        if dtype != jnp.bool_:
            raise TypeError(f"{name} leaf {path!r} must be a bool array, got {dtype}")
    return leaves
