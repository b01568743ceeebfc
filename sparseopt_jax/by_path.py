"""Settings that differ from layer to layer: mappings from glob patterns over paths to values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from sparseopt_jax.patterns import matches
from sparseopt_jax.settings import as_int

Value = TypeVar("Value")
ByPath: TypeAlias = Value | Mapping[str, Value]


def grouped(
    name: str, values: ByPath[Value], paths: Sequence[str]
) -> list[tuple[Value, tuple[int, ...]]]:
    """Each value with the numbers of the paths that it is for.

    Args:
      name: the setting's, for errors.
      values: one for all paths, or a mapping; the first pattern that matches counts.
      paths: the paths of all leaves that it could be for.

    Raises:
      ValueError: a pattern matches none of the paths.
    """
    if not isinstance(values, Mapping):
        return [(values, tuple(range(len(paths))))]
    taken: set[int] = set()
    groups = []
    for pattern, value in values.items():
        matching = [i for i, path in enumerate(paths) if matches(path, pattern)]
        if not matching:
            raise ValueError(
                f"{name} pattern {pattern!r} matches none of the layers: {', '.join(paths)}"
            )
        groups.append((value, tuple(i for i in matching if i not in taken)))
        taken.update(matching)
    return groups


def layer_counts(
    distribution: ByPath[Any],
    layers: Mapping[str, tuple[int, ...]],
    scores: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Number of weights that each layer keeps; layers that no pattern matches stay dense.

    Args:
      distribution: one, or a mapping from patterns to several.
      layers: the layers' shapes by path.
      scores: the layers' scores by path, for distributions that count by them; such counts are
        int32 scalar arrays. Without scores all counts are ints.
    """
    counts: dict[str, Any] = {path: math.prod(shape) for path, shape in layers.items()}
    names = list(layers)
    for one, numbers in grouped("distribution", distribution, names):
        own = [names[i] for i in numbers]
        if own and scores is not None and hasattr(one, "counts_from_scores"):
            found = one.counts_from_scores({name: scores[name] for name in own})
        else:
            found = one.layer_counts({name: layers[name] for name in own}) if own else {}
        counts |= {name: _checked(one, name, count, layers) for name, count in found.items()}
    return counts


def _checked(
    distribution: Any, path: str, count: Any, layers: Mapping[str, tuple[int, ...]]
) -> Any:
    """The count of a layer, which a distribution of the user's own may have got wrong."""
    if path not in layers:
        raise ValueError(
            f"{distribution} counts {path!r}, which is none of the layers: {', '.join(layers)}"
        )
    size = math.prod(layers[path])
    if isinstance(count, jax.core.Tracer):
        return jnp.clip(count, 0, size)
    try:
        return as_int("count", count, 0, size)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{distribution}, layer {path!r} of {size} weights: {error}") from None
