"""Reads what finished runs have left: those of one work folder, or of all settings of a sweep.

A sweep is several settings under one folder, each trained in a work folder of its own:

    sweep.json             {"name": ..., "settings": [...]}: its name, and its settings in order
    SETTING/               a work folder, as `workdir.py` describes it; SETTING may have a slash

A run that diverged in a sweep has `diverged.json` instead of a result: nothing of it is
left to do, but it is in no statistics.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from experiments.config import Config, ConfigError
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
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ConfigError(f"{path}: line {number} is not JSON: {error}") from error
    return lines


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
        raise ConfigError(f"{workdir} has no finished run yet{_and_diverged([folder])}")
    return runs


def _finished(folder: pathlib.Path) -> list[Run]:
    runs = [load_run(path.parent) for path in folder.glob("runs/*/result.json")]
    return sorted(runs, key=lambda run: _position(run.config, run.result))


def _position(config: Mapping[str, Any], run: Mapping[str, Any]) -> tuple[int, str, int]:
    """Where a run comes among those of its folder: by method, in the config's order, and seed."""
    method, order = run["method"], list(config.get("compare", ()))
    return order.index(method) if method in order else len(order), method, run["seed"]


def diverged(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The runs of a work folder that diverged in a sweep.

    Returns:
      `method`, `seed` and `message` of each, by method and seed. The message is the first line of
      what was said, without the run's name and advice.
    """
    folder = pathlib.Path(workdir)
    runs = [
        {"method": content["method"], "seed": content["seed"], "message": _first_line(content)}
        for path in folder.glob("runs/*/diverged.json")
        if not (path.parent / "result.json").exists()
        for content in [read_json(path)]
    ]
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return sorted(runs, key=lambda run: _position(config, run))


def _first_line(content: Mapping[str, Any]) -> str:
    line = (content["message"].splitlines() or [""])[0]
    return str(line).removeprefix(f"{content['method']} seed {content['seed']}: ").rstrip(".")


def _and_diverged(folders: Iterable[pathlib.Path]) -> str:
    """What an error about missing results adds where runs diverged."""
    runs = [run for folder in folders for run in diverged(folder)]
    if not runs:
        return ""
    first = f"{runs[0]['method']} seed {runs[0]['seed']}: {runs[0]['message']}"
    return f"; {len(runs)} diverged, the first of them {first}"


def is_sweep(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is that of a sweep: it has `sweep.json`, or work folders below it."""
    path = pathlib.Path(folder)
    if (path / "sweep.json").is_file():
        return True
    return not (path / "config.json").is_file() and bool(_work_folders(path))


def _work_folders(folder: pathlib.Path) -> list[str]:
    """Relative paths of the work folders in `folder` and one level below, sorted."""
    configs = [*folder.glob("*/config.json"), *folder.glob("*/*/config.json")]
    return sorted(path.parent.relative_to(folder).as_posix() for path in configs)


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
    path, names = pathlib.Path(folder), setting_names(folder)
    sweep = load_settings(path, names)
    if not sweep:
        raise ConfigError(
            f"{folder} has no finished run yet, in any of its settings: {', '.join(names)}"
            f"{_and_diverged(path / name for name in names)}"
        )
    return sweep


def load_settings(folder: str | os.PathLike[str], names: Iterable[str]) -> dict[str, list[Run]]:
    """The finished runs of some settings, for those that have some, whatever `sweep.json` says.

    Args:
      folder: that of a sweep.
      names: of settings; their folders may not be there yet.

    Returns:
      Setting -> its runs by method and seed; settings in the order of `names`.
    """
    finished = {name: _finished(pathlib.Path(folder) / name) for name in names}
    return {name: runs for name, runs in finished.items() if runs}


@dataclasses.dataclass(frozen=True)
class Progress:
    """How many of the runs of a setting's config are finished.

    Attributes:
      finished: how many have a result.
      expected: how many the config has; None where there is no config yet.
      diverged: how many have none, since they diverged.
    """

    finished: int
    expected: int | None
    diverged: int = 0

    def complete(self) -> bool:
        """Whether nothing is missing."""
        return self.expected is not None and self.finished + self.diverged >= self.expected


def progress(workdir: str | os.PathLike[str]) -> Progress:
    """Counts the runs of a work folder, which may not be there yet.

    Where there is a config, these are the runs that it has: its methods with its seeds. The folder
    may hold others.
    """
    folder = pathlib.Path(workdir)
    finished = {path.parent.name for path in folder.glob("runs/*/result.json")}
    lost = {f"{run['method']}-seed{run['seed']}" for run in diverged(folder)}
    if not (folder / "config.json").is_file():
        return Progress(len(finished), None, len(lost))
    config = Config.from_json(read_json(folder / "config.json"))
    expected = {f"{method}-seed{seed}" for method, seed in config.runs()}
    return Progress(len(expected & finished), len(expected), len(expected & lost))


def cut_to(runs: Iterable[Run]) -> int | None:
    """How many steps the runs of one setting took, where `steps` ended them before its epochs."""
    for run in runs:
        done, asked = run.result.get("epochs"), run.config.get("epochs")
        if done is not None and asked is not None and done < asked:
            return int(run.result["steps"])
    return None


def dataset_name(config: Mapping[str, Any]) -> str:
    """The dataset of a config in words; class folders go by the name of their folder."""
    if config["dataset"] != "folder":
        return str(config["dataset"])
    return f"folder {pathlib.Path(config.get('data_dir', '')).expanduser().resolve().name}"


def task(runs: Iterable[Run]) -> str:
    """Models and datasets of runs, in words."""
    configs = [run.config for run in runs]
    models = dict.fromkeys(str(config["model"]) for config in configs)
    return f"{', '.join(models)} on {', '.join(dict.fromkeys(map(dataset_name, configs)))}"


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

    As in `early_train_loss`; a line that begins before the tenth is left out. Where all do, since
    the last one spans more than a tenth, it is that of the last line.

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
