"""Sparse training around any optax optimizer, with no hook in the training loop.

The wrapper keeps parameters exactly sparse, so the forward pass needs no mask, and the gradient
that JAX returns is already the dense gradient by which RigL grows. Within one ``update``:

1. The topology comes first, in a loop of one pass or none, so that nothing is copied on the steps
   between two updates; it ranks the weights and gradients as they came in.
2. Gradients and weights of inactive positions are zeroed, and the inner optimizer's state for them
   is put back to its initial value, also for weights that have just grown. All of it is elementwise
   and fuses with the inner update.
3. The inner optimizer steps, so schedules follow the training step.
4. Each inactive weight gets the update ``-w``, which ``w + (-w)`` turns into exactly 0. A forgotten
   ``apply_masks``, or a dense tree restored by mistake, heals on the first step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from sparseopt_jax import activity as bits
from sparseopt_jax.arguments import as_key, check_arguments, key_impl
from sparseopt_jax.axes import AxesByPath, check_axes, check_patterns, kernel_axes
from sparseopt_jax.by_path import ByPath, grouped
from sparseopt_jax.constraints import kept_masked, where_active
from sparseopt_jax.containers import (
    boxes_of,
    closed,
    held_like,
    opened,
    with_gradient,
)
from sparseopt_jax.explicit import in_auto_mode
from sparseopt_jax.frozen import frozen_leaves
from sparseopt_jax.grown_warmup import GrownWarmup, as_warmup, interval_of, scaled_by_age
from sparseopt_jax.initial_masks import draw_masks
from sparseopt_jax.inner_optimizer import accepted, is_placeholder, map_copies, param_copies
from sparseopt_jax.masks import (
    Distribution,
    apply_masks,
    counts_given,
    fitting,
)
from sparseopt_jax.plan import Plan, plan_of
from sparseopt_jax.prunable import Prunable, default_prunable
from sparseopt_jax.schedule_checks import check_plan, check_schedule, check_structure
from sparseopt_jax.schedules import Schedule
from sparseopt_jax.slots import keep_per_weight, reset_inactive, shared_slots
from sparseopt_jax.state import (
    NeverSparse,
    SparseTrainingState,
    active_masks,
    at_leaf,
    check_dense,
    count_fan_in,
    is_stand_in,
    is_state,
    maskable,
    settled_masks,
)
from sparseopt_jax.structures import Structure
from sparseopt_jax.topology import Topology
from sparseopt_jax.topology_update import Regime, accumulated, update_if_due
from sparseopt_jax.trees import (
    aligned,
    boxed_like,
    is_absent,
    is_masked_node,
    named_leaves,
    path_str,
    unboxed,
)
from sparseopt_jax.units import Units

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


def sparse_training(
    inner: optax.GradientTransformation,
    *,
    topology: ByPath[Topology],
    distribution: ByPath[Distribution] | None = None,
    masks: PyTree | None = None,
    schedule: Schedule | None = None,
    structure: ByPath[Structure] | None = None,
    seed: Any = 0,
    prunable: Prunable = default_prunable,
    out_axes: AxesByPath | None = None,
    batch_axes: AxesByPath = (),
    automatic: bool = True,
    grown_warmup: GrownWarmup | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Train sparsely with any optax optimizer.

    Args:
      inner: the optimizer, for example ``sparseopt(0.1)`` or ``optax.adam(1e-3)``. It gets the
        extra arguments ``masks`` and ``fan_in`` (see ``scale_by_sparseopt``) unless it rejects
        them, as line searches do.
      topology: when and how the masks change: ``Static``, ``SET``, ``RigL``, ``Prune``, ``ACDC``;
        or a mapping from glob patterns over paths to them, of which the first that matches counts.
        Layers that no pattern matches keep their masks.
      distribution: how many weights each layer keeps: ``Uniform``, ``ER``, ``ERK``, ``PerLayer``,
        ``Global``; or a mapping from patterns to them, each of which sees its layers only. Layers
        that no pattern matches stay dense.
      masks: in place of a distribution, the masks to start from: bool arrays in the structure and
        shapes of the parameters, True everywhere in leaves that ``prunable`` does not choose. They
        are copied. With a ``structure`` they have its pattern, or are dense. Traced ones, which
        cannot be looked at, and those of ``set_masks`` get it from the next topology update.
      schedule: how much over time: ``Cubic``, ``Linear``, ``OneShot``, ``from_optax(...)``. Layers
        start at its initial sparsity, at random where that is not dense, and the topology's updates
        bring them to the distribution's counts. None: these from the start.
      structure: in which pattern: ``NM``, ``Blocks``, ``Neurons``, ``ConstantFanIn``, or a mapping
        from patterns to them. Other layers, and layers that stay dense, have none.
      seed: an int, a JAX random key, or a traced one of either. Initial masks, random growth and
        ties derive from it.
      prunable: ``(path, leaf) -> bool``, which leaves may be sparse.
      out_axes: the axis or axes of kernels that index neurons, or a mapping from glob patterns over
        paths to them. Where nothing is given, each kernel's own; see ``scale_by_sparseopt``, which
        takes these from here.
      batch_axes: likewise the axis or axes that index the layers of stacked kernels. Each layer of
        a stack keeps its own number of weights.
      automatic: whether ``update`` follows the topology's schedule. With False the masks change
        only through ``update_topology``, for loops that schedule it themselves. Under ``jax.vmap``
        a scheduled update is computed on the steps on which one is due for any of the copies.
      grown_warmup: smaller updates for weights that have become active: an int ramps them linearly
        over that many steps (SMET), ``adam_bias_correction`` gives each weight Adam's bias
        correction of its own age, a function ``(age, step) -> scale`` does anything else; see
        there. Weights that were active from the start are not scaled. None: no difference.

    Returns:
      A transformation to be outermost but for wrappers that skip or accumulate whole steps
      (``optax.MultiSteps``, ``optax.apply_if_finite``, ``optax.inject_hyperparams``), and for
      ``optax.partition``: whatever changes its updates would change the ``-w`` of inactive weights.
      ``update`` needs ``params``, which may be a whole Equinox model; a leaf whose gradient is None
      gets none. Around ``optax.lookahead`` the parameters are
      ``optax.LookaheadParams``: both copies are kept sparse by the same masks, which have the
      structure of one of them.

      A layer whose gradient is zero everywhere, or whose update does not derive from it
      (``optax.set_to_zero``, ``optax.freeze``), keeps its topology.

    Raises:
      TypeError: an argument of the wrong type; from ``init``: prunable parameters not floating.
      ValueError: a schedule that the topology cannot follow; from ``init``: nothing to prune, a
        distribution, a structure or a pattern that does not fit, or a ``sparse_training`` inside;
        from ``update``: params missing, or masks that do not fit.

    Source: SparseOpt (arXiv 2605.27541); RigL (arXiv 1911.11134).

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 4))}
      >>> tx = sx.sparse_training(
      ...     sx.sparseopt(0.1),
      ...     distribution=sx.ERK(0.75),
      ...     topology=sx.RigL(interval=10, drop_fraction=0.3, end_step=75),
      ... )
      >>> opt_state = tx.init(params)
      >>> params = sx.apply_masks(params, sx.get_masks(opt_state))
      >>> grads = jax.grad(lambda p: jnp.sum(jnp.tanh(p["kernel"])))(params)
      >>> updates, opt_state = tx.update(grads, opt_state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> int(jnp.count_nonzero(params["kernel"]))
      16
    """
    check_arguments(inner, distribution, masks, topology, seed, prunable, automatic)
    check_axes("out_axes", out_axes)
    check_axes("batch_axes", batch_axes)
    check_schedule(schedule, topology, distribution, automatic)
    check_structure(structure, topology)
    warmup = as_warmup(grown_warmup, topology)
    inner = optax.with_extra_args_support(inner)
    initial_masks = masks
    given = None if masks is None or structure is None else counts_given(masks, batch_axes)

    def regimes_of(activity: PyTree) -> list[Regime]:
        """Each topology that may change masks by itself or when asked, with its leaves."""
        groups = grouped("topology", topology, list(named_leaves(activity)))
        return [Regime(t, leaves, batch_axes) for t, leaves in groups if leaves]

    def planned(weights: PyTree, warn: bool = True) -> Plan:
        return plan_of(
            weights,
            distribution,
            prunable=prunable,
            out_axes=out_axes,
            batch_axes=batch_axes,
            structure=structure,
            topology=topology,
            schedule=schedule,
            given=given,
            of_neurons=True,
            warn=warn,
        )

    def init_fn(params: PyTree) -> SparseTrainingState:
        if is_placeholder(params):
            return _outline(params)
        mask_key, topology_key = jax.random.split(as_key(seed))
        held = param_copies(params)[0]
        weights = unboxed(held)
        check_patterns("out_axes", out_axes, named_leaves(weights))
        check_patterns("batch_axes", batch_axes, named_leaves(weights))
        plan = planned(weights)
        layers, axes = plan.layers, plan.axes
        check_plan(plan, topology)
        if initial_masks is None:
            masks = draw_masks(mask_key, weights, plan)
        else:
            masks = fitting(aligned(initial_masks, weights, ("masks", "params")), weights)
            check_dense(masks, lambda path: path not in layers)
            for path, mask in named_leaves(masks).items():
                if given and path in given and path in layers:
                    Units.of(plan.layer(path), plan.shapes[path]).check(path, mask)
            masks = in_auto_mode(lambda m: m, like=weights)(jax.tree.map(jnp.array, masks))

        def byte(path: tuple[Any, ...], mask: Array) -> Any:
            if path_str(path) not in layers:
                return NeverSparse(mask.shape)
            return bits.initial(mask)

        def count(path: tuple[Any, ...], mask: Array) -> Any:
            if path_str(path) not in layers:
                return optax.MaskedNode()
            return count_fan_in(mask, kernel_axes(path_str(path), mask.ndim, axes, batch_axes))

        activity = jax.tree_util.tree_map_with_path(byte, masks)
        regimes_of(activity)  # Its patterns are checked here.
        inner_state = inner.init(map_copies(lambda p: apply_masks(p, masks), params))
        if any(map(is_state, jax.tree.leaves(inner_state, is_leaf=is_state))):
            raise ValueError(
                "inner must not hold another sparse_training: the outer one would undo its masks. "
                "Regimes that differ by layer are mappings, topology={'head/*': Static(), ...}, or "
                "sparse_trainings side by side in optax.partition"
            )
        return SparseTrainingState(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(topology_key),
            activity=boxed_like(activity, held),
            fan_in=jax.tree_util.tree_map_with_path(count, masks),
            changed_at=jnp.full(len(layers), -1, jnp.int32),
            accumulator=_empty_accumulator(activity, held),
            inner_state=inner_state,
        )

    def _empty_accumulator(activity: PyTree, params: PyTree) -> PyTree:
        regimes = [r for r in regimes_of(activity) if r.accumulates] if automatic else []
        if not regimes:
            return ()
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), unboxed(params))
        sums, structure = jax.tree.flatten(maskable(activity, zeros))
        accumulating = {i for regime in regimes for i in regime.leaves}
        sums = [s if i in accumulating else optax.MaskedNode() for i, s in enumerate(sums)]
        return boxed_like(jax.tree.unflatten(structure, sums), params)

    def _outline(placeholder: Any) -> SparseTrainingState:
        """The state of ``optax.tree.map_params``, with what stands for parameters in their place.

        Bytes and fan-in are no copies of the parameters: they lack leaves, or have own shapes.
        """
        return SparseTrainingState(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(as_key(seed)),
            activity=jnp.zeros(()),
            fan_in=jnp.zeros(()),
            changed_at=jnp.zeros(()),
            accumulator=jnp.zeros(()),
            inner_state=inner.init(placeholder),
        )

    def with_topology(
        state: SparseTrainingState,
        params: PyTree,
        grads: PyTree,
        inner_update: Callable[[PyTree], PyTree],
        now: bool,
    ) -> tuple[SparseTrainingState, Any]:
        """The state after the topology updates of this step, and whether it moves no weight."""
        paths = list(named_leaves(state.activity))

        def topology_key(number: int) -> Array:
            key = jax.random.wrap_key_data(state.key, impl=key_impl(seed))
            key = jax.random.fold_in(key, state.step)
            return key if len(regimes) == 1 else jax.random.fold_in(key, number)

        regimes, frozen, plan = regimes_of(state.activity), None, None
        skips: Any = False
        for number, regime in enumerate(regimes):
            is_update: Any = now or (automatic and regime.topology.is_update_step(state.step))
            if is_update is False:
                continue
            scores = grads
            if regime.accumulates and not now:
                scores, state = accumulated(regime, state, grads, is_update)
            if not (isinstance(is_update, jax.core.Tracer) or is_update):
                continue
            if regime.topology.skip_step:
                skips = skips | is_update
            if frozen is None:
                frozen = frozen_of(inner_update, grads, now)
            moving = regime._replace(
                leaves=tuple(i for i in regime.leaves if paths[i] not in frozen)
            )
            key = functools.partial(topology_key, number)
            if moving.leaves:
                plan = plan or planned(params, warn=False)
                state = update_if_due(moving, is_update, key, plan, state, params, scores)
        return state, skips

    def frozen_of(
        inner_update: Callable[[PyTree], PyTree], grads: PyTree, now: bool
    ) -> frozenset[str]:
        try:
            return frozen_leaves(inner_update, grads)
        except TypeError:
            if not now:
                raise
            # An update by hand lacks what the optimizer asks for on a step, such as the loss.
            return frozenset()

    def update_fn(
        updates: PyTree,
        state: SparseTrainingState,
        params: PyTree | None = None,
        *,
        update_topology_only: bool = False,
        **extra: Any,
    ) -> tuple[PyTree, SparseTrainingState]:
        if params is None:
            raise ValueError(
                "params is missing: sparse_training needs update(grads, opt_state, params)"
            )
        held, (state, params, grads) = state, opened(state, params, updates)
        weights = param_copies(params)[0]
        box = functools.partial(boxed_like, like=boxes_of(held))

        def inner_init(params: PyTree) -> PyTree:
            return inner.init(map_copies(box, params))

        def inner_update(
            grads: PyTree, inner_state: PyTree, params: PyTree, **given: Any
        ) -> tuple[PyTree, PyTree]:
            params = map_copies(lambda p: box(with_gradient(state.activity, grads, p)), params)
            steps, after = inner.update(box(grads), inner_state, params, **given)
            return unboxed(steps), after

        def offered(state: SparseTrainingState) -> dict[str, Any]:
            """What the inner optimizer may read: masks of all leaves, and the neurons' fan-in."""
            return {"masks": box(_all_masks(state, weights)), "fan_in": state.fan_in}

        names = accepted(
            functools.partial(inner_update, grads, state.inner_state, params),
            offered(state),
            extra,
        )

        def arguments(state: SparseTrainingState) -> dict[str, Any]:
            return extra | {name: offered(state)[name] for name in names}

        def first_updates(grads: PyTree) -> PyTree:
            steps, _ = inner_update(grads, state.inner_state, params, **arguments(state))
            return param_copies(steps)[0]

        new, skips = with_topology(state, weights, grads, first_updates, update_topology_only)
        keep = functools.partial(where_active, active_masks(new))

        def keep_masked(steps: PyTree, weights: PyTree) -> PyTree:
            return held_like(kept_masked(active_masks(new), steps, weights), updates)

        if update_topology_only:
            nothing = map_copies(functools.partial(jax.tree.map, jnp.zeros_like), params)
            return map_copies(keep_masked, nothing, params), closed(new, held)

        sparse = map_copies(keep, params)
        shared = shared_slots(inner_init, params)
        inner_state = reset_inactive(
            state.inner_state, inner_init(sparse), settled_masks(new), shared
        )
        steps, inner_after = inner_update(keep(grads), inner_state, sparse, **arguments(new))
        if skips is not False:
            steps = jax.tree.map(lambda u: jnp.where(skips, jnp.zeros_like(u), u), steps)
            inner_after = keep_per_weight(skips, inner_state, inner_after, weights, shared)
        if warmup is not None:
            steps = map_copies(lambda u: warmed(u, new), steps)
        new = new._replace(step=optax.safe_increment(state.step), inner_state=inner_after)
        return map_copies(keep_masked, steps, params), closed(new, held)

    def warmed(updates: PyTree, state: SparseTrainingState) -> PyTree:
        """The updates of maskable leaves times the scale of each weight's age."""
        assert warmup is not None
        intervals = {
            i: interval_of(regime.topology)
            for regime in regimes_of(state.activity)
            for i in regime.leaves
        }
        activity, structure = jax.tree.flatten(state.activity)
        own = [
            scaled_by_age(
                warmup, u, a, intervals.get(i, 0), at_leaf(state.changed_at, i, a), state.step
            )
            for i, (u, a) in enumerate(
                zip(jax.tree.leaves(maskable(state.activity, updates)), activity, strict=True)
            )
        ]
        return jax.tree.map(
            lambda a, scaled, u: u if is_stand_in(a) else scaled,
            state.activity,
            jax.tree.unflatten(structure, own),
            updates,
            is_leaf=is_stand_in,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _all_masks(state: SparseTrainingState, params: PyTree) -> PyTree:
    """The masks, True everywhere for leaves that are never sparse."""
    return jax.tree.map(
        lambda m, p: m if is_absent(p) or not is_masked_node(m) else jnp.ones_like(p, jnp.bool_),
        active_masks(state),
        params,
        is_leaf=is_masked_node,
    )
