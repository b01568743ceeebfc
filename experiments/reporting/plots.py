"""The figures of a report: curves with their spread, accuracy against FLOPs, fan-in by neuron.

Every function returns a Matplotlib figure that belongs to no window; `save` writes it.
"""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.axes
import matplotlib.figure
import matplotlib.lines
import matplotlib.ticker
import numpy as np

from experiments.metrics import write_atomically
from experiments.reporting.seed_statistics import half_width

LineStyle = str | tuple[int, tuple[int, ...]]
"""A line style as Matplotlib takes it: its name, or an offset and lengths of dashes and gaps."""

Style = tuple[str, LineStyle]
"""A colour and a line style."""

COLOURS = {
    "purple": "#CC79A7", "sky": "#56B4E9", "black": "#000000", "vermilion": "#D55E00",
    "blue": "#0072B2", "green": "#009E73", "orange": "#E69F00",
}  # fmt: skip
"""Colours that stay apart for colour-blind readers (M. Okabe and K. Ito, 2008)."""

# A line style of each method's own, for prints without colour.
STYLES: dict[str, Style] = {
    "dense": (COLOURS["black"], ":"),
    "sgd": (COLOURS["vermilion"], "--"),
    "sparseopt": (COLOURS["blue"], "-"),
    "ham": (COLOURS["orange"], "-."),
    "sparseopt_ham": (COLOURS["green"], (0, (5, 1, 1, 1, 1, 1))),
}
"""Colour and line style by method."""

_FURTHER_LINES: tuple[LineStyle, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_BEFORE = "#BBBBBB"

MOST_PANELS = 12
"""Panels that one figure can take and still be read."""


class Curve(NamedTuple):
    """A quantity against something that grows: x (points,), values (runs, points)."""

    x: np.ndarray
    values: np.ndarray


class Point(NamedTuple):
    """The end of some runs: FLOPs of one of them, what they reached (runs,), a label or none."""

    flops: float
    values: np.ndarray
    label: str


def styles(names: Iterable[str]) -> dict[str, Style]:
    """A colour and a line style for each name, all different for up to thirty new ones.

    Args:
      names: methods, or anything else; those in `STYLES` keep theirs, and a difference "A - B" has
        that of A.

    Returns:
      By name, in the order of `names`.

    Example:
      >>> styles(["sgd", "batch norm", "layer norm"])["sgd"] == STYLES["sgd"]
      True
    """
    taken = set(STYLES.values())
    steps = range(len(COLOURS) * len(_FURTHER_LINES))
    colours, lines = itertools.cycle(COLOURS.values()), itertools.cycle(_FURTHER_LINES)
    # 7 colours and 5 lines have no common divisor: all 35 pairs come before one comes again.
    pairs = [(next(colours), next(lines)) for _ in steps]
    further = itertools.cycle([pair for pair in pairs if pair not in taken])
    found = {}
    for name in dict.fromkeys(names):
        known = STYLES.get(name.split(" - ")[0])
        found[name] = next(further) if known is None else known
    return found


def curves(
    panels: Mapping[str, Mapping[str, Curve]],
    ylabel: str,
    title: str = "",
    *,
    band: str = "std",
    xlabel: str = "epoch",
    log: bool = False,
    top: float | None = None,
) -> matplotlib.figure.Figure:
    """Draws one panel for each setting, and in it a line with a band for each method.

    Args:
      panels: curves by method, by the panel's title.
      ylabel: what the values are.
      title: of the whole figure; needed where there are several panels.
      band: "std", the sample standard deviation over runs, or "ci95", the 95 % confidence interval
        of the mean (Student's t) with a line at 0, for differences.
      xlabel: what x is.
      log: whether the values' axis is logarithmic.
      top: the largest value that is possible, where there is one.

    Returns:
      The figure, with one legend for all panels.
    """
    figure, drawn = _grid(len(panels))
    look = styles(method for methods in panels.values() for method in methods)
    note = {
        "std": "line: mean; band: ± 1 standard deviation over seeds",
        "ci95": "line: mean of paired differences; band: 95 % confidence interval (Student's t)",
    }[band]
    cut = False
    for axes, (name, methods) in zip(drawn, panels.items(), strict=True):
        if band == "ci95":
            axes.axhline(0, color="#666666", linewidth=0.9, zorder=1)
        limits = []
        for method, (x, values) in methods.items():
            colour, line = look[method]
            mean, spread = values.mean(axis=0), _spread(values, band)
            axes.plot(x, mean, ls=line, color=colour, linewidth=1.6, **_marker(x))
            high = mean + spread if top is None else np.minimum(mean + spread, top)
            # A logarithmic axis has no room for a band that reaches 0.
            low = mean - spread if not log else np.maximum(mean - spread, mean / 10)
            axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
            if len(x) == 1:  # a band of no width
                axes.vlines(x, low, high, color=colour, alpha=0.5)
            # Accuracy climbs from chance in the first third; its axis shows what comes after.
            late = x >= x[-1] / 3 if top is not None else x <= x[-1]
            limits.append((low[late].min(), high[late].max(), np.min(mean), np.max(mean)))
        if log:
            axes.set_yscale("log")
            _plain_log(axes)
        else:
            cut |= _set_limits(axes, limits, top)
        axes.set_title(f"{name} ({_runs(methods)})" if name else _runs(methods), fontsize=8.5)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=5))
    if cut:
        note += "; some of the first points lie beyond the axis"
    _finish(figure, look, title, xlabel, ylabel, note)
    return figure


