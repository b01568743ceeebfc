"""Topologies that follow a density schedule: pruning, and dense and sparse phases in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp

from sparseopt_jax.criteria import DropBy, check_drop_by
from sparseopt_jax.drop_and_grow import Layerwise, check_steps
from sparseopt_jax.schedules import Schedule
from sparseopt_jax.settings import as_bool, keep

Array: TypeAlias = jax.Array


@dataclass(frozen=True)
class Prune(Layerwise):
    """Gradual magnitude pruning: drops along the density schedule, and grows nothing.

    Attributes:
      interval: steps between updates, at least 1.
      end_step: last step on which an update may fall, inclusive; an int, or a share of
        ``total_steps`` in [0, 1]. The schedule must have come to its end by the last update.
      begin_step: first step on which one falls, likewise; one interval by default.
      drop_by: ``"magnitude"``, ``"saliency"``, ``"random"`` or a function, as of ``RigL``.
      skip_step: on the step of an update, move no weight.
      total_steps: the length of the run, where steps are shares of it.

    A layer with a weight that is not finite keeps its topology on that update. Where a criterion
    reads the gradient, so does one whose gradient is not finite, or zero everywhere.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: interval < 1, end before begin, unknown drop_by, or more steps than int32 counts;
        from ``sparse_training``: no schedule, or one that asks for more weights later.

    Source: Zhu and Gupta (arXiv 1710.01878), section 3.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> tx = sx.sparse_training(
      ...     optax.sgd(0.1),
      ...     distribution=sx.Uniform(0.75, dense_first=False),
      ...     schedule=sx.Linear(begin_step=0, end_step=2),
      ...     topology=sx.Prune(interval=1, end_step=2))
      >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(4, 2)}
      >>> state, active = tx.init(params), []
      >>> for _ in range(3):
      ...     active.append(int(sx.get_masks(state)["kernel"].sum()))
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> [*active, int(sx.get_masks(state)["kernel"].sum())]
      [8, 8, 5, 2]
    """

    interval: int
    end_step: int | float
    begin_step: int | float | None = None
    drop_by: DropBy = "magnitude"
    skip_step: bool = False
    total_steps: int | None = None
    needs_schedule = True
    only_drops = True
    grow_by = "gradient"
    _grow: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check_steps(self)
        check_drop_by(self.drop_by, ("magnitude", "saliency", "random"))
        keep(self, skip_step=as_bool("skip_step", self.skip_step))

    @property
    def _reads_scores(self) -> bool:
        return self.drop_by not in ("magnitude", "random")

    def _amounts(self, step: Any, n_active: Array, n_total: Array) -> tuple[Array, Array]:
        return jnp.minimum(n_active, n_total), jnp.zeros_like(n_active)


@dataclass(frozen=True)
class ACDC(Layerwise):
    """Dense and sparse phases in turn, the last one sparse.

    Training begins dense. At ``begin_step`` each layer keeps as many of its largest weights as the
    distribution says; one interval later all others come back, at zero, and so on. From
    ``end_step`` on the masks stay.

    Attributes:
      interval: steps of a phase, at least 1.
      end_step: from then on the network stays sparse; an int, or a share of ``total_steps`` in
        [0, 1]. It lies an even number of intervals after the begin.
      begin_step: the end of the first, dense phase, likewise; one interval by default.
      skip_step: on the step of a change, move no weight.
      total_steps: the length of the run, where steps are shares of it.

    A layer with a weight that is not finite keeps its topology on that update. It brings its own
    density schedule.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: interval < 1, an end that is not an even number of intervals after the begin, or
        more steps than int32 counts.

    Source: Peste et al., AC/DC (arXiv 2106.12379), algorithm 1.

    Example:
      >>> import sparseopt_jax as sx
      >>> topology = sx.ACDC(interval=10, end_step=30)
      >>> [int(topology.own_schedule.count_at(step, 100, 5)) for step in (0, 10, 20, 30, 40)]
      [100, 5, 100, 5, 5]
    """

    interval: int
    end_step: int | float
    begin_step: int | float | None = None
    skip_step: bool = False
    total_steps: int | None = None
    grow_by = "gradient"
    _grow: ClassVar[str | None] = "random"  # All there are.

    def __post_init__(self) -> None:
        check_steps(self)
        keep(self, skip_step=as_bool("skip_step", self.skip_step))
        phases, rest = divmod(int(self.end_step) - self.first_update, self.interval)
        if rest or phases % 2:
            nearest = self.first_update + phases // 2 * 2 * self.interval
            raise ValueError(
                f"end_step must lie an even number of intervals of {self.interval} after the first "
                f"change at {self.first_update}, so that the last phase is sparse: {nearest} or "
                f"{nearest + 2 * self.interval}, got {self.end_step}"
            )

    @property
    def own_schedule(self) -> Schedule:
        """1, dense, and 0, sparse, in turn."""
        return _Phases(self.first_update, self.interval, int(self.end_step))

    @property
    def _reads_scores(self) -> bool:
        return False

    def _amounts(self, step: Any, n_active: Array, n_total: Array) -> tuple[Array, Array]:
        return jnp.minimum(n_active, n_total), jnp.zeros_like(n_active)


@dataclass(frozen=True)
class _Phases(Schedule):
    """The density of ``ACDC``."""

    begin_step: int
    interval: int
    end_step: int
    initial_sparsity = 0.0

    def remaining(self, step: Any) -> Array:
        """1 in dense phases."""
        step = jnp.minimum(step, self.end_step)
        phase = (step - self.begin_step) // self.interval
        return ((step < self.begin_step) | (phase % 2 == 1)).astype(jnp.float32)
