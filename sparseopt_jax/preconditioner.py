"""SparseOpt's per-neuron preconditioner as an optax gradient transformation.

Behind batch normalisation the gradient of a neuron with sparsity s_i is longer by
(1 - s_i)^(-1/2) than its dense counterpart's. Where the neurons of a layer differ in s_i, the
layer's gradient is rotated too. SparseOpt multiplies it by sqrt(1 - s_i), over the layer's mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparseopt_jax.axes import (
    AxesByPath,
    axes_of_stack,
    check_axes,
    check_patterns,
    is_given,
    kernel_axes,
)
from sparseopt_jax.layout import out_axes_of
from sparseopt_jax.masks import fitting
from sparseopt_jax.prunable import default_prunable
from sparseopt_jax.settings import check_function
from sparseopt_jax.trees import (
    aligned,
    boxed_like,
    is_absent,
    is_masked_node,
    named_leaves,
    path_str,
    unboxed,
)

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any

_AVERAGES = ("layer", "network", None)


class MissingMasksError(ValueError):
    """Raised by a transformation that reads the extra argument ``masks`` and did not get it."""


def scale_by_sparseopt(
    average_over: str | None = "layer",
    out_axes: AxesByPath | None = None,
    layers: Callable[[str], bool] | None = None,
    *,
    batch_axes: AxesByPath = (),
) -> optax.GradientTransformationExtraArgs:
    """Correct the gradient of every neuron for its sparsity.

    With fan_in_i the active and N the dense fan-in of neuron i, so that 1 - s_i = fan_in_i / N, the
    gradient of its weights is multiplied by

        sqrt(1 - s_i) / sqrt(1 - s_avg).

    Dense layers, and with ``average_over="layer"`` also layers of equal fan-in, pass unchanged, bit
    for bit. A neuron without active weights gets the factor 0.

    Place it before SGD-like optimizers. Ahead of a scale-invariant one (Adam, Lion) a constant
    factor per neuron largely cancels; place it after the adaptive scaling there.

    Args:
      average_over: s_avg is the mean over the neurons of the ``"layer"`` (the paper), over those of
        all sparse layers of the ``"network"``, or None: no average, the factor is sqrt(1 - s_i).
      out_axes: the axis or axes of a kernel that index neurons, or a mapping from glob patterns
        over paths to them; see the table in ``fan_in``. Where nothing is given, or no pattern
        matches: those of ``sparse_training`` around it. Elsewhere each kernel's own: the axes that
        its ``bias`` fits; where there is none, or it fits several, those of other kernels of its
        name; then 0 for ``weight`` in Equinox's modules and -1 for all others, with a warning for
        what is called ``weight``, as in PyTorch, where it would be 0.
      layers: predicate over the path (``"Dense_0/kernel"``) of a leaf; where it is False the
        gradient passes unchanged. Leave out layers that no normalisation follows: without one the
        effect does not arise. Leaves of fewer than two dimensions always pass unchanged.
      batch_axes: the axis or axes that index the layers of a stack, or a mapping from patterns;
        every layer has its own average.

    Returns:
      A stateless transformation. Its ``update`` reads the extra argument ``masks`` (bool arrays in
      the paths and shapes of the updates), which ``sparse_training`` passes by itself, and
      optionally ``fan_in``: int32 arrays of the active fan-in with the incoming axes kept as 1,
      so that the masks need not be counted again on each step. Factors are computed in float32
      and cast to the gradient's dtype.

    Raises:
      TypeError, ValueError: for an unknown ``average_over``, ``layers`` that is not callable, and
        in ``update`` for masks that are missing or do not fit.

    Source: SparseOpt (arXiv 2605.27541), the update rule
    w <- w - eta / sqrt(1 - s_avg) * D g with D = diag(sqrt(1 - s_i)).

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> masks = {"kernel": jnp.array([[True, True], [True, False], [True, False], [True, False]])}
      >>> grads = {"kernel": jnp.ones((4, 2))}
      >>> tx = sx.scale_by_sparseopt(average_over=None)
      >>> updates, _ = tx.update(grads, tx.init(grads), masks=masks)
      >>> updates["kernel"][0].tolist()
      [1.0, 0.5]
    """
    if average_over not in _AVERAGES:
        raise ValueError(f"average_over must be 'layer', 'network' or None, got {average_over!r}")
    check_function("layers", layers, "path", or_none=True)
    check_axes("out_axes", out_axes)
    check_axes("batch_axes", batch_axes)

    def init_fn(params: PyTree) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree | None = None,
        *,
        masks: PyTree | None = None,
        fan_in: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, optax.EmptyState]:
        del params, extra_args
        if masks is None:
            raise MissingMasksError(
                "masks is missing: scale_by_sparseopt needs the masks of the weights. Wrap the "
                "optimizer in sparse_training, or pass update(grads, state, params, masks=masks)"
            )
        grads = unboxed(updates)
        counts = neuron_fan_in(masks, grads, out_axes, batch_axes, fan_in, layers)
        return boxed_like(scale_by_fan_in(grads, counts, average_over, batch_axes), updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def sparseopt(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = 0.9,
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = "kernels",
    *,
    average_over: str | None = "layer",
    out_axes: AxesByPath | None = None,
    layers: Callable[[str], bool] | None = None,
    batch_axes: AxesByPath = (),
) -> optax.GradientTransformationExtraArgs:
    """The paper's optimizer: SparseOpt's preconditioner ahead of SGD with momentum.

    The gradient is corrected first, so weight decay is not scaled by the correction.

    Args:
      learning_rate: a number or an optax schedule.
      momentum: decay of the momentum, or None for plain SGD.
      nesterov: whether to use Nesterov's momentum.
      weight_decay: factor of the L2 penalty's gradient, added ahead of the momentum as in SGD.
      mask: which leaves decay: ``"kernels"``, those of two and more dimensions; or a tree of bools,
        a function that gives one, or None for all, as in ``optax.add_decayed_weights``. (A function
        as a default would be taken for a schedule by ``optax.inject_hyperparams``.)
      average_over: see ``scale_by_sparseopt``.
      out_axes: see ``scale_by_sparseopt``.
      layers: see ``scale_by_sparseopt``.
      batch_axes: see ``scale_by_sparseopt``.

    Returns:
      A gradient transformation; wrap it in ``sparse_training`` or pass ``masks`` to its ``update``.

    Raises:
      TypeError, ValueError: as ``scale_by_sparseopt``.

    Source: SparseOpt (arXiv 2605.27541).

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> tx = sx.sparseopt(0.5, weight_decay=0.1)
      >>> masks = {"kernel": jnp.ones((4, 2), bool)}
      >>> updates, state = tx.update(params, tx.init(params), params, masks=masks)
      >>> round(float(updates["kernel"][0, 0]), 6)
      -0.55
    """
    return optax.chain(
        scale_by_sparseopt(average_over, out_axes, layers, batch_axes=batch_axes),
        optax.add_decayed_weights(weight_decay, decay_mask(mask)),
        optax.sgd(learning_rate, momentum, nesterov),
    )


def decay_mask(mask: Any) -> Any:
    """``mask`` as ``optax.add_decayed_weights`` takes it.

    Raises:
      TypeError: it is neither ``"kernels"``, a tree of bools, a function, nor None. That is what
        ``optax.inject_hyperparams`` makes of a function that is not among its ``static_args``.
    """
    if mask is None or (callable(mask) and not isinstance(mask, jax.Array)):
        return mask
    if isinstance(mask, str) and mask == "kernels":
        return lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)
    leaves = jax.tree.leaves(mask)
    # One bool for all leaves is what a function gives when it is called with a step.
    if leaves == [mask] or not all(isinstance(leaf, bool | np.bool_) for leaf in leaves):
        raise TypeError(
            "mask must be 'kernels', a tree of bools, a function of the parameters, or None, "
            f"got {mask!r}. In optax.inject_hyperparams name it in static_args=('mask',)"
        )
    return mask


def neuron_fan_in(
    masks: PyTree,
    updates: PyTree,
    out_axes: AxesByPath | None,
    batch_axes: AxesByPath = (),
    fan_in: PyTree | None = None,
    layers: Callable[[str], bool] | None = None,
) -> PyTree:
    """Active fan-in of each neuron, kept dimensions; MaskedNode for leaves that are not corrected.

    ``updates`` have no boxes, and their containers are those of the result. ``fan_in`` are counts
    that were kept from an earlier step. Their shape says over which axes they were summed; where
    ``out_axes`` names others, the mask is counted again.
    """
    all_masks, masks = masks, fitting(masks, updates)
    # Inside optax.masked and optax.partition, a part of the updates is replaced by MaskedNode.
    if not any(is_masked_node(u) for u in jax.tree.leaves(updates, is_leaf=is_masked_node)):
        check_patterns("out_axes", out_axes, named_leaves(updates))
        check_patterns("batch_axes", batch_axes, named_leaves(updates))
    if fan_in is None:
        # Of all masks, since a kernel's bias may be among the updates that are replaced.
        axes_at = out_axes_of(all_masks, out_axes, batch_axes, concerns=default_prunable)
        kept_counts = masks
    else:
        axes_at = -1 if out_axes is None else out_axes
        names = ("fan_in", "updates")
        kept_counts = aligned(fan_in, updates, names, partial=True, surplus=True)

    def count(path: tuple[Any, ...], update: Any, mask: Any, kept: Any) -> Any:
        if is_absent(mask):
            return optax.MaskedNode()
        # What is left of a stacked bias or scale without its batch axes is no kernel.
        name, ndim = path_str(path), jnp.ndim(update)
        if ndim - len(axes_of_stack(name, ndim, batch_axes)) < 2:
            return optax.MaskedNode()
        if layers is not None and not layers(name):
            return optax.MaskedNode()
        if fan_in is not None and is_absent(kept):
            return optax.MaskedNode()
        if fan_in is not None and not is_given(name, out_axes):
            return kept
        axes = kernel_axes(name, mask.ndim, axes_at, batch_axes)
        shape = tuple(1 if axis in axes.incoming else size for axis, size in enumerate(mask.shape))
        if fan_in is not None and kept.shape == shape:
            return kept
        return jnp.sum(mask, axis=axes.incoming, keepdims=True, dtype=jnp.int32)

    return jax.tree_util.tree_map_with_path(count, updates, masks, kept_counts)


def scale_by_fan_in(
    updates: PyTree, counts: PyTree, average_over: str | None, batch_axes: AxesByPath = ()
) -> PyTree:
    """Multiply each neuron's update by its factor; ``counts`` as ``neuron_fan_in`` gives them."""

    def layer_of(path: tuple[Any, ...], update: Any, count: Any) -> Any:
        if is_masked_node(count):
            return count
        batch = axes_of_stack(path_str(path), count.ndim, batch_axes)
        return _Layer(update, count, batch)

    layers = jax.tree_util.tree_map_with_path(layer_of, updates, counts)
    network_density: Any = None
    if average_over == "network":
        sparse = [x for x in jax.tree.leaves(layers, is_leaf=_is_layer) if _is_layer(x)]
        network_density = _mean_density_of_sparse_layers(sparse)

    def scale(layer: Any, update: Any) -> Any:
        if not _is_layer(layer):
            return update
        if average_over == "layer":
            # fan_in_i / (total / neurons)
            ratio = _ratio(layer.count * layer.neurons, jnp.maximum(layer.total, 1))
        else:
            ratio = _ratio(layer.count, layer.dense_fan_in)
            if network_density is not None:
                ratio = jnp.where(layer.is_dense, 1.0, ratio / network_density)
        return update * jnp.sqrt(ratio).astype(update.dtype)

    return jax.tree.map(scale, layers, updates, is_leaf=lambda x: _is_layer(x) or is_masked_node(x))


