"""How much over time: density schedules from an initial sparsity to the distribution's counts.

A schedule is a frozen value that says, for each step, which part of the way is still ahead: 1 at
the initial sparsity, 0 where each layer has the number of weights that the distribution gives it.
The topology looks at it on the steps of its updates. It remembers nothing, so a run that resumes
goes on where it was.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from sparseopt_jax.settings import (
    MOST_STEPS,
    as_int,
    as_number,
    as_step,
    as_total_steps,
    check_function,
    keep,
)

Array: TypeAlias = jax.Array

MILLION = 1_000_000


class Schedule(ABC):
    """A density schedule; ``Cubic``, ``Linear``, ``OneShot`` and ``from_optax`` are some.

    Attributes:
      initial_sparsity: the share of weights that is missing at first, in [0, 1); 0 is dense.
      end_step: the step from which on the distribution's counts are wanted.

    Its ``final_sparsity`` is the distribution's, where the schedule states it; None, the default,
    fits all.

    Example:
      >>> import sparseopt_jax as sx
      >>> class Halving(sx.Schedule):
      ...     initial_sparsity, end_step = 0.0, 300
      ...     def remaining(self, step):
      ...         return 0.5 ** (step // 100) * (step < 300)
      >>> [int(Halving().count_at(step, 100, 10)) for step in (0, 100, 200, 300)]
      [100, 55, 32, 10]
    """

    initial_sparsity: float
    end_step: int

    @property
    def final_sparsity(self) -> float | None:
        """None: whatever the distribution gives."""
        return None

    @abstractmethod
    def remaining(self, step: Any) -> Any:
        """The part of the way that is still ahead, 1 at first and 0 from ``end_step`` on.

        Args:
          step: number of optimizer steps done before this one; an int or an integer array.
        """

    def count_at(self, step: Any, initial: Any, final: Any) -> Array:
        """How many of a layer's weights are wanted at a step.

        The part that is ahead is rounded to six decimals, so that no count depends on the last bits
        of a backend's arithmetic; the rest is in integers, rounded towards ``final``.

        Args:
          step: an int or an integer scalar array.
          initial: the layer's number of weights at first; an int or an integer array.
          final: its number in the end; likewise.

        Returns:
          int32 of the shape of ``initial`` and ``final``.
        """
        ahead = jnp.clip(jnp.asarray(self.remaining(step), jnp.float32), 0, 1)
        initial, final = jnp.asarray(initial, jnp.int32), jnp.asarray(final, jnp.int32)
        millionths = jnp.round(ahead * MILLION).astype(jnp.int32)
        left = millionths_of(millionths, jnp.abs(initial - final))
        return final + jnp.sign(initial - final) * left


@dataclass(frozen=True)
class _FromTo(Schedule):
    """What ``Cubic`` and ``Linear`` share."""

    begin_step: int | float
    end_step: int | float  # type: ignore[assignment]  # an int, once it is made
    initial_sparsity: float = 0.0
    total_steps: int | None = None

    def __post_init__(self) -> None:
        keep(self, total_steps=as_total_steps(self.total_steps))
        keep(
            self,
            begin_step=as_step("begin_step", self.begin_step, self.total_steps),
            end_step=as_step("end_step", self.end_step, self.total_steps),
            initial_sparsity=as_initial_sparsity(self.initial_sparsity),
        )
        if self.end_step <= self.begin_step:
            raise ValueError(
                f"end_step must come after begin_step={self.begin_step}, got {self.end_step}; "
                "OneShot(step) prunes at once"
            )

    def _left(self, step: Any) -> Array:
        """1 at ``begin_step``, falling by the same amount on each step to 0 at ``end_step``."""
        left = (jnp.asarray(self.end_step) - step).astype(jnp.float32)
        return jnp.clip(left / (self.end_step - self.begin_step), 0, 1)


@dataclass(frozen=True)
class Cubic(_FromTo):
    """Gradual pruning: fast at first, slower towards the end.

    s(t) = s_f + (s_i - s_f) * (1 - (t - begin_step) / (end_step - begin_step))^3, where s_i is the
    initial sparsity and s_f what the distribution gives each layer.

    Attributes:
      begin_step: until then, the initial sparsity; an int, or a share of ``total_steps`` in [0, 1].
      end_step: from then on, the distribution's counts; likewise.
      initial_sparsity: share of weights that is missing at first, in [0, 1). 0: all layers are
        dense. Else, each layer begins with what its distribution gives at that sparsity (ER, ERK
        and Uniform), or at that sparsity itself where the distribution has none.
      total_steps: the length of the run, where steps are shares of it.

    Raises:
      TypeError: an argument of the wrong type, or a share without ``total_steps``.
      ValueError: an argument out of range, or an end that is not after the begin.

    Source: Zhu and Gupta (arXiv 1710.01878), equation 1; GraNet (arXiv 2106.10404), equation 1.

    Example:
      >>> import sparseopt_jax as sx
      >>> schedule = sx.Cubic(begin_step=0.0, end_step=0.5, total_steps=2000)
      >>> [int(schedule.count_at(step, 1000, 100)) for step in (0, 500, 1000)]
      [1000, 212, 100]
    """

    def remaining(self, step: Any) -> Array:
        """The cube of the linear part."""
        left = self._left(step)
        return left * left * left


@dataclass(frozen=True)
class Linear(_FromTo):
    """The same number of weights fewer on each step.

    Attributes:
      begin_step: as of ``Cubic``.
      end_step: as of ``Cubic``.
      initial_sparsity: as of ``Cubic``.
      total_steps: as of ``Cubic``.

    Raises:
      TypeError: as ``Cubic``.
      ValueError: as ``Cubic``.

    Example:
      >>> import sparseopt_jax as sx
      >>> schedule = sx.Linear(begin_step=0, end_step=1000, initial_sparsity=0.5)
      >>> [int(schedule.count_at(step, 500, 100)) for step in (0, 500, 1000)]
      [500, 300, 100]
    """

    def remaining(self, step: Any) -> Array:
        """The linear part."""
        return self._left(step)


@dataclass(frozen=True)
class OneShot(Schedule):
    """From the initial sparsity to the distribution's counts at once.

    With ``Prune`` that is one-shot pruning, with ``RigL`` or ``SET`` a delayed start.

    Attributes:
      step: when; an int, or a share of ``total_steps`` in [0, 1].
      initial_sparsity: as of ``Cubic``.
      total_steps: as of ``Cubic``.

    Raises:
      TypeError: as ``Cubic``.
      ValueError: an argument out of range.

    Example:
      >>> import sparseopt_jax as sx
      >>> [int(sx.OneShot(100).count_at(step, 1000, 50)) for step in (99, 100)]
      [1000, 50]
    """

    step: int | float
    initial_sparsity: float = 0.0
    total_steps: int | None = None

    def __post_init__(self) -> None:
        keep(self, total_steps=as_total_steps(self.total_steps))
        keep(
            self,
            step=as_step("step", self.step, self.total_steps),
            initial_sparsity=as_initial_sparsity(self.initial_sparsity),
        )

    @property
    def end_step(self) -> int:  # type: ignore[override]
        """The step itself."""
        return int(self.step)

    def remaining(self, step: Any) -> Array:
        """1 before the step, 0 from it on."""
        return (jnp.asarray(step) < self.step).astype(jnp.float32)


@dataclass(frozen=True)
class _FromOptax(Schedule):
    """See ``from_optax``."""

    schedule: Callable[[Any], Any]
    end_step: int

    def _sparsity(self, step: int) -> float:
        """To six decimals: in float32, 0 may come out as a little more or less."""
        with jax.ensure_compile_time_eval():
            return round(float(self.schedule(jnp.asarray(step, jnp.int32))), 6)

    @property
    def initial_sparsity(self) -> float:  # type: ignore[override]
        """What the schedule gives at step 0."""
        return as_initial_sparsity(self._sparsity(0), "schedule(0)")

    @property
    def final_sparsity(self) -> float:
        """What it gives at ``end_step``."""
        return as_initial_sparsity(self._sparsity(self.end_step), f"schedule({self.end_step})")

    def remaining(self, step: Any) -> Array:
        """The way from the sparsity at a step to the last one, as a part of the whole way."""
        first, last = self.initial_sparsity, self.final_sparsity
        if first == last:
            raise ValueError(
                f"schedule must change between step 0 and end_step={self.end_step}, got a sparsity "
                f"of {first} at both"
            )
        sparsity = self.schedule(jnp.minimum(step, self.end_step))
        return (jnp.asarray(sparsity, jnp.float32) - last) / (first - last)


def from_optax(schedule: Callable[[Any], Any], end_step: int) -> Schedule:
    """A density schedule from any function of the step, such as those of optax.

    Args:
      schedule: ``step -> sparsity``, the share of weights that is missing, in [0, 1). It is called
        with integer arrays. Each layer goes its own way from its initial to its final count; of
        that way this gives the part that is done.
      end_step: from this step on, the distribution's counts.

    Returns:
      A density schedule.

    Raises:
      TypeError: ``schedule`` is no function of the step, or ``end_step`` no int.
      ValueError: ``end_step`` is below 1. From ``sparse_training``'s ``init``: a sparsity outside
        [0, 1), the same one at both ends, or a last one that is not the distribution's.

    Example:
      >>> import optax
      >>> import sparseopt_jax as sx
      >>> falling = optax.polynomial_schedule(0.0, 0.9, power=2, transition_steps=1000)
      >>> schedule = sx.from_optax(falling, end_step=1000)
      >>> [int(schedule.count_at(step, 1000, 100)) for step in (0, 500, 1000)]
      [1000, 325, 100]
    """
    check_function("schedule", schedule, "step")
    return _FromOptax(schedule, as_int("end_step", end_step, 1, MOST_STEPS))


def millionths_of(millionths: Array, n: Array) -> Array:
    """floor(millionths * n / 10**6) of int32 up to 10**6 and 2**31 - 1, without overflow.

    With n = q * 10**6 + r and r = 1000 * r1 + r0, every product and sum below fits.
    """
    quotient, remainder = n // MILLION, n % MILLION
    high, low = millionths * (remainder // 1000), millionths * (remainder % 1000)
    return millionths * quotient + high // 1000 + (high % 1000 * 1000 + low) // MILLION


def as_initial_sparsity(value: Any, name: str = "initial_sparsity") -> float:
    sparsity = as_number(name, value, "a number in [0, 1)")
    if not (math.isfinite(sparsity) and 0.0 <= sparsity < 1.0):
        raise ValueError(f"{name} must lie in [0, 1): the share of weights missing, got {sparsity}")
    return float(sparsity)
