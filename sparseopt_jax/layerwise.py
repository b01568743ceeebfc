"""One function over all layers of a model, so that its searches are shared by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt_jax.axes import (
    AxesByPath,
    axes_of_stack,
    from_layers,
    layer_shape,
    layers_of,
    to_layers,
)
from sparseopt_jax.explicit import in_auto_mode
from sparseopt_jax.masks import check_masks, path_str
from sparseopt_jax.selection import Stacks

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any

# Leaves of up to this size share a stack where their layers have one shape: each stack adds to the
# time of compilation, and one of several leaves is a copy.
_LARGEST_STACKED = 2**18


def update_layerwise(
    update_layers: Callable[[Array, Any, Stacks, Stacks, Stacks], Stacks],
    key: Array,
    step: Any,
    masks: PyTree,
    params: PyTree,
    scores: PyTree,
    batch_axes: AxesByPath,
) -> PyTree:
    """Apply ``update_layers`` to the leaves as stacks of layers, (layers, *shape) each.

    Small leaves with layers of one shape share a stack; a large one is a stack of its own.
    """
    check_masks(masks, params)
    if jax.tree.structure(scores) != jax.tree.structure(params):  # type: ignore[operator]
        raise ValueError(
            "scores must have the tree structure of params, got "
            f"{jax.tree.structure(scores)} against {jax.tree.structure(params)}"
        )
    leaves, structure = jax.tree.flatten(masks)
    paths = [path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(masks)]
    batches = [
        axes_of_stack(path, mask.ndim, batch_axes) for path, mask in zip(paths, leaves, strict=True)
    ]
    trees = leaves, jax.tree.leaves(params), jax.tree.leaves(scores)
    for path, mask, score in zip(paths, leaves, trees[2], strict=True):
        if jnp.shape(score) != mask.shape:
            raise ValueError(
                f"scores leaf {path!r} has shape {jnp.shape(score)}, its mask {mask.shape}"
            )
    if not leaves:
        return masks

    groups = _alike(*trees, batches)

    def update(key: Array, step: Array, trees: Any) -> list[Array]:
        stacks = []
        for arrays in trees:
            layers = [to_layers(jnp.asarray(a), b) for a, b in zip(arrays, batches, strict=True)]
            stacks.append([jnp.concatenate([layers[i] for i in group]) for group in groups])
        found: dict[int, Array] = {}
        for group, stack in zip(groups, update_layers(key, step, *stacks), strict=True):
            ends = np.cumsum([layers_of(leaves[i].shape, batches[i]) for i in group])
            found.update(zip(group, jnp.split(stack, ends[:-1]), strict=True))
        return [
            from_layers(found[i], leaf.shape, batch)
            for i, (leaf, batch) in enumerate(zip(leaves, batches, strict=True))
        ]

    return jax.tree.unflatten(
        structure, in_auto_mode(update, like=leaves)(key, jnp.asarray(step), trees)
    )


def _alike(
    masks: Sequence[Any], params: Sequence[Any], scores: Sequence[Any], batches: Sequence[Any]
) -> list[list[int]]:
    """The numbers of the leaves, the small ones together with others of their kind."""
    groups: dict[Any, list[int]] = {}
    for i, (mask, weight, score, batch) in enumerate(
        zip(masks, params, scores, batches, strict=True)
    ):
        shape = layer_shape(mask.shape, batch)
        kind = shape, jnp.result_type(weight), jnp.result_type(score)
        groups.setdefault(kind if mask.size <= _LARGEST_STACKED else i, []).append(i)
    return list(groups.values())
