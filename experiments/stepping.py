"""Training steps of one run, one by one or several in one compiled loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from experiments import data
from experiments.functions import State
from experiments.programs import MethodPrograms

_IN_FLIGHT = 4


def bound_in_flight(results: Sequence[Any]) -> None:
    """Waits until no more than a few of the calls that gave `results`, in order, are unfinished.

    Calls return before the device has run them, and each holds its batch in the device's memory.
    """
    if len(results) >= _IN_FLIGHT:
        jax.block_until_ready(results[-_IN_FLIGHT])  # type: ignore[no-untyped-call]


class Stepper:
    """Takes a run's steps on its own batches, from any step on.

    A call of the compiled loop saves the host's part of every step but one; on a CPU, where
    convolutions in a loop are slow, its length is 1 and there is none.

    Attributes:
      step: how many steps are done.
      data_seconds: how long the host has waited for batches.
    """

    def __init__(self, programs: MethodPrograms, dataset: data.Data, seed: int, step: int) -> None:
        """Prepares for the steps after `step`; reads no data yet.

        Args:
          programs: of the method.
          dataset: what `programs` were compiled for.
          seed: of the run.
          step: how many steps are done.
        """
        self._programs = programs
        self._data = dataset
        self._seed = seed
        self.step = step
        self.data_seconds = 0.0
        self._batches: Iterator[data.Split] | None = None
        self._order: tuple[int, jax.Array] | None = None
        self._last: data.Split | None = None

    def advance(
        self,
        state: State,
        count: int,
        stop: Callable[[], bool] = lambda: False,
        single: bool = False,
    ) -> tuple[State, list[dict[str, jax.Array]]]:
        """Takes `count` steps within one epoch, or fewer where it is asked to stop.

        Args:
          state: before them; its memory is used again.
          count: how many steps.
          stop: asked after each call of a compiled program.
          single: take them one by one.

        Returns:
          The state after them, and the metrics of all steps in order, each an array of one
          element or of one per step of a compiled loop.
        """
        metrics: list[dict[str, jax.Array]] = []
        end = self.step + count
        while self.step < end:
            loop = self._programs.steps is not None and not single
            if loop and end - self.step >= self._programs.steps_per_call:
                state, measured = self._loop(state)
            else:
                state, measured = self._single(state)
            metrics.append(measured)
            bound_in_flight(metrics)
            if stop():
                break
        return state, metrics

    def _single(self, state: State) -> tuple[State, dict[str, jax.Array]]:
        if self._batches is None:
            self._batches = self._data.train_batches(self._seed, self.step)
        begin = time.monotonic()
        self._last = next(self._batches)
        self.data_seconds += time.monotonic() - begin
        self.step += 1
        stepped: tuple[State, dict[str, jax.Array]] = self._programs.step(state, *self._last)
        return stepped

    def _loop(self, state: State) -> tuple[State, dict[str, jax.Array]]:
        dataset = self._data
        assert isinstance(dataset, data.DeviceData)
        assert self._programs.steps is not None
        epoch, index = divmod(self.step, dataset.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, dataset.epoch_order(self._seed, epoch)
        # NumPy's scalars go to all devices, also to those of other processes.
        scalars = (np.int32(value) for value in (self._seed, epoch, index))
        state, measured = self._programs.steps(state, dataset.train, self._order[1], *scalars)
        self._batches = self._last = None
        self.step += self._programs.steps_per_call
        return state, measured

    def last_batch(self) -> data.Split:
        """Images and labels of the last step; there must have been one."""
        if self._last is None:  # it was a loop's
            self._last = next(self._data.train_batches(self._seed, self.step - 1))
        return self._last

    def close(self) -> None:
        """Stops the threads and processes that read ahead."""
        batches: Any = self._batches
        if batches is not None:
            batches.close()
