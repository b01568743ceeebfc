"""When and how the set of active weights changes: what a topology is, and Static.

A topology is a frozen value with a pure ``update(key, step, masks, params, scores, layers) ->
masks`` that works on whatever leaves it is given. It remembers nothing: what must be kept between
updates lives in the state of ``sparse_training``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from sparseopt_jax.criteria import GrowBy
from sparseopt_jax.schedules import Schedule
from sparseopt_jax.settings import MOST_STEPS

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


class Topology(ABC):
    """What ``sparse_training`` asks of a topology, with defaults for all but two.

    Attributes:
      interval: steps between updates, at least 1; it has no default.
      skip_step: whether no weight moves on the step of an update.
      grow_by: what ``scores`` are to be: ``"gradient"``, ``"corrected_gradient"``, or a
        ``Momentum`` of the gradient.
      accumulate_steps: over how many steps, the update's own included, ``scores`` are summed.
      needs_schedule: whether it does nothing without a density schedule.
      only_drops: whether it cannot give a layer more weights than it has.
      needs_dense_gradient: whether an update reads ``scores`` of weights that are not active, for
        ``training_flops``.

    Its attributes ``begin_step`` and ``end_step``, the first step on which an update falls and the
    last on which one may, are one interval and never where it has none.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> class Shifted(sx.Topology):
      ...     interval = 10
      ...     def update(self, key, step, masks, params, scores, layers=None):
      ...         return jax.tree.map(lambda mask: jnp.roll(mask, 1), masks)
      >>> masks = {"kernel": jnp.array([[True, False, False]])}
      >>> Shifted().update(None, 0, masks, masks, masks)["kernel"].tolist()
      [[False, True, False]]
      >>> [bool(Shifted().is_update_step(step)) for step in (0, 5, 10)]
      [False, False, True]
    """

    interval: int
    skip_step: bool = False
    grow_by: GrowBy = "gradient"
    accumulate_steps: int = 1
    needs_schedule: bool = False
    only_drops: bool = False
    needs_dense_gradient: bool = True

    @property
    def own_schedule(self) -> Schedule | None:
        """None, where the density is that of ``sparse_training``'s schedule, if it has one."""
        return None

    @property
    def first_update(self) -> int:
        """The first step on which an update falls."""
        begin = getattr(self, "begin_step", None)
        return int(self.interval if begin is None else begin)

    @property
    def last_update(self) -> int:
        """The last one; below the first where there is none."""
        first = self.first_update
        return first + (self._end - first) // self.interval * self.interval

    @property
    def _end(self) -> int:
        return int(getattr(self, "end_step", MOST_STEPS))

    def is_update_step(self, step: Any) -> Any:
        """Whether ``begin_step <= step <= end_step`` at a whole number of intervals from the begin.

        Args:
          step: number of optimizer steps done before this one; an int or an integer array.
        """
        step = jnp.asarray(step)
        within = (step >= self.first_update) & (step <= self._end)
        return within & ((step - self.first_update) % self.interval == 0)

    def in_accumulation_window(self, step: Any) -> Any:
        """Whether this step is one of the last ``accumulate_steps`` before, and with, an update."""
        if self.accumulate_steps == 1:
            return self.is_update_step(step)
        step, first = jnp.asarray(step), self.first_update
        to_next = (first - step) % self.interval
        next_update = jnp.maximum(step + to_next, first)
        return (next_update - step < self.accumulate_steps) & (next_update <= self._end)

    @abstractmethod
    def update(
        self,
        key: Array,
        step: Any,
        masks: PyTree,
        params: PyTree,
        scores: PyTree,
        layers: PyTree | None = None,
    ) -> PyTree:
        """The masks after one update; pure, and safe under jit, vmap and scan.

        Args:
          key: a JAX random key.
          step: the training step; may be traced.
          masks: bool arrays.
          params: floating arrays of the same paths and shapes, held in any way.
          scores: likewise, what to grow by: the gradient with respect to all weights, also those
            that are not active, or what ``grow_by`` asks for.
          layers: a ``Layer`` in the place of each mask: its axes, its structure, and how many
            weights it is to have. None: what ``describe_layers(masks)`` gives.
        """


@dataclass(frozen=True)
class Static(Topology):
    """Masks that never change.

    Example:
      >>> import sparseopt_jax as sx
      >>> sx.Static().is_update_step(100)
      False
    """

    needs_dense_gradient = False

    def is_update_step(self, step: Any) -> Any:
        """Never."""
        return False

    def in_accumulation_window(self, step: Any) -> Any:
        """Never."""
        return False

    @property
    def last_update(self) -> int:
        """There is none."""
        return -1

    def update(
        self,
        key: Array,
        step: Any,
        masks: PyTree,
        params: PyTree,
        scores: PyTree,
        layers: PyTree | None = None,
    ) -> PyTree:
        """The masks as they are."""
        return masks
