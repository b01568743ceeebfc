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

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sparseopt_jax.arguments import as_key, check_arguments
from sparseopt_jax.axes import AxesByPath, check_axes, check_patterns, kernel_axes
from sparseopt_jax.explicit import in_auto_mode
from sparseopt_jax.explored import pack
from sparseopt_jax.inner_optimizer import copies, each_copy, is_placeholder, reads_masks
from sparseopt_jax.masks import (
    Distribution,
    Prunable,
    apply_masks,
    check_masks,
    default_prunable,
    init_masks,
    is_hidden,
    maskable_layers,
    named_leaves,
    path_str,
)
from sparseopt_jax.preconditioner import scale_by_fan_in
from sparseopt_jax.slots import keep_per_weight, reset_inactive, shared_slots
from sparseopt_jax.state import (
    SparseTrainingState,
    check_dense,
    count_fan_in,
    emptied,
    find_state,
    maskable,
    newly_active,
    recount,
    replace_state,
    without_grown,
)
from sparseopt_jax.topology import Topology

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


class SparseTraining(optax.GradientTransformationExtraArgs):
    """What ``sparse_training`` returns: an optax transformation that can also update its topology.

    Attributes:
      update_topology: ``(state, params, grads) -> state``, one topology update at ``state.step``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> tx = sx.sparse_training(
      ...     optax.sgd(0.1), distribution=sx.ERK(0.5), topology=sx.SET(10, 0.5, 100))
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> state = tx.update_topology(tx.init(params), params, params)
      >>> int(sx.get_masks(state)["kernel"].sum())
      4
    """

    update_topology: Callable[[SparseTrainingState, PyTree, PyTree], SparseTrainingState]


