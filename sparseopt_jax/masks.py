"""Mask pytrees: which weights of a model are active.

A mask tree has the structure of the parameters, and every leaf is a bool array of its parameter's
shape. Leaves that are never sparse (biases, norm scales, embeddings) are True everywhere, so that
``jax.tree.map(f, params, masks)`` works on all of them alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt_jax.axes import (
    Axes,
    AxesByPath,
    axes_of_stack,
    kernel_axes,
    layer_shape,
    layers_of,
    window_in_out,
)
from sparseopt_jax.explicit import in_auto_mode
from sparseopt_jax.layout import out_axes_of
from sparseopt_jax.prunable import Prunable, default_prunable
from sparseopt_jax.selection import checked_size, is_selectable
from sparseopt_jax.settings import check_function
from sparseopt_jax.trees import (
    aligned,
    boxed_like,
    is_absent,
    listed,
    named_leaves,
    path_str,
    unboxed,
)

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


class Distribution(Protocol):
    """How many weights each layer keeps; see ``Uniform``, ``ER``, ``ERK`` and ``PerLayer``.

    Anything with this method is one. ``Global`` has a second, ``counts_from_scores``, which
    ``masks_from_scores`` calls in its place, with the layers' scores by path.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> class OnePerNeuron:
      ...     def layer_counts(self, layers):
      ...         return {path: shape[-1] for path, shape in layers.items()}
      >>> tx = sx.sparse_training(
      ...     optax.sgd(0.1), distribution=OnePerNeuron(), topology=sx.Static())
      >>> int(sx.get_masks(tx.init({"kernel": jnp.ones((8, 4))}))["kernel"].sum())
      4
    """

    def layer_counts(self, layers: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Number of weights that each layer keeps, from the layers' shapes by path.

        Shapes are in Flax's order, (window, in, out), whatever that of the parameters.
        """
        ...


