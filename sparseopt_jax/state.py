"""The state of ``sparse_training``, and how masks get out of it and into it.

Several ``sparse_training``s may share a state (``optax.partition``): each has the leaves that the
others do not, and what is read here is put together from all of them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparseopt_jax import activity as bits
from sparseopt_jax.axes import KernelAxes
from sparseopt_jax.explicit import in_auto_mode
from sparseopt_jax.masks import fitting
from sparseopt_jax.outlining import on_one_cpu, outlined
from sparseopt_jax.trees import aligned, boxed_like, is_masked_node, named_leaves, unboxed

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


class NeverSparse(NamedTuple):
    """Stands in ``activity`` for a leaf that is never sparse; it holds no array.

    Attributes:
      shape: the leaf's.

    Example:
      >>> import jax
      >>> import sparseopt_jax as sx
      >>> jax.tree.leaves(sx.NeverSparse((3,)))
      []
    """

    shape: tuple[int, ...]


jax.tree_util.register_pytree_node(
    NeverSparse, lambda node: ((), node.shape), lambda shape, _: NeverSparse(shape)
)


class SparseTrainingState(NamedTuple):
    """State of ``sparse_training``.

    Attributes:
      step: int32 scalar, how many updates have been made.
      key: uint32 key data from which each topology update derives its key.
      activity: in the structure and the boxes of the parameters, for each maskable leaf uint8 in
        its shape: bit 0 is set while the weight is active, bit 1 once it has been, and the six bits
        above count the topology updates since the weight became active, up to 63. ``NeverSparse``
        for other leaves.
      fan_in: for each maskable leaf the int32 active fan-in of its neurons, with the incoming axes
        kept as 1; ``optax.MaskedNode`` for all other leaves. It is in no boxes, since those of Flax
        may say how an array of the parameter's shape is sharded.
      changed_at: int32, for each topology the step at which it last changed the masks; -1 before.
      accumulator: float32 sums of gradients where a topology accumulates, else an empty tuple.
      inner_state: the wrapped optimizer's state.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> tx = sx.sparse_training(
      ...     optax.sgd(0.1), distribution=sx.ERK(0.5), topology=sx.Static())
      >>> state = tx.init({"kernel": jnp.ones((16, 2)), "bias": jnp.zeros(2)})
      >>> int(state.step), state.fan_in["kernel"].shape, state.activity["kernel"].dtype
      (0, (1, 2), dtype('uint8'))
    """

    step: Array
    key: Array
    activity: PyTree
    fan_in: PyTree
    changed_at: Array
    accumulator: PyTree
    inner_state: optax.OptState


def get_masks(opt_state: optax.OptState) -> PyTree:
    """The masks in an optimizer state, however deep ``sparse_training``'s state is nested in it.

    Args:
      opt_state: the state of ``sparse_training``, of anything wrapped around it, or of an
        ``optax.partition`` with several of them.

    Returns:
      Bool arrays in the structure and shapes of the parameters. A leaf of a partition that no
      ``sparse_training`` has is ``optax.MaskedNode``, which counts as dense wherever masks are
      taken.

    Raises:
      ValueError: there is no such state in it.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> tx = sx.sparse_training(
      ...     optax.sgd(0.1), distribution=sx.ERK(0.5), topology=sx.Static())
      >>> opt_state = tx.init({"kernel": jnp.ones((4, 4))})
      >>> int(sx.get_masks(opt_state)["kernel"].sum())
      8
    """
    return _merged(_read(state, bits.is_active) for state in find_states(opt_state))


def get_explored(opt_state: optax.OptState) -> PyTree:
    """Which weights have been active at any time since the first step.

    Args:
      opt_state: as for ``get_masks``.

    Returns:
      Bool arrays in the structure and shapes of the parameters; True everywhere for leaves that
      are never sparse. ``density`` of it is the exploration rate of each layer.

    Raises:
      ValueError: there is no state of ``sparse_training`` in it.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> tx = sx.sparse_training(
      ...     optax.sgd(0.1), distribution=sx.ERK(0.5), topology=sx.Static())
      >>> opt_state = tx.init({"kernel": jnp.ones((4, 4))})
      >>> int(sx.get_explored(opt_state)["kernel"].sum())
      8
    """
    return _merged(_read(state, bits.is_explored) for state in find_states(opt_state))


def itop_rate(opt_state: optax.OptState) -> Array:
    """ITOP rate R_m: the share of weights that have been active at any time so far.

    R_m = ``|union of all masks so far|`` / number of maskable weights. Only leaves that may be
    sparse count, in numerator and denominator; leaves that ``prunable`` left out do not, a maskable
    layer that the distribution keeps dense does.

    Args:
      opt_state: as for ``get_masks``.

    Returns:
      float32 scalar in (0, 1]. Per layer: ``density(get_explored(opt_state))``.

    Raises:
      ValueError: there is no state of ``sparse_training`` in it.

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
    leaves = [a for state in find_states(opt_state) for a in jax.tree.leaves(state.activity)]
    explored = [jnp.sum(bits.is_explored(a), dtype=jnp.int32) for a in leaves]
    # Counts are integers in a layer; their total may be more than int32 holds.
    total = sum((n.astype(jnp.float32) for n in explored), jnp.float32(0))
    return total / jnp.float32(sum(a.size for a in leaves))


