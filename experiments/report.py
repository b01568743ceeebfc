"""Tables and pictures from finished runs: `python -m experiments.report DIR`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from experiments import plots
from experiments.config import ConfigError
from experiments.metrics import read_json

COMPARED = (("sparseopt", "sgd"),)
"""Pairs of methods whose difference is taken seed by seed, where both were run."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its `result.json`, the lines of its `metrics.jsonl`, and its fan-ins.

    `fan_in` has `before/LAYER`, `after/LAYER` and `size/LAYER`; it is empty for a dense run.
    """

    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    fan_in: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean, sample standard deviation and 95 % confidence interval of the mean (Student's t)."""

    n: int
    mean: float
    std: float | None
    ci95: tuple[float, float] | None


def describe(values: Sequence[float]) -> Statistics:
    """Statistics of at least one value; spread and interval are None for a single one.

    Example:
      >>> describe([1.0, 2.0, 3.0]).std
      1.0
    """
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Statistics(n, mean, None, None)
    std = statistics.stdev(values)
    half = float(scipy.stats.t.ppf(0.975, n - 1)) * std / math.sqrt(n)
    return Statistics(n, mean, std, (mean - half, mean + half))


def load_runs(workdir: str | os.PathLike[str]) -> list[Run]:
    """The finished runs of a folder, by method and seed; raises ConfigError where there are none.

    Methods come in the order of the folder's config.
    """
    folder = pathlib.Path(workdir)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{workdir} has no config.json: it is not the folder of a run")
    runs = [load_run(path.parent) for path in folder.glob("runs/*/result.json")]
    if not runs:
        raise ConfigError(f"{workdir} has no finished run yet")
    order = list(read_json(folder / "config.json").get("compare", ()))

    def position(run: Run) -> tuple[int, str, int]:
        method = run.result["method"]
        place = order.index(method) if method in order else len(order)
        return place, method, run.result["seed"]

    return sorted(runs, key=position)


def load_run(folder: pathlib.Path) -> Run:
    """Reads the folder of one finished run."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    arrays: dict[str, np.ndarray] = {}
    if (folder / "fan_in.npz").is_file():
        with np.load(folder / "fan_in.npz", allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    return Run(read_json(folder / "result.json"), [json.loads(line) for line in lines], arrays)


def by_method(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs grouped by method, in the order in which they come."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.result["method"], []).append(run)
    return groups


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """Final test accuracies by method, and the paired differences of `COMPARED`, as JSON.

    Accuracies and differences are fractions, not percentages.
    """
    groups = by_method(runs)
    methods = {}
    for method, group in groups.items():
        accuracies = [run.result["test_accuracy"] for run in group]
        methods[method] = {
            "seeds": [run.result["seed"] for run in group],
            "test_accuracy": dataclasses.asdict(describe(accuracies)),
            "density": statistics.fmean(run.result["density"] for run in group),
        }
    paired = {}
    for one, other in COMPARED:
        left, right = (
            {run.result["seed"]: run.result["test_accuracy"] for run in groups.get(name, [])}
            for name in (one, other)
        )
        seeds = sorted(left.keys() & right.keys())
        if seeds:
            differences = [left[seed] - right[seed] for seed in seeds]
            paired[f"{one} - {other}"] = {
                "seeds": seeds,
                "differences": differences,
                "test_accuracy": dataclasses.asdict(describe(differences)),
            }
    return {"methods": methods, "paired": paired}


def table(summary: Mapping[str, Any]) -> str:
    """The summary as text, in percent and percentage points."""
    width = max(9, *(len(name) for name in summary["methods"]))
    lines = [f"{'method':<{width}}  density  test accuracy (%)   n"]
    for method, row in summary["methods"].items():
        accuracy = row["test_accuracy"]
        lines.append(
            f"{method:<{width}}  {row['density']:7.4f}"
            f"  {_plus_minus(accuracy):>17}  {accuracy['n']:>2}"
        )
    for pair, row in summary["paired"].items():
        difference = row["test_accuracy"]
        each = ", ".join(f"{100 * value:+.2f}" for value in row["differences"])
        lines.append("")
        lines.append(f"{pair}, paired by seed (percentage points): {each}")
        text = f"mean {_plus_minus(difference, '+')}"
        if difference["ci95"] is not None:
            low, high = (100 * bound for bound in difference["ci95"])
            text += f", 95 % confidence interval [{low:+.2f}, {high:+.2f}] (Student's t)"
        lines.append(f"{text}, n = {difference['n']}")
    lines.append("")
    lines.append("± is the sample standard deviation over seeds; density is active over maskable")
    lines.append("weights. Differences on a few seeds of a small test set are mostly noise.")
    return "\n".join(lines)


def _plus_minus(row: Mapping[str, Any], sign: str = "") -> str:
    mean = format(100 * row["mean"], f"{sign}.2f")
    return mean if row["std"] is None else f"{mean} ± {100 * row['std']:.2f}"


def write_pictures(runs: Sequence[Run], workdir: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Writes `accuracy.png`, and `fan_in.png` where a run is sparse; returns their paths.

    Runs whose log has lost its evaluations are not in the former.
    """
    folder = pathlib.Path(workdir)
    config = read_json(folder / "config.json")
    trained = f"{config['model']} on {config['dataset']}"
    names = {"rigl": "RigL", "set": "SET", "static": "static masks", "uniform": "uniform"}
    spread, moves = (names.get(config[k], config[k].upper()) for k in ("distribution", "topology"))
    sparse = f"{spread} {config['sparsity']:g}, {moves}"
    written = []
    curves = _curves(runs)
    if curves:
        written.append(folder / "accuracy.png")
        plots.accuracy(curves, f"{trained}; sparse methods: {sparse}", written[-1])
    groups = by_method(run for run in runs if run.fan_in)
    if groups:
        everything = [run for group in groups.values() for run in group]
        written.append(folder / "fan_in.png")
        plots.fan_in(
            before=_layers(everything, "before/"),
            after={method: _layers(group, "after/") for method, group in groups.items()},
            sizes={name: size.item() for name, size in _layers(everything[:1], "size/").items()},
            title=f"{trained}, {sparse}",
            path=written[-1],
        )
    return written


def _curves(runs: Iterable[Run]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    curves = {}
    for method, group in by_method(runs).items():
        found = [
            {line["epoch"]: line["test_accuracy"] for line in run.metrics if line["kind"] == "eval"}
            for run in group
        ]
        epochs = sorted(set(found[0]).intersection(*found))  # a log may have lost lines
        accuracies = [[of_run[epoch] for epoch in epochs] for of_run in found]
        if epochs:
            curves[method] = np.array(epochs), np.array(accuracies)
    return curves


def _layers(runs: Sequence[Run], prefix: str) -> dict[str, np.ndarray]:
    """Arrays of all runs, stacked along a new first axis, by the layer they belong to."""
    names = [name for name in runs[0].fan_in if name.startswith(prefix)]
    return {
        name.removeprefix(prefix): np.stack([run.fan_in[name] for run in runs]) for name in names
    }


def report(workdir: str | os.PathLike[str]) -> str:
    """Draws the pictures of a folder's finished runs; returns its table and where they are."""
    runs = load_runs(workdir)
    text = table(summarize(runs))
    if read_json(pathlib.Path(workdir) / "config.json")["distribution"] == "uniform":
        text += "\nuniform leaves the first layer dense and does not make up for it, as RigL does."
    pictures = write_pictures(runs, workdir)
    return text + "\n\n" + "\n".join(str(path) for path in pictures)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m experiments.report DIR   (the folder of a run)", file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        print(report(arguments[0]))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