def sparse_training(
    inner: optax.GradientTransformation,
    *,
    topology: Topology,
    distribution: Distribution | None = None,
    masks: PyTree | None = None,
    seed: Any = 0,
    prunable: Prunable = default_prunable,
    static_layers: Callable[[str], bool] | None = None,
    out_axes: AxesByPath = -1,
    batch_axes: AxesByPath = (),
    automatic: bool = True,
) -> SparseTraining:
    """Train sparsely with any optax optimizer.

    Args:
      inner: the optimizer, for example ``sparseopt(0.1)`` or ``optax.adam(1e-3)``. It gets the
        extra arguments ``masks`` and ``fan_in`` where it reads them (``scale_by_sparseopt`` does).
      topology: when and how the masks change: ``Static``, ``SET``, ``RigL``.
      distribution: how many weights each layer keeps: ``Uniform``, ``ER``, ``ERK``, ``PerLayer``.
      masks: in place of a distribution, the masks to start from: bool arrays in the structure and
        shapes of the parameters, True everywhere in leaves that ``prunable`` does not choose.
      seed: an int, a JAX random key, or a traced one of either. Initial masks, random growth and
        ties derive from it.
      prunable: ``(path, leaf) -> bool``, which leaves may be sparse.
      static_layers: predicate over the path of a leaf; where it is True the masks never change.
      out_axes: the axis or axes of kernels that index neurons, or a mapping from glob patterns over
        paths to them; see ``fan_in``. Give ``scale_by_sparseopt`` the same, or it counts the masks
        again on each step.
      batch_axes: likewise the axis or axes that index the layers of stacked kernels. Each layer of
        a stack keeps its own number of weights.
      automatic: whether ``update`` follows the topology's schedule. With False the masks change
        only through ``update_topology``, for loops that schedule it themselves. Under ``jax.vmap``
        a scheduled update is computed on the steps on which one is due for any of the copies.

    Returns:
      A transformation to be outermost but for wrappers that skip or accumulate whole steps
      (``optax.MultiSteps``, ``optax.apply_if_finite``, ``optax.inject_hyperparams``): whatever
      changes its updates would change the ``-w`` of inactive weights. ``update`` needs ``params``.
      Around ``optax.lookahead`` the parameters are ``optax.LookaheadParams``: both copies are kept
      sparse by the same masks, which have the structure of one of them.

    Raises:
      TypeError: an argument of the wrong type; from ``init``: prunable parameters not floating.
      ValueError: from ``init``: nothing to prune, or a distribution that does not fit; from
        ``update``: params missing, or masks that do not fit them.

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
    check_arguments(inner, distribution, masks, topology, static_layers, automatic)
    check_axes("out_axes", out_axes)
    check_axes("batch_axes", batch_axes)
    mask_key, topology_key = jax.random.split(as_key(seed))
    key_impl = jax.random.key_impl(topology_key)
    inner = optax.with_extra_args_support(inner)
    accumulates = automatic and topology.accumulate_steps > 1
    masks_are_read: list[bool] = []
    found_shared: dict[Any, frozenset[Any]] = {}
    initial_masks = masks

    def init_fn(params: PyTree) -> SparseTrainingState:
        if is_placeholder(params):
            return _outline(params)
        weights = copies(params)[0]
        layers = maskable_layers(weights, prunable, batch_axes)
        check_patterns("out_axes", out_axes, named_leaves(weights))
        check_patterns("batch_axes", batch_axes, named_leaves(weights))
        if initial_masks is None:
            assert distribution is not None  # check_arguments
            masks = init_masks(
                mask_key, weights, distribution, prunable=prunable, batch_axes=batch_axes
            )
        else:
            check_masks(initial_masks, weights)
            check_dense(initial_masks, lambda path: path not in layers)
            masks = in_auto_mode(lambda m: m, like=weights)(
                jax.tree.map(jnp.asarray, initial_masks)
            )

        def count(path: tuple[Any, ...], mask: Array) -> Any:
            if path_str(path) not in layers:
                return optax.MaskedNode()
            return count_fan_in(mask, kernel_axes(path_str(path), mask.ndim, out_axes, batch_axes))

        fan_in = jax.tree_util.tree_map_with_path(count, masks)
        accumulator: PyTree = ()
        if accumulates:
            zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), weights)
            accumulator = maskable(fan_in, zeros)
        explored = jax.tree.map(pack, maskable(fan_in, masks))
        return SparseTrainingState(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(topology_key),
            masks=masks,
            fan_in=fan_in,
            explored=explored,
            grown=jax.tree.map(jnp.zeros_like, explored),
            accumulator=accumulator,
            inner_state=inner.init(each_copy(lambda p: apply_masks(p, masks), params)),
        )

    def _outline(placeholder: Any) -> SparseTrainingState:
        """The state of ``optax.tree.map_params``, with what stands for parameters in their place.

        The fan-in and the packed sets are no copies of the parameters: they have their own shapes.
        """
        return SparseTrainingState(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(topology_key),
            masks=placeholder,
            fan_in=jnp.zeros(()),
            explored=jnp.zeros(()),
            grown=jnp.zeros(()),
            accumulator=placeholder if accumulates else (),
            inner_state=inner.init(placeholder),
        )

    def slots_shared(params: PyTree) -> frozenset[Any]:
        """``shared_slots``, found once for parameters of the same structure and shapes."""
        leaves, structure = jax.tree.flatten(params)
        known = structure, tuple(jnp.shape(leaf) for leaf in leaves)
        if known not in found_shared:
            found_shared[known] = shared_slots(inner.init, params)
        return found_shared[known]

    def moving(fan_in: PyTree, tree: PyTree) -> PyTree:
        """``tree`` without the leaves whose masks never change."""
        tree = maskable(fan_in, tree)
        if static_layers is None:
            return tree
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: optax.MaskedNode() if static_layers(path_str(path)) else leaf, tree
        )

    def updated_topology(
        state: SparseTrainingState, params: PyTree, scores: PyTree
    ) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        """Masks, fan-in, explored set and grown weights after an update at ``state.step``."""
        if topology.grow_by == "corrected_gradient":
            scores = scale_by_fan_in(scores, state.fan_in, None, out_axes, batch_axes)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=key_impl), state.step)
        masks = topology.update(
            key,
            state.step,
            moving(state.fan_in, state.masks),
            moving(state.fan_in, params),
            moving(state.fan_in, scores),
            batch_axes=batch_axes,
        )
        # Behind the barrier layers of one shape are alike, and the compiler makes their bits and
        # counts with one kernel; without it each is fused with its part of a stack, and again
        # with each set that it is added to.
        masks = lax.optimization_barrier(masks)  # type: ignore[no-untyped-call]
        merged = jax.tree.map(
            lambda new, old: old if is_hidden(new) else new,
            masks,
            state.masks,
            is_leaf=is_hidden,
        )
        # What was active before has been explored already.
        fresh = maskable(state.fan_in, newly_active(state.masks, merged))
        bits = lax.optimization_barrier(jax.tree.map(pack, fresh))  # type: ignore[no-untyped-call]
        return (
            merged,
            recount(state.fan_in, merged),
            jax.tree.map(jnp.bitwise_or, state.explored, bits),
            jax.tree.map(jnp.bitwise_or, state.grown, bits),
        )

    def update_topology(
        state: SparseTrainingState, params: PyTree, grads: PyTree
    ) -> SparseTrainingState:
        _check_fit(state, params, grads)
        masks, fan_in, explored, grown = updated_topology(state, copies(params)[0], grads)
        return state._replace(masks=masks, fan_in=fan_in, explored=explored, grown=grown)

    def update_fn(
        updates: PyTree, state: SparseTrainingState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, SparseTrainingState]:
        if params is None:
            raise ValueError(
                "params is missing: sparse_training needs update(grads, opt_state, params)"
            )
        _check_fit(state, params, updates)
        grads, accumulator = updates, state.accumulator
        masks, fan_in = state.masks, state.fan_in
        explored, grown = state.explored, state.grown
        is_update: Any = topology.is_update_step(state.step) if automatic else False
        if is_update is not False:
            scores = grads
            if accumulates:
                counted = topology.in_accumulation_window(state.step)
                scores = jax.tree.map(
                    lambda total, g: total + jnp.where(counted, g.astype(jnp.float32), 0.0),
                    accumulator,
                    maskable(fan_in, grads),
                )
                accumulator = jax.tree.map(lambda s: jnp.where(is_update, 0.0, s), scores)
            masks, fan_in, explored, grown = _in_place_if(
                is_update,
                lambda masks, fan_in, explored, grown: updated_topology(
                    state._replace(masks=masks, fan_in=fan_in, explored=explored, grown=grown),
                    copies(params)[0],
                    scores,
                ),
                (masks, fan_in, explored, grown),
            )

        def where_active(active: Any) -> PyTree:
            return jax.tree.map(
                lambda count, m, a: a if is_hidden(count) else jnp.where(m, a, jnp.zeros_like(a)),
                fan_in,
                masks,
                active,
                is_leaf=is_hidden,
            )

        grads, weights = where_active(grads), each_copy(where_active, params)
        shared, stayed = slots_shared(params), maskable(fan_in, without_grown(masks, grown))
        inner_state = reset_inactive(state.inner_state, inner.init(weights), stayed, shared)
        if not masks_are_read:
            masks_are_read.append(reads_masks(inner, grads, inner_state, weights, extra))
        if masks_are_read[0]:
            extra = extra | {"masks": masks, "fan_in": fan_in}
        steps, new_inner_state = inner.update(grads, inner_state, weights, **extra)
        if topology.skip_step and is_update is not False:
            steps = jax.tree.map(lambda u: jnp.where(is_update, jnp.zeros_like(u), u), steps)
            new_inner_state = keep_per_weight(
                is_update, inner_state, new_inner_state, masks, shared
            )

        def leave(steps: PyTree, weights: PyTree) -> PyTree:
            return jax.tree.map(_leave, fan_in, masks, steps, weights, is_leaf=is_hidden)

        return each_copy(leave, steps, params), SparseTrainingState(
            step=optax.safe_increment(state.step),
            key=state.key,
            masks=masks,
            fan_in=fan_in,
            explored=explored,
            grown=emptied(grown, state.step),
            accumulator=accumulator,
            inner_state=new_inner_state,
        )

    transformation = SparseTraining(init_fn, update_fn)
    transformation.update_topology = update_topology
    return transformation


def _in_place_if(condition: Any, change: Callable[..., Any], values: Any) -> Any:
    """``change(*values)`` where ``condition``, else ``values``, which are not copied then.

    That is ``lax.cond``, written as a loop of one pass or none: XLA gives the values of a loop one
    buffer from start to end, where each branch of a conditional, also the one that does nothing,
    would copy what it returns.
    """
    _, values = lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.zeros_like(carry[0]), change(*carry[1])),
        (jnp.asarray(condition), values),
    )
    return values


def update_topology(
    tx: SparseTraining, opt_state: optax.OptState, params: PyTree, grads: PyTree
) -> tuple[PyTree, optax.OptState]:
    """One topology update, now, for loops that schedule it themselves.

    Args:
      tx: what ``sparse_training`` returned (usually with ``automatic=False``), also where
        ``opt_state`` is the state of something wrapped around it.
      opt_state: the optimizer state; the drop fraction follows the number of steps in it.
      params: the parameters.
      grads: their gradient with respect to all weights, or a sum of it over several steps.

    Returns:
      ``(params, opt_state)``: the parameters with dropped weights at exactly zero, and the state
      with the new masks. Slots of weights that changed return to their initial value on the next
      ``update``.

    Raises:
      TypeError: ``tx`` did not come from ``sparse_training``.
      ValueError: masks do not fit ``params`` or ``grads``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
      >>> tx = sx.sparse_training(
      ...     optax.sgd(0.1), distribution=sx.ERK(0.5), automatic=False,
      ...     topology=sx.RigL(interval=1, drop_fraction=0.3, end_step=10))
      >>> opt_state = tx.init(params)
      >>> params = sx.apply_masks(params, sx.get_masks(opt_state))
      >>> params, opt_state = sx.update_topology(tx, opt_state, params, params)
      >>> int(sx.get_masks(opt_state)["kernel"].sum())
      16
    """
    if not isinstance(tx, SparseTraining):
        raise TypeError(
            "tx must be the transformation that sparse_training returned, without wrappers around "
            f"it, got {type(tx).__name__}"
        )
    state = tx.update_topology(find_state(opt_state), params, grads)
    params = each_copy(lambda p: apply_masks(p, state.masks), params)
    return params, replace_state(opt_state, state)


def _check_fit(state: SparseTrainingState, params: PyTree, grads: PyTree) -> None:
    if not isinstance(state, SparseTrainingState):
        raise TypeError(
            "opt_state must be a SparseTrainingState as init returns it, "
            f"got {type(state).__name__}"
        )
    for copy in copies(params):
        check_masks(state.masks, copy)
    check_masks(state.masks, grads)


def _leave(count: Any, mask: Any, step: Any, weight: Any) -> Any:
    """The update that takes inactive weights to exactly 0, in a dtype that holds ``-weight``."""
    if is_hidden(count):
        return step
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(step.dtype, weight.dtype)
    return jnp.where(mask, step.astype(dtype), -weight.astype(dtype))