def _grid(panels: int) -> tuple[matplotlib.figure.Figure, list[matplotlib.axes.Axes]]:
    """A figure with so many panels, in up to four columns, and those panels."""
    if panels == 1:
        figure = matplotlib.figure.Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
        drawn = [figure.subplots()]
    else:
        columns = min(4, math.ceil(math.sqrt(panels)))
        rows = math.ceil(panels / columns)
        width, height = (4.5, 3.0) if columns == 2 else (3.1, 2.3)
        figure = matplotlib.figure.Figure(
            figsize=(width * columns + 0.4, height * rows + 1.0), dpi=130, layout="constrained"
        )
        every = list(figure.subplots(rows, columns, squeeze=False).ravel())
        drawn = every[:panels]
        for axes in every[panels:]:
            axes.remove()
    for axes in drawn:
        axes.grid(alpha=0.3)
        if panels > 1:
            axes.tick_params(labelsize=7.5)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, drawn


def _spread(values: np.ndarray, band: str) -> np.ndarray:
    runs = len(values)
    if runs < 2:
        return np.zeros(values.shape[1])
    spread = values.std(axis=0, ddof=1)
    return half_width(1.0, runs) * spread if band == "ci95" else spread


def _marker(x: np.ndarray) -> dict[str, Any]:
    """A few points are marked: a line between two of them shows nothing in between."""
    return {"marker": "o", "markersize": 3} if len(x) <= 12 else {}


def _set_limits(
    axes: matplotlib.axes.Axes,
    limits: Sequence[tuple[float, float, float, float]],
    top: float | None,
) -> bool:
    """Sets the values' axis; returns whether a mean lies beyond it."""
    lows, highs, smallest, largest = zip(*limits, strict=True)
    low, high = min(lows), max(highs)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    bottom, upper = low - margin, high + margin
    if top is not None:
        bottom, upper = max(bottom, 0.0), min(upper, 1.003 * top)
    axes.set_ylim(bottom, upper)
    return min(smallest) < bottom or max(largest) > upper


def _plain_log(axes: matplotlib.axes.Axes) -> None:
    """Numbers such as 0.5 on a logarithmic axis, as many as can be read whatever its range."""
    low, high = axes.get_ylim()
    locator: matplotlib.ticker.Locator
    if high < 5 * low:
        locator = matplotlib.ticker.MaxNLocator(nbins=5)
    elif high < 50 * low:
        locator = matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5, 7))
    elif high < 1000 * low:
        locator = matplotlib.ticker.LogLocator(subs=(1, 3))
    else:
        locator = matplotlib.ticker.LogLocator(numticks=6)
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def _runs(methods: Mapping[str, Curve]) -> str:
    counts = dict.fromkeys(str(len(curve.values)) for curve in methods.values())
    if len(counts) > 1:
        counts = dict.fromkeys(f"{len(curve.values)} {m}" for m, curve in methods.items())
    return f"n = {', '.join(counts)}"


def _finish(
    figure: matplotlib.figure.Figure,
    look: Mapping[str, Style],
    title: str,
    xlabel: str,
    ylabel: str,
    note: str,
) -> None:
    size = 10 if len(figure.axes) == 1 else 8.5
    # Labels of the whole figure would lie under its legend.
    lowest: dict[int, matplotlib.axes.Axes] = {}
    for axes in figure.axes:
        place = axes.get_subplotspec()
        if place is not None:
            lowest[place.colspan.start] = axes
            if place.is_first_col():
                axes.set_ylabel(ylabel, fontsize=size)
    for axes in lowest.values():
        axes.set_xlabel(xlabel, fontsize=size)
    if title:
        figure.suptitle(title, fontsize=10)
    handles = [
        matplotlib.lines.Line2D([], [], color=colour, ls=line, label=name, linewidth=1.6)
        for name, (colour, line) in look.items()
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False,
        fontsize=9, title=note, title_fontsize=8,
    )  # fmt: skip


