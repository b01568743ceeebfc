"""Whether the answers to how much, when, by what and in which pattern go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt_jax.by_path import ByPath, grouped
from sparseopt_jax.plan import Plan
from sparseopt_jax.schedules import Schedule
from sparseopt_jax.structures import Structure
from sparseopt_jax.topology import Static, Topology


def check_is_schedule(schedule: Any) -> None:
    """Raise unless ``schedule`` is a density schedule or None."""
    if schedule is not None and not isinstance(schedule, Schedule):
        hint = "; from_optax(schedule, end_step) makes one" if callable(schedule) else ""
        raise TypeError(
            "schedule must be a density schedule such as Cubic(0, 1000), or None, got "
            f"{schedule!r}{hint}"
        )


def check_schedule(
    schedule: Schedule | None, topology: ByPath[Topology], distribution: Any, automatic: bool
) -> None:
    """Raise where a topology cannot follow the density schedule."""
    check_is_schedule(schedule)
    topologies = _values(topology)
    if schedule is not None and all(isinstance(t, Static) or t.own_schedule for t in topologies):
        raise ValueError(
            f"schedule={schedule} is of no use to topology={topology}, which has one of its own or "
            "never changes masks; Prune(interval, end_step) and RigL follow it"
        )
    for one in topologies:
        followed = one.own_schedule or schedule
        if one.needs_schedule and followed is None:
            raise ValueError(
                f"{one} needs a density schedule, for example schedule=Cubic(begin_step=0, "
                f"end_step={one.last_update}): without one there is nothing to prune"
            )
        if followed is not None and not isinstance(one, Static):
            _check_followed(followed, one, distribution, automatic)


def _check_followed(
    schedule: Schedule, topology: Topology, distribution: Any, automatic: bool
) -> None:
    if distribution is None:
        raise ValueError(
            f"masks cannot be followed by {schedule}, which leads to the counts of a distribution: "
            "give a distribution in their place"
        )
    if getattr(topology, "drop_by", None) == "sign":
        raise ValueError(
            f"drop_by='sign' keeps the number of weights, so it cannot follow {schedule}; "
            "drop_by='magnitude' can"
        )
    scheduled = automatic and type(topology).is_update_step is Topology.is_update_step
    if scheduled and topology.last_update < schedule.end_step:
        raise ValueError(
            f"schedule={schedule} ends at step {schedule.end_step}, after the last update of "
            f"{topology} at step {topology.last_update}: its final counts would never be reached"
        )


def check_structure(structure: Any, topology: ByPath[Topology] | None = None) -> None:
    """Raise unless ``structure`` is one, several by pattern, or None, and goes with topologies."""
    if structure is None:
        return
    for one in _values(structure):
        if not isinstance(one, Structure):
            raise TypeError(f"structure must be a value such as NM(2, 4), or None, got {one!r}")
    for pattern in structure if isinstance(structure, Mapping) else ():
        if not isinstance(pattern, str):
            raise TypeError(f"structure patterns must be strings, got {pattern!r}")
    if any(getattr(one, "drop_by", None) == "sign" for one in _values(topology)):
        raise ValueError(
            "drop_by='sign' drops single weights by their sign, so it cannot keep to "
            f"structure={structure}; drop_by='magnitude' can"
        )


def check_plan(plan: Plan, topology: ByPath[Topology]) -> None:
    """Raise where a density schedule asks for more weights than a topology gives a layer."""
    paths = list(plan.layers)
    for one, numbers in grouped("topology", topology, paths):
        own = [paths[i] for i in numbers if paths[i] in plan.schedules]
        if not own or not one.only_drops:
            continue
        schedule = plan.schedules[own[0]]
        for name in (name for path in own for name in plan.layers[path].names):
            if plan.initial[name] < plan.final[name]:
                raise ValueError(
                    f"initial_sparsity={schedule.initial_sparsity} leaves layer {name!r} "
                    f"{plan.initial[name]} weights, less than the {plan.final[name]} that its "
                    f"distribution gives it, and {type(one).__name__} only prunes: lower it, or "
                    "use RigL, which grows"
                )
        _check_falls(schedule, one)


def _check_falls(schedule: Schedule, topology: Topology) -> None:
    steps = np.arange(topology.first_update, topology.last_update + 1, topology.interval)
    with jax.ensure_compile_time_eval():
        ahead = np.asarray(jax.vmap(schedule.remaining)(jnp.asarray(steps, jnp.int32)), np.float64)
    if steps.size and (rising := np.flatnonzero(np.diff(ahead) > 1e-6)).size:
        step = steps[rising[0] + 1]
        raise ValueError(
            f"schedule={schedule} asks for more weights at step {step} than at the update before, "
            f"and {type(topology).__name__} only prunes: RigL follows it"
        )


def _values(by_path: ByPath[Any]) -> list[Any]:
    return list(by_path.values()) if isinstance(by_path, Mapping) else [by_path]
