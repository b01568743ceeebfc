"""Trees with the same leaves that frameworks hold in different ways.

Flax holds leaves in boxes: NNX in variables, of another kind in an optimizer than in a model, Linen
in partitioning metadata. Equinox has None where a filter took a leaf out of a model, optax a
``MaskedNode``. The library computes on trees without boxes: what its public functions are given is
taken out of them at the door, leaves of several trees are matched by their paths, and what they
return is held as it was given. A box is a node whose only child is its attribute ``value``, or has
no name; no path shows it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import numpy as np
import optax
from jax.tree_util import FlattenedIndexKey, GetAttrKey

PyTree: TypeAlias = Any

_NO_BOXES = (dict, list, tuple, type(None), str, int, float, jax.Array, np.ndarray)


def path_str(path: tuple[Any, ...]) -> str:
    """A key path of ``jax.tree_util`` as ``"a/b/c"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_masked_node(leaf: Any) -> bool:
    """Whether a node stands for a leaf that is left out of a tree, as in ``optax.masked``."""
    return isinstance(leaf, optax.MaskedNode)


def is_absent(node: Any) -> bool:
    """Whether a node stands for leaves that are left out, in optax's way or in Equinox's."""
    return node is None or is_masked_node(node)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array or stands for one; an Equinox model has functions too."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by path, in the tree's order.

    Raises:
      ValueError: two leaves have one path.
    """
    leaves = jax.tree_util.tree_leaves_with_path(unboxed(tree))
    named = {path_str(path): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        paths = [path_str(path) for path, _ in leaves]
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"two leaves have the path {twice!r}; rename one, so that paths tell them")
    return named


def unboxed(tree: PyTree) -> PyTree:
    """``tree`` with what is in its boxes in their place."""
    return jax.tree.map(
        lambda node: unboxed(_content(node)) if _is_box(node) else node, tree, is_leaf=_is_box
    )


def boxed_like(tree: PyTree, like: PyTree) -> PyTree:
    """``tree``, of the structure of ``unboxed(like)``, in boxes like those of ``like``.

    In the place of a leaf it may have a node that stands for one.
    """

    def box(node: Any, content: Any) -> Any:
        if not _is_box(node):
            return content
        shell = jax.tree.structure(node, is_leaf=lambda child: child is not node)
        return jax.tree.unflatten(shell, [boxed_like(content, _content(node))])

    return jax.tree.map(box, like, tree, is_leaf=_is_box)


def aligned(
    tree: PyTree,
    like: PyTree,
    names: tuple[str, str],
    *,
    partial: bool = False,
    surplus: bool = False,
) -> PyTree:
    """``tree`` without boxes, its leaves in the containers of ``like``, matched by path.

    Args:
      tree: has the leaves of ``like``, however they are held.
      like: without boxes.
      names: what errors call the two.
      partial: whether ``tree`` may have None or ``MaskedNode`` in the place of a leaf of ``like``;
        so has the result then.
      surplus: whether ``tree`` may have leaves where ``like`` has None or ``MaskedNode``, such as
        an Equinox model with its functions; they are left out.

    Raises:
      ValueError: the paths differ; the message names those that do, and the cure.
    """
    tree = unboxed(tree)
    if jax.tree.structure(tree) == jax.tree.structure(like):  # type: ignore[operator]
        return tree
    given, expected = _named_nodes(tree), _named_nodes(like)
    found = {path: _at(given, path) for path, leaf in expected.items() if not is_absent(leaf)}
    missing = [
        path
        for path, leaf in found.items()
        if leaf is _NOTHING or (is_absent(leaf) and not partial)
    ]
    extra = [
        path
        for path, leaf in given.items()
        if path not in found
        and not is_absent(leaf)
        and not (surplus and is_absent(_at(expected, path)))
    ]
    if missing or extra:
        name, other = names
        raise ValueError(
            f"{name} must have the tree structure of {other}; missing: {listed(missing)}; "
            f"not in {other}: {listed(extra)}. Masks and optimizer states fit the params that they "
            "were made for: nnx.state(model, nnx.Param) in Flax NNX, eqx.filter(model, "
            "eqx.is_inexact_array) or the whole model in Equinox"
        )
    return jax.tree.unflatten(jax.tree.structure(like), found.values())


_NOTHING = object()


def _at(nodes: dict[str, Any], path: str) -> Any:
    """The node at ``path``, or what stands for all leaves of a branch that it lies on."""
    if path in nodes:
        return nodes[path]
    ends = [i for i, letter in enumerate(path) if letter == "/"]
    branches = (nodes.get(path[:end], _NOTHING) for end in ends)
    return next((node for node in branches if is_absent(node)), _NOTHING)


def _named_nodes(tree: PyTree) -> dict[str, Any]:
    """Leaves, and what stands for leaves that are left out, by path."""
    named_leaves(tree)  # Raises where a path names two leaves.
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_absent)
    return {path_str(path): node for path, node in nodes}


def _is_box(node: Any) -> bool:
    if isinstance(node, _NO_BOXES):
        return False
    children = _children(node)
    if len(children) != 1 or len(children[0][0]) != 1:
        return False
    (key,), _ = children[0]
    return isinstance(key, FlattenedIndexKey) or key == GetAttrKey("value")


def _content(box: Any) -> Any:
    return _children(box)[0][1]


def _children(node: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda child: child is not node)


def listed(names: Any, at_most: int = 8) -> str:
    """The first few of ``names``, and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:at_most]) or "none"
    return shown + (f" and {len(names) - at_most} more" if len(names) > at_most else "")
