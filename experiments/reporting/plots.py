"""The figures of a report: curves with their spread, accuracy against FLOPs, fan-in by neuron.

Every function returns a Matplotlib figure that belongs to no window; `save` writes it.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from experiments.metrics import write_atomically
from experiments.reporting.drawing import LineStyle, Style, drawn, layers, library, plain
from experiments.reporting.seed_statistics import half_width

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure
    import matplotlib.lines
    import matplotlib.ticker

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
    chosen = {}
    for name in dict.fromkeys(names):
        known = STYLES.get(name.split(" - ")[0])
        chosen[name] = next(further) if known is None else known
    return chosen


@drawn
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
    figure, grid = _grid(len(panels))
    look = styles(method for methods in panels.values() for method in methods)
    lies = layers(look)
    note = {
        "std": "line: mean; band: ± 1 standard deviation over seeds",
        "ci95": "line: mean of paired differences; band: 95 % confidence interval (Student's t)",
    }[band]
    cut = False
    for axes, (name, methods) in zip(grid, panels.items(), strict=True):
        if band == "ci95":
            axes.axhline(0, color="#666666", linewidth=0.9, zorder=1)
        limits = []
        for method, (x, values) in methods.items():
            (colour, line), layer = look[method], lies[method]
            mean, spread = values.mean(axis=0), _spread(values, band)
            # A few points are marked: a line between two of them shows nothing in between.
            axes.plot(
                x, mean, ls=line, color=colour, linewidth=layer.width, zorder=layer.zorder,
                marker="o" if len(x) <= 12 else None, markersize=layer.marker,
            )  # fmt: skip
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
        shown = f"{plain(name)} ({_runs(methods)})" if name else _runs(methods)
        axes.set_title(shown, fontsize=8.5)
        axes.xaxis.set_major_locator(library().ticker.MaxNLocator(nbins=5))
        from_zero(axes, (x for x, _ in methods.values()))
    if cut:
        note += "; some of the first points lie beyond the axis"
    _finish(figure, look, title, xlabel, ylabel, note)
    return figure


def _grid(panels: int) -> tuple[matplotlib.figure.Figure, list[matplotlib.axes.Axes]]:
    """A figure with so many panels, in up to four columns, and those panels."""
    if panels == 1:
        figure = library().figure.Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
        grid = [figure.subplots()]
    else:
        columns = min(4, math.ceil(math.sqrt(panels)))
        rows = math.ceil(panels / columns)
        width, height = (4.5, 3.0) if columns == 2 else (3.1, 2.3)
        figure = library().figure.Figure(
            figsize=(width * columns + 0.4, height * rows + 1.0), dpi=130, layout="constrained"
        )
        every = list(figure.subplots(rows, columns, squeeze=False).ravel())
        grid = every[:panels]
        for axes in every[panels:]:
            axes.remove()
    for axes in grid:
        axes.grid(alpha=0.3)
        if panels > 1:
            axes.tick_params(labelsize=7.5)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, grid


def _spread(values: np.ndarray, band: str) -> np.ndarray:
    runs = len(values)
    if runs < 2:
        return np.zeros(values.shape[1])
    spread = values.std(axis=0, ddof=1)
    return half_width(1.0, runs) * spread if band == "ci95" else spread


def from_zero(axes: matplotlib.axes.Axes, xs: Iterable[np.ndarray]) -> None:
    """Has the axis begin at 0 where all points have one x, which says little by itself."""
    distinct = np.unique(np.concatenate(list(xs)))
    if len(distinct) == 1 and distinct[0] > 0:
        axes.set_xlim(0, 1.15 * distinct[0])


def _set_limits(
    axes: matplotlib.axes.Axes,
    limits: Sequence[tuple[float, float, float, float]],
    top: float | None,
) -> bool:
    """Sets the values' axis; returns whether a mean lies beyond it."""
    lows, highs, smallest, largest = zip(*limits, strict=True)
    low, high = min(lows), max(highs)
    margin = 0.08 * (high - low) or 0.5 * abs(high) or 1.0
    bottom, upper = low - margin, high + margin
    if top is not None:
        bottom, upper = max(bottom, 0.0), min(upper, 1.003 * top)
    axes.set_ylim(bottom, upper)
    return min(smallest) < bottom or max(largest) > upper