class _Layer:
    """What the factors of a kernel's neurons derive from; a stack's layers side by side."""

    def __init__(self, update: Array, count: Array, batch: tuple[int, ...]) -> None:
        within = tuple(axis for axis in range(count.ndim) if axis not in batch)
        self.count = count
        self.neurons = math.prod(count.shape[axis] for axis in within)
        self.dense_fan_in = math.prod(update.shape[axis] for axis in within) // max(self.neurons, 1)
        # Active weights of each layer, one number for each entry of the batch axes.
        self.total = jnp.sum(count, axis=within, keepdims=True)
        self.is_dense = self.total == self.neurons * self.dense_fan_in


def _is_layer(node: Any) -> bool:
    return isinstance(node, _Layer)


def _mean_density_of_sparse_layers(layers: Sequence[_Layer]) -> Array:
    """Mean of 1 - s_i over the neurons of the layers that are not dense; 1 where there are none."""
    density, neurons = jnp.float32(0), jnp.float32(0)
    for layer in layers:
        neurons += layer.neurons * jnp.sum(~layer.is_dense, dtype=jnp.int32).astype(jnp.float32)
        # A layer's sum of fan_in_i / N over its neurons.
        density += jnp.sum(
            jnp.where(layer.is_dense, 0.0, _ratio(layer.total, layer.dense_fan_in)),
            dtype=jnp.float32,
        )
    # No active weight in any sparse layer: every factor is 0 / 1 then.
    return jnp.where(density > 0, density / jnp.maximum(neurons, 1.0), 1.0)


def _ratio(part: Array, whole: Any) -> Array:
    """Quotient of integers in float32, exactly 1 where they are equal.

    A compiled division may multiply by a rounded reciprocal, which 41 / 41 shows.
    """
    ratio = part.astype(jnp.float32) / jnp.asarray(whole).astype(jnp.float32)
    return jnp.where(part == whole, 1.0, ratio)
