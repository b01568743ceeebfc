"""Sparse training around any optax optimizer, with no hook in the training loop.

The wrapper keeps parameters exactly sparse, so the forward pass needs no mask, and the gradient
that JAX returns is already the dense gradient by which RigL grows. Within one ``update``:

1. The topology comes first. A ``lax.cond`` takes and returns masks and fan-in counts only; it ranks
   the weights and gradients as they came in.
2. Gradients and weights of inactive positions are zeroed, and the inner optimizer's state for them
   is put back to its initial value. All of it is elementwise and fuses with the inner update.
3. The inner optimizer steps, so schedules follow the training step.
4. Each inactive weight gets the update ``-w``, which ``w + (-w)`` turns into exactly 0. A forgotten
   ``apply_masks``, or a dense tree restored by mistake, heals on the first step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sparseopt_jax.masks import (
    Distribution,
    OutAxes,
    Prunable,
    apply_masks,
    check_masks,
    default_prunable,
    init_masks,
    is_hidden,
    maskable_layers,
    path_str,
)
from sparseopt_jax.preconditioner import MissingMasksError, scale_by_fan_in
from sparseopt_jax.slots import keep_per_weight, reset_inactive
from sparseopt_jax.state import (
    SparseTrainingState,
    count_fan_in,
    find_state,
    maskable,
    recount,
    replace_state,
)
from sparseopt_jax.topology import Topology

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


class SparseTraining(optax.GradientTransformationExtraArgs):
    """What ``sparse_training`` returns: an optax transformation that can also update its topology.

    Attributes:
      update_topology: ``(state, params, grads) -> state``, one topology update at ``state.step``.
    """

    update_topology: Callable[[SparseTrainingState, PyTree, PyTree], SparseTrainingState]


def sparse_training(
    inner: optax.GradientTransformation,
    *,
    distribution: Distribution,
    topology: Topology,
    seed: Any = 0,
    prunable: Prunable = default_prunable,
    out_axes: OutAxes = -1,
    automatic: bool = True,
) -> SparseTraining:
    """Train sparsely with any optax optimizer.

    Args:
      inner: the optimizer, for example ``sparseopt(0.1)`` or ``optax.adam(1e-3)``. It gets the
        extra arguments ``masks`` and ``fan_in`` where it reads them (``scale_by_sparseopt`` does).
      distribution: how many weights each layer keeps: ``Uniform``, ``ER``, ``ERK``, ``PerLayer``.
      topology: when and how the masks change: ``Static``, ``SET``, ``RigL``.
      seed: an int, a JAX random key, or a traced one of either. Initial masks, random growth and
        ties derive from it.
      prunable: ``(path, leaf) -> bool``, which leaves may be sparse.
      out_axes: the axis or axes of kernels that index neurons; see ``fan_in``. Give
        ``scale_by_sparseopt`` the same, or it counts the masks again on each step.
      automatic: whether ``update`` follows the topology's schedule. With False the masks change
        only through ``update_topology``, for loops that schedule it themselves (under ``jax.vmap``
        a scheduled update would be computed on every step).

    Returns:
      A transformation to be outermost but for wrappers that skip or accumulate whole steps
      (``optax.MultiSteps``, ``optax.apply_if_finite``, ``optax.inject_hyperparams``): whatever
      changes its updates would change the ``-w`` of inactive weights. ``update`` needs ``params``.

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
    _check_arguments(inner, distribution, topology, automatic)
    mask_key, topology_key = jax.random.split(_as_key(seed))
    key_impl = jax.random.key_impl(topology_key)
    inner = optax.with_extra_args_support(inner)
    accumulates = automatic and topology.accumulate_steps > 1
    reads_masks: list[bool] = []

    def init_fn(params: PyTree) -> SparseTrainingState:
        masks = init_masks(mask_key, params, distribution, prunable=prunable)
        layers = maskable_layers(params, prunable)

        def count(path: tuple[Any, ...], mask: Array) -> Any:
            return count_fan_in(mask, out_axes) if path_str(path) in layers else optax.MaskedNode()

        fan_in = jax.tree_util.tree_map_with_path(count, masks)
        accumulator: PyTree = ()
        if accumulates:
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
            accumulator = maskable(fan_in, zeros)
        return SparseTrainingState(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(topology_key),
            masks=masks,
            fan_in=fan_in,
            accumulator=accumulator,
            inner_state=inner.init(apply_masks(params, masks)),
        )

    def updated_topology(
        state: SparseTrainingState, params: PyTree, scores: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Masks and fan-in after one topology update at ``state.step``."""
        if topology.grow_by == "corrected_gradient":
            scores = scale_by_fan_in(scores, state.fan_in, None)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=key_impl), state.step)
        masks = topology.update(
            key,
            state.step,
            maskable(state.fan_in, state.masks),
            maskable(state.fan_in, params),
            maskable(state.fan_in, scores),
        )
        fan_in = recount(state.fan_in, masks)
        merged = jax.tree.map(
            lambda new, old: old if is_hidden(new) else new,
            masks,
            state.masks,
            is_leaf=is_hidden,
        )
        return merged, fan_in

    def update_topology(
        state: SparseTrainingState, params: PyTree, grads: PyTree
    ) -> SparseTrainingState:
        _check_fit(state, params, grads)
        masks, fan_in = updated_topology(state, params, grads)
        return state._replace(masks=masks, fan_in=fan_in)

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
            masks, fan_in = lax.cond(
                is_update,
                lambda: updated_topology(state, params, scores),
                lambda: (masks, fan_in),
            )

        def where_active(active: Any, inactive: Any) -> PyTree:
            """``active`` on active weights, ``inactive()`` on the others, leaf by leaf."""
            return jax.tree.map(
                lambda count, m, a: a if is_hidden(count) else jnp.where(m, a, inactive(a)),
                fan_in,
                masks,
                active,
                is_leaf=is_hidden,
            )

        grads, weights = where_active(grads, jnp.zeros_like), where_active(params, jnp.zeros_like)
        inner_state = reset_inactive(
            inner, state.inner_state, inner.init(weights), maskable(fan_in, masks)
        )
        if not reads_masks:
            reads_masks.append(_reads_masks(inner, grads, inner_state, weights, extra))
        if reads_masks[0]:
            extra = extra | {"masks": masks, "fan_in": fan_in}
        steps, new_inner_state = inner.update(grads, inner_state, weights, **extra)
        if topology.skip_step and is_update is not False:
            steps = jax.tree.map(lambda u: jnp.where(is_update, jnp.zeros_like(u), u), steps)
            new_inner_state = keep_per_weight(inner, is_update, inner_state, new_inner_state, masks)
        steps = jax.tree.map(_leave, fan_in, masks, steps, params, is_leaf=is_hidden)
        return steps, SparseTrainingState(
            step=optax.safe_increment(state.step),
            key=state.key,
            masks=masks,
            fan_in=fan_in,
            accumulator=accumulator,
            inner_state=new_inner_state,
        )

    transformation = SparseTraining(init_fn, update_fn)
    transformation.update_topology = update_topology
    return transformation


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
    return apply_masks(params, state.masks), replace_state(opt_state, state)


def _check_arguments(inner: Any, distribution: Any, topology: Any, automatic: Any) -> None:
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"inner must be an optax gradient transformation, got {inner!r}"
            + ("; MultiSteps goes around sparse_training" if hasattr(inner, "has_updated") else "")
        )
    if isinstance(distribution, type) or not hasattr(distribution, "layer_counts"):
        raise TypeError(f"distribution must be a value such as ERK(0.9), got {distribution!r}")
    if isinstance(topology, type) or not hasattr(topology, "is_update_step"):
        raise TypeError(f"topology must be a value such as Static(), got {topology!r}")
    if not isinstance(automatic, bool):
        raise TypeError(f"automatic must be True or False, got {automatic!r}")
    if not automatic and topology.accumulate_steps > 1:
        raise ValueError(
            f"accumulate_steps={topology.accumulate_steps} needs automatic=True; a loop that "
            "schedules updates itself passes the gradients it accumulated to update_topology"
        )


def _as_key(seed: Any) -> Array:
    """A typed key from an int, a key of either kind, or a traced one."""
    if isinstance(seed, bool) or not (isinstance(seed, int) or hasattr(seed, "dtype")):
        raise TypeError(f"seed must be an int or a JAX random key, got {seed!r}")
    if isinstance(seed, int):
        return jax.random.key(seed)
    if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) and seed.ndim == 0:
        return cast(Array, seed)
    if jnp.issubdtype(seed.dtype, jnp.integer) and seed.ndim == 0:
        return jax.random.key(seed)
    if seed.dtype == jnp.uint32 and seed.ndim == 1:
        return jax.random.wrap_key_data(seed)
    raise TypeError(
        "seed must be an int or one JAX random key, got an array of "
        f"dtype {seed.dtype} and shape {seed.shape}"
    )


def _check_fit(state: SparseTrainingState, params: PyTree, grads: PyTree) -> None:
    if not isinstance(state, SparseTrainingState):
        raise TypeError(
            "opt_state must be a SparseTrainingState as init returns it, "
            f"got {type(state).__name__}"
        )
    check_masks(state.masks, params)
    check_masks(state.masks, grads)


def _leave(count: Any, mask: Any, step: Any, weight: Any) -> Any:
    """The update that takes inactive weights to exactly 0, in a dtype that holds ``-weight``."""
    if is_hidden(count):
        return step
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(step.dtype, weight.dtype)
    return jnp.where(mask, step.astype(dtype), -weight.astype(dtype))


def _reads_masks(
    inner: optax.GradientTransformationExtraArgs,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    extra: dict[str, Any],
) -> bool:
    """Whether the inner chain asks for ``masks``; some transformations reject unknown arguments."""
    if "masks" in extra:
        return False
    try:
        jax.eval_shape(lambda: inner.update(grads, state, params, **extra))
    except MissingMasksError:
        return True
    return False