def flops(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[Point]]]], ylabel: str, title: str = ""
) -> matplotlib.figure.Figure:
    """Draws what runs reached against the FLOPs of their training, on a logarithmic axis.

    Args:
      panels: by the panel's title and method: lines, each of the points that it joins, from the
        fewest FLOPs on.
      ylabel: what was reached.
      title: of the whole figure.

    Returns:
      The figure. A point is the mean over runs with its standard deviation. Each label has a marker
      of its own, and stands once below the first points of the lines that share it.
    """
    figure, drawn = _grid(len(panels))
    look = styles(method for methods in panels.values() for method in methods)
    for axes, (name, methods) in zip(drawn, panels.items(), strict=True):
        every = [line for lines in methods.values() for line in lines]
        names = dict.fromkeys(point.label for line in every for point in line)
        markers = dict(zip(names, itertools.cycle("os^Dv<>P*X"), strict=False))
        counts = [point.flops for line in every for point in line]
        step = max((max(counts) / min(counts)) ** 0.012, 1.01)
        labels: dict[tuple[str, float], float] = {}
        sparse = [method for method in methods if method != "dense"]
        for method, lines in methods.items():
            colour, dashes = look[method]
            middle = (len(sparse) - 1) / 2
            aside = 1.0 if method == "dense" else step ** (sparse.index(method) - middle)
            for points in lines:
                mean = np.array([point.values.mean() for point in points])
                spread = np.array([_spread(point.values[:, None], "std")[0] for point in points])
                axes.errorbar(
                    [aside * point.flops for point in points], mean, spread, ls=dashes,
                    color=colour, linewidth=1.2, elinewidth=0.9, capsize=2.5, markersize=4,
                    marker=markers[points[0].label],
                )  # fmt: skip
                key = points[0].label, points[0].flops
                labels[key] = min(labels.get(key, math.inf), float(mean[0] - spread[0]))
        for (label, x), low in labels.items():
            axes.annotate(
                label, (x, low), xytext=(0, -3), textcoords="offset points",
                ha="center", va="top", fontsize=7.5, color="#444444",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.margins(x=0.12, y=0.14)
        _flops_axis(axes)
        axes.set_title(name, fontsize=8.5)
    note = "mean at the end ± 1 standard deviation; number: sparsity; equal FLOPs: side by side"
    _finish(figure, look, title, "FLOPs of one training run", ylabel, note)
    return figure


def _flops_axis(axes: matplotlib.axes.Axes) -> None:
    """A few numbers that can be read, whatever the range; and a range with some in it."""
    low, high = axes.get_xlim()
    wider = max(1.0, math.sqrt(4 * low / high))
    axes.set_xlim(low / wider, high * wider)
    subs = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


FanIn = Mapping[str, np.ndarray]
"""Fan-in of every neuron of a layer by the layer's path; more dimensions are flattened."""


def fan_in(
    before: FanIn,
    after: Mapping[str, FanIn],
    sizes: Mapping[str, int],
    title: str,
) -> matplotlib.figure.Figure:
    """Draws, for every layer, how many active incoming weights its neurons have.

    Args:
      before: fan-in before training, by layer, in the order to draw.
      after: the same after training, by method.
      sizes: dense fan-in by layer.
      title: what was trained.

    Returns:
      The figure, with a panel for each layer.
    """
    look = styles(after)
    columns = min(5, max(1, math.ceil(math.sqrt(len(before)))))
    rows = math.ceil(len(before) / columns)
    figure = matplotlib.figure.Figure(
        figsize=(2.5 * columns + 0.5, 1.75 * rows + 1.1), dpi=130, layout="constrained"
    )
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (layer, start) in zip(panels, before.items(), strict=False):
        finish = {method: layers[layer] for method, layers in after.items()}
        bins = _bins([start, *finish.values()])
        share = _share(start)
        axes.hist(start.ravel(), bins, weights=share, color=_BEFORE)
        for method, values in finish.items():
            colour, line = look[method]
            axes.hist(
                values.ravel(), bins, weights=_share(values), histtype="step",
                color=colour, linestyle=line, linewidth=1.3,
            )  # fmt: skip
        name = layer.removesuffix("/kernel")
        axes.set_title(
            f"{name}\n{start.shape[-1]} neurons, dense fan-in {sizes[layer]}", fontsize=7.5
        )
        axes.tick_params(labelsize=7)
        axes.locator_params(axis="x", integer=True, nbins=5)
        axes.locator_params(axis="y", nbins=3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for axes in panels[len(before) :]:
        axes.set_visible(False)
    handles: list[matplotlib.lines.Line2D] = [
        matplotlib.lines.Line2D([], [], color=_BEFORE, linewidth=7, label="before training")
    ]
    for method in after:
        colour, line = look[method]
        label = f"after, {method}"
        handles.append(matplotlib.lines.Line2D([], [], color=colour, ls=line, label=label))
    figure.suptitle(title, fontsize=11, x=0.01, horizontalalignment="left")
    figure.supxlabel("fan-in: active incoming weights of a neuron", fontsize=9)
    figure.supylabel("neurons (% of the layer, all seeds)", fontsize=9)
    figure.legend(
        handles=handles, loc="outside upper right", ncols=len(handles), fontsize=8, frameon=False
    )
    return figure


def _share(values: np.ndarray) -> np.ndarray:
    return np.full(values.size, 100 / values.size)


def _bins(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Edges between whole numbers, the same number of them in every bin, at most 15 bins."""
    low = min(int(values.min()) for values in groups)
    high = max(int(values.max()) for values in groups)
    width = max(1, math.ceil((high - low + 1) / 15))
    if high - low < 4:  # a bar must not look as wide as its panel
        low, high = max(low - 2, 0), high + 2
    return np.arange(low - 0.5, high + width + 0.5, width)


def save(figure: matplotlib.figure.Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG, whole or not at all.

    Args:
      figure: any Matplotlib figure.
      path: the file to write.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(path, picture.getvalue())