def _plain_log(axes: matplotlib.axes.Axes) -> None:
    """Numbers such as 0.5 on a logarithmic axis, as many as can be read whatever its range."""
    low, high = axes.dataLim.intervaly
    if high < 1.1 * low:  # no range to speak of
        axes.set_ylim(low / 1.5, 1.5 * high)
    low, high = axes.get_ylim()
    ticker = library().ticker
    locator: matplotlib.ticker.Locator
    if high < 5 * low:
        locator = ticker.MaxNLocator(nbins=5)
    elif high < 50 * low:
        locator = ticker.LogLocator(subs=(1, 2, 3, 5, 7))
    elif high < 1000 * low:
        locator = ticker.LogLocator(subs=(1, 3))
    else:
        locator = ticker.LogLocator(numticks=6)
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


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
    size, inches = 10 if len(figure.axes) == 1 else 8.5, figure.get_figwidth()
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
        figure.suptitle(textwrap.fill(plain(title), int(12 * inches)), fontsize=10)
    line2d, lies = library().lines.Line2D, layers(look)
    handles = [
        line2d([], [], color=colour, ls=line, label=plain(name), linewidth=lies[name].width)
        for name, (colour, line) in look.items()
    ]
    figure.legend(
        handles=handles, loc="outside lower center", frameon=False, fontsize=9,
        ncols=min(len(handles), 5, int(inches / 1.4)), title=textwrap.fill(note, int(15 * inches)),
        title_fontsize=8,
    )  # fmt: skip


@drawn
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
    figure, grid = _grid(len(panels))
    look = styles(method for methods in panels.values() for method in methods)
    lies = layers(look)
    for axes, (name, methods) in zip(grid, panels.items(), strict=True):
        every = [line for lines in methods.values() for line in lines]
        names = dict.fromkeys(point.label for line in every for point in line)
        markers = dict(zip(names, itertools.cycle("os^Dv<>P*X"), strict=False))
        counts = [point.flops for line in every for point in line]
        step = max((max(counts) / min(counts)) ** 0.012, 1.01)
        labels: dict[tuple[str, float], float] = {}
        sparse = [method for method in methods if method != "dense"]
        for method, lines in methods.items():
            (colour, dashes), layer = look[method], lies[method]
            middle = (len(sparse) - 1) / 2
            aside = 1.0 if method == "dense" else step ** (sparse.index(method) - middle)
            for points in lines:
                mean = np.array([point.values.mean() for point in points])
                spread = np.array([_spread(point.values[:, None], "std")[0] for point in points])
                axes.errorbar(
                    [aside * point.flops for point in points], mean, spread, ls=dashes,
                    color=colour, linewidth=layer.width, elinewidth=0.9, capsize=2.5, markersize=4,
                    marker=markers[points[0].label], zorder=layer.zorder,
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
        axes.set_title(plain(name), fontsize=8.5)
    note = "mean at the end ± 1 standard deviation; number: sparsity; equal FLOPs: side by side"
    _finish(figure, look, title, "FLOPs of one training run", ylabel, note)
    return figure


def _flops_axis(axes: matplotlib.axes.Axes) -> None:
    """A few numbers that can be read, whatever the range; and a range with some in it."""
    low, high = axes.get_xlim()
    wider = max(1.0, math.sqrt(4 * low / high))
    axes.set_xlim(low / wider, high * wider)
    subs = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(library().ticker.LogLocator(subs=subs))
    axes.xaxis.set_minor_formatter(library().ticker.NullFormatter())


FanIn = Mapping[str, np.ndarray]
"""Fan-in of every neuron of a layer by the layer's path; more dimensions are flattened."""


@drawn
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
    lies = layers(look, thinnest=1.0)
    columns = min(5, max(1, math.ceil(math.sqrt(len(before)))))
    rows = math.ceil(len(before) / columns)
    figure = library().figure.Figure(
        figsize=(2.5 * columns + 0.5, 1.75 * rows + 1.1), dpi=130, layout="constrained"
    )
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (layer, start) in zip(panels, before.items(), strict=False):
        finish = {method: by_layer[layer] for method, by_layer in after.items()}
        bins = _bins([start, *finish.values()])
        share = _share(start)
        axes.hist(start.ravel(), bins, weights=share, color=_BEFORE)
        for method, values in finish.items():
            colour, line = look[method]
            axes.hist(
                values.ravel(), bins, weights=_share(values), histtype="step",
                color=colour, linestyle=line, linewidth=lies[method].width,
                zorder=lies[method].zorder,
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
        axes.remove()
    note = (
        "active incoming weights of a neuron; % of the layer's neurons, all seeds;"
        " grey: before training, lines: after"
    )
    _finish(figure, look, title, "fan-in", "neurons (%)", note)
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


@drawn
def save(figure: matplotlib.figure.Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG, whole or not at all.

    Args:
      figure: any Matplotlib figure.
      path: the file to write.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format="png", backend="agg")
    write_atomically(path, picture.getvalue())