class Layers(NamedTuple):
    """The layers that one maskable leaf holds: itself, or those that it stacks.

    Attributes:
      shape: of a single layer.
      names: the leaf's path, or for a stack ``path/0``, ``path/1`` and so on.
      batch: the leaf's axes that index the layers of a stack.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    batch: tuple[int, ...]


def maskable_layers(
    params: PyTree, prunable: Prunable, batch_axes: AxesByPath = (), argument: str = "params"
) -> dict[str, Layers]:
    """The leaves, by path, that ``prunable`` chooses, unless they stack something smaller.

    A leaf whose layers have fewer than two dimensions stacks biases or scales, no kernels. A leaf
    without elements has no weights to choose from.

    Raises:
      TypeError: ``prunable`` is no function of path and leaf, or chooses a leaf that is not
        floating; or a leaf is neither an array nor a number.
      ValueError: it chooses none, or a leaf too large to count in int32.
    """
    check_function("prunable", prunable, "path", "leaf")
    leaves = named_leaves(params)
    layers = {}
    for path, leaf in leaves.items():
        if isinstance(leaf, bool | int | float | complex):
            continue
        if not hasattr(leaf, "ndim"):
            raise TypeError(
                f"{argument} leaf {path!r} is a {type(leaf).__name__}, not an array. Leave such "
                f"leaves out of {argument}, in Equinox by eqx.filter(model, eqx.is_inexact_array)"
            )
        if not prunable(path, leaf):
            continue
        batch = axes_of_stack(path, leaf.ndim, batch_axes)
        if leaf.size == 0 or (batch and leaf.ndim - len(batch) < 2):
            continue
        if not is_selectable(leaf.dtype):
            raise TypeError(
                f"{argument} leaf {path!r} has dtype {leaf.dtype}; only float16, bfloat16, float32 "
                "and float64 arrays can be sparse. Convert it, or leave it out with prunable"
            )
        checked_size(leaf.shape)
        n = layers_of(leaf.shape, batch)
        names = tuple(f"{path}/{i}" for i in range(n)) if batch else (path,)
        layers[path] = Layers(layer_shape(leaf.shape, batch), names, batch)
    if not layers:
        raise ValueError(
            f"prunable chooses no leaf of {argument}, so there is nothing to make sparse. The "
            "default takes leaves of two and more dimensions that are no embedding, norm, bias or "
            "scale; "
            f"{argument} has {listed(f'{path} {np.shape(leaf)}' for path, leaf in leaves.items())}"
        )
    return layers


def counts_given(masks: PyTree, batch_axes: AxesByPath) -> dict[str, np.ndarray]:
    """How many weights masks have in each layer of a leaf, int (layers,), by path.

    Leaves that cannot be read are left out: traced ones, those that are partly elsewhere, and those
    of which ``init`` will say what is wrong.
    """
    found = {}
    for path, mask in named_leaves(masks).items():
        if isinstance(mask, jax.core.Tracer) or getattr(mask, "dtype", None) != np.bool_:
            continue
        if not getattr(mask, "is_fully_addressable", True):
            continue
        with contextlib.suppress(ValueError):  # Of a leaf that is no kernel.
            batch = axes_of_stack(path, mask.ndim, batch_axes)
            layers = np.moveaxis(np.asarray(mask), batch, range(len(batch)))
            found[path] = layers.reshape(layers_of(mask.shape, batch), -1).sum(axis=1)
    return found


def shapes_by_name(
    params: PyTree,
    layers: Mapping[str, Layers],
    out_axes: AxesByPath | None,
    batch_axes: AxesByPath,
) -> dict[str, tuple[int, ...]]:
    """The shapes by name that a distribution sees, in Flax's order: window, inputs, neurons."""
    axes = out_axes_of(
        params, out_axes, batch_axes, concerns=lambda path, p: path in layers and p.ndim > 2
    )
    shapes = {}
    for path, leaf in named_leaves(params).items():
        if path in layers:
            shape = window_in_out(leaf.shape, kernel_axes(path, leaf.ndim, axes, batch_axes))
            shapes.update(dict.fromkeys(layers[path].names, shape))
    return shapes


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Set the weights that are not active to exactly zero.

    Args:
      params: pytree of arrays, or a whole Equinox model.
      masks: bool arrays of the same paths and shapes, held in any way; None for leaves that stay
        as they are.

    Returns:
      ``params`` with zeros where the masks are False; also where a weight was NaN or infinite.

    Raises:
      TypeError: a mask is not bool.
      ValueError: structure or shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> params, masks = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])}
      >>> sx.apply_masks(params, masks)["w"].tolist()
      [1.0, 0.0]
    """
    weights = unboxed(params)

    def zeroed(weight: Array, mask: Array) -> Array:
        return jnp.where(mask, weight, jnp.zeros_like(weight))

    def apply(weight: Any, mask: Any) -> Any:
        # Masks that get_masks makes of leaves that are never sparse know nothing of a mesh.
        return weight if is_absent(mask) else in_auto_mode(zeroed, like=weight)(weight, mask)

    return boxed_like(jax.tree.map(apply, weights, fitting(masks, weights)), params)


def fan_in(mask: Array, out_axes: Axes = -1, batch_axes: Axes = ()) -> Array:
    """Number of active incoming weights of each neuron (output unit).

    Args:
      mask: bool array, a layer's mask.
      out_axes: the axis or axes that index neurons, as in
        ``jax.nn.initializers.variance_scaling``; all that are in neither ``out_axes`` nor
        ``batch_axes`` are incoming. See the table below.
      batch_axes: the axis or axes that index the layers of a stacked kernel.

    Returns:
      int32 array of the shape of the out and batch axes, in the order in which the mask has them.

    Raises:
      TypeError: the mask is not bool, or an axis no int.
      ValueError: the axes do not fit the mask's rank.

    =================  ==========  =============================================================
    out_axes           batch_axes  kernel
    =================  ==========  =============================================================
    -1                 ()          Flax, Haiku: Dense (in, out); Conv, also grouped and depthwise
                                   (window, in / groups, out)
    (-2, -1)           ()          Flax attention's query, key, value (embed, heads, head_dim);
                                   DenseGeneral with several features
    -1                 ()          Flax attention's out (heads, head_dim, embed)
    -1                 ()          ConvTranspose (window, in, out)
    -2                 ()          ConvTranspose(transpose_kernel=True) (window, out, in)
    0                  ()          Equinox, PyTorch: Linear (out, in); Conv (out, in / groups,
                                   window)
    as above, from -1  0           any of them stacked by nn.scan, vmap or lax.scan along a
                                   leading axis
    =================  ==========  =============================================================

    An array alone does not tell its axes. Functions of whole trees find most of them by themselves,
    see ``scale_by_sparseopt``; what they cannot find is attention and transposed kernels without a
    bias.

    Source: SparseOpt (arXiv 2605.27541), where the sparsity of neuron i is 1 - fan_in_i / N.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> sx.fan_in(jnp.array([[True, False], [True, True]])).tolist()
      [2, 1]
    """
    axes = kernel_axes("", mask.ndim, out_axes, batch_axes)
    return jnp.sum(_checked_bool(mask, "mask"), axis=axes.incoming, dtype=jnp.int32)


def density(masks: PyTree) -> PyTree:
    """Share of active weights of each leaf.

    Args:
      masks: pytree of bool arrays; a single array is a tree too.

    Returns:
      float32 scalars in the structure of ``masks``; 1 for an empty leaf.

    Raises:
      TypeError: a leaf of ``masks`` is not a bool array.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> float(sx.density(jnp.array([True, False, False, False])))
      0.25
    """

    def share(mask: Array) -> Array:
        active = jnp.sum(_checked_bool(mask, "masks"), dtype=jnp.int32)
        return active.astype(jnp.float32) / max(mask.size, 1) if mask.size else jnp.float32(1)

    return jax.tree.map(share, masks)


def scale_to_fan_in(
    params: PyTree,
    masks: PyTree,
    out_axes: AxesByPath | None = None,
    batch_axes: AxesByPath = (),
) -> PyTree:
    """Rescale freshly initialised weights to the fan-in that each neuron has left.

    An initializer draws weights with a variance of c / N for a dense fan-in of N; a neuron with
    only ``fan_in_i`` active weights needs c / fan_in_i for the same output variance. Each neuron's
    weights are multiplied by sqrt(N / fan_in_i), and the masks are applied.

    Args:
      params: pytree of floating arrays, or a whole Equinox model.
      masks: bool arrays of the same paths and shapes; None for leaves that stay as they are.
      out_axes: see ``scale_by_sparseopt``.
      batch_axes: see ``scale_by_sparseopt``.

    Returns:
      The rescaled, masked parameters, dtypes unchanged. Leaves of fewer than two dimensions and
      dense leaves stay as they are, bit for bit.

    Raises:
      TypeError: a mask is not bool.
      ValueError: structure or shapes differ.

    Source: Evci et al., Gradient Flow in Sparse Neural Networks (arXiv 2010.03533), section 3.1.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> mask = jnp.array([[True], [False], [False], [False]])
      >>> sx.scale_to_fan_in(jnp.ones((4, 1)), mask)[:, 0].tolist()
      [2.0, 0.0, 0.0, 0.0]
    """
    weights = unboxed(params)
    axes_at = out_axes_of(masks, out_axes, batch_axes, concerns=default_prunable)

    def scale(path: tuple[Any, ...], p: Any, m: Any) -> Any:
        if is_absent(m):
            return p
        name = path_str(path)
        if p.ndim - len(axes_of_stack(name, p.ndim, batch_axes)) >= 2:
            axes = kernel_axes(name, p.ndim, axes_at, batch_axes).incoming
            active = jnp.sum(m, axis=axes, keepdims=True, dtype=jnp.int32)
            dense = np.prod([p.shape[axis] for axis in axes])
            gain = jnp.sqrt(jnp.float32(dense) / jnp.maximum(active, 1).astype(jnp.float32))
            p = p * gain.astype(p.dtype)
        return jnp.where(m, p, jnp.zeros_like(p))

    scaled = jax.tree_util.tree_map_with_path(scale, weights, fitting(masks, weights))
    return boxed_like(scaled, params)


def check_masks(masks: PyTree, params: PyTree) -> None:
    """Raise unless ``masks`` are bool arrays of the structure and shapes of ``params``.

    Args:
      masks: what to check. How the leaves are held does not matter, ``nnx.Param`` or a variable of
        an ``nnx.Optimizer``; None and ``optax.MaskedNode`` stand for leaves without a mask.
      params: the tree that they must fit; anything with shapes.

    Raises:
      TypeError: a mask is not bool.
      ValueError: paths or shapes differ; the message names the leaves that do, and the cure.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> sx.check_masks({"w": jnp.ones((2, 3), bool)}, {"w": jnp.ones((2, 3))})
    """
    fitting(masks, unboxed(params))


def fitting(masks: PyTree, params: PyTree) -> PyTree:
    """``masks`` in the containers of ``params``, which have no boxes; None where there is no mask.

    Raises as ``check_masks``.
    """
    if masks is None:
        raise ValueError("masks must have the tree structure of params, got None")
    masks = aligned(masks, params, ("masks", "params"), partial=True, surplus=True)

    def check(path: tuple[Any, ...], param: Any, mask: Any) -> None:
        if is_absent(mask):
            return
        name = f"masks leaf {path_str(path)!r}"
        _checked_bool(mask, name)
        if np.shape(mask) != np.shape(param):
            raise ValueError(
                f"{name} has shape {np.shape(mask)}, but its parameter has {np.shape(param)}; "
                "masks must fit the parameters they were made for"
            )

    jax.tree_util.tree_map_with_path(check, params, masks)
    return masks


def _checked_bool(mask: Any, name: str) -> Any:
    if getattr(mask, "dtype", None) != np.bool_:
        kind = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"{name} must be a bool array, got {kind}")
    return mask
