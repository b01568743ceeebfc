"""Whether the answers to how much, when, by what and in which pattern go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt_jax.by_path import ByPath, grouped
from sparseopt_jax.plan import Plan
from sparseopt_jax.schedules import MILLION, Schedule
from sparseopt_jax.structures import check_is_structure
from sparseopt_jax.topology import Static, Topology

# Of parts of a way, in float32.
_TOLERANCE = 1e-6


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
        whose = f"the schedule of {topology}" if topology.own_schedule else schedule
        raise ValueError(
            f"masks cannot be followed by {whose}, which leads to the counts of a distribution: "
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
    check_is_structure(structure)
    if structure is not None and any(
        getattr(one, "drop_by", None) == "sign" for one in _values(topology)
    ):
        raise ValueError(
            "drop_by='sign' drops single weights by their sign, so it cannot keep to "
            f"structure={structure}; drop_by='magnitude' can"
        )


def check_plan(plan: Plan, topology: ByPath[Topology]) -> None:
    """Raise where a topology cannot bring its layers from the initial counts to the final ones."""
    paths = list(plan.layers)
    for one, numbers in grouped("topology", topology, paths):
        own = [paths[i] for i in numbers if paths[i] in plan.schedules]
        if not own:
            continue
        schedule = plan.schedules[own[0]]
        check_way(plan, own, one)
        if not one.only_drops:
            continue
        for name in (name for path in own for name in plan.layers[path].names):
            if plan.initial[name] < plan.final[name]:
                raise ValueError(
                    f"initial_sparsity={schedule.initial_sparsity} leaves layer {name!r} "
                    f"{plan.initial[name]} weights, less than the {plan.final[name]} that its "
                    f"distribution gives it, and {type(one).__name__} only prunes: lower it, or "
                    "use RigL, which grows"
                )
        steps = _update_steps(one, schedule)
        rising = np.flatnonzero(np.diff(_ahead(schedule, steps)) > _TOLERANCE)
        if rising.size:
            raise ValueError(
                f"schedule={schedule} asks for more weights at step {steps[rising[0] + 1]} than at "
                f"the update before, and {type(one).__name__} only prunes: RigL follows it"
            )


def check_way(plan: Plan, paths: Sequence[str], topology: Topology | None = None) -> None:
    """Raise where a schedule leads elsewhere than to the distribution, or beyond its ends.

    Args:
      plan: of all layers.
      paths: some that share a schedule.
      topology: what looks at it on its updates; None: it is looked at on each step.
    """
    schedule = plan.schedules[paths[0]]
    names = [name for path in paths for name in plan.layers[path].names]
    assert plan.distribution is not None
    for one, numbers in grouped("distribution", plan.distribution, list(plan.final)):
        sparsity, last = getattr(one, "sparsity", None), schedule.final_sparsity
        concerned = not set(names).isdisjoint(list(plan.final)[i] for i in numbers)
        if not concerned or sparsity is None or last is None:
            continue
        if abs(last - sparsity) > _TOLERANCE:
            raise ValueError(
                f"schedule must end at the sparsity of distribution={one}, {sparsity}, but "
                f"schedule({schedule.end_step}) is {last:.6g}: change either"
            )
    steps = _update_steps(topology, schedule)
    ahead = _ahead(schedule, steps)
    beyond = np.flatnonzero(~((ahead >= -_TOLERANCE) & (ahead <= 1 + _TOLERANCE)))
    if beyond.size:
        raise ValueError(
            f"schedule={schedule} must stay between its first density and its last, but at step "
            f"{steps[beyond[0]]} the part of the way that is ahead is {ahead[beyond[0]]:.6g}, "
            "outside [0, 1]"
        )


def _update_steps(topology: Topology | None, schedule: Schedule) -> np.ndarray:
    """Up to the schedule's end; all steps where the topology has its own way to choose them.

    Of a run of more than a million updates, some.
    """
    first, last, interval = 0, schedule.end_step, 1
    if topology is not None and type(topology).is_update_step is Topology.is_update_step:
        first, interval = topology.first_update, topology.interval
        last = min(topology.last_update, last)
    some = 1 + max(0, last - first) // interval // MILLION
    return np.arange(first, last + 1, interval * some)


def _ahead(schedule: Schedule, steps: np.ndarray) -> np.ndarray:
    if not steps.size:
        return np.zeros(0)
    with jax.ensure_compile_time_eval():
        ahead = jax.vmap(schedule.remaining)(jnp.asarray(steps, jnp.int32))
    return np.asarray(ahead, np.float64)


def _values(by_path: ByPath[Any]) -> list[Any]:
    return list(by_path.values()) if isinstance(by_path, Mapping) else [by_path]
