"""One topology's update of the layers that it is for, inside the state of ``sparse_training``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from sparseopt_jax import activity as bits
from sparseopt_jax.axes import AxesByPath
from sparseopt_jax.criteria import Momentum
from sparseopt_jax.explicit import varying_as
from sparseopt_jax.outlining import on_one_cpu, outlined
from sparseopt_jax.plan import Plan
from sparseopt_jax.preconditioner import scale_by_fan_in
from sparseopt_jax.state import SparseTrainingState, at_leaf, maskable, recount
from sparseopt_jax.topology import Topology
from sparseopt_jax.tpu_layouts import as_arguments_lie
from sparseopt_jax.trees import named_leaves

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


class Regime(NamedTuple):
    """A topology and the leaves that it is for.

    Attributes:
      topology: when and how the masks of these leaves change.
      leaves: their numbers among the maskable leaves.
      batch_axes: as in ``sparse_training``.
    """

    topology: Topology
    leaves: tuple[int, ...]
    batch_axes: AxesByPath

    @property
    def accumulates(self) -> bool:
        """Whether something of the gradients of earlier steps is kept."""
        return self.topology.accumulate_steps > 1 or self._momentum is not None

    @property
    def _momentum(self) -> Momentum | None:
        grow_by = self.topology.grow_by
        return grow_by if isinstance(grow_by, Momentum) else None

    def summed(self, before: Array, gradient: Array, step: Any) -> Array:
        """The sum, or the average, with the gradient of a step, float32."""
        gradient = gradient.astype(jnp.float32)
        if self._momentum is not None:
            decay = self._momentum.decay
            return decay * before + (1 - decay) * gradient
        counted = self.topology.in_accumulation_window(step)
        return before + jnp.where(counted, gradient, 0.0)

    def left(self, before: Array, after: Array, is_update: Any) -> Array:
        """What a step leaves of it: a sum begins again after an update, an average goes on.

        An average has no end, so what is not finite stays out of it.
        """
        if self._momentum is not None:
            return jnp.where(jnp.isfinite(after), after, before)
        return jnp.where(is_update, 0.0, after)


def accumulated(
    regime: Regime, state: SparseTrainingState, grads: PyTree, is_update: Any
) -> tuple[PyTree, SparseTrainingState]:
    """What to rank growth by, with the gradient of this step, and the state that has it summed."""
    gradients = jax.tree.leaves(maskable(state.activity, grads))
    # The sums are of all leaves that some regime accumulates.
    sums, structure = jax.tree.flatten(state.accumulator)
    paths = list(named_leaves(state.activity))
    scores: list[Any] = list(gradients)
    for place, path in enumerate(named_leaves(state.accumulator)):
        i = paths.index(path)
        if i in regime.leaves:
            scores[i] = regime.summed(sums[place], gradients[i], state.step)
            sums[place] = regime.left(sums[place], scores[i], is_update)
    kept = state._replace(accumulator=jax.tree.unflatten(structure, sums))
    return jax.tree.unflatten(jax.tree.structure(state.fan_in), scores), kept


def update_if_due(
    regime: Regime,
    is_update: Any,
    key: Callable[[], Array],
    plan: Plan,
    state: SparseTrainingState,
    params: PyTree,
    scores: PyTree,
) -> SparseTrainingState:
    """``state`` after an update of the regime's leaves at ``state.step``, where ``is_update``.

    ``key`` makes the update's key, where it is used: the body of a loop may not consume a key from
    outside of it.
    """
    topology, leaves = regime.topology, regime.leaves
    old_bytes, structure = jax.tree.flatten(state.activity)
    old_counts, counts_structure = jax.tree.flatten(state.fan_in)
    weights, ranked = (jax.tree.leaves(maskable(state.activity, t)) for t in (params, scores))
    again = state.changed_at == state.step
    paths = list(named_leaves(state.activity))

    def tree(own: Sequence[Any]) -> PyTree:
        """A tree of these leaves alone."""
        every: list[Any] = [optax.MaskedNode()] * len(old_bytes)
        for i, leaf in zip(leaves, own, strict=True):
            every[i] = leaf
        return jax.tree.unflatten(counts_structure, every)

    def change(activity: list[Array], fan_in: list[Array]) -> tuple[list[Array], list[Array]]:
        activity = as_arguments_lie(activity)
        own_scores = tree(as_arguments_lie([ranked[i] for i in leaves]))
        if topology.grow_by == "corrected_gradient":
            own_scores = scale_by_fan_in(own_scores, tree(fan_in), None, regime.batch_axes)
        own_weights = as_arguments_lie([weights[i] for i in leaves])
        own_masks = [bits.is_active(a) for a in activity]
        layers = plan.described([paths[i] for i in leaves], state.step, own_masks, own_weights)
        given = tree(own_masks)
        masks = topology.update(
            key(), state.step, given, tree(own_weights), own_scores, tree(layers)
        )
        _check_returned(topology, masks, given)
        # Behind the barrier layers of one shape are alike, and the compiler makes their bytes and
        # counts with one kernel; without it each is fused with its part of a stack.
        new = lax.optimization_barrier(jax.tree.leaves(masks))  # type: ignore[no-untyped-call]
        activity, fan_in = _renewed(activity, fan_in, new, again, leaves)
        return as_arguments_lie(activity), fan_in

    own = [old_bytes[i] for i in leaves], [old_counts[i] for i in leaves]
    reads = [weights[i] for i in leaves], [ranked[i] for i in leaves], state.key, state.step
    for new, old in zip(
        _in_place_if(is_update, change, own, reads), (old_bytes, old_counts), strict=True
    ):
        for i, leaf in zip(leaves, new, strict=True):
            old[i] = leaf
    of_regime = np.isin(np.arange(len(old_bytes)), leaves)
    return state._replace(
        activity=jax.tree.unflatten(structure, old_bytes),
        fan_in=jax.tree.unflatten(counts_structure, old_counts),
        changed_at=jnp.where(of_regime & is_update, state.step, state.changed_at),
    )


def _renewed(
    activity: list[Array],
    fan_in: list[Array],
    masks: list[Array],
    again: Array,
    leaves: Sequence[int],
) -> tuple[list[Array], list[Array]]:
    """The bytes and fan-ins of ``leaves`` for new masks; ``again`` is of all leaves."""

    def default(
        activity: list[Array], fan_in: list[Array], masks: list[Array], again: Array
    ) -> tuple[list[Array], list[Array]]:
        new = [
            bits.changed(a, m, at_leaf(again, i, a))
            for i, a, m in zip(leaves, activity, masks, strict=True)
        ]
        return new, [recount(c, m) for c, m in zip(fan_in, masks, strict=True)]

    def cpu(
        activity: list[Array], fan_in: list[Array], masks: list[Array], again: Array
    ) -> tuple[list[Array], list[Array]]:
        new = [
            outlined(_changed, a, m, again, i).reshape(a.shape)
            for i, a, m in zip(leaves, activity, masks, strict=True)
        ]
        return new, [outlined(_recount, c, m) for c, m in zip(fan_in, masks, strict=True)]

    renewed: tuple[list[Array], list[Array]] = on_one_cpu(
        cpu, default, activity, fan_in, masks, again, traced=masks[0]
    )
    return renewed


def _changed(activity: Array, mask: Array, again: Array, i: Array) -> Array:
    """Of one axis: a CPU's compiler unrolls loops over short ones."""
    return bits.changed(activity.reshape(-1), mask.reshape(-1), again[i])


