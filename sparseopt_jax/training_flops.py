"""Floating point operations of a whole run whose density changes."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import jax
import numpy as np

from sparseopt_jax.arguments import check_distribution, check_topology
from sparseopt_jax.axes import AxesByPath
from sparseopt_jax.by_path import ByPath, grouped
from sparseopt_jax.criteria import Momentum
from sparseopt_jax.masks import Distribution
from sparseopt_jax.model_flops import ModelFLOPs
from sparseopt_jax.plan import Plan, plan_of
from sparseopt_jax.prunable import Prunable, default_prunable
from sparseopt_jax.schedule_checks import check_plan, check_schedule, check_structure
from sparseopt_jax.schedules import Schedule
from sparseopt_jax.settings import MOST_STEPS, as_int
from sparseopt_jax.structures import Structure
from sparseopt_jax.topology import Topology
from sparseopt_jax.trees import unboxed
from sparseopt_jax.units import Units

PyTree: TypeAlias = Any


def training_flops(
    count: ModelFLOPs,
    params: PyTree,
    steps: int,
    *,
    topology: ByPath[Topology],
    distribution: ByPath[Distribution],
    schedule: Schedule | None = None,
    structure: ByPath[Structure] | None = None,
    prunable: Prunable = default_prunable,
    out_axes: AxesByPath | None = None,
    batch_axes: AxesByPath = (),
) -> float:
    """FLOPs of a run, with the density that each layer has at each of its steps.

    A step costs, layer by layer, its forward pass three times at its density: once forward, once
    for the gradient of the activations, once for that of the weights. Where the topology needs the
    gradient of all weights, the last is dense: on the steps that ``RigL`` ranks or sums up, and on
    all steps with a ``Momentum``. An update comes after the passes of its step. Densities are those
    of the settings, which ``sparse_training`` keeps exactly; of ``Global`` those of its sizes, and
    of ``ConstantFanIn`` before ablation.

    Args:
      count: what ``flops`` counts of the model; the masks that it was given do not matter.
      params: the parameters, or their shapes.
      steps: of the run.
      topology: as of ``sparse_training``; so are all others.
      distribution: how many weights each layer keeps.
      schedule: how much over time.
      structure: in which pattern.
      prunable: which leaves may be sparse.
      out_axes: which axes index neurons.
      batch_axes: which axes index the layers of stacked kernels.

    Returns:
      FLOPs, of the batch that ``count`` was traced with on each step. ``3 * count.dense * steps``
      is what dense training takes.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: settings that do not go together, as ``sparse_training``.

    Source: RigL (arXiv 1911.11134), appendix on the FLOPs of its methods.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> params = {"kernel": jnp.ones((50, 10))}
      >>> count = sx.flops(lambda p, x: x @ p["kernel"], params, None, jnp.ones((1, 50)))
      >>> dense = 3 * count.dense * 100
      >>> tenth = sx.Uniform(0.9, dense_first=False)
      >>> static = sx.training_flops(
      ...     count, params, 100, topology=sx.Static(), distribution=tenth)
      >>> pruned = sx.training_flops(
      ...     count, params, 100, topology=sx.Prune(interval=50, end_step=50),
      ...     schedule=sx.OneShot(50), distribution=tenth)
      >>> round(static / dense, 3), round(pruned / dense, 3)
      (0.1, 0.559)
    """
    if not isinstance(count, ModelFLOPs):
        raise TypeError(f"count must be what flops returns, got {count!r}")
    steps = as_int("steps", steps, at_least=1, at_most=MOST_STEPS)
    check_distribution(distribution)
    check_topology(topology)
    check_schedule(schedule, topology, distribution, automatic=True)
    check_structure(structure, topology)
    plan = plan_of(
        unboxed(params),
        distribution,
        prunable=prunable,
        out_axes=out_axes,
        batch_axes=batch_axes,
        structure=structure,
        topology=topology,
        schedule=schedule,
    )
    check_plan(plan, topology)
    own = {path: count.layers[path].dense for path in plan.layers if path in count.layers}
    passes = dict.fromkeys(own, 0.0)
    paths = list(plan.layers)
    for one, numbers in grouped("topology", topology, paths):
        passes |= {p: _passes(one, plan, p, steps) for p in (paths[i] for i in numbers) if p in own}
    for path in own:
        # Layers of no topology keep the masks that they begin with.
        passes[path] = passes[path] or 3.0 * steps * float(_densities(plan, path, None)[0])
    rest = 3.0 * steps * (count.dense - sum(own.values()))
    return rest + sum(own[path] * passes[path] for path in own)


def _passes(topology: Topology, plan: Plan, path: str, steps: int) -> float:
    """How many dense forward passes of one layer a run is worth."""
    every = np.arange(steps, dtype=np.int32)
    is_update = np.broadcast_to(np.asarray(topology.is_update_step(every)), steps)
    # The density at first, and after each update.
    densities = np.append(_densities(plan, path, None), _densities(plan, path, every[is_update]))
    # The gradient that an update ranks was taken with the masks before it.
    density = densities[np.cumsum(is_update) - is_update]
    ranked = np.broadcast_to(np.asarray(topology.in_accumulation_window(every)), steps)
    if isinstance(topology.grow_by, Momentum):
        ranked = np.ones(steps, bool)
    if not topology.needs_dense_gradient:
        ranked = np.zeros(steps, bool)
    return float(np.sum(2 * density + np.where(ranked, 1.0, density)))


def _densities(plan: Plan, path: str, updates: np.ndarray | None) -> np.ndarray:
    """Of a leaf, after updates at these steps; None: before the first one."""
    names, shape = plan.layers[path].names, plan.shapes[path]
    if updates is None:
        counts = np.array([[plan.initial[name] for name in names]])
    elif path in plan.schedules:
        counts = np.asarray(jax.vmap(lambda step: plan.counts_at(path, step))(updates))
    else:
        counts = np.array([[plan.final[name] for name in names]] * len(updates))
    counts = counts.reshape(-1, len(names))
    split = Units.of(plan.layer(path), shape).split
    if split is not None:
        n_groups, _, n_weights = split.sizes
        counts = np.asarray(split.members_of(counts)) * n_groups * n_weights
    return counts.sum(axis=1) / math.prod(shape)
