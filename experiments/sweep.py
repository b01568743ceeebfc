"""Several settings in one folder, each trained as `experiments.train` does it.

    sweep.json         the sweep's name and its settings, in order
    <setting>/         the work folder of one setting, see `workdir`

A sweep can be stopped at any moment and started again: finished runs are kept, a run that is under
way goes on from its checkpoint. The same sweep may be started several times side by side, on one
machine or on several that share the folder: each process takes settings that no other has.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments import data, distributed, metrics, train, workdir
from experiments.config import Config, ConfigError
from experiments.divergence import DivergedError
from experiments.programs import kept_in
from experiments.progress import Progress
from experiments.run import total_steps
from experiments.run_batch import Member
from experiments.stopping import StopRequests

_OF_DATA = (
    "dataset", "data_dir", "train_split", "test_split", "label", "num_classes", "storage", "pool",
    "pairs", "max_corrupt", "mesh_data", "mesh_fsdp",
)  # fmt: skip
"""Fields that say which images are put on the device; settings that agree in them share these."""


@dataclasses.dataclass
class _Setting:
    """One setting, and how many runs and steps of it the progress bar counts as left."""

    name: str
    config: Config
    folder: pathlib.Path
    runs: int
    steps_per_run: int


def train_sweep(
    name: str, settings: Mapping[str, Config], folder: pathlib.Path, stop: StopRequests
) -> bool:
    """Trains every run of every setting that `folder` does not hold yet.

    Args:
      name: of the sweep.
      settings: configs by name; a name is a relative path, where the setting's work folder goes.
      folder: where everything goes; made where there is none.
      stop: says when to stop.

    Returns:
      Whether all runs are finished; if not, other processes train those that are missing.

    Raises:
      CheckpointError, ConfigError, DataError, StoppedError: as `train.train_grid`.
      DivergedError: runs have diverged, at the end: all others are done first. They are not tried
        again unless the file `diverged.json` in their folder is deleted.
    """
    console = train.make_console()
    say = functools.partial(console.print, markup=False)
    datasets = _Datasets(say)
    plan = _plan(settings, folder, datasets)
    distributed.from_main(lambda: _write(name, settings, folder))
    runs = sum(setting.runs for setting in plan)
    total = sum(len(config.runs()) for config in settings.values())
    steps = sum(setting.runs * setting.steps_per_run for setting in plan)
    progress = Progress(runs, steps, total - runs, console)
    failed = distributed.from_main(lambda: _diverged(plan))
    say(
        f"{name}: {len(settings)} setting(s), {total - runs - len(failed)} of {total} runs are done"
        + (f", {len(failed)} diverged" if failed else "")
        + f"\n{folder}\n"
    )
    with progress.live(), kept_in(folder):
        left = _train_free(plan, datasets, progress, stop)
        # What another process had may be done, or given up, by now.
        left = _train_free(left, datasets, progress, stop)
    for setting in left:
        say(f"{setting.name}: another process trains in {setting.folder}")
    failed = distributed.from_main(lambda: _diverged(plan))
    if failed:
        raise DivergedError("\n".join(failed))
    return not left


def _diverged(plan: Sequence[_Setting]) -> list[str]:
    return [
        f"{setting.name}: {message}"
        for setting in plan
        for message in workdir.diverged(setting.config, setting.folder).values()
    ]


def _write(name: str, settings: Mapping[str, Config], folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "sweep.json"
        before = metrics.read_json(path) if path.is_file() else {}
        # What another process was asked for, or this one earlier, is part of it still.
        earlier = before["settings"] if before.get("name") == name else []
        names = list(dict.fromkeys((*earlier, *settings)))
        metrics.write_json(path, {"name": name, "settings": names})
    except OSError as error:
        raise ConfigError(f"--workdir={folder}: {error.strerror or error}") from error


class _Datasets:
    """The data of settings; what lies on the device is loaded once for all that share it."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._loaded: dict[tuple[Any, ...], data.DeviceData] = {}

    def of(self, config: Config) -> data.DeviceData | data.StreamedData:
        key = self._key(config)
        if key in self._loaded:
            return self._loaded[key].with_config(config)
        loaded = data.load(config, self._say)
        if isinstance(loaded, data.DeviceData):
            self._loaded[key] = loaded
        return loaded

    def keep(self, configs: Iterable[Config]) -> None:
        """Drops what none of `configs` needs."""
        keys = {self._key(config) for config in configs}
        self._loaded = {key: loaded for key, loaded in self._loaded.items() if key in keys}

    @staticmethod
    def _key(config: Config) -> tuple[Any, ...]:
        return tuple(getattr(config, name) for name in _OF_DATA)


def _plan(
    settings: Mapping[str, Config], folder: pathlib.Path, datasets: _Datasets
) -> list[_Setting]:
    """What there is to do; says what cannot work before anything is written."""
    plan = []
    for name, config in settings.items():
        train.check_loggers(config, folder / name)
        dataset = datasets.of(config)
        train.check(config, dataset)
        runs = len(distributed.from_main(lambda: _todo(config, folder / name)))  # noqa: B023
        steps = total_steps(config, dataset)
        plan.append(_Setting(name, config, folder / name, runs, steps))
    return plan


def _todo(config: Config, folder: pathlib.Path) -> list[tuple[str, int]]:
    """The runs that are neither finished nor diverged."""
    workdir.check_folder(config, folder)
    failed = workdir.diverged(config, folder)
    return [run for run in workdir.missing(config, folder) if run not in failed]


def _train_free(
    plan: Sequence[_Setting], datasets: _Datasets, progress: Progress, stop: StopRequests
) -> list[_Setting]:
    """Trains the settings that no other process has; returns those that another one has."""
    taken: list[_Setting] = []
    for index, setting in enumerate(plan):
        try:
            with distributed.lock(lambda: workdir.lock(setting.folder)):  # noqa: B023
                _train_setting(setting, datasets, progress, stop)
        except distributed.LockedError:
            taken.append(setting)
        datasets.keep(later.config for later in (*plan[index + 1 :], *taken))
    return taken


def _train_setting(
    setting: _Setting, datasets: _Datasets, progress: Progress, stop: StopRequests
) -> None:
    config, folder = setting.config, setting.folder
    train.open_folder(config, folder)
    todo = [(method, seed) for method, seed in distributed.from_main(lambda: _todo(config, folder))]
    done = setting.runs - len(todo)  # by others, since the sweep began
    progress.skipped(done, done * setting.steps_per_run)
    setting.runs = len(todo)
    dataset = datasets.of(config)
    if todo:
        methods = ", ".join(config.methods())
        progress.console.print(
            f"{setting.name}: {config.model} on {config.dataset}: {methods}; {config.seeds}"
            f" seed(s), {setting.steps_per_run} steps; {train.devices(dataset)}",
            markup=False,
        )

    def diverged(member: Member, error: DivergedError) -> None:
        progress.console.print(f"{setting.name}: {error}", markup=False)
        if distributed.is_main():
            workdir.write_diverged(folder, member.method, member.seed, str(error))

    prefix = f"{setting.name} "
    train.train_missing(config, folder, todo, dataset, progress, stop, prefix, diverged)
