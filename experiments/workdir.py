"""The folder of a grid of runs.

    config.json            the resolved config; a folder belongs to one config
    runs/METHOD-seedK/     metrics.jsonl, fan_in.npz, and result.json once the run is finished
    metrics.jsonl          the lines of all finished runs
    result.json            final metrics and digests of all runs, summary, environment
    accuracy.png, fan_in.png

Only a run's own folder is written to while it trains; everything else is made from finished runs,
whole or not at all. So an interruption leaves no line too many and none too few.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence

from experiments import metrics, report
from experiments.config import SPECS, Config, ConfigError

_MAY_CHANGE = ("data_dir", "loader_threads", "loader_processes", "max_corrupt")
"""Fields that change no finished run: where and how fast data is read, what would have ended it."""


def open_for(config: Config, folder: pathlib.Path) -> None:
    """Makes `folder` and writes `config.json`, or checks that it holds the same config.

    Raises:
      ConfigError: the folder cannot be written, or belongs to another config; the message names
        the field that differs and both values.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.json"
        new = json.loads(json.dumps(dataclasses.asdict(config)))
        if not path.exists():
            metrics.write_json(path, new)
            return
        old = metrics.read_json(path)
    except OSError as error:
        raise ConfigError(f"--workdir={folder}: {error.strerror or error}") from error
    for name, spec in SPECS.items():
        if name in _MAY_CHANGE:
            continue
        # A field that is newer than the folder had its default.
        before = old.get(name, spec.default)
        if before != new[name]:
            raise ConfigError(
                f"--workdir={folder} holds runs with {name}={before!r}, not {new[name]!r};\n"
                f"give another --workdir, or --config.{name} as it was"
            )


def run_folder(folder: pathlib.Path, method: str, seed: int) -> pathlib.Path:
    """Where one run's files are."""
    return folder / "runs" / f"{method}-seed{seed}"


def is_finished(folder: pathlib.Path, method: str, seed: int) -> bool:
    """Whether a run has written its result, which is the last thing it does."""
    return (run_folder(folder, method, seed) / "result.json").is_file()


def _finished(
    folder: pathlib.Path, methods: Iterable[str], seeds: Sequence[int]
) -> list[pathlib.Path]:
    return [
        run_folder(folder, method, seed)
        for method in methods
        for seed in seeds
        if is_finished(folder, method, seed)
    ]


def merge_metrics(folder: pathlib.Path, methods: Iterable[str], seeds: Sequence[int]) -> None:
    """Makes `metrics.jsonl` from the finished runs, in the order of the grid."""
    runs = _finished(folder, methods, seeds)
    lines = b"".join((run / "metrics.jsonl").read_bytes() for run in runs)
    metrics.write_atomically(folder / "metrics.jsonl", lines)


def merge_results(
    config: Config, folder: pathlib.Path, methods: Iterable[str], seeds: Sequence[int]
) -> None:
    """Makes `result.json` from the finished runs.

    Its `state_sha256` is the digest of the runs' digests in the order of the grid, and its
    `environment` that of the last run; a run made in another environment has its own as well.
    """
    methods = list(methods)
    runs = [report.load_run(run) for run in _finished(folder, methods, seeds)]
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
