"""One function over all layers of a model, layers of the same shape side by side.

A program with one selection a layer would take tens of seconds to compile for a ResNet.
"""

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
    """Apply ``update_layers`` to stacks of the layers that share shape and dtypes."""
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
        groups: dict[Any, list[int]] = {}
        for index, (mask, weight, score) in enumerate(layers):
            groups.setdefault((mask.shape[1:], weight.dtype, score.dtype), []).append(index)
        stacked = [
            [jnp.concatenate([layers[index][kind] for index in group]) for group in groups.values()]
            for kind in range(3)
        ]
        updated: list[Any] = [None] * len(layers)
        for group, new, old, weight, score in zip(
            groups.values(), update_layers(key, step, *stacked), *stacked, strict=True
        ):
            axes = tuple(range(1, old.ndim))
            finite = jnp.all(jnp.isfinite(weight) & jnp.isfinite(score), axis=axes, keepdims=True)
            chosen, start = jnp.where(finite, new, old), 0
            for index in group:
                end = start + len(layers[index][0])
                own = chosen[start:end]
                updated[index] = from_layers(own, trees[0][index].shape, batches[index])
                start = end
        return updated

    return jax.tree.unflatten(
        structure, in_auto_mode(update, like=leaves)(key, jnp.asarray(step), trees)
    )
