"""Tables and pictures from finished runs: `python -m experiments.report DIR`.

DIR is a work folder, as `experiments.train` leaves it, or the folder of a sweep: several settings,
each in a work folder of its own (see `finished_runs.py`).
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.config import ConfigError
from experiments.metrics import write_json
from experiments.paths import local_path
from experiments.reporting import finished_runs
from experiments.reporting.finished_runs import (
    COMPARED,
    Run,
    by_method,
    load_run,
    load_runs,
    load_settings,
    load_sweep,
)
from experiments.reporting.pictures import write_pictures, write_sweep_pictures
from experiments.reporting.seed_statistics import compare, describe
from experiments.reporting.tables import QUANTITIES, diverged, sweep_tables, table, unfinished
from experiments.terminal import tolerant_output

__all__ = [
    "COMPARED", "Run", "by_method", "load_run", "load_runs", "load_settings", "load_sweep", "main",
    "report", "report_sweep", "summarize", "summarize_sweep", "table", "write_pictures",
]  # fmt: skip


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """The numbers of one work folder's finished runs, as JSON.

    Args:
      runs: finished runs of one config.

    Returns:
      `methods`: by method its `seeds`, mean `density`, `training_flops` of a run and
      `training_flops_over_dense`, and statistics of `test_accuracy`, `late_train_loss`,
      `early_train_loss` (means over the last and the first tenth of the steps) and `itop_rate`.
      `paired`: by pair of `COMPARED` the `seeds` that both have, and statistics of the differences
      in accuracy and in both losses, with the p of the paired t-test.
      Accuracies and their differences are fractions, not percentages. A number that no run has is
      None.
    """
    groups = by_method(runs)
    values = {method: [_numbers(run) for run in group] for method, group in groups.items()}
    methods = {}
    for method, group in groups.items():
        row: dict[str, Any] = {"seeds": [run.result["seed"] for run in group]}
        for name in values[method][0]:
            column = [value for one in values[method] if (value := one[name]) is not None]
            if name in _MEANS:
                row[name] = statistics.fmean(column) if column else None
            else:
                row[name] = dataclasses.asdict(describe(column)) if column else None
        methods[method] = row
    paired = {}
    for one, other in COMPARED:
        if one in groups and other in groups:
            comparison = _paired(
                dict(zip(methods[one]["seeds"], values[one], strict=True)),
                dict(zip(methods[other]["seeds"], values[other], strict=True)),
            )
            if comparison["seeds"]:
                paired[f"{one} - {other}"] = comparison
    return {"methods": methods, "paired": paired}


_MEANS = ("density", "training_flops", "training_flops_over_dense")
"""Numbers that hardly differ between seeds: their mean says it all."""

Numbers = Mapping[str, float | None]


def _numbers(run: Run) -> dict[str, float | None]:
    result = run.result
    flops, ratio = finished_runs.training_flops(run) or (None, None)
    return {
        "density": result["density"],
        "test_accuracy": result.get("test_accuracy"),
        "late_train_loss": finished_runs.late_train_loss(run),
        "early_train_loss": finished_runs.early_train_loss(run),
        "itop_rate": result.get("itop_rate"),
        "training_flops": flops,
        "training_flops_over_dense": ratio,
    }


def _paired(one: Mapping[int, Numbers], other: Mapping[int, Numbers]) -> dict[str, Any]:
    row: dict[str, Any] = {"seeds": sorted(one.keys() & other.keys())}
    for name in QUANTITIES:
        left, right = (
            {seed: value for seed, numbers in runs.items() if (value := numbers[name]) is not None}
            for runs in (one, other)
        )
        comparison = compare(left, right)
        row[name] = (
            None
            if comparison is None
            else {"seeds": comparison[0]} | dataclasses.asdict(comparison[1])
        )
    return row


def summarize_sweep(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The numbers of a sweep, as JSON.

    Args:
      folder: that of a sweep.

    Returns:
      `name`; `task`: models and datasets, in words; `settings`: by setting what `summarize` returns
      of it; `cut_to`: by setting the steps that it took, where those cut it short; `unfinished`: by
      setting how many runs are `finished`, `diverged` and `expected` (None where there is no config
      yet);
      `diverged`: by setting `method`, `seed` and `message` of runs that did; `environment`: by each
      entry of the runs' environments all its distinct values.

    Raises:
      ConfigError: it is not the folder of a sweep, or no run is finished.
    """
    names = finished_runs.setting_names(folder)
    return _summarize_settings(pathlib.Path(folder), names, load_sweep(folder))


