"""The masks that training begins with."""

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
from sparseopt_jax.selection import random_masks
from sparseopt_jax.stacks import Stacked
from sparseopt_jax.structures import Structure
from sparseopt_jax.trees import boxed_like, path_str, unboxed
from sparseopt_jax.units import Units

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


def init_masks(
    key: Array,
    params: PyTree,
    distribution: ByPath[Distribution],
    *,
    prunable: Prunable = default_prunable,
    out_axes: AxesByPath | None = None,
    batch_axes: AxesByPath = (),
    structure: ByPath[Structure] | None = None,
) -> PyTree:
    """Random masks with exactly the number of active weights that ``distribution`` gives a layer.

    Args:
      key: a JAX random key, may be traced.
      params: the model's parameters.
      distribution: ``Uniform``, ``ER``, ``ERK`` or ``PerLayer``, or a mapping from glob patterns
        over paths to them, each of which sees its layers only; other layers stay dense.
      prunable: ``(path, leaf) -> bool``, which leaves may be sparse.
      out_axes: see ``scale_by_sparseopt``; here it tells ``ER`` and ``Uniform`` a convolution's
        window from its inputs.
      batch_axes: the axis or axes that index the layers of a stacked leaf (0 under ``nn.scan``), or
        a mapping from glob patterns over paths to them. Each layer of a stack counts as a layer of
        its own, which the distribution knows as ``path/0``, ``path/1`` and so on.
      structure: the pattern of the masks, ``NM``, ``Blocks``, ``Neurons``, ``ConstantFanIn``, or a
        mapping from glob patterns over paths to them; other layers have none, and neither have
        layers that stay dense. Patterns say how they round the number of weights.

    Returns:
      Bool arrays in the structure and shapes of ``params``, True where a weight is active; in
      Explicit mesh mode sharded as ``params``.

    Raises:
      TypeError: a leaf chosen by ``prunable`` is not floating.
      ValueError: nothing is prunable, or the distribution or the structure does not fit the layers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}
      >>> masks = sx.init_masks(jax.random.key(0), params, sx.ERK(0.75))
      >>> int(masks["kernel"].sum()), int(masks["bias"].sum())
      (8, 4)
    """
    boxed, params = params, unboxed(params)
    plan = plan_of(
        params,
        distribution,
        prunable=prunable,
        out_axes=out_axes,
        batch_axes=batch_axes,
        structure=structure,
    )
    return boxed_like(draw_masks(key, params, plan), boxed)


def draw_masks(key: Array, params: PyTree, plan: Plan) -> PyTree:
    """Random masks with the plan's initial numbers, in the containers of ``params``."""
    units = {path: Units.of(plan.layer(path), shape) for path, shape in plan.shapes.items()}
    # NumPy's, since a jax.Array made under an Explicit mesh is of no use inside in_auto_mode.
    counts = {
        path: np.array([plan.initial[name] for name in own.names], np.int32)
        for path, own in plan.layers.items()
    }

    def draw(key: Array) -> PyTree:
        by_structure: dict[Structure | None, dict[str, Units]] = {}
        for path, unit in units.items():
            by_structure.setdefault(unit.grouped_by, {})[path] = unit
        masks: dict[str, Array] = {}
        for number, (grouped, own) in enumerate(by_structure.items()):
            own_key = key if len(by_structure) == 1 else jax.random.fold_in(key, number)
            draw_own = _drawn if grouped is None else _drawn_in_groups
            masks |= draw_own(own_key, own, counts)

        def init(path: tuple[Any, ...], leaf: Any) -> Array:
            mask = masks.get(path_str(path))
            return jnp.ones(jnp.shape(leaf), jnp.bool_) if mask is None else mask

        return jax.tree_util.tree_map_with_path(init, params)

    return in_auto_mode(draw, like=params)(key)


def _drawn(
    key: Array, units: Mapping[str, Units], counts: Mapping[str, np.ndarray]
) -> dict[str, Array]:
    """Layers of the same shape are drawn together, which keeps the compiled program small."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for path, unit in units.items():
        alike.setdefault(unit.unit_shape, []).append(path)
    stacked = tuple(
        (sum(units[path].n_layers for path in paths), *shape) for shape, paths in alike.items()
    )
    k = jnp.concatenate(
        [
            units[path].members(jnp.asarray(counts[path]))
            for paths in alike.values()
            for path in paths
        ]
    )
    masks: dict[str, Array] = {}
    stacks = random_masks(key, Stacked.of(*stacked), k)
    for stack, paths in zip(stacks, alike.values(), strict=True):
        parts = jnp.split(stack, np.cumsum([units[path].n_layers for path in paths])[:-1])
        masks |= {path: units[path].restored(p) for path, p in zip(paths, parts, strict=True)}
    return masks


def _drawn_in_groups(
    key: Array, units: Mapping[str, Units], counts: Mapping[str, np.ndarray]
) -> dict[str, Array]:
    k = [unit.limits(jnp.asarray(counts[path])) for path, unit in units.items()]
    everywhere = [jnp.ones((u.n_layers, *u.unit_shape), jnp.bool_) for u in units.values()]
    chosen = largest_of_groups(None, k, key, everywhere)
    return {p: u.restored(mask) for (p, u), mask in zip(units.items(), chosen, strict=True)}
