"""The state of ``sparse_training``, and how masks get out of it and into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparseopt_jax.axes import KernelAxes
from sparseopt_jax.explored import count_explored, pack, unpack
from sparseopt_jax.masks import check_masks, is_hidden, named_leaves

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


class SparseTrainingState(NamedTuple):
    """State of ``sparse_training``.

    Attributes:
      step: int32 scalar, how many updates have been made.
      key: uint32 key data from which each topology update derives its key.
      masks: bool arrays in the structure and shapes of the parameters.
      fan_in: for each maskable leaf the int32 active fan-in of its neurons, with the incoming axes
        kept as 1; ``optax.MaskedNode`` for all other leaves.
      explored: for each maskable leaf which weights have been active at any time, uint8 with one
        bit a weight; ``optax.MaskedNode`` for all other leaves. See ``get_explored``.
      grown: likewise the weights that became active since the last step. Their optimizer slots are
        reset on the next one; the set is empty between steps unless masks were changed by hand.
      accumulator: float32 sums of gradients where the topology accumulates, else an empty tuple.
      inner_state: the wrapped optimizer's state.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> tx = sx.sparse_training(
      ...     optax.sgd(0.1), distribution=sx.ERK(0.5), topology=sx.Static())
      >>> state = tx.init({"kernel": jnp.ones((16, 2)), "bias": jnp.zeros(2)})
      >>> int(state.step), state.fan_in["kernel"].shape, state.explored["kernel"].shape
      (0, (1, 2), (2, 2))
    """

    step: Array
    key: Array
    masks: PyTree
    fan_in: PyTree
    explored: PyTree
    grown: PyTree
    accumulator: PyTree
    inner_state: optax.OptState


def get_masks(opt_state: optax.OptState) -> PyTree:
    """The masks in an optimizer state, however deep ``sparse_training``'s state is nested in it.

    Args:
      opt_state: the state of ``sparse_training`` or of anything wrapped around it.

    Returns:
      Bool arrays in the structure and shapes of the parameters.

    Raises:
      ValueError: there is no such state in it, or more than one.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> tx = sx.sparse_training(
      ...     optax.sgd(0.1), distribution=sx.ERK(0.5), topology=sx.Static())
      >>> opt_state = tx.init({"kernel": jnp.ones((4, 4))})
      >>> int(sx.get_masks(opt_state)["kernel"].sum())
      8
    """
    # New containers, so that a caller who edits the tree does not edit the state.
    return jax.tree.map(lambda mask: mask, find_state(opt_state).masks)


def get_explored(opt_state: optax.OptState) -> PyTree:
    """Which weights have been active at any time since the first step.

    Args:
      opt_state: the state of ``sparse_training`` or of anything wrapped around it.

    Returns:
      Bool arrays in the structure and shapes of the parameters; True everywhere for leaves that
      are never sparse. ``density`` of it is the exploration rate of each layer.

    Raises:
      ValueError: there is no such state in it, or more than one.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> tx = sx.sparse_training(
      ...     optax.sgd(0.1), distribution=sx.ERK(0.5), topology=sx.Static())
      >>> opt_state = tx.init({"kernel": jnp.ones((4, 4))})
      >>> int(sx.get_explored(opt_state)["kernel"].sum())
      8
    """
    state = find_state(opt_state)
    return jax.tree.map(
        lambda bits, mask: mask if is_hidden(bits) else unpack(bits, mask),
        state.explored,
        state.masks,
        is_leaf=is_hidden,
    )


def itop_rate(opt_state: optax.OptState) -> Array:
    """ITOP rate R_m: the share of weights that have been active at any time so far.

    R_m = |union of all masks so far| / number of maskable weights. Only leaves that may be sparse
    count, in numerator and denominator; leaves that ``prunable`` left out do not, a maskable layer
    that the distribution keeps dense does.

    Args:
      opt_state: the state of ``sparse_training`` or of anything wrapped around it.

    Returns:
      float32 scalar in (0, 1]. Per layer: ``density(get_explored(opt_state))``.

    Raises:
      ValueError: there is no such state in it, or more than one.

    Source: Liu et al., In-Time Over-Parameterization (arXiv 2102.02887), section 3.2.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> params = {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}
      >>> tx = sx.sparse_training(
      ...     optax.sgd(0.1), distribution=sx.ERK(0.75), topology=sx.Static())
      >>> float(sx.itop_rate(tx.init(params)))
      0.25
    """
    state = find_state(opt_state)
    sizes = [mask.size for mask in jax.tree.leaves(maskable(state.fan_in, state.masks))]
    explored = [count_explored(bits) for bits in jax.tree.leaves(state.explored)]
    # Counts are integers in a layer; their total may be more than int32 holds.
    total = sum((n.astype(jnp.float32) for n in explored), jnp.float32(0))
    return total / jnp.float32(sum(sizes))


def set_masks(opt_state: optax.OptState, masks: PyTree) -> optax.OptState:
    """Replace the masks in an optimizer state and refresh the fan-in counts kept beside them.

    On the next step the optimizer's slots of weights that became inactive or active start again at
    their initial value. Inactive weights become zero then; ``apply_masks`` zeroes them at once.

    Args:
      opt_state: the state of ``sparse_training`` or of anything wrapped around it.
      masks: bool arrays in the structure and shapes of the parameters. They may keep other numbers
        of weights than before. Leaves that ``prunable`` did not choose must be True everywhere.

    Returns:
      The new state, of the same structure.

    Raises:
      TypeError: a mask is not bool.
      ValueError: structure or shapes differ, a leaf that is not maskable has inactive weights, or
        there is not exactly one state of ``sparse_training``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> tx = sx.sparse_training(
      ...     optax.sgd(0.1), distribution=sx.ERK(0.5), topology=sx.Static())
      >>> opt_state = tx.init({"kernel": jnp.ones((4, 4))})
      >>> opt_state = sx.set_masks(opt_state, {"kernel": jnp.eye(4, dtype=bool)})
      >>> int(sx.get_masks(opt_state)["kernel"].sum())
      4
    """
    state = find_state(opt_state)
    check_masks(masks, state.masks)
    masks = jax.tree.map(jnp.asarray, masks)
    maskable_paths = named_leaves(state.fan_in)
    check_dense(masks, lambda path: path not in maskable_paths)
    # Masks that no step has used yet have explored nothing.
    unused = state.step == 0
    before = jax.tree.map(lambda bits: jnp.where(unused, jnp.uint8(0), bits), state.explored)
    new = state._replace(
        masks=masks,
        fan_in=recount(state.fan_in, masks),
        explored=add_bits(before, masks),
        grown=add_bits(state.grown, newly_active(state.masks, masks)),
    )
    return replace_state(opt_state, new)


def check_dense(masks: PyTree, never_sparse: Callable[[str], bool]) -> None:
    """Raise where a leaf that ``prunable`` left out has inactive weights; traced masks pass."""
    for path, mask in named_leaves(masks).items():
        if never_sparse(path) and not isinstance(mask, jax.core.Tracer) and not np.all(mask):
            raise ValueError(
                f"masks leaf {path!r} must be True everywhere, got {int((~mask).sum())} "
                "inactive weights: prunable left this leaf out of the sparse ones"
            )


def find_state(opt_state: optax.OptState) -> SparseTrainingState:
    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(leaf)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state must hold exactly one state of sparse_training, found {len(found)} in a "
            f"{type(opt_state).__name__}"
        )
    return cast(SparseTrainingState, found[0])


def replace_state(opt_state: optax.OptState, new: SparseTrainingState) -> optax.OptState:
    return jax.tree.map(lambda leaf: new if _is_state(leaf) else leaf, opt_state, is_leaf=_is_state)


def _is_state(leaf: Any) -> bool:
    return isinstance(leaf, SparseTrainingState)


def maskable(fan_in: PyTree, tree: PyTree) -> PyTree:
    """``tree`` with ``MaskedNode`` in place of the leaves that are not maskable."""
    return jax.tree.map(
        lambda count, leaf: count if is_hidden(count) else leaf, fan_in, tree, is_leaf=is_hidden
    )


def count_fan_in(mask: Array, axes: KernelAxes) -> Array:
    """Active fan-in with the incoming axes kept as 1."""
    return jnp.sum(mask, axis=axes.incoming, keepdims=True, dtype=jnp.int32)


def recount(fan_in: PyTree, masks: PyTree) -> PyTree:
    """The counts of ``fan_in`` for new masks; an axis of size 1 is one that was summed over."""

    def count(old: Any, mask: Any) -> Any:
        if is_hidden(old):
            return old
        axes = tuple(axis for axis, size in enumerate(old.shape) if size == 1)
        return jnp.sum(mask, axis=axes, keepdims=True, dtype=jnp.int32)

    return jax.tree.map(count, fan_in, masks, is_leaf=is_hidden)


def add_bits(packed: PyTree, masks: PyTree) -> PyTree:
    """A packed set with the weights of ``masks`` in it."""
    return jax.tree.map(
        lambda bits, mask: bits if is_hidden(bits) else bits | pack(mask),
        packed,
        masks,
        is_leaf=is_hidden,
    )


def newly_active(before: PyTree, after: PyTree) -> PyTree:
    """Weights that are active only in ``after``."""
    return jax.tree.map(lambda old, new: new & ~old, before, after)


def without_grown(masks: PyTree, grown: PyTree) -> PyTree:
    """``masks`` without the weights of the packed set ``grown``."""
    return jax.tree.map(
        lambda bits, mask: mask if is_hidden(bits) else mask & ~unpack(bits, mask),
        grown,
        masks,
        is_leaf=is_hidden,
    )


def emptied(packed: PyTree, step: Array) -> PyTree:
    """A packed set without any weights, sharded as before.

    A constant would have no sharding to keep, and in Auto mode the compiler would replicate it. It
    does not know that no step is negative.
    """
    return jax.tree.map(lambda bits: jnp.where(step < 0, bits, jnp.zeros_like(bits)), packed)
