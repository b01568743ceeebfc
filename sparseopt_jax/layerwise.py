"""One function over all layers of a model, so that its searches are shared by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from sparseopt_jax.axes import AxesByPath, axes_of_stack, from_layers, to_layers
from sparseopt_jax.explicit import in_auto_mode
from sparseopt_jax.masks import check_masks, path_str
from sparseopt_jax.selection import Stacks

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


def update_layerwise(
    update_layers: Callable[[Array, Any, Stacks, Stacks, Stacks], Stacks],
    key: Array,
    step: Any,
    masks: PyTree,
    params: PyTree,
    scores: PyTree,
    batch_axes: AxesByPath,
) -> PyTree:
    """Apply ``update_layers`` to the leaves as stacks of layers, (layers, *shape) each."""
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

    def update(key: Array, step: Array, trees: Any) -> list[Array]:
        layers = [
            tuple(to_layers(jnp.asarray(array), batch) for array in arrays)
            for *arrays, batch in zip(*trees, batches, strict=True)
        ]
        stacks = [list(kind) for kind in zip(*layers, strict=True)]
        return [
            from_layers(new, leaf.shape, batch)
            for new, leaf, batch in zip(
                update_layers(key, step, *stacks), leaves, batches, strict=True
            )
        ]

    return jax.tree.unflatten(
        structure, in_auto_mode(update, like=leaves)(key, jnp.asarray(step), trees)
    )
