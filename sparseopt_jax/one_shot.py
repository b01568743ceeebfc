"""From scores to masks, at once: pruning at initialisation, or of what was trained dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt_jax.axes import AxesByPath
from sparseopt_jax.by_path import ByPath
from sparseopt_jax.explicit import in_auto_mode
from sparseopt_jax.group_selection import largest_of_groups
from sparseopt_jax.masks import Distribution
from sparseopt_jax.plan import Plan, plan_of
from sparseopt_jax.prunable import Prunable, default_prunable
from sparseopt_jax.selection import top_k_masks
from sparseopt_jax.structures import Structure
from sparseopt_jax.trees import boxed_like, named_leaves, path_str, unboxed
from sparseopt_jax.units import Units

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any

# Leaves of up to this size share a stack where their layers have one shape, as in topology updates.
_LARGEST_STACKED = 2**18


def masks_from_scores(
    scores: PyTree,
    distribution: ByPath[Distribution],
    structure: ByPath[Structure] | None = None,
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
      structure: in which pattern, as in ``init_masks``. Blocks and neurons count by the sum of
        their weights' scores.
      prunable: ``(path, leaf) -> bool``, which leaves may be sparse.
      out_axes: as in ``init_masks``.
      batch_axes: as in ``init_masks``.

    Returns:
      Bool arrays in the structure and shapes of ``scores``, True where a weight is active and
      everywhere in leaves that are not ``prunable``; None where ``scores`` has None. In Explicit
      mesh mode sharded as ``scores``.

    Raises:
      TypeError: a leaf chosen by ``prunable`` is not floating.
      ValueError: nothing is prunable, or the distribution or the structure does not fit the layers.

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
    plan = plan_of(
        scores,
        distribution,
        prunable=prunable,
        out_axes=out_axes,
        batch_axes=batch_axes,
        structure=structure,
        argument="scores",
    )
    leaves = {path: leaf for path, leaf in named_leaves(scores).items() if path in plan.layers}

    def choose(leaves: dict[str, Array]) -> dict[str, Array]:
        return largest_of_layers(leaves, plan, plan.counts_of_scores(leaves))

    masks = in_auto_mode(choose, like=leaves)(leaves)

    def mask(path: tuple[Any, ...], leaf: Any) -> Array:
        chosen = masks.get(path_str(path))
        return jnp.ones(jnp.shape(leaf), jnp.bool_) if chosen is None else chosen

    return boxed_like(jax.tree_util.tree_map_with_path(mask, scores), boxed)


def largest_of_layers(
    scores: Mapping[str, Array],
    plan: Plan,
    counts: Mapping[str, Array],
    by_magnitude: bool = False,
) -> dict[str, Array]:
    """Masks of the largest scores of each layer; among equals the lowest index comes first.

    Args:
      scores: floating arrays by path.
      plan: of these leaves.
      counts: how many weights the layers of each leaf keep, int32 (layers,).
      by_magnitude: rank absolute values.
    """
    units = {path: Units.of(plan.layer(path), score.shape) for path, score in scores.items()}
    of_units = {p: units[p].of_scores(score, by_magnitude) for p, score in scores.items()}
    chosen: dict[str, Array] = {}
    alike: dict[Any, list[str]] = {}
    grouped: dict[Structure, list[str]] = {}
    for path, unit in units.items():
        if unit.grouped_by is not None:
            grouped.setdefault(unit.grouped_by, []).append(path)
        else:
            kind = unit.unit_shape, of_units[path].dtype
            alike.setdefault(kind if scores[path].size <= _LARGEST_STACKED else path, []).append(
                path
            )
    for paths in grouped.values():
        stacks = [of_units[path] for path in paths]
        limits = [units[path].limits(counts[path]) for path in paths]
        found = largest_of_groups(stacks, limits, None, by_magnitude=by_magnitude)
        chosen |= zip(paths, found, strict=True)
    if alike:
        stacks = [jnp.concatenate([of_units[p] for p in paths]) for paths in alike.values()]
        k = jnp.concatenate(
            [units[p].members(counts[p]) for paths in alike.values() for p in paths]
        )
        found = top_k_masks(stacks, k, None, by_magnitude=by_magnitude)
        for stack, paths in zip(found, alike.values(), strict=True):
            parts = jnp.split(stack, np.cumsum([units[p].n_layers for p in paths])[:-1])
            chosen |= zip(paths, parts, strict=True)
    return {path: units[path].restored(mask) for path, mask in chosen.items()}
