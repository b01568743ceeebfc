"""The folder of a grid of runs.

    config.json            the resolved config; a folder belongs to one config
    runs/METHOD-seedK/     run.json (config; commit, versions and device, each time it was started),
                           metrics.jsonl, checkpoints/, and once the run is finished fan_in.npz and
                           result.json; diverged.json where it diverged in a sweep
    batches/NAME/          checkpoints/ of runs that train together in one program, and runs.json,
                           which names them
    metrics.jsonl          the lines of all finished runs
    result.json            final metrics and digests of all runs, summary, environment
    accuracy.png, loss.png, fan_in.png
    compilation_cache/     compiled programs, see `programs.kept_in`; may be deleted; beside the
                           folder where that is in `runs`

Only a run's own folder is written to while it trains; everything else is made from finished runs,
whole or not at all. What an interrupted run's log has beyond its last checkpoint is dropped when
the run goes on. So an interruption leaves no line too many and none too few. One process at a time
may train in a folder (`.lock`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments import distributed, metrics, report
from experiments.config import SPECS, Config, ConfigError

MAY_CHANGE = (
    "data_dir", "loader_threads", "loader_processes", "max_corrupt", "loggers",
    "checkpoint_every", "keep_last", "keep_best", "mesh_data", "mesh_fsdp", "seeds", "compare",
    "batch_runs",
)  # fmt: skip
"""Fields that say how a run is done, not what: where data is read, what is kept, which devices; and
which runs a grid has: further seeds and methods join those that are there."""


@contextlib.contextmanager
def lock(folder: pathlib.Path) -> Iterator[None]:
    """Makes `folder` and keeps it for this process while the body runs.

    The operating system takes the lock away from a process that ends in any way.

    Raises:
      ConfigError: the folder cannot be written, or another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")  # noqa: SIM115, closed below
    except OSError as error:
        raise ConfigError(f"--workdir={folder}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise distributed.LockedError(
                f"--workdir={folder}: another process trains in it ({file.read().strip()}); wait"
                " for it, or give another --workdir"
            ) from None
        except OSError as error:  # some network file systems have no locks
            print(f"warning: {folder} cannot be locked ({error.strerror})", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}, since {time.ctime()}\n")
        file.flush()
        yield


def open_for(config: Config, folder: pathlib.Path) -> None:
    """Writes `config.json` into `folder`, unless it holds another experiment's.

    Raises:
      ConfigError: the folder cannot be written, or belongs to another config; the message names
        the field that differs and both values.
    """
    try:
        path = folder / "config.json"
        old = check_folder(config, folder)
        new = json.loads(json.dumps(dataclasses.asdict(_joined(config, old))))
        if old != new:
            metrics.write_json(path, new)
    except OSError as error:
        raise ConfigError(f"--workdir={folder}: {error.strerror or error}") from error


def check_folder(config: Config, folder: pathlib.Path) -> dict[str, Any]:
    """The config of a work folder as JSON has it, empty where there is none yet.

    Raises:
      ConfigError: it is of another experiment, or its runs drew other random numbers.
    """
    path = folder / "config.json"
    old: dict[str, Any] = metrics.read_json(path) if path.exists() else {}
    if old:
        what = f"--workdir={folder} holds runs"
        check_same(config, old, what)
        for run in sorted(folder.glob("runs/*/run.json")):
            environment = metrics.read_json(run)["sessions"][-1]["environment"]
            check_settings(environment.get("settings", {}), what)
    return old


def _joined(config: Config, old: Mapping[str, Any]) -> Config:
    """`config`, with the methods and seeds of an earlier one as well."""
    if not old:
        return config
    before = Config.from_json(old)
    fields: dict[str, Any] = {"seeds": max(before.seeds, config.seeds)}
    methods = tuple(dict.fromkeys((*before.methods(), *config.methods())))
    if methods != config.methods():
        fields["compare"] = methods
    return dataclasses.replace(config, **fields)


def check_same(config: Config, old: Mapping[str, Any], what: str) -> None:
    """Raises ConfigError where `old`, a config as JSON has it, is of another experiment.

    Args:
      config: that of now.
      old: that of before.
      what: what has the old one, for the message.
    """
    new = json.loads(json.dumps(dataclasses.asdict(config)))
    for name, spec in SPECS.items():
        if name in MAY_CHANGE:
            continue
        # A field that is newer than the folder had its default.
        before = old.get(name, json.loads(json.dumps(spec.default)))
        if before != new[name]:
            raise ConfigError(
                f"{what} with {name}={before!r}, not {new[name]!r};\n"
                f"give another --workdir, or --config.{name} as it was"
            )


def check_settings(old: Mapping[str, Any], what: str) -> None:
    """Raises ConfigError where `metrics.settings` were others than now.

    Args:
      old: those of before; one that is missing had its default.
      what: what has them, for the message.
    """
    for name, now in metrics.settings().items():
        before = old.get(name, metrics.SETTINGS[name])
        if before != now:
            variable = name.upper()
            raise ConfigError(
                f"{what} with {variable}={before}, not {now}, so keys of random numbers and what"
                f" they draw would not fit;\nset the environment variable {variable}={before}, or"
                " give another --workdir"
            )