def _summarize_settings(
    folder: pathlib.Path, names: Iterable[str], sweep: Mapping[str, Sequence[Run]]
) -> dict[str, Any]:
    progress = {name: finished_runs.progress(folder / name) for name in names}
    lost = {name: finished_runs.diverged(folder / name) for name in progress}
    return {
        "name": finished_runs.sweep_name(folder),
        "task": finished_runs.task(run for runs in sweep.values() for run in runs),
        "settings": {name: summarize(runs) for name, runs in sweep.items()},
        "cut_to": {
            name: steps for name, runs in sweep.items() if (steps := finished_runs.cut_to(runs))
        },
        "unfinished": {
            name: dataclasses.asdict(one) for name, one in progress.items() if not one.complete()
        },
        "diverged": {name: runs for name, runs in lost.items() if runs},
        "environment": _environment([run for runs in sweep.values() for run in runs]),
    }


def _environment(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """All distinct values of each entry of the runs' environments, in the order of the runs."""
    environment: dict[str, list[Any]] = {}
    for run in runs:
        for name, value in run.result.get("environment", {}).items():
            values = environment.setdefault(name, [])
            if value not in values:
                values.append(value)
    return environment


def report(folder: str | os.PathLike[str]) -> str:
    """Draws the pictures of a folder's finished runs; returns its table and where they are.

    Args:
      folder: a work folder, or that of a sweep.

    Raises:
      ConfigError: it is neither, or no run is finished.
    """
    path = pathlib.Path(folder)
    if finished_runs.is_sweep(path):
        return report_sweep(path)
    runs = load_runs(path)
    parts = [table(summarize(runs))]
    if runs[0].config["distribution"] == "uniform":
        parts[0] += (
            "\nuniform leaves the first layer dense and does not make up for it, as RigL does."
        )
    lost = finished_runs.diverged(path)
    if lost:
        parts.append(diverged({str(folder): lost}))
    progress = finished_runs.progress(path)
    if not progress.complete():
        parts.append(unfinished({str(folder): dataclasses.asdict(progress)}))
    parts.append("\n".join(str(picture) for picture in write_pictures(runs, path)))
    return "\n\n".join(parts)


def report_sweep(folder: str | os.PathLike[str], names: Sequence[str] | None = None) -> str:
    """Writes `summary.json` and the pictures of a sweep's finished runs.

    Args:
      folder: that of a sweep.
      names: the settings to report on; None: those of `sweep.json`.

    Returns:
      Its tables, what diverged, what is not finished, and the paths of what was written.

    Raises:
      ConfigError: it is not the folder of a sweep, or no run is finished.
    """
    path = pathlib.Path(folder)
    sweep = load_sweep(path) if names is None else load_settings(path, names)
    if not sweep:
        raise ConfigError(f"{folder} has no finished run yet of {', '.join(names or ())}")
    chosen = finished_runs.setting_names(path) if names is None else names
    summary = _summarize_settings(path, chosen, sweep)
    written = path / "summary.json"
    write_json(written, summary)
    title = f"{summary['task']} (settings of {summary['name']})"
    paths = [written, *write_sweep_pictures(sweep, title, path)]
    return sweep_tables(summary) + "\n\n" + "\n".join(map(str, paths))


@tolerant_output()
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(
            "usage: python -m experiments.report DIR   (the folder of a run or of a sweep)",
            file=sys.stderr,
        )
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        print(report(local_path("DIR", arguments[0])))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
