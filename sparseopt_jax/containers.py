"""What ``sparse_training`` is given, out of its boxes, and what it returns, held as before.

Its state is in the boxes of the parameters (``nn.Partitioned`` says how its value is sharded), but
for the fan-in, which has a shape of its own. ``nnx.Optimizer`` puts boxes of its own around all.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import optax

from sparseopt_jax.inner_optimizer import map_copies
from sparseopt_jax.masks import fitting
from sparseopt_jax.state import SparseTrainingState, is_stand_in, mask_shapes
from sparseopt_jax.trees import (
    aligned,
    boxed_like,
    is_absent,
    is_masked_node,
    named_leaves,
    unboxed,
)

PyTree: TypeAlias = Any


def opened(
    state: SparseTrainingState, params: PyTree, grads: PyTree
) -> tuple[SparseTrainingState, PyTree, PyTree]:
    """The three without boxes but for ``inner_state``; params and grads in the state's containers.

    Raises:
      TypeError: the state is none of ``sparse_training``.
      ValueError: paths or shapes differ, or a leaf with masks has no gradient.
    """
    if not isinstance(state, SparseTrainingState):
        raise TypeError(
            "opt_state must be a SparseTrainingState as init returns it, "
            f"got {type(state).__name__}"
        )
    inner_state, state = state.inner_state, unboxed(state._replace(inner_state=()))
    masks = mask_shapes(state)

    def fit(tree: PyTree, name: str, **allowed: bool) -> PyTree:
        fitting(masks, unboxed(tree))
        return aligned(tree, masks, (name, "masks"), **allowed)

    params = map_copies(lambda p: fit(p, "params", surplus=True), params)
    grads = fit(grads, "grads", partial=True)
    given = named_leaves(grads)
    for path in named_leaves(state.activity):
        if path not in given:
            raise ValueError(
                f"grads leaf {path!r} is None, but opt_state has masks for it: a layer that does "
                "not train keeps its weights where init is not given it either, in Equinox "
                "tx.init(eqx.partition(model, what_trains)[0])"
            )
    return state._replace(inner_state=inner_state), params, grads


def boxes_of(state: SparseTrainingState) -> PyTree:
    """A tree with some leaf in the box of each parameter."""
    return jax.tree.map(
        lambda a: a if is_masked_node(a) else 0, state.activity, is_leaf=is_stand_in
    )


def closed(state: SparseTrainingState, like: SparseTrainingState) -> SparseTrainingState:
    """``state`` in boxes like those of ``like``; its ``inner_state`` has its own."""
    outer = boxed_like(state._replace(inner_state=()), like._replace(inner_state=()))
    return outer._replace(inner_state=state.inner_state)


def with_gradient(activity: PyTree, grads: PyTree, params: PyTree) -> PyTree:
    """``params`` where there is a gradient; optax takes parameters only where updates are."""
    return jax.tree.map(
        lambda _, grad, weight: grad if is_absent(grad) else weight,
        activity,
        grads,
        params,
        is_leaf=is_stand_in,
    )


def held_like(tree: PyTree, given: PyTree) -> PyTree:
    """``tree`` in the containers and the boxes of ``given``."""
    names = ("updates", "grads")
    return boxed_like(aligned(tree, unboxed(given), names, surplus=True), given)


def as_at_init(params: PyTree, masks: PyTree) -> PyTree:
    """Without boxes, what ``init`` was given: of a whole model, the leaves that have masks.

    Where some leaves have none, in an ``optax.partition``, params are to be given as they were.
    """
    masks = unboxed(masks)
    if any(map(is_masked_node, jax.tree.leaves(masks, is_leaf=is_masked_node))):
        return unboxed(params)
    return aligned(params, masks, ("params", "masks"), surplus=True)


def part_of(tx: Any, opt_state: optax.OptState, params: PyTree) -> optax.OptState:
    """The part of ``opt_state`` that is the state of ``tx``, without boxes."""
    structure = jax.tree.structure(unboxed(jax.eval_shape(tx.init, params)))

    def fits(node: Any) -> bool:
        return jax.tree.structure(unboxed(node)) == structure  # type: ignore[operator]

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=fits) if fits(node)]
    if len(found) != 1 or isinstance(found[0], optax.MultiStepsState):
        raise TypeError(
            "tx must be what sparse_training returned, or an optax.partition of several, without "
            "what is wrapped around it and was made for the same parameters as opt_state; got "
            f"{type(tx).__name__} and a state of type {type(opt_state).__name__}"
        )
    return unboxed(found[0])
