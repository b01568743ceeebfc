"""The tables of a report as text, made from the summaries of `report.py`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reporting.seed_statistics import SIGNIFICANT

Row = Mapping[str, Any]

QUANTITIES = {
    "test_accuracy": "test accuracy (percentage points)",
    "late_train_loss": "training loss, mean over the last tenth of the steps",
    "early_train_loss": "training loss, mean over the first tenth of the steps",
}
"""What is compared by seed, and its name in words."""

_UNITS = (
    (1e18, "EFLOPs"),
    (1e15, "PFLOPs"),
    (1e12, "TFLOPs"),
    (1e9, "GFLOPs"),
    (1e6, "MFLOPs"),
    (1e3, "kFLOPs"),
)
_MARK = "*"


def table(summary: Row) -> str:
    """The summary of one work folder as text, in percent and percentage points.

    Args:
      summary: what `report.summarize` returned.

    Returns:
      A line for each method, then the paired differences.
    """
    width = max(9, *(len(name) for name in summary["methods"]))
    lines = [f"{'method':<{width}}  density  test accuracy (%)   n"]
    for method, row in summary["methods"].items():
        lines.append(
            f"{method:<{width}}  {row['density']:7.4f}"
            f"  {plus_minus(row['test_accuracy'], 100, 2):>17}  {len(row['seeds']):>2}"
        )
    for pair, row in summary["paired"].items():
        accuracy = row["test_accuracy"]
        if accuracy is not None:
            each = ", ".join(f"{100 * value:+.2f}" for value in accuracy["differences"])
            lines += ["", f"{pair}, paired by seed (percentage points): {each}"]
            lines.append(_difference(accuracy, 100, 2))
        for quantity in ("late_train_loss", "early_train_loss"):
            if row[quantity] is not None:
                lines += [f"{QUANTITIES[quantity]}:", "  " + _difference(row[quantity], 1, 4)]
    lines += [
        "",
        "± is the sample standard deviation over seeds; density is active over maskable",
        "weights. Differences on a few seeds of a small test set are mostly noise.",
    ]
    return "\n".join([*lines, *about_p(_comparisons([summary]))])


def _difference(row: Row, scale: float, digits: int) -> str:
    text = f"mean {plus_minus(row, scale, digits, '+')}"
    if row["ci95"] is not None:
        text += f", 95 % confidence interval {interval(row, scale, digits)} (Student's t)"
    text += f", n = {row['n']}"
    return text if row["p"] is None else f"{text}, p = {p_value(row['p'])}".replace("= <", "< ")


def sweep_tables(summary: Row) -> str:
    """The summary of a sweep as text.

    Args:
      summary: what `report.summarize_sweep` returned.

    Returns:
      A table with a line for each setting and method, and one for each pair of methods and each
      quantity that is compared, followed by what their columns mean.
    """
    settings = summary["settings"]
    several = "1 setting" if len(settings) == 1 else f"{len(settings)} settings"
    parts = [
        f"{summary['name']}, {summary['task']}: {several} with finished runs", _methods(settings)
    ]  # fmt: skip
    pairs = list(dict.fromkeys(pair for row in settings.values() for pair in row["paired"]))
    for pair in pairs:
        for quantity, words in QUANTITIES.items():
            rows = {
                name: row["paired"].get(pair, {}).get(quantity) for name, row in settings.items()
            }
            known = {name: row for name, row in rows.items() if row is not None}
            if known:
                scale, digits = (100, 2) if quantity == "test_accuracy" else (1, 4)
                parts.append(
                    f"{pair}, paired by seed: {words}\n{_differences(known, scale, digits)}"
                )
    notes = [
        "± is the sample standard deviation over seeds, CI the 95 % confidence interval of a mean",
        "(Student's t). Training loss: mean over the last tenth of the steps, or of the log's last",
        "line where that is longer. R_m: share of the weights that were ever active. FLOPs: of one",
        "training run; x dense: over a dense run of as many steps.",
    ]
    parts.append("\n".join([*notes, *about_p(_comparisons(list(settings.values())))]))
    parts += _environment(summary["environment"])
    if summary["cut_to"]:
        by_steps: dict[int, list[str]] = {}
        for name, steps in summary["cut_to"].items():
            by_steps.setdefault(steps, []).append(name)
        parts += [
            textwrap.fill(f"cut to {steps} steps: {', '.join(names)}", 98, break_on_hyphens=False)
            for steps, names in by_steps.items()
        ]
    if summary["diverged"]:
        parts.append(diverged(summary["diverged"]))
    if summary["unfinished"]:
        parts.append(unfinished(summary["unfinished"]))
    return "\n\n".join(parts)


def _methods(settings: Mapping[str, Row]) -> str:
    every = [row for setting in settings.values() for row in setting["methods"].values()]
    counts = [row["training_flops"] for row in every if row["training_flops"] is not None]
    scale, unit = _unit(counts)
    rows = []
    for name, setting in settings.items():
        for place, (method, row) in enumerate(setting["methods"].items()):
            flops, ratio = row["training_flops"], row["training_flops_over_dense"]
            rate = row["itop_rate"]
            cells = (
                method,
                str(len(row["seeds"])),
                plus_minus(row["test_accuracy"], 100, 2),
                plus_minus(row["late_train_loss"], 1, 4),
                "-" if rate is None else f"{rate['mean']:.3f}",
                "-" if flops is None else f"{flops / scale:.4g}",
                "-" if ratio is None else f"{ratio:.3f}",
            )
            rows.append(("" if place else name, *cells))
    header = ("setting", "method", "n", "accuracy (%)", "training loss", "R_m", unit, "x dense")
    return columns(header, rows, left=2)


def _unit(counts: Sequence[float]) -> tuple[float, str]:
    """The largest unit in which every count is at least 1."""
    for scale, name in _UNITS:
        if counts and min(counts) >= scale:
            return scale, name
    return 1.0, "FLOPs"


def _differences(rows: Mapping[str, Row], scale: float, digits: int) -> str:
    body = [
        (
            name,
            str(row["n"]),
            plus_minus(row, scale, digits, "+"),
            interval(row, scale, digits),
            p_value(row["p"]),
        )
        for name, row in rows.items()
    ]
    return columns(("setting", "n", "difference", "95 % CI", "p"), body)


def columns(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, longest: int = 32
) -> str:
    """Text in aligned columns.

    A first cell of more than `longest` characters has a line of its own, above the rest of its row.

    Args:
      header: the heading of each column.
      rows: the cells of each row.
      left: how many columns, from the first, are aligned to the left; the others are to the right.
      longest: the most characters that widen the first column.

    Returns:
      Lines without a trailing newline.

    Example:
      >>> print(columns(("setting", "n"), [("rigl", "5"), ("set", "10")]))
      setting   n
      rigl      5
      set      10
    """
    widths = [max(len(row[0]) for row in (header, *rows, ("",)) if len(row[0]) <= longest)]
    widths += [max(len(row[i]) for row in (header, *rows)) for i in range(1, len(header))]
    lines = []
    for row in (header, *rows):
        first = row[0]
        if len(first) > longest:
            lines.append(first)
            first = ""
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip((first, *row[1:]), widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def plus_minus(row: Row | None, scale: float, digits: int, sign: str = "") -> str:
    """Mean ± sample standard deviation; the mean alone for one value, and - for none.

    Args:
      row: `mean` and `std`, as `seed_statistics` has them; None, or a mean of None, for no value.
      scale: what both are multiplied by, e.g. 100 for percent.
      digits: behind the point.
      sign: "+" to have it before positive means as well.

    Example:
      >>> plus_minus({"mean": 0.5, "std": 0.01}, 100, 2)
      '50.00 ± 1.00'
    """
    if row is None or row["mean"] is None:
        return "-"
    mean = format(scale * row["mean"], f"{sign}.{digits}f")
    return mean if row["std"] is None else f"{mean} ± {scale * row['std']:.{digits}f}"


def interval(row: Row, scale: float, digits: int) -> str:
    """The 95 % confidence interval of a mean, with signs; - for a single value.

    Example:
      >>> interval({"ci95": (-0.01, 0.025)}, 100, 1)
      '[-1.0, +2.5]'
    """
    if row["ci95"] is None:
        return "-"
    low, high = (format(scale * bound, f"+.{digits}f") for bound in row["ci95"])
    return f"[{low}, {high}]"


def p_value(p: float | None) -> str:
    """A p in four decimals, marked with * where it is below 0.01; - where there is none.

    Example:
      >>> p_value(0.1217), p_value(0.00994), p_value(1e-6)
      ('0.1217', '0.0099*', '<0.0001*')
    """
    if p is None:
        return "-"
    text = "<0.0001" if p < 1e-4 else f"{p:.4f}"
    return text + (_MARK if p < SIGNIFICANT else "")


def _comparisons(settings: Sequence[Row]) -> list[Row | None]:
    return [
        row[quantity]
        for setting in settings
        for row in setting["paired"].values()
        for quantity in QUANTITIES
    ]


def about_p(comparisons: Sequence[Row | None]) -> list[str]:
    """What p is, and what many of them mean, as lines of text.

    Args:
      comparisons: statistics of paired differences; those without a `p` are not counted.

    Returns:
      Two lines; none where no comparison has a p.
    """
    shown = sum(row is not None and row["p"] is not None for row in comparisons)
    if not shown:
        return []
    return [
        f"p: two-sided paired t-test; p < {SIGNIFICANT:g} ({_MARK}) is what we call a difference."
        f" Of {shown} comparison{'s' if shown > 1 else ''}",
        f"here, {SIGNIFICANT * shown:.2g} would be expected to have it by chance alone.",
    ]


def diverged(settings: Mapping[str, Sequence[Row]]) -> str:
    """The runs that diverged, a line each; they are in no statistics.

    Args:
      settings: by name `method`, `seed` and `message` of such runs.

    Returns:
      Lines without a trailing newline.

    Example:
      >>> lost = {"method": "ham", "seed": 0, "message": "the loss is nan at step 22"}
      >>> print(diverged({"rigl": [lost]}))
      diverged: rigl ham seed 0: the loss is nan at step 22
    """
    return "\n".join(
        f"diverged: {name} {run['method']} seed {run['seed']}: {run['message']}"
        for name, runs in settings.items()
        for run in runs
    )


def unfinished(settings: Mapping[str, Row]) -> str:
    """What is not finished, a line each.

    Args:
      settings: by name the numbers of runs that are `finished` and `expected`, the latter None
        where there is no config yet, and `diverged`.

    Returns:
      Lines without a trailing newline.

    Example:
      >>> print(unfinished({"rigl": {"finished": 3, "expected": 10, "diverged": 1}}))
      not finished:
        rigl: 3 of 10 runs (1 diverged)
    """
    lines = ["not finished:"]
    for name, row in settings.items():
        of = (
            "not started"
            if row["expected"] is None
            else f"{row['finished']} of {row['expected']} runs"
        )
        lost = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        lines.append(f"  {name}: {of}{lost}")
    return "\n".join(lines)


def _environment(environment: Mapping[str, Sequence[Any]]) -> list[str]:
    """Where the runs were made, and a warning where not all were made alike."""
    if not environment:
        return []
    changed = ", with uncommitted changes" if True in environment.get("git_dirty", ()) else ""
    jax = dict.fromkeys(str(versions.get("jax")) for versions in environment.get("versions", ()))
    commits = [str(commit)[:10] for commit in environment.get("git_commit", ())]
    words = [
        f"commit {', '.join(commits)}{changed}",
        f"jax {', '.join(jax)}",
        f"device {', '.join(map(str, environment.get('device_kind', ())))}",
    ]
    text = f"Runs of {'; '.join(words)}."
    differing = [name for name, values in environment.items() if len(values) > 1]
    if differing:
        text += f"\nNot the same in all runs: {', '.join(differing)} (see summary.json)."
    return [text]
