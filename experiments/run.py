"""One run, or several that train together: from the first step, or the last checkpoint, to the end.

All that a run batch needs to go on bit for bit is its arrays (its state, and the masks of the
last lines of the logs) and its `Position`; both are in every checkpoint. What is due at a step (a
line of the log, an evaluation, a checkpoint) follows from the position, so a run that is stopped
between two of them does the second one first when it goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from experiments import data, distributed, divergence, metrics, workdir
from experiments.checkpoint import Checkpoints, all_finite
from experiments.config import Config, ConfigError
from experiments.progress import Progress
from experiments.record import Place, Record
from experiments.run_batch import RunBatch, Steps
from experiments.stepping import bound_in_flight
from experiments.stopping import StopRequests

STATE_VERSION = 3
"""The form of the states in checkpoints; 3: one byte a weight holds mask, exploration and age."""


class StoppedError(Exception):
    """The run was asked to stop and has saved a checkpoint; the message says of which step."""


@dataclasses.dataclass
class Position:
    """Where a run batch is, apart from its arrays; JSON values, for checkpoints.

    Attributes:
      step: steps done.
      logged_step: the step of the last lines in the logs.
      measured_step: the last step whose evaluation and diagnostics, where due, are done.
      pending: metrics of the steps since the last line, by name; float32 in hexadecimal bytes.
      test_step: the step of the last evaluation.
      best_accuracy: the highest test accuracy so far, the mean over the runs.
      training_seconds: time spent in training steps.
      corrupt: names of the images that were left out.
      places: where the runs' logs are.
    """

    step: int = 0
    logged_step: int = 0
    measured_step: int = 0
    pending: dict[str, str] = dataclasses.field(default_factory=dict)
    test_step: int = -1
    best_accuracy: float | None = None
    training_seconds: float = 0.0
    corrupt: list[str] = dataclasses.field(default_factory=list)
    places: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class Run:
    """A run batch in training; `train` is all there is to call."""

    def __init__(
        self,
        run_batch: RunBatch,
        dataset: data.Data,
        folders: Sequence[pathlib.Path],
        checkpoints: pathlib.Path,
        progress: Progress,
        stop: StopRequests,
    ) -> None:
        """Prepares a run; reads and writes nothing yet.

        Args:
          run_batch: what to train.
          dataset: what to train and to test on.
          folders: where metrics, fan-ins and result of each member go.
          checkpoints: where the batch's checkpoints go.
          progress: told of every evaluation and logged step.
          stop: says when to stop.
        """
        self._run_batch, self._dataset, self._folder = run_batch, dataset, checkpoints
        self._progress, self._stop = progress, stop
        self._config = run_batch.members[0].config  # all agree in what is used here
        functions = run_batch.model.functions
        name = checkpoints.parent.name if len(run_batch.members) > 1 else None
        self._records = [
            Record(member, folder, dataset, functions, name)
            for member, folder in zip(run_batch.members, folders, strict=True)
        ]
        self._name = ", ".join(record.name for record in self._records)
        self._per_epoch = data.steps_per_epoch(self._config, dataset)
        self._last_step = total_steps(self._config, dataset)
        self._at = Position()
        self._pending: list[dict[str, Any]] = []  # of the steps since the last line
        self._shown: dict[str, float] = {}
        self._since = time.monotonic()
        self._data_seconds = 0.0

    def train(self) -> None:
        """Trains to the end, or until asked to stop.

        Raises:
          CheckpointError: a checkpoint cannot be written.
          ConfigError: the checkpoints in the folder are of another config.
          DataError: an image cannot be decoded, or a file be read; the message names it.
          DivergedError: the loss or a weight is not finite; the message says where that began.
          StoppedError: it was asked to stop, and has saved a checkpoint.
        """
        if distributed.is_main():
            self._folder.mkdir(parents=True, exist_ok=True)
        distributed.all_succeeded(True)  # the folder is there for all
        self._start()
        config = self._config
        with contextlib.ExitStack() as stack:
            self._checkpoints = stack.enter_context(
                Checkpoints(self._folder, config.keep_last, config.keep_best, self._say)
            )
            with self._progress.doing("looking for a checkpoint"):
                saved = self._done() if self._restore() else None
            for record in self._records:
                record.open(stack, self._at.step, self._say)
            stack.enter_context(self._stop.deferred())
            stepper = stack.enter_context(
                contextlib.closing(self._run_batch.stepper(self._at.step))
            )
            self._since = time.monotonic()
            while True:
                self._log_if_due(stepper)
                evaluated = self._evaluate_if_due(stepper)
                last = self._at.step == self._last_step and evaluated
                stopped = (self._stop.agreed() or not evaluated) and not last
                due = stopped or self._checkpoint_is_due()
                if due and self._at.step and self._done() != saved:
                    with self._progress.doing("saving"):
                        self._save()
                    saved = self._done()
                if last or stopped:
                    with self._progress.doing("saving"):
                        self._checkpoints.wait()
                if last:
                    break
                if stopped:
                    raise StoppedError(f"{self._name}, at step {self._at.step}")
                self._advance(stepper)
        with self._progress.doing("writing the result"):
            self._finish()

    def _say(self, text: str) -> None:
        self._progress.console.print(text, markup=False)

    def _done(self) -> tuple[int, int]:
        """What a checkpoint of now would have: a step, with or without its evaluation."""
        return self._at.step, self._at.measured_step

    def _start(self) -> None:
        self._state = self._run_batch.start()
        for index, record in enumerate(self._records):
            record.begin(self._run_batch.masks_of(self._state, index))
        self._masks: Any = self._run_batch.masks(self._state)
        self._measure()

    def _measure(self) -> None:
        of_members, self._masks = self._run_batch.measure(self._state, self._masks)
        for record, measured in zip(self._records, of_members, strict=True):
            record.measured(measured)

    def _arrays(self) -> dict[str, Any]:
        return {"state": self._state, "logged_masks": self._masks}

    def _shapes(self) -> dict[str, Any]:
        return {"state": self._run_batch.shapes, "logged_masks": self._run_batch.mask_shapes}

    def _restore(self) -> bool:
        """Goes on from the newest good checkpoint; False where there is none."""

        def check(notes: Mapping[str, Any]) -> None:
            what = f"{self._folder} holds checkpoints of a run"
            workdir.check_same(self._config, notes["config"], what)
            workdir.check_settings(notes.get("settings", {}), what)
            if notes.get("state_version") != STATE_VERSION:
                raise ConfigError(
                    f"{what} by an earlier commit, whose optimizer state has another form; finish"
                    " it with that commit, or give another --workdir"
                )

        restored = self._checkpoints.restore(self._shapes(), check)
        if restored is None:
            return False
        self._state, self._masks = restored.arrays["state"], restored.arrays["logged_masks"]
        at = self._at = Position(**restored.notes["position"])
        for record, place in zip(self._records, at.places, strict=True):
            record.place = Place(**place)
        self._pending = [
            {k: np.frombuffer(bytes.fromhex(v), np.float32) for k, v in at.pending.items()}
        ] if at.pending else []  # fmt: skip
        self._dataset.corrupt.restore(at.corrupt)
        self._show_line()
        self._show_test()
        self._progress.resumed(at.step)
        return True

    def _write(self, kind: str, values: Sequence[Mapping[str, Any]]) -> None:
        step = self._at.step
        for record, of_run in zip(self._records, values, strict=True):
            record.write(kind, step, step / self._per_epoch, of_run)

    def _show_line(self) -> None:
        lines = [record.place.line for record in self._records]
        self._shown |= {
            name: sum(line[name] for line in lines) / len(lines)
            for name in ("loss", "density")
            if name in lines[0]
        }

    def _show_test(self) -> None:
        tests = [record.place.test for record in self._records]
        for name in tests[0]:
            self._shown[name] = sum(test[name] for test in tests) / len(tests)

    def _epoch(self) -> int:
        """The epoch that the last step was in, from 1."""
        return -(-self._at.step // self._per_epoch)

    def _advance(self, stepper: Steps) -> None:
        step, config = self._at.step, self._config
        ends = [(step // n + 1) * n for n in (config.log_every, self._per_epoch)]
        for every in (config.checkpoint_every, config.eval_steps):
            if every:
                ends.append((step // every + 1) * every)
        count = min(*ends, self._last_step) - step
        self._state, measured = stepper.advance(self._state, count, self._stop.agreed)
        self._pending += measured
        self._at.step = stepper.step

    def _log_if_due(self, stepper: Steps) -> None:
        at, config = self._at, self._config
        if at.step == at.logged_step:
            return
        if at.step % config.log_every and at.step != self._last_step:
            return
        means = {k: column.mean(0, np.float64) for k, column in self._finite_columns().items()}
        self._measure()
        elapsed, steps = time.monotonic() - self._since, at.step - at.logged_step
        runs = len(self._records)
        shared = {
            "learning_rate": self._run_batch.learning_rate(at.step - 1),
            "examples_per_second": runs * steps * config.batch_size / elapsed,
            "step_seconds": elapsed / steps,
            "data_wait_seconds": (stepper.data_seconds - self._data_seconds) / steps,
        }
        if config.max_corrupt:
            shared["corrupt_examples"] = len(self._dataset.corrupt)
        for index, record in enumerate(self._records):
            record.place.line = {
                **{name: float(mean[index]) for name, mean in means.items()},
                "density": record.density(),
                "mask_churn": record.place.mask_churn, "itop_rate": record.place.itop_rate,
                **shared,
            }  # fmt: skip
        self._write("train", [record.place.line for record in self._records])
        at.logged_step, self._pending = at.step, []
        at.training_seconds += elapsed
        self._show_line()
        self._progress.update(at.step, self._epoch(), self._shown)
        self._since, self._data_seconds = time.monotonic(), stepper.data_seconds

    def _finite_columns(self) -> dict[str, np.ndarray]:
        """Metrics of the pending steps, (steps, runs); raises DivergedError."""
        fetched = jax.device_get(self._pending)
        runs = len(self._records)
        columns = {
            name: np.concatenate([np.reshape(values[name], (-1, runs)) for values in fetched])
            for name in fetched[0]
        }
        finite = np.isfinite(columns["loss"])
        if not finite.all():
            index, of_run = np.argwhere(~finite)[0]  # the first one
            step = self._at.step - len(finite) + 1 + int(index)
            loss = columns["loss"][index, of_run]
            self._diverged(f"the loss is {loss} at step {step}", step, int(of_run))
        return columns

    def _diverged(self, what: str, step: int, of_run: int) -> NoReturn:
        """Raises DivergedError, once the steps up to `step` have been taken again to find out."""
        self._say(f"{what}: looking for where it began ...")
        self._checkpoints.wait()
        kept = self._checkpoints.restore(self._shapes())
        if kept is None:
            self._start()
        else:
            self._state = kept.arrays["state"]
        first = kept.step if kept else 0
        with contextlib.closing(self._run_batch.stepper(first)) as stepper:
            began = self._run_batch.locate(stepper, self._state, step)
        keeps = (
            f"the checkpoint of step {first} is finite" if kept else "there is no checkpoint yet"
        )
        raise divergence.DivergedError(
            f"{self._records[of_run].name}: {what}; {began}.\n{keeps}. A smaller learning_rate than"
            f" {self._config.learning_rate:g}, or warmup_epochs, may help"
        )

    def _evaluate_if_due(self, stepper: Steps) -> bool:
        """Evaluates and measures where that is due; False where it was stopped meanwhile."""
        at, config = self._at, self._config
        last = at.step == self._last_step
        end_of_epoch = last or at.step % self._per_epoch == 0
        between = config.eval_steps > 0 and at.step % config.eval_steps == 0
        if at.step == at.measured_step or not (end_of_epoch or between):
            return True
        jax.block_until_ready(self._state)  # type: ignore[no-untyped-call]
        paused, epoch = time.monotonic(), self._epoch()
        if between or epoch % config.eval_every == 0 or last:
            with self._progress.doing("evaluating"):
                tests = evaluate(self._run_batch, self._state, self._dataset, self._stop)
            if tests is None:
                return False
            at.test_step = at.step
            for record, test in zip(self._records, tests, strict=True):
                record.place.test = test
            self._write("eval", tests)
            self._show_test()
            self._progress.update(at.step, epoch, self._shown)
        diagnostics: list[dict[str, Any]] = [{} for _ in self._records]
        measures: tuple[tuple[int, Callable[..., Any]], ...] = (
            (config.diagnostics_every, self._run_batch.diagnose),
            (config.hessian_every, self._run_batch.sharpness),
        )
        for every, measure in measures:
            if every and end_of_epoch and (epoch % every == 0 or last):
                with self._progress.doing("measuring"):  # and compiling, the first time
                    measured = measure(self._state, stepper.last_batch())
                diagnostics = [one | more for one, more in zip(diagnostics, measured, strict=True)]
        if diagnostics[0]:
            self._write("diagnostics", diagnostics)
        at.measured_step = at.step
        self._since += time.monotonic() - paused  # neither is training time
        return True

    def _accuracy(self) -> float | None:
        """The test accuracy of this very step, the mean over runs, if there was an evaluation."""
        return self._shown["test_accuracy"] if self._at.test_step == self._at.step else None

    def _checkpoint_is_due(self) -> bool:
        at, every = self._at, self._config.checkpoint_every
        if at.step == self._last_step or (every and at.step % every == 0):
            return True
        accuracy, best = self._accuracy(), at.best_accuracy
        return self._config.keep_best and accuracy is not None and (best is None or accuracy > best)

    def _save(self) -> None:
        at, paused = self._at, time.monotonic()
        at.pending = {}
        if self._pending:
            columns = self._finite_columns()
            at.pending = {k: v.astype(np.float32).tobytes().hex() for k, v in columns.items()}
        if not all_finite((self._state.params, self._state.batch_stats)):
            what = f"weights or statistics are not finite after step {at.step}"
            self._diverged(what, at.step, self._not_finite())
        accuracy = self._accuracy()
        if accuracy is not None:
            at.best_accuracy = max(accuracy, at.best_accuracy or 0.0)
        at.corrupt = self._dataset.corrupt.names()
        for record in self._records:
            record.sync()
        at.places = [dataclasses.asdict(record.place) for record in self._records]
        notes = {
            "state_version": STATE_VERSION,
            "config": dataclasses.asdict(self._config),
            "settings": metrics.settings(),
            "position": dataclasses.asdict(at),
        }
        self._checkpoints.save(at.step, self._arrays(), notes, accuracy)
        self._since += time.monotonic() - paused

    def _not_finite(self) -> int:
        """The first run with a parameter that is not finite; 0 where it is in the statistics."""
        for index in range(len(self._records)):
            params = self._run_batch.params_of(self._state, index)
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
                return index
        return 0

    def _finish(self) -> None:
        runs = len(self._records)
        for index, record in enumerate(self._records):
            record.finish(
                self._run_batch.params_of(self._state, index),
                self._run_batch.masks_of(self._state, index),
                self._at.step,
                self._at.training_seconds / runs,
                self._run_batch.seconds / runs,
            )


def total_steps(config: Config, dataset: data.Data) -> int:
    """Training steps of one run."""
    steps = config.epochs * data.steps_per_epoch(config, dataset)
    return steps if config.steps == -1 else min(steps, config.steps)


def evaluate(
    run_batch: RunBatch, state: Any, dataset: data.Data, stop: StopRequests
) -> list[dict[str, float]] | None:
    """Accuracy and mean loss over all test examples, each counted once; None when stopped.

    Args:
      run_batch: the runs.
      state: their state.
      dataset: has the test examples.
      stop: asked before each batch.

    Returns:
      `test_accuracy` and `test_loss` of each run.
    """
    sums: list[tuple[jax.Array, ...]] = []
    for batch in dataset.eval_batches():
        if stop.noted():
            return None
        sums.append(run_batch.evaluate(state, batch))
        bound_in_flight(sums)
    fetched = jax.device_get(sums)
    # (batches, runs), added up in float64.
    examples, correct, losses = (
        np.stack([np.reshape(values, -1) for values in column]).sum(0, np.float64)
        for column in zip(*fetched, strict=True)
    )
    if not examples.all():
        raise data.DataError("there is no test image that can be decoded")
    return [
        {"test_accuracy": float(c / n), "test_loss": float(total / n)}
        for n, c, total in zip(examples, correct, losses, strict=True)
    ]