def set_masks(opt_state: optax.OptState, masks: PyTree) -> optax.OptState:
    """Replace the masks in an optimizer state and refresh the fan-in counts kept beside them.

    On the next step the optimizer's slots of weights that became inactive or active start again at
    their initial value. Inactive weights become zero then; ``apply_masks`` zeroes them at once.

    Args:
      opt_state: as for ``get_masks``.
      masks: bool arrays of the paths and shapes of the parameters, held in any way. They may keep
        other numbers of weights than before. Leaves that ``prunable`` did not choose must be True
        everywhere.

    Returns:
      The new state, of the same structure and in the same boxes, so that
      ``optimizer.opt_state = sx.set_masks(optimizer.opt_state, masks)`` is right for an
      ``nnx.Optimizer`` too. It shares no array with ``masks``.

    Raises:
      TypeError: a mask is not bool.
      ValueError: structure or shapes differ, a leaf that is not maskable has inactive weights, or
        there is no state of ``sparse_training``.

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
    held = find_states(opt_state)
    states = [unboxed(state) for state in held]
    shapes = _merged(mask_shapes(state) for state in states)
    masks = fitting(aligned(masks, shapes, ("masks", "params")), shapes)
    maskable_paths = {path for state in states for path in named_leaves(state.activity)}
    check_dense(masks, lambda path: path not in maskable_paths)

    own = {path: mask for path, mask in named_leaves(masks).items() if path in maskable_paths}
    new = [boxed_like(_with_masks(s, own), h) for s, h in zip(states, held, strict=True)]
    return replace_states(opt_state, new)


def _with_masks(state: SparseTrainingState, masks: dict[str, Any]) -> SparseTrainingState:
    old, structure = jax.tree.flatten(state.activity)
    counts, counts_structure = jax.tree.flatten(state.fan_in)
    own = [masks[path] for path in named_leaves(state.activity)]
    step = jnp.broadcast_to(state.step[..., None], state.changed_at.shape)

    def with_mask(activity: Array, mask: Array, unused: Array, again: Array) -> Array:
        later = bits.changed(activity, mask, again)
        # Masks that no step has used yet have explored nothing.
        return jnp.where(unused, bits.initial(mask), later)

    new = [
        in_auto_mode(with_mask, like=a)(
            a, jnp.array(m), at_leaf(step == 0, i, a), at_leaf(state.changed_at == step, i, a)
        )
        for i, (a, m) in enumerate(zip(old, own, strict=True))
    ]
    return state._replace(
        activity=jax.tree.unflatten(structure, new),
        fan_in=jax.tree.unflatten(
            counts_structure,
            [recount(c, bits.is_active(a)) for c, a in zip(counts, new, strict=True)],
        ),
        changed_at=step,
    )


def check_dense(masks: PyTree, never_sparse: Callable[[str], bool]) -> None:
    """Raise where a leaf that ``prunable`` left out has inactive weights; traced masks pass."""
    for path, mask in named_leaves(masks).items():
        if never_sparse(path) and not isinstance(mask, jax.core.Tracer) and not np.all(mask):
            raise ValueError(
                f"masks leaf {path!r} must be True everywhere, got {int((~mask).sum())} "
                "inactive weights: prunable left this leaf out of the sparse ones"
            )


def find_states(opt_state: optax.OptState) -> list[SparseTrainingState]:
    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(leaf)]
    if not found:
        raise ValueError(
            f"opt_state must hold a state of sparse_training, found none in a "
            f"{type(opt_state).__name__}"
        )
    return found


def replace_states(opt_state: optax.OptState, new: Iterable[SparseTrainingState]) -> optax.OptState:
    """``opt_state`` with ``new`` in place of the states that ``find_states`` finds in it."""
    remaining = iter(new)
    return jax.tree.map(
        lambda leaf: next(remaining) if is_state(leaf) else leaf, opt_state, is_leaf=is_state
    )


def is_state(leaf: Any) -> bool:
    return isinstance(leaf, SparseTrainingState)


def is_stand_in(leaf: Any) -> bool:
    """Whether a node of ``activity`` stands for a leaf that is never masked here."""
    return isinstance(leaf, NeverSparse | optax.MaskedNode)


def maskable(activity: PyTree, tree: PyTree) -> PyTree:
    """``tree`` with ``MaskedNode`` in place of the leaves that are not maskable."""
    return jax.tree.map(
        lambda a, leaf: optax.MaskedNode() if is_stand_in(a) else leaf,
        activity,
        tree,
        is_leaf=is_stand_in,
    )


def active_masks(state: SparseTrainingState) -> PyTree:
    """Masks of the maskable leaves; ``MaskedNode`` for all others."""
    masks = jax.tree.map(bits.is_active, state.activity)
    return maskable(state.activity, masks)


def settled_masks(state: SparseTrainingState) -> PyTree:
    """Likewise, without the weights that became active after the last step."""
    activity, structure = jax.tree.flatten(state.activity)
    now = _by_leaf(state.changed_at == state.step)
    settled = [
        bits.is_active(a) & ~(bits.is_young(a) & own) for a, own in zip(activity, now, strict=True)
    ]
    return maskable(state.activity, jax.tree.unflatten(structure, settled))


def mask_shapes(state: SparseTrainingState) -> PyTree:
    """Shapes in place of the masks of a state."""
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),  # type: ignore[no-untyped-call]
        state._replace(inner_state=(), accumulator=()),
    )
    return _read(shapes, bits.is_active)


def _by_leaf(values: Array) -> list[Array]:
    """The scalars (N,), on a CPU each computed ahead of the kernels that read it.

    With their own place in ``values`` in it, no two leaves' kernels would be equal.
    """

    def default(values: Array) -> list[Array]:
        return [values[i] for i in range(len(values))]

    def cpu(values: Array) -> list[Array]:
        return [outlined(operator.getitem, values, i) for i in range(len(values))]

    found: list[Array] = on_one_cpu(cpu, default, values, traced=values)
    return found


def at_leaf(values: Array, i: int, leaf: Array) -> Array:
    """The ``i``-th of ``values``, one for each maskable leaf, in a shape that broadcasts to it.

    Axes ahead of the last are those of a mapped state that is read from outside of ``jax.vmap``.
    """
    own = values[..., i]
    return own.reshape(own.shape + (1,) * (leaf.ndim - own.ndim))


def count_fan_in(mask: Array, axes: KernelAxes) -> Array:
    """Active fan-in with the incoming axes kept as 1."""
    return jnp.sum(mask, axis=axes.incoming, keepdims=True, dtype=jnp.int32)


def recount(count: Array, mask: Array) -> Array:
    """The fan-in ``count`` for a new mask; an axis of size 1 is one that was summed over."""
    axes = tuple(axis for axis, size in enumerate(count.shape) if size == 1)
    return jnp.sum(mask, axis=axes, keepdims=True, dtype=jnp.int32)


def _read(state: SparseTrainingState, of: Callable[[Array], Array]) -> PyTree:
    """``of`` the bytes, True everywhere for leaves that are never sparse; of shapes, shapes."""
    step = unboxed(state.step)
    abstract = isinstance(step, jax.ShapeDtypeStruct)

    def read(activity: Any) -> Any:
        if is_masked_node(activity):
            return activity
        shape = activity.shape
        if isinstance(activity, NeverSparse):
            shape = (*step.shape, *shape)
        elif not abstract:
            return of(activity)
        if not abstract:
            return jnp.ones(shape, jnp.bool_)
        sharding = getattr(activity, "sharding", step.sharding)  # or replicated, as a scalar
        return jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=sharding)  # type: ignore[no-untyped-call]

    return jax.tree.map(read, state.activity, is_leaf=is_stand_in)


def _merged(trees: Iterable[PyTree]) -> PyTree:
    """One tree out of those of several states, of which each leaves out the others' parts."""
    return functools.reduce(_merge, trees)


def _merge(tree: PyTree, other: PyTree) -> PyTree:
    if is_masked_node(tree):
        return other
    if is_masked_node(other):
        return tree
    parts, structure = jax.tree.flatten(tree, is_leaf=lambda node: node is not tree)
    others = jax.tree.leaves(other, is_leaf=lambda node: node is not other)
    if len(parts) == 1 and parts[0] is tree:
        return tree
    return jax.tree.unflatten(structure, map(_merge, parts, others))
