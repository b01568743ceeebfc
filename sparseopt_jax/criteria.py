"""What to drop and what to grow by: criteria, as values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from sparseopt_jax.settings import as_number, check_function, keep

Array: TypeAlias = jax.Array

DropBy: TypeAlias = str | Callable[[Array, Array], Array]
GrowBy: TypeAlias = "str | Momentum"


@dataclass(frozen=True)
class Momentum:
    """To grow by: an exponential average of the gradient with respect to all weights.

    ``m <- decay * m + (1 - decay) * g`` on every step, from 0; weights are grown where ``|m|`` is
    largest. It is an array of the parameters' size in float32 more, which each step reads and
    writes; what is not finite stays out of it. ``update_topology`` ranks what it is given. Criteria
    to drop by that read the gradient get the average.

    Attributes:
      decay: in (0, 1).

    Raises:
      TypeError: ``decay`` is no number.
      ValueError: ``decay`` outside (0, 1).

    Source: Dettmers and Zettlemoyer, SNFS (arXiv 1907.04840), section 3. There layers also trade
    weights; here each keeps its number.

    Example:
      >>> import sparseopt_jax as sx
      >>> sx.RigL(100, 0.3, 10_000, grow_by=sx.Momentum(0.9)).grow_by
      Momentum(decay=0.9)
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        keep(self, decay=as_number("decay", self.decay, "a number in (0, 1)"))
        if not 0.0 < self.decay < 1.0:
            raise ValueError(f"decay must lie in (0, 1), got {self.decay}")


def check_drop_by(drop_by: Any, choices: tuple[str, ...]) -> None:
    """Raise unless ``drop_by`` is one of the choices or a function of weight and gradient."""
    if not isinstance(drop_by, str) and callable(drop_by):
        check_function("drop_by", drop_by, "weight", "gradient")
    elif not isinstance(drop_by, str) or drop_by not in choices:
        raise ValueError(
            f"drop_by must be one of {', '.join(map(repr, choices))}, or a function "
            f"(weight, gradient) -> score, got {drop_by!r}"
        )


def check_grow_by(grow_by: Any, choices: tuple[str, ...]) -> None:
    """Raise unless ``grow_by`` is one of the choices or a ``Momentum``."""
    if not isinstance(grow_by, Momentum) and (
        not isinstance(grow_by, str) or grow_by not in choices
    ):
        raise ValueError(
            f"grow_by must be one of {', '.join(map(repr, choices))}, or Momentum(decay), "
            f"got {grow_by!r}"
        )


def drop_scores(drop_by: DropBy, weight: Array, score: Array) -> Array:
    """What is ranked by magnitude: the smallest are dropped.

    For ``"random"`` all are alike, and ties are broken at random. A weight that is not finite has a
    score that is not, whatever the criterion, so that its layer is known by it.
    """
    if drop_by == "magnitude":
        return weight
    if callable(drop_by):
        scores = jnp.asarray(drop_by(weight, score))
        if scores.shape != weight.shape or not jnp.issubdtype(scores.dtype, jnp.floating):
            raise ValueError(
                f"drop_by must return a floating score for each weight, {weight.shape}, got "
                f"{scores.dtype} of shape {scores.shape}"
            )
    elif drop_by == "saliency":
        scores = weight.astype(jnp.float32) * score.astype(jnp.float32)
    else:
        scores = jnp.ones_like(weight)
    return jnp.where(jnp.isfinite(weight), scores, jnp.nan)
