"""A chain link after which each layer has its k largest weights, on every step."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from sparseopt_jax.axes import AxesByPath
from sparseopt_jax.by_path import ByPath
from sparseopt_jax.explicit import in_auto_mode
from sparseopt_jax.masks import Distribution
from sparseopt_jax.one_shot import largest_of_layers
from sparseopt_jax.plan import Plan, plan_of
from sparseopt_jax.prunable import Prunable, default_prunable
from sparseopt_jax.schedule_checks import check_is_schedule, check_structure, check_way
from sparseopt_jax.schedules import Schedule
from sparseopt_jax.structures import Structure
from sparseopt_jax.trees import aligned, boxed_like, named_leaves, path_str, unboxed

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


class KeepTopKState(NamedTuple):
    """The state of ``keep_top_k``.

    Attributes:
      step: number of updates so far, int32.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> int(sx.keep_top_k(sx.ERK(0.5)).init({"kernel": jnp.ones((4, 4))}).step)
      0
    """

    step: Array


def keep_top_k(
    distribution: ByPath[Distribution],
    schedule: Schedule | None = None,
    structure: ByPath[Structure] | None = None,
    *,
    prunable: Prunable = default_prunable,
    out_axes: AxesByPath | None = None,
    batch_axes: AxesByPath = (),
) -> optax.GradientTransformation:
    """Keep the k largest magnitudes of each layer after every step; the last link of a chain.

    The optimizer ahead of it is dense: all weights have gradients and moments, and one that was
    zeroed comes back once an update makes it large enough. Among the magnitudes of ``w + u`` the k
    largest are kept, and the update ``u`` of all other weights is ``-w``, so that they are exactly
    0 after ``optax.apply_updates``. NaN ranks last, the lowest index first among equals. The masks
    are ``params != 0``. A weight that is itself NaN or infinite is beyond what an update can mend:
    put ``optax.apply_if_finite`` around the chain where gradients may be.

    Args:
      distribution: how many weights each layer keeps in the end, as in ``init_masks``.
      schedule: how much over time, from the number of updates before: ``Linear``, ``Cubic``,
        ``OneShot`` or ``from_optax(...)``. None: the distribution's counts from the first step.
      structure: in which pattern, as in ``masks_from_scores``.
      prunable: ``(path, leaf) -> bool``, which leaves may be sparse; others pass.
      out_axes: as in ``init_masks``.
      batch_axes: as in ``init_masks``.

    Returns:
      A transformation whose state is a ``KeepTopKState``. Its ``update`` needs ``params``; updates
      of layers come out in the promoted dtype of update and parameter, which holds ``-w``.

    Raises:
      TypeError: ``schedule`` is no density schedule, or ``structure`` none; from ``init`` and
        ``update``: a leaf chosen by ``prunable`` is not floating.
      ValueError: from ``init`` and ``update``: nothing is prunable, or the distribution or the
        structure does not fit the layers; from ``update``: without ``params``.

    Source: the weights' projection after each step in Gao et al., Weight-sparse transformers have
    interpretable circuits (arXiv 2511.13653).

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> tx = optax.chain(optax.lion(1e-3), sx.keep_top_k(sx.Uniform(0.75, dense_first=False)))
      >>> params = {"kernel": jnp.array([[4.0, -3.0], [2.0, -1.0]]), "bias": jnp.ones(2)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> (optax.apply_updates(params, updates)["kernel"] != 0).tolist()
      [[True, False], [False, False]]
    """
    check_is_schedule(schedule)
    check_structure(structure)

    def planned(params: PyTree, warn: bool) -> Plan:
        return plan_of(
            params,
            distribution,
            prunable=prunable,
            out_axes=out_axes,
            batch_axes=batch_axes,
            structure=structure,
            schedule=schedule,
            warn=warn,
        )

    def init_fn(params: PyTree) -> KeepTopKState:
        plan = planned(unboxed(params), warn=True)  # Raises where they do not fit.
        if schedule is not None:
            check_way(plan, list(plan.layers))
        return KeepTopKState(jnp.zeros((), jnp.int32))

    def update_fn(
        updates: PyTree, state: KeepTopKState, params: PyTree | None = None
    ) -> tuple[PyTree, KeepTopKState]:
        if params is None:
            raise ValueError("params is missing: keep_top_k needs update(grads, opt_state, params)")
        steps = unboxed(updates)
        weights = aligned(params, steps, ("params", "updates"), surplus=True)
        plan = planned(weights, warn=False)

        def keep(steps: dict[str, Array], weights: dict[str, Array], step: Array) -> Any:
            # What apply_updates will make of them.
            after = {
                path: (w.astype(steps[path].dtype) + steps[path]).astype(w.dtype)
                for path, w in weights.items()
            }
            counts = {path: plan.counts_at(path, step) for path in after}
            kept = largest_of_layers(after, plan, counts, by_magnitude=True)
            return {
                path: jnp.where(kept[path], steps[path], -w.astype(steps[path].dtype))
                for path, w in weights.items()
            }

        own = {path: w for path, w in named_leaves(weights).items() if path in plan.layers}
        by_path = {
            path: u.astype(_promoted(u, own[path]))
            for path, u in named_leaves(steps).items()
            if path in own
        }
        kept = in_auto_mode(keep, like=own)(by_path, own, state.step)
        new = jax.tree_util.tree_map_with_path(lambda path, u: kept.get(path_str(path), u), steps)
        return boxed_like(new, updates), KeepTopKState(optax.safe_increment(state.step))

    return optax.GradientTransformation(init_fn, update_fn)


def _promoted(update: Array, weight: Array) -> Any:
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(update.dtype, weight.dtype)
