"""The pictures of a report: which numbers of finished runs go into which figure."""

from __future__ import annotations

import math
import os
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.reporting import plots
from experiments.reporting.finished_runs import (
    COMPARED,
    Run,
    by_method,
    cut_to,
    dataset_name,
    late_train_loss,
    task,
    training_flops,
)
from experiments.reporting.plots import Curve, Point

if TYPE_CHECKING:
    import matplotlib.figure

_TOPOLOGIES = {"rigl": "RigL", "set": "SET", "static": "static masks", "dense": "dense"}


def write_pictures(runs: Sequence[Run], workdir: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Writes the pictures of one work folder.

    Args:
      runs: its finished runs.
      workdir: where the pictures go.

    Returns:
      Paths of `accuracy.png`, `loss.png`, and of `fan_in.png` where a run is sparse. Runs whose
      log has lost its evaluations, or all its lines, are not in the first two.
    """
    folder = pathlib.Path(workdir)
    config = runs[0].config
    trained = task(runs)
    spread = {"uniform": "uniform"}.get(config["distribution"], config["distribution"].upper())
    sparse = f"{spread} {config['sparsity']:g}, {_TOPOLOGIES[config['topology']]}"
    title = f"{trained}; sparse methods: {sparse}"
    figures = {}
    accuracies, losses = {"": _accuracies(runs)}, {"": _curves(runs, "train", "loss")}
    if accuracies[""]:
        figures["accuracy.png"] = plots.curves(accuracies, "test accuracy (%)", title, top=100)
    if losses[""]:
        figures["loss.png"] = plots.curves(losses, "training loss", title, log=True)
    groups = by_method(run for run in runs if run.fan_in)
    if groups:
        everything = [run for group in groups.values() for run in group]
        figures["fan_in.png"] = plots.fan_in(
            before=_layers(everything, "before/"),
            after={method: _layers(group, "after/") for method, group in groups.items()},
            sizes={name: size.item() for name, size in _layers(everything[:1], "size/").items()},
            title=f"{trained}, {sparse}",
        )
    return _save(figures, folder)


def write_sweep_pictures(
    sweep: Mapping[str, Sequence[Run]], title: str, folder: str | os.PathLike[str]
) -> list[pathlib.Path]:
    """Writes the pictures of a sweep.

    Args:
      sweep: finished runs by setting.
      title: what was trained, and the name of the sweep.
      folder: where the pictures go.

    Returns:
      Paths of `curves.png` (test accuracy), `loss.png`, `difference_accuracy.png`,
      `difference_loss.png`, `itop.png`, `skew_norm.png` and `skew_angle.png` (what SparseOpt's
      factors do, or would do, to the gradient), `flops.png` and `flops_loss.png`, each only where
      it has data. Those with more than 12 settings go on in `curves-2.png` and so on.
    """
    figures: dict[str, matplotlib.figure.Figure] = {}
    names = {
        setting: setting if (steps := cut_to(runs)) is None else f"{setting}, cut to {steps} steps"
        for setting, runs in sweep.items()
    }

    def draw(
        name: str, find: Callable[[Sequence[Run]], dict[str, Curve]], ylabel: str, **options: Any
    ) -> None:
        by_setting = {setting: find(runs) for setting, runs in sweep.items()}
        panels = [(names[setting], methods) for setting, methods in by_setting.items() if methods]
        most = plots.MOST_PANELS
        for first in range(0, len(panels), most):
            file = f"{name}-{first // most + 1}.png" if first else f"{name}.png"
            some = dict(panels[first : first + most])
            figures[file] = plots.curves(some, ylabel, title, **options)

    draw("curves", _accuracies, "test accuracy (%)", top=100)
    draw("loss", lambda runs: _curves(runs, "train", "loss"), "training loss", log=True)
    draw(
        "difference_accuracy",
        lambda runs: _differences(runs, "eval", "test_accuracy", 100),
        "test accuracy: difference (points)",
        band="ci95",
    )
    draw(
        "difference_loss",
        lambda runs: _differences(runs, "train", "loss"),
        "training loss: difference",
        band="ci95",
    )
    draw("itop", lambda runs: _curves(runs, "train", "itop_rate"), "ITOP rate R_m")
    draw("skew_norm", lambda runs: _skews(runs, "norm_ratio"), _SKEWS["norm_ratio"])
    draw("skew_angle", lambda runs: _skews(runs, "angle", 180 / math.pi), _SKEWS["angle"])
    for name, find, ylabel in (
        ("flops.png", _accuracy, "test accuracy (%)"),
        ("flops_loss.png", late_train_loss, "training loss"),
    ):
        panels = _flops(sweep, find)
        if panels:
            figures[name] = plots.flops(panels, ylabel, title)
    return _save(figures, pathlib.Path(folder))


def _save(
    figures: Mapping[str, matplotlib.figure.Figure], folder: pathlib.Path
) -> list[pathlib.Path]:
    for name, figure in figures.items():
        plots.save(figure, folder / name)
    return [folder / name for name in figures]


_SKEWS = {
    "norm_ratio": "raw over corrected gradient:\nnorms, mean over layers",
    "angle": "angle between corrected and raw\ngradient (degrees), mean over layers",
}
"""What `gradient_skew` of the diagnostics has, in words."""


def _accuracies(runs: Iterable[Run]) -> dict[str, Curve]:
    return _curves(runs, "eval", "test_accuracy", 100)


def _skews(runs: Iterable[Run], name: str, scale: float = 1) -> dict[str, Curve]:
    """Angle or ratio of norms, the mean over the layers that have one, against epochs."""

    def of_run(run: Run) -> dict[float, float]:
        by_epoch = {}
        for line in run.metrics:
            layers = line.get("gradient_skew") or {}
            values = [layer[name] for layer in layers.values() if layer[name] is not None]
            if values:
                by_epoch[line["epoch"]] = statistics.fmean(values)
        return by_epoch

    return _by_method(runs, of_run, scale)


def _curves(runs: Iterable[Run], kind: str, name: str, scale: float = 1) -> dict[str, Curve]:
    """One number of the log against epochs."""
    return _by_method(runs, lambda run: _values(run, kind, name), scale)


def _by_method(
    runs: Iterable[Run], find: Callable[[Run], Mapping[float, float]], scale: float
) -> dict[str, Curve]:
    """What `find` has of each run by epoch: by method, at the epochs that all its runs have."""
    curves = {}
    for method, group in by_method(runs).items():
        curve = _stacked([find(run) for run in group], scale)
        if curve is not None:
            curves[method] = curve
    return curves


def _values(run: Run, kind: str, name: str) -> dict[float, float]:
    """One number of the log by epoch, where there is one."""
    lines = (line for line in run.metrics if line["kind"] == kind)
    return {line["epoch"]: line[name] for line in lines if line.get(name) is not None}


def _stacked(curves: Sequence[Mapping[float, float]], scale: float) -> Curve | None:
    if not curves:
        return None
    epochs = sorted(set(curves[0]).intersection(*curves))  # a log may have lost lines
    if not epochs:
        return None
    values = np.array([[of_run[epoch] for epoch in epochs] for of_run in curves])
    return Curve(np.array(epochs), scale * values)


def _differences(runs: Iterable[Run], kind: str, name: str, scale: float = 1) -> dict[str, Curve]:
    """Differences of one number of the log by pair of methods, seed by seed."""
    values = {
        method: {run.result["seed"]: _values(run, kind, name) for run in group}
        for method, group in by_method(runs).items()
    }
    curves = {}
    for one, other in COMPARED:
        left, right = values.get(one, {}), values.get(other, {})
        pairs = [(left[seed], right[seed]) for seed in sorted(left.keys() & right.keys())]
        curve = _stacked([{e: a[e] - b[e] for e in a.keys() & b.keys()} for a, b in pairs], scale)
        if curve is not None:
            curves[f"{one} - {other}"] = curve
    return curves


def _flops(
    sweep: Mapping[str, Sequence[Run]], find: Callable[[Run], float | None]
) -> dict[str, dict[str, list[list[Point]]]]:
    """What runs have at their end, a panel for each task and topology: method -> lines of points.

    Points of one method are a line where nothing but the length of the runs differs. Dense runs are
    in all panels of their task.
    """
    ends: dict[tuple[str, ...], dict[tuple[str, str], list[Point]]] = {}
    dense: dict[tuple[str, ...], dict[tuple[str, str], list[Point]]] = {}
    of_length = _of_length()
    for runs in sweep.values():
        for method, group in by_method(runs).items():
            config = group[0].config
            sparse = method != "dense"
            point = _end(group, find, f"{config['sparsity']:g}" if sparse else "")
            if point is None:
                continue
            task = _task(config)
            panel = (*task, _TOPOLOGIES[config["topology"] if sparse else "dense"])
            lines = ends.setdefault(panel, {}) if sparse else dense.setdefault(task, {})
            same = _without(config, of_length if sparse else (*of_length, *_SPARSITY))
            lines.setdefault((method, same), []).append(point)
    if not ends:
        ends = {(*task, _TOPOLOGIES["dense"]): {} for task in dense}
    panels = {}
    for panel, of_panel in ends.items():
        methods: dict[str, list[list[Point]]] = {}
        for (method, _), points in (dense.get(panel[:-1], {}) | of_panel).items():
            methods.setdefault(method, []).append(_line(points))
        panels[panel] = methods
    varying = [len(set(column)) > 1 for column in zip(*panels, strict=True)]
    titles = {
        panel: ", ".join(w for w, varies in zip(panel, varying, strict=True) if w and varies)
        for panel in panels
    }
    return {titles[panel] or panel[-1]: methods for panel, methods in panels.items()}


_OF_MODEL = ("width", "base_channels", "hidden", "shortcut", "image_size")
"""Fields that make another model of one name."""


def _task(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What makes accuracies and FLOPs comparable, in words."""
    pool = config.get("pool", 1)
    return (
        config["model"],
        *(f"{name}={config[name]}" if name in config else "" for name in _OF_MODEL),
        dataset_name(config),
        "" if config.get("label", "label") == "label" else config["label"],
        "pairs" if config.get("pairs") else "",
        f"pooled by {pool}" if pool > 1 else "",
        config.get("train_split", "train"),
    )


def _accuracy(run: Run) -> float | None:
    accuracy = run.result.get("test_accuracy")
    return None if accuracy is None else 100 * float(accuracy)


def _end(group: Sequence[Run], find: Callable[[Run], float | None], label: str) -> Point | None:
    counted = [training_flops(run) for run in group]
    reached = [find(run) for run in group]
    if None in counted or None in reached:
        return None
    flops = float(np.mean([pair[0] for pair in counted if pair is not None]))
    return Point(flops, np.array(reached, dtype=float), label)


def _line(points: Sequence[Point]) -> list[Point]:
    """Points by FLOPs, each once: several settings may have the same runs."""
    distinct = {(point.flops, point.values.tobytes()): point for point in points}
    return sorted(distinct.values(), key=lambda point: point.flops)


def _of_length() -> tuple[str, ...]:
    """Fields that may differ between settings of which one is the other, trained for longer."""
    from experiments import workdir  # which imports the report, and so this module

    return (
        *workdir.MAY_CHANGE, "epochs", "steps", "seed", "log_every", "eval_every", "eval_steps",
        "diagnostics_every", "hessian_every",
    )  # fmt: skip


_SPARSITY = (
    "sparsity", "distribution", "fan_in_spread", "init", "topology", "update_interval",
    "drop_fraction", "update_end", "grow_by", "optimizer", "average_over", "correct", "ham_alpha",
    "ham_beta",
)  # fmt: skip
"""Fields without a meaning for dense runs."""


def _without(config: Mapping[str, Any], fields: Sequence[str]) -> str:
    return repr(sorted((name, value) for name, value in config.items() if name not in fields))


def _layers(runs: Sequence[Run], prefix: str) -> dict[str, np.ndarray]:
    """Arrays of all runs, stacked along a new first axis, by the layer they belong to."""
    names = [name for name in runs[0].fan_in if name.startswith(prefix)]
    return {
        name.removeprefix(prefix): np.stack([run.fan_in[name] for run in runs]) for name in names
    }
