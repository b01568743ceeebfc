"""What the wrapper has to find out of the optimizer inside it, and of the weights that it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax

from sparseopt_jax.preconditioner import MissingMasksError

PyTree: TypeAlias = Any


def copies(params: PyTree) -> tuple[PyTree, ...]:
    """The weights; those that the gradient is taken at first, where an optimizer keeps two."""
    return tuple(params) if isinstance(params, optax.LookaheadParams) else (params,)


def each_copy(function: Callable[..., PyTree], *params: PyTree) -> PyTree:
    """What ``function`` gives for each copy of the weights, held as they were."""
    if isinstance(params[0], optax.LookaheadParams):
        return optax.LookaheadParams(*map(function, *params))
    return function(*params)


def is_placeholder(params: PyTree) -> bool:
    """Whether this is what ``optax.tree.map_params`` puts in the place of parameters."""
    containers = (dict, list, tuple, type(None))
    return not jax.tree.leaves(params) and not isinstance(params, containers)


def reads_masks(
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
