"""What the wrapper has to find out of the optimizer inside it, and of the weights that it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax

PyTree: TypeAlias = Any


def param_copies(params: PyTree) -> tuple[PyTree, ...]:
    """The weights; those that the gradient is taken at first, where an optimizer keeps two."""
    return tuple(params) if isinstance(params, optax.LookaheadParams) else (params,)


def map_copies(function: Callable[..., PyTree], *params: PyTree) -> PyTree:
    """What ``function`` gives for each copy of the weights, held as they were."""
    if isinstance(params[0], optax.LookaheadParams):
        return optax.LookaheadParams(*map(function, *params))
    return function(*params)


def is_placeholder(params: PyTree) -> bool:
    """Whether this is what ``optax.tree.map_params`` puts in the place of parameters."""
    containers = (dict, list, tuple, type(None))
    return not jax.tree.leaves(params) and not isinstance(params, containers)


def accepted(
    update: Callable[..., Any], offered: dict[str, Any], extra: dict[str, Any]
) -> list[str]:
    """The names of what is ``offered`` that ``update`` accepts beside ``extra``.

    Line searches and SAM pass extra arguments on to functions that know of none, so they are
    offered less and less, from the last name on. What is in ``extra`` stands.
    """
    names = [name for name in offered if name not in extra]
    while names:
        arguments = extra | {name: offered[name] for name in names}
        try:
            jax.eval_shape(lambda arguments=arguments: update(**arguments))
            break
        except TypeError:
            names.pop()
    return names