def _recount(fan_in: Array, mask: Array) -> Array:
    """``recount`` as one of two sums: of a single one a CPU's compiler makes three kernels.

    The first of these writes the mask out as int32.
    """
    axes = tuple(axis for axis, size in enumerate(fan_in.shape) if size == 1)
    ones = mask.astype(jnp.int32), jnp.zeros(mask.shape, jnp.int32)
    zeros = jnp.int32(0), jnp.int32(0)
    found, nothing = lax.reduce(ones, zeros, lambda x, y: (x[0] + y[0], x[1] + y[1]), axes)
    return (found + nothing).reshape(fan_in.shape)


def _check_returned(topology: Topology, masks: PyTree, given: PyTree) -> None:
    """Raise unless a topology, which may be the user's own, returned masks like those given."""

    def kinds(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", tree)

    if kinds(masks) != kinds(given):
        raise TypeError(
            f"update of {topology} must return masks of the dtype, shapes and structure that it "
            f"was given, {jax.tree.leaves(kinds(given))}, got {jax.tree.leaves(kinds(masks))}"
        )


def _in_place_if(
    condition: Any, change: Callable[..., Any], values: tuple[Any, ...], reads: Any
) -> Any:
    """``change(*values)`` where ``condition``, else ``values``, which are not copied then.

    That is ``lax.cond``, written as a loop of one pass or none: XLA gives the values of a loop one
    buffer from start to end, where each branch of a conditional, also the one that does nothing,
    would copy what it returns. A condition whose value is known, outside of ``jax.jit``, needs no
    loop, which would be compiled again on each call. ``reads`` is what ``change`` closes over.
    """
    if not isinstance(condition, jax.core.Tracer):
        return change(*values) if condition else values

    def once(carry: Any) -> Any:
        is_due, values = carry
        return jnp.zeros_like(is_due), change(*values)

    start = condition, varying_as(values, values, reads)
    return lax.while_loop(lambda carry: carry[0], once, start)[1]