def run_folder(folder: pathlib.Path, method: str, seed: int) -> pathlib.Path:
    """Where one run's files are."""
    return folder / "runs" / f"{method}-seed{seed}"


def missing(config: Config, folder: pathlib.Path) -> list[tuple[str, int]]:
    """Method and seed of those runs of a config that `folder` does not hold the result of."""
    return [run for run in config.runs() if not _is_finished(folder, *run)]


def diverged(config: Config, folder: pathlib.Path) -> dict[tuple[str, int], str]:
    """Those runs of a config that diverged in a sweep, and what was said of each."""
    messages = {}
    for run in missing(config, folder):
        path = run_folder(folder, *run) / "diverged.json"
        if path.is_file():
            messages[run] = metrics.read_json(path)["message"]
    return messages


def write_diverged(folder: pathlib.Path, method: str, seed: int, message: str) -> None:
    """Has a run count as one that diverged; deleting the file has it tried again."""
    own_folder = run_folder(folder, method, seed)
    own_folder.mkdir(parents=True, exist_ok=True)
    content = {"method": method, "seed": seed, "message": message}
    path = own_folder / "diverged.json"
    metrics.write_json(path, content | {"environment": metrics.environment()})


def together(
    config: Config, folder: pathlib.Path, todo: Sequence[tuple[str, int]]
) -> list[tuple[pathlib.Path, list[tuple[str, int]]]]:
    """Runs that train in one program, where those are wanted (`batched`).

    Methods that lack the same seeds train together. A group that was interrupted goes on as it was,
    unless some of its runs have been done in another way meanwhile.

    Args:
      config: of the work folder.
      folder: the work folder.
      todo: the runs that are missing.

    Returns:
      Of each group: its own folder, for checkpoints, and its runs, methods in the config's order.
    """
    left = list(todo)
    groups = []
    for path in sorted((folder / "batches").glob("*/runs.json")):
        runs = [(method, seed) for method, seed in metrics.read_json(path)]
        interrupted = all(
            run in left or _trained_in(folder, *run) == path.parent.name for run in runs
        )
        if interrupted and any(run in left for run in runs):
            groups.append((path.parent, runs))
            left = [run for run in left if run not in runs]
    by_seeds: dict[tuple[int, ...], list[str]] = {}
    for method in config.methods():
        seeds = tuple(seed for of, seed in left if of == method)
        if seeds:
            by_seeds.setdefault(seeds, []).append(method)
    for seeds, methods in by_seeds.items():
        name = "-".join((*methods, "seeds", *map(str, seeds)))
        groups.append((folder / "batches" / name, [(m, s) for m in methods for s in seeds]))
    return groups


def _trained_in(folder: pathlib.Path, method: str, seed: int) -> str | None:
    """The name of the group that a finished run trained in."""
    path = run_folder(folder, method, seed) / "run.json"
    name: str | None = metrics.read_json(path).get("group") if path.is_file() else None
    return name


def _is_finished(folder: pathlib.Path, method: str, seed: int) -> bool:
    return (run_folder(folder, method, seed) / "result.json").is_file()


def _finished(config: Config, folder: pathlib.Path) -> list[pathlib.Path]:
    runs = (run for run in config.runs() if _is_finished(folder, *run))
    return [run_folder(folder, *run) for run in runs]


def merge_metrics(folder: pathlib.Path) -> None:
    """Makes `metrics.jsonl` from the finished runs, in the order of the grid."""
    runs = _finished(_config_of(folder), folder)
    lines = b"".join((run / "metrics.jsonl").read_bytes() for run in runs)
    metrics.write_atomically(folder / "metrics.jsonl", lines)


def _config_of(folder: pathlib.Path) -> Config:
    """The config of a work folder."""
    return Config.from_json(metrics.read_json(folder / "config.json"))


def merge_results(folder: pathlib.Path) -> None:
    """Makes `result.json` from the finished runs.

    Its `state_sha256` is the digest of the runs' digests in the order of the grid, and its
    `environment` that of the last run; a run made in another environment has its own as well.
    """
    config = _config_of(folder)
    runs = [report.load_run(run) for run in _finished(config, folder)]
    if not runs:  # all that there are diverged
        return
    results = [dict(run.result) for run in runs]
    environment = results[-1]["environment"]
    for result in results:
        if result["environment"] == environment:
            del result["environment"]
    digests = "\n".join(result["state_sha256"] for result in results)
    content = {
        "state_sha256": hashlib.sha256(digests.encode()).hexdigest(),
        "summary": report.summarize(runs),
        "runs": results,
        "environment": environment,
        "config": dataclasses.asdict(config),
    }
    metrics.write_json(folder / "result.json", content)
