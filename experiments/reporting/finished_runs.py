"""Reads what finished runs have left: those of one work folder, or of all settings of a sweep.

A sweep is several settings under one folder, each trained in a work folder of its own:

    sweep.json             {"name": ..., "settings": [...]}: its name, and its settings in order
    SETTING/               a work folder, as `workdir.py` describes it; SETTING may have a slash
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from experiments.config import ConfigError
from experiments.metrics import read_json

COMPARED = (("sparseopt", "sgd"), ("sparseopt_ham", "ham"))
"""Pairs of methods whose difference is taken seed by seed, where both were run."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its `result.json`, the lines of its `metrics.jsonl`, and its fan-ins.

    `fan_in` has `before/LAYER`, `after/LAYER` and `size/LAYER`; it is empty for a dense run.
    `config` is the `config.json` of its work folder.
    """

    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    fan_in: dict[str, np.ndarray]
    config: dict[str, Any]


def load_run(folder: pathlib.Path) -> Run:
    """Reads the folder of one finished run, `WORKDIR/runs/METHOD-seedK`.

    Raises:
      ConfigError: one of its files is damaged.
    """
    arrays: dict[str, np.ndarray] = {}
    if (folder / "fan_in.npz").is_file():
        with np.load(folder / "fan_in.npz", allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    config = read_json(folder.parent.parent / "config.json")
    return Run(read_json(folder / "result.json"), _lines(folder / "metrics.jsonl"), arrays, config)


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ConfigError(f"{path}: line {number} is not JSON: {error}") from error
    return found


def load_runs(workdir: str | os.PathLike[str]) -> list[Run]:
    """The finished runs of a folder, by method and seed.

    Args:
      workdir: a work folder.

    Returns:
      The runs; methods come in the order of the folder's config.

    Raises:
      ConfigError: it is no work folder, or has no finished run.
    """
    folder = pathlib.Path(workdir)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{workdir} has no config.json: it is not the folder of a run")
    runs = _finished(folder)
    if not runs:
        raise ConfigError(f"{workdir} has no finished run yet")
    return runs


def _finished(folder: pathlib.Path) -> list[Run]:
    runs = [load_run(path.parent) for path in folder.glob("runs/*/result.json")]

    def position(run: Run) -> tuple[int, str, int]:
        method, order = run.result["method"], list(run.config.get("compare", ()))
        place = order.index(method) if method in order else len(order)
        return place, method, run.result["seed"]

    return sorted(runs, key=position)


def is_sweep(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is that of a sweep: it has `sweep.json`, or work folders below it."""
    path = pathlib.Path(folder)
    if (path / "sweep.json").is_file():
        return True
    return not (path / "config.json").is_file() and bool(_work_folders(path))


def _work_folders(folder: pathlib.Path) -> list[str]:
    """Relative paths of the work folders in `folder` and one level below, sorted."""
    found = [*folder.glob("*/config.json"), *folder.glob("*/*/config.json")]
    return sorted(path.parent.relative_to(folder).as_posix() for path in found)


def sweep_name(folder: str | os.PathLike[str]) -> str:
    """The name in `sweep.json`; that of the folder where there is none."""
    path = pathlib.Path(folder)
    name = _sweep_json(path).get("name")
    return name if isinstance(name, str) else path.resolve().name


def _sweep_json(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "sweep.json"
    if not path.is_file():
        return {}
    sweep = read_json(path)
    settings = sweep.get("settings") if isinstance(sweep, dict) else None
    if not isinstance(settings, list) or not all(isinstance(name, str) for name in settings):
        raise ConfigError(
            f'{path} has settings={settings!r}; it must be {{"name": ..., "settings": [...]}}, with'
            " the names of the settings in a list"
        )
    return dict(sweep)


def setting_names(folder: str | os.PathLike[str]) -> list[str]:
    """The settings of a sweep in the order of `sweep.json`; without one, the work folders found.

    Raises:
      ConfigError: `sweep.json` is damaged, or there is no setting.
    """
    path = pathlib.Path(folder)
    names = list(_sweep_json(path).get("settings", ())) or _work_folders(path)
    if not names:
        raise ConfigError(
            f"{folder} has no config.json: it is not the folder of a run, nor of a sweep (neither"
            " sweep.json nor work folders below it)"
        )
    return names


def load_sweep(folder: str | os.PathLike[str]) -> dict[str, list[Run]]:
    """The finished runs of a sweep by setting, for settings that have some.

    Args:
      folder: that of a sweep, or any with work folders in it or one level below.

    Returns:
      Setting -> its runs by method and seed; settings in the order of `sweep.json`, or sorted.

    Raises:
      ConfigError: `sweep.json` is damaged, or no run of any setting is finished.
    """
    path = pathlib.Path(folder)
    found = {name: _finished(path / name) for name in setting_names(folder)}
    sweep = {name: runs for name, runs in found.items() if runs}
    if not sweep:
        raise ConfigError(
            f"{folder} has no finished run yet, in any of its settings: {', '.join(found)}"
        )
    return sweep


@dataclasses.dataclass(frozen=True)
class Progress:
    """How many runs of a setting are finished, and how many there are to be.

    `expected` is None where there is no config yet.
    """

    finished: int
    expected: int | None

    def complete(self) -> bool:
        """Whether nothing is missing."""
        return self.expected is not None and self.finished >= self.expected


def progress(workdir: str | os.PathLike[str]) -> Progress:
    """Counts the finished runs of a work folder, which may not be there yet."""
    folder = pathlib.Path(workdir)
    finished = len(list(folder.glob("runs/*/result.json")))
    if not (folder / "config.json").is_file():
        return Progress(finished, None)
    config = read_json(folder / "config.json")
    methods = len(config.get("compare", ())) or 1
    return Progress(finished, methods * config.get("seeds", 1))


def by_method(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs grouped by method, in the order in which they come."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.result["method"], []).append(run)
    return groups


def early_train_loss(run: Run) -> float | None:
    """Mean training loss over the first tenth of a run's steps.

    A line of the log has the mean since the line before it, so each counts with its steps; one
    that ends beyond the tenth is left out.

    Returns:
      The mean; None where the log has no line so early.
    """
    end, before, total = run.result["steps"] / 10, 0, 0.0
    for line in run.metrics:
        if line["kind"] == "train" and line["step"] <= end:
            total += line["loss"] * (line["step"] - before)
            before = line["step"]
    return total / before if before else None


def late_train_loss(run: Run) -> float | None:
    """Mean training loss over the last tenth of a run's steps.

    As in `early_train_loss`; a line that begins before the tenth is left out. Where all do, it is
    that of the last line.

    Returns:
      The mean; None where the log has no line of the training.
    """
    lines = [line for line in run.metrics if line["kind"] == "train"]
    if not lines:
        return None
    begins = [0, *(line["step"] for line in lines[:-1])]
    first = 0.9 * lines[-1]["step"]
    spans = [
        (line["loss"], line["step"] - begin)
        for line, begin in zip(lines, begins, strict=True)
        if begin >= first
    ] or [(lines[-1]["loss"], 1)]
    return sum(loss * steps for loss, steps in spans) / sum(steps for _, steps in spans)


def training_flops(run: Run) -> tuple[float, float] | None:
    """FLOPs of a run's training, and those over a dense run of as many steps.

    A dense step costs three forward passes: one forward, two backward.

    Returns:
      Both numbers; None where the run did not count its FLOPs.
    """
    counted = run.result.get("flops_per_example")
    if counted is None:
        return None
    per_example = counted["training"]
    total = per_example * run.config["batch_size"] * run.result["steps"]
    return total, per_example / (3 * counted["forward_dense"])
