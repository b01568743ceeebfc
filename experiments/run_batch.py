"""Runs that train together: one by itself (`Single`), or several in one program (`batched`).

A `Run` drives a run batch and knows nothing of how many runs are in it: what it measures comes as
one entry a member, and its steps' metrics as arrays whose last axes are the members'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

import sparseopt_jax as sx
from experiments import data, distributed, divergence
from experiments.config import Config
from experiments.programs import MethodPrograms, ModelPrograms
from experiments.stepping import Stepper


class Member(NamedTuple):
    """A run of a run batch: the config of its method alone, and its seed."""

    config: Config
    seed: int

    @property
    def method(self) -> str:
        """The name of its method."""
        (method,) = self.config.methods()
        return method


class Measured(NamedTuple):
    """Active weights, mask churn since the earlier masks, and ITOP rate; None without masks."""

    active: int
    mask_churn: float | None
    itop_rate: float | None


class Steps(Protocol):
    """Takes the training steps of a run batch; see `stepping.Stepper`."""

    @property
    def step(self) -> int:
        """How many steps are done."""

    @property
    def data_seconds(self) -> float:
        """How long the host has waited for batches."""

    def advance(
        self, state: Any, count: int, stop: Callable[[], bool] = ...
    ) -> tuple[Any, list[dict[str, jax.Array]]]:
        """Takes `count` steps within one epoch, or fewer where it is asked to stop."""

    def last_batch(self) -> data.Split:
        """Images and labels of the last step."""

    def close(self) -> None:
        """Stops what reads ahead."""


class RunBatch(Protocol):
    """Runs that start, step and stop together.

    Attributes:
      model: the compiled programs of the model.
      shapes: of a state, which has `params` and `batch_stats`.
      mask_shapes: of the masks of a state.
      seconds: how long the compilation of what is theirs took.
    """

    model: ModelPrograms
    shapes: Any
    mask_shapes: Any
    seconds: float

    @property
    def members(self) -> Sequence[Member]:
        """The runs."""

    def start(self) -> Any:
        """The state before the first step."""

    def stepper(self, step: int) -> Steps:
        """Takes the steps after `step`."""

    def masks(self, state: Any) -> Any:
        """The masks of a state; a pytree without leaves where there are none."""

    def measure(self, state: Any, earlier: Any) -> tuple[list[Measured], Any]:
        """What the masks are like, and a copy of them that outlives the next step."""

    def evaluate(self, state: Any, batch: data.EvalBatch) -> tuple[jax.Array, ...]:
        """Number of examples, number correct, sum of losses; an entry a member."""

    def diagnose(self, state: Any, batch: data.Split) -> list[dict[str, Any]]:
        """Gradient norm, skew and fan-in on a batch."""

    def sharpness(self, state: Any, batch: data.Split) -> list[dict[str, Any]]:
        """The Hessian's top eigenvalue on a batch."""

    def params_of(self, state: Any, index: int) -> Any:
        """The parameters of one member, as NumPy's arrays."""

    def masks_of(self, state: Any, index: int) -> Any:
        """The masks of one member, as NumPy's arrays; None where it is dense."""

    def learning_rate(self, step: int) -> float:
        """The rate of the step after `step`."""

    def locate(self, stepper: Steps, state: Any, last_step: int) -> str:
        """Where values first were not finite, from a finite `state` on; ends a sentence."""


class Single:
    """One run by itself, on any mesh and any data; a `RunBatch` of one."""

    def __init__(
        self, member: Member, model: ModelPrograms, programs: MethodPrograms, dataset: data.Data
    ) -> None:
        """Keeps what it is given.

        Args:
          member: the run.
          model: the compiled programs of the model.
          programs: those of the method.
          dataset: what they were compiled for.
        """
        self.members: Sequence[Member] = (member,)
        self.model, self.programs = model, programs
        self.seconds = programs.seconds
        self.shapes = programs.functions.state
        self._dataset = dataset
        self._sparse = member.config.topology != "dense"
        self.mask_shapes = self.masks(self.shapes)

    def start(self) -> Any:
        """As `RunBatch.start`."""
        seed = np.int32(self.members[0].seed)
        return self.programs.start(*self.model.init(seed), seed)

    def stepper(self, step: int) -> Stepper:
        """As `RunBatch.stepper`."""
        return Stepper(self.programs, self._dataset, self.members[0].seed, step)

    def masks(self, state: Any) -> Any:
        """As `RunBatch.masks`."""
        return sx.get_masks(state.opt_state) if self._sparse else {}

    def measure(self, state: Any, earlier: Any) -> tuple[list[Measured], Any]:
        """As `RunBatch.measure`."""
        if not self._sparse:
            return [Measured(sum(self.model.layers.values()), None, None)], {}
        active, churn, itop_rate, masks = self.programs.measure(state.opt_state, earlier)
        return [Measured(int(active), float(churn), float(itop_rate))], masks

    def evaluate(self, state: Any, batch: data.EvalBatch) -> tuple[jax.Array, ...]:
        """As `RunBatch.evaluate`."""
        sums: tuple[jax.Array, ...] = self.model.evaluate(state.params, state.batch_stats, batch)
        return sums

    def diagnose(self, state: Any, batch: data.Split) -> list[dict[str, Any]]:
        """As `RunBatch.diagnose`."""
        return [jax.device_get(self.programs.diagnose(state, *batch))]

    def sharpness(self, state: Any, batch: data.Split) -> list[dict[str, Any]]:
        """As `RunBatch.sharpness`."""
        return [jax.device_get(self.programs.sharpness(state, *batch))]

    def params_of(self, state: Any, index: int) -> Any:
        """As `RunBatch.params_of`."""
        return distributed.to_host(state.params)

    def masks_of(self, state: Any, index: int) -> Any:
        """As `RunBatch.masks_of`."""
        return distributed.to_host(self.masks(state)) if self._sparse else None

    def learning_rate(self, step: int) -> float:
        """As `RunBatch.learning_rate`."""
        return float(self.programs.learning_rate(step))

    def locate(self, stepper: Any, state: Any, last_step: int) -> str:
        """As `RunBatch.locate`."""
        return divergence.locate(self.programs, stepper, state, last_step)
