"""Smaller updates for weights that have become active, against the cold start of Adam.

The moments of a weight that grows start at zero, but the optimizer's step count, which corrects
their bias, is shared by all weights and long past its beginning. After 3,000 steps of
``adam(1e-3)`` a new weight's steps are 4.1 times the usual one at once, and 6.4 times after eleven.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp

from sparseopt_jax import activity as bits
from sparseopt_jax.by_path import ByPath
from sparseopt_jax.settings import as_int, as_number, keep, kind_of
from sparseopt_jax.topology import Topology

Array: TypeAlias = jax.Array
GrownWarmup: TypeAlias = int | Callable[[Array, Array], Array]


@dataclass(frozen=True)
class adam_bias_correction:
    """Each weight's own bias correction, for ``sparse_training(grown_warmup=...)`` around Adam.

    Adam divides its moments by ``1 - b ** t`` with t the optimizer's step count. For a weight that
    has been active for a steps only, a in place of t is right, and

        (1 - b1**t) / (1 - b1**a) * sqrt((1 - b2**a) / (1 - b2**t))

    makes one out of the other: a grown weight steps as in an Adam of its own that started when it
    grew. Exact up to Adam's epsilon, also for AdamW's gradient part, NAdam and others with Adam's
    correction; the decay of grown weights is scaled along.

    Attributes:
      b1: decay of the first moment, the optimizer's.
      b2: decay of the second moment, the optimizer's.

    Raises:
      TypeError, ValueError: not numbers in [0, 1). From ``sparse_training``: the topology's
        interval is so short that a weight's age, which is remembered over 63 updates, is forgotten
        while the correction is still more than a tenth.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> scale = sx.adam_bias_correction(b1=0.9, b2=0.999)
      >>> [round(float(scale(jnp.int32(age), jnp.int32(3000))), 3) for age in (1, 10, 100, 3000)]
      [0.324, 0.157, 0.317, 1.0]
    """

    b1: float = 0.9
    b2: float = 0.999

    def __post_init__(self) -> None:
        for name in ("b1", "b2"):
            value = as_number(name, getattr(self, name))
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must lie in [0, 1): Adam's decay rate, got {value}")
            keep(self, **{name: value})

    def __call__(self, age: Array, step: Array) -> Array:
        """The scale, float32.

        Args:
          age: int32, how many updates the weight has had since it became active, this one included.
          step: int32 scalar, how many updates there were in all, this one included.
        """

        def one_minus_power(b: float, n: Array) -> Array:
            if b == 0:
                return jnp.float32(1)
            return -jnp.expm1(n.astype(jnp.float32) * math.log(b))

        first = one_minus_power(self.b1, step) / one_minus_power(self.b1, age)
        second = one_minus_power(self.b2, age) / one_minus_power(self.b2, step)
        return first * jnp.sqrt(second)

    @property
    def steps(self) -> int:
        """After how many steps the correction is within a tenth of none."""
        return max(math.ceil(math.log(1 - 1 / 1.21) / math.log(self.b2)), 1) if self.b2 else 1


@dataclass(frozen=True)
class _Ramp:
    steps: int

    def __call__(self, age: Array, step: Array) -> Array:
        return jnp.minimum(age.astype(jnp.float32) / self.steps, 1.0)


def as_warmup(
    grown_warmup: GrownWarmup | None, topology: ByPath[Topology]
) -> Callable[[Array, Array], Array] | None:
    """The function of age and step, checked.

    Raises:
      TypeError: neither an int nor a function.
      ValueError: an int below 1, or a topology whose interval is too short for it.
    """
    if grown_warmup is None:
        return None
    if kind_of("grown_warmup", grown_warmup) is int:
        grown_warmup = _Ramp(as_int("grown_warmup", grown_warmup, at_least=1))
    if isinstance(grown_warmup, type) or not callable(grown_warmup):
        raise TypeError(
            "grown_warmup must be a number of steps, adam_bias_correction(), or a function of age "
            f"and step, got {grown_warmup!r}"
        )
    needed = getattr(grown_warmup, "steps", 0)
    for one in topology.values() if isinstance(topology, Mapping) else (topology,):
        interval = interval_of(one)
        if interval and bits.OLDEST * interval < needed:
            raise ValueError(
                f"grown_warmup={grown_warmup!r} takes {needed} steps, but with an interval of "
                f"{interval} the age of a weight is remembered for {bits.OLDEST} updates, "
                f"{bits.OLDEST * interval} steps: the interval must be at least "
                f"{-(-needed // bits.OLDEST)}"
            )
    return grown_warmup


def interval_of(topology: Topology) -> int:
    """Steps between its updates; 0 where it has no schedule."""
    return int(getattr(topology, "interval", 0))


def scaled_by_age(
    warmup: Callable[[Array, Array], Array],
    update: Array,
    activity: Array,
    interval: int,
    changed_at: Array,
    step: Array,
) -> Array:
    """A leaf's update, times the scale of each weight's age.

    What was active from the start, or for as many updates as a byte counts, is not scaled.
    """
    updates_ago = bits.age(activity)
    age = step - changed_at + updates_ago.astype(jnp.int32) * interval
    scale = warmup(jnp.minimum(age, step) + 1, step + 1)
    return jnp.where(updates_ago == bits.OLDEST, update, update * scale.astype(update.dtype))
