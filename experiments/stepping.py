"""Training steps of one run, one by one or several in one compiled loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments import data
from experiments.data import on_device
from experiments.programs import MethodPrograms, State


class Stepper:
    """Takes a run's steps on its own batches, from any step on.

    A call of the compiled loop saves the host's part of every step but one; on a CPU, where
    convolutions in a loop are slow, its length is 1 and there is none.
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
        self._step = step
        self._batches: Iterator[data.Split] | None = None
        self._order: tuple[int, jax.Array] | None = None
        self._last: data.Split | None = None

    def advance(self, state: State, count: int) -> tuple[State, list[dict[str, jax.Array]]]:
        """Takes `count` steps within one epoch.

        Args:
          state: before them; its memory is used again.
          count: how many steps.

        Returns:
          The state after them, and the metrics of all steps in order, each an array of one
          element or of one per step of a compiled loop.
        """
        if self._programs.steps is not None and count == self._programs.steps_per_call:
            state, measured = self._loop(state, count)
            return state, [measured]
        if self._batches is None:
            self._batches = self._data.train_batches(self._seed, self._step)
        metrics = []
        for _ in range(count):
            self._last = next(self._batches)
            state, measured = self._programs.step(state, *self._last)
            metrics.append(measured)
        self._step += count
        return state, metrics

    def _loop(self, state: State, count: int) -> tuple[State, dict[str, jax.Array]]:
        dataset = self._data
        assert isinstance(dataset, data.DeviceData)
        assert self._programs.steps is not None
        split = dataset.dataset.train
        epoch, index = divmod(self._step, dataset.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, on_device.epoch_order(self._seed, epoch, len(split.labels))
        order = self._order[1]
        scalars = (jnp.int32(value) for value in (self._seed, epoch, index))
        state, measured = self._programs.steps(state, split, order, *scalars)
        last = index + count - 1
        self._last = dataset.take_batch(split, order, self._seed, epoch, last)
        self._batches = None
        self._step += count
        return state, measured

    def last_batch(self) -> data.Split:
        """Images and labels of the last step."""
        assert self._last is not None, "no step has been taken"
        return self._last

    def close(self) -> None:
        """Stops the threads and processes that read ahead."""
        batches: Any = self._batches
        if batches is not None:
            batches.close()
