"""What one run leaves in its folder: its log, its fan-ins, its result; and its place in the log."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import sparseopt_jax as sx
from experiments import data, distributed, loggers, metrics
from experiments.functions import ModelFunctions, flops_per_example
from experiments.run_batch import Measured, Member


@dataclasses.dataclass
class Place:
    """Where a run's log is; JSON values, so that a checkpoint can hold it.

    Attributes:
      log_bytes: size of `metrics.jsonl`.
      line: the last line of training metrics.
      test: the last evaluation.
      active: weights that are active.
      mask_churn: as in the last line.
      itop_rate: as in the last line.
    """

    log_bytes: int = 0
    line: dict[str, Any] = dataclasses.field(default_factory=dict)
    test: dict[str, float] = dataclasses.field(default_factory=dict)
    active: int = 0
    mask_churn: float | None = None
    itop_rate: float | None = None


class Record:
    """The files of one run, which process 0 alone writes."""

    def __init__(
        self,
        member: Member,
        folder: pathlib.Path,
        dataset: data.Data,
        functions: ModelFunctions,
        group: str | None,
    ) -> None:
        """Prepares for a run; reads and writes nothing yet.

        Args:
          member: the run.
          folder: where it goes.
          dataset: what it trains on.
          functions: of its model.
          group: the name of the group that it trains in, if it is one of several.
        """
        self.place = Place()
        self.name = f"{member.method} seed {member.seed}"
        self._member, self._folder = member, folder
        self._dataset, self._functions = dataset, functions
        self.maskable = sum(functions.layers.values())
        self._group = group
        self._fan_ins: dict[str, np.ndarray] = {}
        self._lines: metrics.JsonLines | None = None
        self._loggers: loggers.Loggers | None = None

    def begin(self, masks: Any) -> None:
        """Takes note of the masks before the first step, or of None."""
        if masks is not None:
            self._fan_ins = _fan_ins(masks, self._functions.layers, "before")

    def is_finished(self) -> bool:
        """Whether the run has a result, which it keeps: others of its group did not get so far."""
        return (self._folder / "result.json").is_file()

    def open(self, stack: contextlib.ExitStack, step: int, say: Callable[[str], object]) -> None:
        """On process 0, opens the log as it was at the checkpoint; the others write none.

        Args:
          stack: closes it.
          step: steps done.
          say: told where lines are lost.
        """
        if not distributed.is_main() or self.is_finished():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "metrics.jsonl"
        lines = metrics.JsonLines(path, keep=self.place.log_bytes, last_step=step)
        self._lines = stack.enter_context(lines)
        if lines.missing:
            say(f"{path}: {lines.missing} bytes of the lines up to step {step} are lost")
        config = self._member.config
        self._write_origin(step)
        self._loggers = stack.enter_context(
            loggers.open_loggers(
                config.loggers, self._folder, config, self._member.method, self._member.seed, step
            )
        )

    def _write_origin(self, step: int) -> None:
        """Says with which config, and from which step on in which environment, the run trains."""
        path = self._folder / "run.json"
        sessions = metrics.read_json(path)["sessions"] if step and path.is_file() else []
        sessions = [one for one in sessions if one["from_step"] < step]
        sessions.append({"from_step": step, "environment": metrics.environment()})
        content = {
            "config": dataclasses.asdict(self._member.config),
            "group": self._group,
            "images": {  # what the model takes: (image - mean) / std
                "shape": self._dataset.image_shape,
                "mean": self._dataset.mean,
                "std": self._dataset.std,
            },
            "sessions": sessions,
        }
        metrics.write_json(path, content)

    def write(self, kind: str, step: int, epoch: float, values: Mapping[str, Any]) -> None:
        """Adds a line to the log."""
        if self._lines is None or self._loggers is None:
            return
        line = {
            "kind": kind, "method": self._member.method, "seed": self._member.seed,
            "step": step, "epoch": epoch, **values,
        }  # fmt: skip
        self._lines.write(line)
        self._loggers.write(line)

    def measured(self, values: Measured) -> None:
        """Takes note of what the masks are like now."""
        self.place.active, self.place.mask_churn, self.place.itop_rate = values

    def density(self) -> float:
        """Active over maskable weights."""
        return self.place.active / self.maskable

    def sync(self) -> None:
        """Has the log on the disk, and takes note of its size."""
        if self._lines is not None:
            self.place.log_bytes = self._lines.sync()

    def finish(
        self, params: Any, masks: Any, step: int, seconds: float, compilation_seconds: float
    ) -> None:
        """Writes fan-ins and result, the latter last: a run is finished when it is there.

        Args:
          params: at the end, NumPy's arrays.
          masks: likewise, or None.
          step: steps done.
          seconds: of training; of runs that train together, an equal share of them.
          compilation_seconds: likewise, of compilation.
        """
        if not distributed.is_main() or self.is_finished():
            return
        config, layers, place = self._member.config, self._functions.layers, self.place
        if masks is not None:
            arrays = io.BytesIO()
            np.savez(arrays, **(self._fan_ins | _fan_ins(masks, layers, "after")))  # type: ignore[arg-type]
            metrics.write_atomically(self._folder / "fan_in.npz", arrays.getvalue())
        metrics.write_json(
            self._folder / "result.json",
            {
                "method": self._member.method, "seed": self._member.seed, "steps": step,
                "epochs": step / data.steps_per_epoch(config, self._dataset),
                **place.test,
                "train_loss": place.line["loss"], "train_accuracy": place.line["train_accuracy"],
                "density": self.density(), "itop_rate": place.itop_rate,
                "flops_per_example": flops_per_example(
                    config, self._dataset, self._functions, masks
                ),
                "active_weights": place.active, "maskable_weights": self.maskable,
                "corrupt_examples": len(self._dataset.corrupt),
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
                "state_sha256": metrics.state_sha256(params, masks),
                "timing": {
                    "training_seconds": seconds,
                    "compilation_seconds": compilation_seconds,
                    "examples_per_second": step * config.batch_size / seconds,
                },
                "environment": metrics.environment(),
            },
        )  # fmt: skip


def _fan_ins(masks: Any, layers: Mapping[str, int], when: str) -> dict[str, np.ndarray]:
    """Fan-ins of every layer, and its dense fan-in, as `report.Run.fan_in` has them."""
    leaves = metrics.path_leaves(masks)
    arrays = {}
    for path in layers:
        fan_in = np.asarray(sx.fan_in(leaves[path]))
        arrays[f"{when}/{path}"] = fan_in
        arrays[f"size/{path}"] = np.asarray(leaves[path].size // fan_in.size)
    return arrays
