"""The state of ``sparse_training``, and how masks get out of it and into it."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparseopt_jax.masks import OutAxes, check_masks, in_axes, is_hidden, path_str

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
      accumulator: float32 sums of gradients where the topology accumulates, else an empty tuple.
      inner_state: the wrapped optimizer's state.
    """

    step: Array
    key: Array
    masks: PyTree
    fan_in: PyTree
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


def set_masks(opt_state: optax.OptState, masks: PyTree) -> optax.OptState:
    """Replace the masks in an optimizer state and refresh the fan-in counts kept beside them.

    The optimizer's slots of weights that become inactive, and the weights themselves, return to
    their initial value and to zero on the next step; ``apply_masks`` zeroes the weights at once.

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
    hidden = jax.tree.leaves(state.fan_in, is_leaf=is_hidden)
    for (path, mask), count in zip(jax.tree_util.tree_leaves_with_path(masks), hidden, strict=True):
        if is_hidden(count) and not isinstance(mask, jax.core.Tracer) and not np.all(mask):
            raise ValueError(
                f"masks leaf {path_str(path)!r} must be True everywhere, got {int((~mask).sum())} "
                "inactive weights: prunable left this leaf out of the sparse ones"
            )
    new = state._replace(masks=masks, fan_in=recount(state.fan_in, masks))
    return replace_state(opt_state, new)


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


def count_fan_in(mask: Array, out_axes: OutAxes) -> Array:
    return jnp.sum(mask, axis=in_axes(mask.ndim, out_axes), keepdims=True, dtype=jnp.int32)


def recount(fan_in: PyTree, masks: PyTree) -> PyTree:
    """The counts of ``fan_in`` for new masks; an axis of size 1 is one that was summed over."""

    def count(old: Any, mask: Any) -> Any:
        if is_hidden(old):
            return old
        axes = tuple(axis for axis, size in enumerate(old.shape) if size == 1)
        return jnp.sum(mask, axis=axes, keepdims=True, dtype=jnp.int32)

    return jax.tree.map(count, fan_in, masks, is_leaf=is_hidden)
