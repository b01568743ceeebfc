"""From scores to masks, at once: pruning at initialisation, or of what was trained dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt_jax.axes import AxesByPath, from_layers, to_layers
from sparseopt_jax.by_path import ByPath, layer_counts
from sparseopt_jax.explicit import in_auto_mode
from sparseopt_jax.masks import Distribution, Layers, maskable_layers, shapes_by_name
from sparseopt_jax.prunable import Prunable, default_prunable
from sparseopt_jax.selection import top_k_masks
from sparseopt_jax.trees import boxed_like, named_leaves, path_str, unboxed

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any

# Leaves of up to this size share a stack where their layers have one shape, as in topology updates.
_LARGEST_STACKED = 2**18


def masks_from_scores(
    scores: PyTree,
    distribution: ByPath[Distribution],
    *,
    prunable: Prunable = default_prunable,
    out_axes: AxesByPath | None = None,
    batch_axes: AxesByPath = (),
) -> PyTree:
    """Masks of the largest scores, exactly as many as ``distribution`` gives a layer.

    Args:
      scores: floating arrays in the structure of the parameters, such as ``snip_scores`` returns
        or, for pruning by magnitude, ``jax.tree.map(jnp.abs, params)``. The order is that of
        ``top_k_mask``: NaN comes last, and the lowest index first among equals.
      distribution: as in ``init_masks``; or ``Global``, one threshold over all layers.
      prunable: ``(path, leaf) -> bool``, which leaves may be sparse.
      out_axes: as in ``init_masks``.
      batch_axes: as in ``init_masks``.

    Returns:
      Bool arrays in the structure and shapes of ``scores``, True where a weight is active and
      everywhere in leaves that are not ``prunable``; None where ``scores`` has None. In Explicit
      mesh mode sharded as ``scores``.

    Raises:
      TypeError: a leaf chosen by ``prunable`` is not floating.
      ValueError: nothing is prunable, or the distribution does not fit the layers.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> params = {"kernel": jnp.array([[3.0, -4.0], [0.5, 1.0]]), "bias": jnp.zeros(2)}
      >>> masks = sx.masks_from_scores(jax.tree.map(jnp.abs, params), sx.ERK(0.5))
      >>> masks["kernel"].tolist()
      [[True, True], [False, False]]
      >>> tx = sx.sparse_training(optax.sgd(0.1), masks=masks, topology=sx.Static())
    """
    boxed, scores = scores, unboxed(scores)
    layers = maskable_layers(scores, prunable, batch_axes, "scores")
    shapes = shapes_by_name(scores, layers, out_axes, batch_axes)
    leaves = {path: leaf for path, leaf in named_leaves(scores).items() if path in layers}

    def choose(leaves: dict[str, Array]) -> dict[str, Array]:
        of_layers = {
            name: layer
            for path, own in layers.items()
            for name, layer in zip(own.names, to_layers(leaves[path], own.batch), strict=True)
        }
        counts = layer_counts(distribution, shapes, of_layers)
        k = jnp.stack([jnp.asarray(counts[n], jnp.int32) for n in of_layers])
        return largest_of_layers(leaves, layers, k)

    masks = in_auto_mode(choose, like=leaves)(leaves)

    def mask(path: tuple[Any, ...], leaf: Any) -> Array:
        chosen = masks.get(path_str(path))
        return jnp.ones(jnp.shape(leaf), jnp.bool_) if chosen is None else chosen

    return boxed_like(jax.tree_util.tree_map_with_path(mask, scores), boxed)


def largest_of_layers(
    scores: Mapping[str, Array], layers: Mapping[str, Layers], k: Array, by_magnitude: bool = False
) -> dict[str, Array]:
    """Masks of the ``k`` largest scores of each layer, in one search.

    Args:
      scores: floating arrays by path.
      layers: what layers each of them holds.
      k: int32 (N,), for the layers in the order of ``layers``, each in the range of its size.
      by_magnitude: rank absolute values.
    """
    alike: dict[Any, list[str]] = {}
    numbers: dict[str, range] = {}
    n = 0
    for path, own in layers.items():
        kind = own.shape, scores[path].dtype
        small = scores[path].size <= _LARGEST_STACKED
        alike.setdefault(kind if small else path, []).append(path)
        numbers[path] = range(n, n + len(own.names))
        n += len(own.names)
    order = [number for paths in alike.values() for path in paths for number in numbers[path]]
    stacks = [
        jnp.concatenate([to_layers(scores[path], layers[path].batch) for path in paths])
        for paths in alike.values()
    ]
    chosen = top_k_masks(stacks, k[np.array(order)], None, by_magnitude=by_magnitude)
    found = {}
    for stack, paths in zip(chosen, alike.values(), strict=True):
        parts = jnp.split(stack, np.cumsum([len(layers[path].names) for path in paths])[:-1])
        for path, part in zip(paths, parts, strict=True):
            found[path] = from_layers(part, scores[path].shape, layers[path].batch)
    return found
