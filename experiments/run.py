"""One run: a method and a seed, from its first step, or its last checkpoint, to `result.json`.

All that a run needs to go on bit for bit is its arrays (`State`, and the masks of the last line of
the log) and its `Position`; both are in every checkpoint. What is due at a step (a line of the log,
an evaluation, a checkpoint) follows from the position, so a run that is stopped between two of them
does the second one first when it goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pathlib
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np

import sparseopt_jax as sx
from experiments import data, distributed, divergence, loggers, metrics, workdir
from experiments.checkpoint import Checkpoints, all_finite
from experiments.config import Config
from experiments.functions import State, flops_per_example
from experiments.programs import MethodPrograms, ModelPrograms
from experiments.progress import Progress
from experiments.stepping import Stepper, bound_in_flight
from experiments.stopping import StopRequests


class StoppedError(Exception):
    """The run was asked to stop and has saved a checkpoint; the message says of which step."""


@dataclasses.dataclass
class Position:
    """Where a run is, apart from its arrays; JSON values, so that a checkpoint can hold it.

    Attributes:
      step: steps done.
      logged_step: the step of the last line in `metrics.jsonl`.
      measured_step: the last step whose evaluation and diagnostics, where due, are done.
      log_bytes: size of `metrics.jsonl`.
      pending: metrics of the steps since the last line, by name; float32 in hexadecimal bytes.
      line: the last line of training metrics.
      test: the last evaluation.
      test_step: its step.
      best_accuracy: the highest test accuracy so far.
      active: weights that are active.
      mask_churn: as in the last line.
      itop_rate: as in the last line.
      training_seconds: time spent in training steps.
      corrupt: names of the images that were left out.
    """

    step: int = 0
    logged_step: int = 0
    measured_step: int = 0
    log_bytes: int = 0
    pending: dict[str, str] = dataclasses.field(default_factory=dict)
    line: dict[str, Any] = dataclasses.field(default_factory=dict)
    test: dict[str, float] = dataclasses.field(default_factory=dict)
    test_step: int = -1
    best_accuracy: float | None = None
    active: int = 0
    mask_churn: float | None = None
    itop_rate: float | None = None
    training_seconds: float = 0.0
    corrupt: list[str] = dataclasses.field(default_factory=list)


class Run:
    """A method with a seed, in a folder of its own; `train` is all there is to call."""

    def __init__(
        self,
        config: Config,
        model: ModelPrograms,
        programs: MethodPrograms,
        dataset: data.Data,
        seed: int,
        folder: pathlib.Path,
        progress: Progress,
        stop: StopRequests,
    ) -> None:
        """Prepares a run; reads and writes nothing yet.

        Args:
          config: the config of the method alone.
          model: the compiled programs of the model.
          programs: those of the method.
          dataset: what to train and to test on.
          seed: of weights, masks and data order.
          folder: where metrics, checkpoints, fan-ins and result go.
          progress: told of every evaluation and logged step.
          stop: says when to stop.
        """
        self._config, self._model, self._programs = config, model, programs
        self._dataset, self._seed, self._folder = dataset, seed, folder
        self._progress, self._stop = progress, stop
        (self._method,) = config.methods()
        self._sparse = config.topology != "dense"
        self._maskable = sum(model.layers.values())
        self._per_epoch = data.steps_per_epoch(config, dataset)
        self._last_step = total_steps(config, dataset)
        self._at = Position(active=self._maskable)
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
                Checkpoints(
                    self._folder / "checkpoints",
                    config.keep_last,
                    config.keep_best,
                    lambda text: self._progress.console.print(text, markup=False),
                )
            )
            saved = self._done() if self._restore() else None
            self._open_logs(stack)
            stack.enter_context(self._stop.deferred())
            stepper = stack.enter_context(
                contextlib.closing(
                    Stepper(self._programs, self._dataset, self._seed, self._at.step)
                )
            )
            self._since = time.monotonic()
            while True:
                self._log_if_due(stepper)
                evaluated = self._evaluate_if_due(stepper)
                last = self._at.step == self._last_step and evaluated
                stopped = (self._stop.agreed() or not evaluated) and not last
                due = stopped or self._checkpoint_is_due()
                if due and self._at.step and self._done() != saved:
                    self._save()
                    saved = self._done()
                if last:
                    break
                if stopped:
                    self._checkpoints.wait()
                    raise StoppedError(f"{self._name()}, at step {self._at.step}")
                self._advance(stepper)
        self._finish()

    def _done(self) -> tuple[int, int]:
        """What a checkpoint of now would have: a step, with or without its evaluation."""
        return self._at.step, self._at.measured_step

    def _name(self) -> str:
        return f"{self._method} seed {self._seed}"

    def _start(self) -> None:
        seed = np.int32(self._seed)
        self._state: State = self._programs.start(*self._model.init(seed), seed)
        self._masks: Any = {}
        if self._sparse:
            masks = sx.get_masks(self._state.opt_state)
            self._fan_ins = _fan_ins(distributed.whole(masks), self._model.layers, "before")
            self._measure(masks)

    def _measure(self, earlier: Any) -> None:
        active, churn, itop_rate, self._masks = self._programs.measure(
            self._state.opt_state, earlier
        )
        self._at.active = int(active)
        self._at.mask_churn, self._at.itop_rate = float(churn), float(itop_rate)

    def _arrays(self) -> dict[str, Any]:
        return {"state": self._state, "logged_masks": self._masks}

    def _shapes(self) -> dict[str, Any]:
        state = self._programs.functions.state
        masks = sx.get_masks(state.opt_state) if self._sparse else {}
        return {"state": state, "logged_masks": masks}

    def _restore(self) -> bool:
        """Goes on from the newest good checkpoint; False where there is none."""

        def check(notes: Mapping[str, Any]) -> None:
            what = f"{self._folder / 'checkpoints'} holds checkpoints of a run"
            workdir.check_same(self._config, notes["config"], what)

        found = self._checkpoints.restore(self._shapes(), check)
        if found is None:
            return False
        self._state, self._masks = found.arrays["state"], found.arrays["logged_masks"]
        at = self._at = Position(**found.notes["position"])
        self._pending = [
            {k: np.frombuffer(bytes.fromhex(v), np.float32) for k, v in at.pending.items()}
        ] if at.pending else []  # fmt: skip
        self._dataset.corrupt.restore(at.corrupt)
        self._shown = {k: at.line[k] for k in ("loss", "density") if k in at.line} | at.test
        self._progress.resumed(at.step)
        return True

    def _open_logs(self, stack: contextlib.ExitStack) -> None:
        """On process 0, the log as it was at the checkpoint; the others write none."""
        self._lines: metrics.JsonLines | None = None
        if not distributed.is_main():
            return
        path, at = self._folder / "metrics.jsonl", self._at
        lines = metrics.JsonLines(path, keep=at.log_bytes, last_step=at.step)
        self._lines = stack.enter_context(lines)
        if lines.missing:
            self._progress.console.print(
                f"{path}: {lines.missing} bytes of the lines up to step {at.step} are lost",
                markup=False,
            )
        self._loggers = stack.enter_context(
            loggers.open_loggers(
                self._config.loggers, self._folder, self._config, self._method, self._seed,
                at.step,
            )
        )  # fmt: skip

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._lines is not None:
            self._lines.write(line)
            self._loggers.write(line)

    def _where(self) -> dict[str, Any]:
        step = self._at.step
        return {
            "method": self._method, "seed": self._seed, "step": step,
            "epoch": step / self._per_epoch,
        }  # fmt: skip

    def _epoch(self) -> int:
        """The epoch that the last step was in, from 1."""
        return -(-self._at.step // self._per_epoch)

    def _advance(self, stepper: Stepper) -> None:
        step, config = self._at.step, self._config
        ends = [(step // n + 1) * n for n in (config.log_every, self._per_epoch)]
        for every in (config.checkpoint_every, config.eval_steps):
            if every:
                ends.append((step // every + 1) * every)
        count = min(*ends, self._last_step) - step
        self._state, measured = stepper.advance(self._state, count, self._stop.agreed)
        self._pending += measured
        self._at.step = stepper.step

    def _log_if_due(self, stepper: Stepper) -> None:
        at, config = self._at, self._config
        if at.step == at.logged_step:
            return
        if at.step % config.log_every and at.step != self._last_step:
            return
        columns = self._finite_columns()
        values = {name: float(column.mean(dtype=np.float64)) for name, column in columns.items()}
        if self._sparse:
            self._measure(self._masks)
        elapsed, steps = time.monotonic() - self._since, at.step - at.logged_step
        line = {
            "kind": "train", **self._where(), **values,
            "learning_rate": float(self._programs.learning_rate(at.step - 1)),
            "density": at.active / self._maskable,
            "mask_churn": at.mask_churn, "itop_rate": at.itop_rate,
            "examples_per_second": steps * config.batch_size / elapsed,
            "step_seconds": elapsed / steps,
            "data_wait_seconds": (stepper.data_seconds - self._data_seconds) / steps,
        }  # fmt: skip
        if config.max_corrupt:
            line["corrupt_examples"] = len(self._dataset.corrupt)
        self._write(line)
        at.line, at.logged_step, self._pending = line, at.step, []
        at.training_seconds += elapsed
        self._shown |= {"loss": values["loss"], "density": at.active / self._maskable}
        self._progress.update(at.step, self._epoch(), self._shown)
        self._since, self._data_seconds = time.monotonic(), stepper.data_seconds

    def _finite_columns(self) -> dict[str, np.ndarray]:
        """Metrics of the pending steps, one value a step; raises DivergedError."""
        fetched = jax.device_get(self._pending)
        columns = {
            name: np.concatenate([np.atleast_1d(values[name]) for values in fetched])
            for name in fetched[0]
        }
        losses = columns["loss"]
        if not np.isfinite(losses).all():
            index = int(np.argmin(np.isfinite(losses)))  # the first one
            step = self._at.step - len(losses) + 1 + index
            self._diverged(f"the loss is {losses[index]} at step {step}", step)
        return columns

    def _diverged(self, what: str, step: int) -> NoReturn:
        """Raises DivergedError, once the steps up to `step` have been taken again to find out."""
        self._progress.console.print(f"{what}: looking for where it began ...", markup=False)
        self._checkpoints.wait()
        kept = self._checkpoints.restore(self._shapes())
        if kept is None:
            self._start()
        else:
            self._state = kept.arrays["state"]
        first = kept.step if kept else 0
        stepper = Stepper(self._programs, self._dataset, self._seed, first)
        with contextlib.closing(stepper):
            began = divergence.locate(self._programs, stepper, self._state, step)
        keeps = (
            f"the checkpoint of step {first} is finite" if kept else "there is no checkpoint yet"
        )
        raise divergence.DivergedError(
            f"{self._name()}: {what}; {began}.\n{keeps}. A smaller learning_rate than"
            f" {self._config.learning_rate:g}, or warmup_epochs, may help"
        )

    def _evaluate_if_due(self, stepper: Stepper) -> bool:
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
            test = evaluate(self._model, self._state, self._dataset, self._stop)
            if test is None:
                return False
            at.test, at.test_step = test, at.step
            self._write({"kind": "eval"} | self._where() | test)
            self._shown |= test
            self._progress.update(at.step, epoch, self._shown)
        found: dict[str, Any] = {}
        for every, measure in (
            (config.diagnostics_every, self._programs.diagnose),
            (config.hessian_every, self._programs.sharpness),
        ):
            if every and end_of_epoch and (epoch % every == 0 or last):
                found |= measure(self._state, *stepper.last_batch())
        if found:
            self._write({"kind": "diagnostics"} | self._where() | jax.device_get(found))
        at.measured_step = at.step
        self._since += time.monotonic() - paused  # neither is training time
        return True

    def _accuracy(self) -> float | None:
        """The test accuracy of this very step, if there was an evaluation."""
        at = self._at
        return at.test["test_accuracy"] if at.test_step == at.step else None

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
            self._diverged(f"weights or statistics are not finite after step {at.step}", at.step)
        accuracy = self._accuracy()
        if accuracy is not None:
            at.best_accuracy = max(accuracy, at.best_accuracy or 0.0)
        at.corrupt = self._dataset.corrupt.names()
        if self._lines is not None:
            at.log_bytes = self._lines.sync()
        notes = {"config": dataclasses.asdict(self._config), "position": dataclasses.asdict(at)}
        self._checkpoints.save(at.step, self._arrays(), notes, accuracy)
        self._since += time.monotonic() - paused

    def _finish(self) -> None:
        """Writes fan-ins and result, the latter last: a run is finished when it is there."""
        params = distributed.whole(self._state.params)
        masks = distributed.whole(sx.get_masks(self._state.opt_state)) if self._sparse else None
        if not distributed.is_main():
            return
        if self._sparse:
            arrays = io.BytesIO()
            after = _fan_ins(masks, self._model.layers, "after")
            np.savez(arrays, **(self._fan_ins | after))  # type: ignore[arg-type]
            metrics.write_atomically(self._folder / "fan_in.npz", arrays.getvalue())
        at, seconds = self._at, self._at.training_seconds
        metrics.write_json(
            self._folder / "result.json",
            {
                "method": self._method, "seed": self._seed, "steps": at.step,
                "epochs": at.step / self._per_epoch,
                **at.test,
                "train_loss": at.line["loss"], "train_accuracy": at.line["train_accuracy"],
                "density": at.active / self._maskable, "itop_rate": at.itop_rate,
                "flops_per_example": flops_per_example(
                    self._config, self._dataset, self._model.functions, masks
                ),
                "active_weights": at.active, "maskable_weights": self._maskable,
                "corrupt_examples": len(self._dataset.corrupt),
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
                "state_sha256": metrics.state_sha256(params, masks),
                "timing": {
                    "training_seconds": seconds,
                    "compilation_seconds": self._programs.seconds,
                    "examples_per_second": at.step * self._config.batch_size / seconds,
                },
                "environment": metrics.environment(),
            },
        )  # fmt: skip


def total_steps(config: Config, dataset: data.Data) -> int:
    """Training steps of one run."""
    steps = config.epochs * data.steps_per_epoch(config, dataset)
    return steps if config.steps == -1 else min(steps, config.steps)


def evaluate(
    model: ModelPrograms, state: State, dataset: data.Data, stop: StopRequests
) -> dict[str, float] | None:
    """Accuracy and mean loss over all test examples, each counted once; None when stopped."""
    sums: list[tuple[jax.Array, ...]] = []
    for batch in dataset.eval_batches():
        if stop.noted():
            return None
        sums.append(model.evaluate(state.params, state.batch_stats, batch))
        bound_in_flight(sums)
    columns = zip(*jax.device_get(sums), strict=True)
    examples, correct, losses = (sum(map(float, column)) for column in columns)
    if not examples:
        raise data.DataError("there is no test image that can be decoded")
    return {"test_accuracy": correct / examples, "test_loss": losses / examples}


def _fan_ins(masks: Any, layers: Mapping[str, int], when: str) -> dict[str, np.ndarray]:
    """Fan-ins of every layer, and its dense fan-in, as `report.Run.fan_in` has them."""
    leaves = metrics.path_leaves(masks)
    arrays = {}
    for path in layers:
        fan_in = np.asarray(sx.fan_in(leaves[path]))
        arrays[f"{when}/{path}"] = fan_in
        arrays[f"size/{path}"] = np.asarray(leaves[path].size // fan_in.size)
    return arrays
