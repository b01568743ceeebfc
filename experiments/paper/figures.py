"""The figures of the paper, with our numbers beside the paper's.

Rows are those of `side_by_side`. Every function returns a Matplotlib figure that belongs to no
window; `plots.save` writes it.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.paper import reported
from experiments.paper.side_by_side import label, our_length
from experiments.reporting import plots
from experiments.reporting.drawing import Layer, Style, drawn, layers, library
from experiments.reporting.seed_statistics import half_width

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure
    import matplotlib.lines

Row = Mapping[str, Any]

_PAPER = "the paper's"


@drawn
def budgets(
    rows: Sequence[Row], quantity: str, title: str, same_task: bool
) -> matplotlib.figure.Figure:
    """A quantity at the end of training against its length: a panel a topology and sparsity.

    Args:
      rows: as `side_by_side.rows_of` makes them.
      quantity: name and unit.
      title: what was trained.
      same_task: ours and the paper's go into one panel; else the paper's are in a row of their own.

    Returns:
      The figure: mean and standard deviation over seeds; the paper's numbers hollow.
    """
    panels = list(
        dict.fromkeys((r["topology"], r["sparsity"]) for r in rows if r["method"] != "dense")
    ) or [(rows[0]["topology"], rows[0]["sparsity"])]
    styles = _styles(rows)
    lies = layers(styles)
    shown = [
        side
        for side in ("ours", "paper")
        if any(row[side] is not None for row in rows) or side == "ours"
    ]
    apart = not same_task and len(shown) == 2
    lines = 2 if apart else 1
    figure, grid = _panels(lines, len(panels), width=3.1, height=2.9)
    for column, (topology, sparsity) in enumerate(panels):
        of_panel = [
            row
            for row in rows
            if row["method"] == "dense"
            or (row["topology"], row["sparsity"]) == (topology, sparsity)
        ]
        for side in shown:
            axes = grid[1 if apart and side == "paper" else 0][column]
            for i, (name, style) in enumerate(styles.items()):
                # Side by side, or error bars would lie on one another.
                shift = 1.012 ** (i - (len(styles) - 1) / 2)
                of_arm = [row for row in of_panel if _arm(row) == name]
                _line(axes, of_arm, side, style, lies[name], shift)
        for row, axes in enumerate(line[column] for line in grid):
            whose = f"{_PAPER}: " if row else "ours: " if apart else ""
            name = label(dict(of_panel[-1], variant="", method="sparse")).removesuffix(" sparse")
            axes.set_title(f"{whose}{name}", fontsize=9)
            sides = [shown[row]] if apart else shown
            _epoch_axis(axes, [r for r in of_panel if any(r[side] for side in sides)], sides)
            axes.set_xlabel("epochs of training")
    for line in grid:
        line[0].set_ylabel(quantity)
    handles = [_handle(name, style, lies[name].width) for name, style in styles.items()]
    note = "mean ± 1 standard deviation over seeds"
    if "paper" in shown:
        note += "; hollow: the paper's numbers" + (", of another task" if apart else "")
    return _finish(figure, title, handles, note)


def _arm(row: Row) -> str:
    return " ".join(filter(None, (row["variant"], row["method"])))


def _styles(rows: Sequence[Row]) -> dict[str, Style]:
    """A style for each variant and method: the method's own for the first variant."""
    arms = {_arm(row): row for row in rows}
    first = {row["method"] for row in rows if row["variant"] == rows[0]["variant"]}
    taken = {plots.STYLES[method][0] for method in first}
    further = itertools.cycle(color for color in plots.COLOURS.values() if color not in taken)
    styles = {}
    for name, row in arms.items():
        color, line = plots.STYLES[row["method"]]
        styles[name] = (color if row["variant"] == rows[0]["variant"] else next(further), line)
    return styles


def _line(
    axes: matplotlib.axes.Axes,
    rows: Sequence[Row],
    side: str,
    style: Style,
    layer: Layer,
    shift: float,
) -> None:
    points = sorted((row["epochs"], row[side]["mean"], row[side]["std"] or 0.0)
                   for row in rows if row[side] is not None)  # fmt: skip
    if not points:
        return
    epochs, means, spreads = (np.array(column) for column in zip(*points, strict=True))
    hollow = side == "paper"
    axes.errorbar(
        shift * epochs, means, spreads, color=style[0], linestyle=style[1], marker="o",
        markersize=layer.marker, capsize=3, linewidth=layer.width, elinewidth=1.3,
        zorder=layer.zorder, markerfacecolor="white" if hollow else style[0],
        alpha=0.75 if hollow else 1.0,
    )  # fmt: skip


def _epoch_axis(axes: matplotlib.axes.Axes, rows: Sequence[Row], sides: Sequence[str]) -> None:
    """Ticks where there are numbers; a logarithmic scale, since lengths double."""
    axes.grid(alpha=0.3)
    if not rows:
        return
    names = {row["epochs"]: str(row["epochs"]) for row in rows}
    if "ours" in sides:
        cut = {row["epochs"]: row["cut_to"] for row in rows if row["cut_to"] is not None}
        names |= {epochs: f"{epochs}, cut to\n{steps} steps" for epochs, steps in cut.items()}
    ticks = sorted(names)
    axes.set_xscale("log")
    axes.set_xlim(ticks[0] / 1.15, ticks[-1] * 1.15)
    axes.set_xticks(ticks, [names[epochs] for epochs in ticks])
    axes.xaxis.set_minor_locator(library().ticker.NullLocator())


@drawn
def bars(
    rows: Sequence[Row], quantity: str, title: str, published: reported.Table | None
) -> matplotlib.figure.Figure:
    """A quantity by sparsity, a bar for each variant and method; the paper's are hatched.

    Args:
      rows: as `side_by_side.rows_of` makes them.
      quantity: name and unit.
      title: what was trained.
      published: the paper's table that the rows have numbers of, if they have.

    Returns:
      The figure.
    """
    lengths = {row["epochs"]: our_length(row) for row in rows if row["ours"] is not None}
    lengths = dict(sorted((lengths or {row["epochs"]: our_length(row) for row in rows}).items()))
    sparsities, styles = sorted({row["sparsity"] for row in rows}), _styles(rows)
    papers = [row["paper"] for row in rows if row["paper"] is not None]
    sides = ("ours", "paper") if papers else ("ours",)
    figure, grid = _panels(1, len(lengths), width=2.2 + 1.3 * len(sparsities), height=3.6)
    width = 0.85 / (len(styles) * len(sides))
    for axes, epochs in zip(grid[0], lengths, strict=True):
        for i, (name, style) in enumerate(styles.items()):
            for j, side in enumerate(sides):
                numbers = {
                    row["sparsity"]: row[side]
                    for row in rows
                    if _arm(row) == name
                    and row[side] is not None
                    and (row["epochs"] == epochs or side == "paper")
                }
                for sparsity, number in numbers.items():
                    x = sparsities.index(sparsity) + (i * len(sides) + j + 0.5) * width - 0.425
                    axes.bar(
                        x, number["mean"], width, yerr=number["std"], capsize=2,
                        color="white" if side == "paper" else style[0], edgecolor=style[0],
                        hatch="///" if side == "paper" else None,
                    )  # fmt: skip
        axes.set_xticks(range(len(sparsities)), [f"{sparsity:g}" for sparsity in sparsities])
        axes.set_xlabel("sparsity")
        axes.set_title(f"ours after {lengths[epochs]}", fontsize=9)
        axes.grid(axis="y", alpha=0.3)
    grid[0][0].set_ylabel(quantity)
    handles = [_handle(name, (style[0], "-"), width=6) for name, style in styles.items()]
    note = "ours: mean ± 1 standard deviation over seeds"
    if papers and published is not None:
        there = "/".join(map(str, published.epochs))
        note += f"; hatched: {_PAPER}, {published.model} on {published.dataset} after"
        note += f" {there} epochs" + (
            ", off a figure" if any(cell["approximate"] for cell in papers) else ""
        )
    return _finish(figure, title, handles, note)


@drawn
def sharpness(curves: Sequence[Row], title: str) -> matplotlib.figure.Figure:
    """The Hessian's top eigenvalue against epochs, beside 2 / learning rate; a panel a setting.

    Args:
      curves: as `side_by_side.curves_of` makes them; at least one.
      title: what was trained.

    Returns:
      The figure: mean and standard deviation over seeds.
    """
    settings = list(dict.fromkeys(row["setting"] for row in curves))
    styles = plots.styles(list(dict.fromkeys(row["method"] for row in curves)))
    lies = layers(styles)
    figure, grid = _panels(1, len(settings), width=5.2, height=3.8)
    for axes, setting in zip(grid[0], settings, strict=True):
        of_setting = [row for row in curves if row["setting"] == setting]
        highest = 0.0
        for method, (color, line) in styles.items():
            rows = sorted(
                (row for row in of_setting if row["method"] == method), key=lambda r: r["epoch"]
            )
            epochs = np.array([row["epoch"] for row in rows])
            means = np.array([row["ours"]["mean"] for row in rows])
            spread = np.array([row["ours"]["std"] or 0.0 for row in rows])
            axes.plot(
                epochs, means, color=color, linestyle=line, marker="o",
                linewidth=lies[method].width, markersize=lies[method].marker,
                zorder=lies[method].zorder,
            )  # fmt: skip
            axes.fill_between(epochs, means - spread, means + spread, color=color, alpha=0.18, lw=0)
            highest = max([highest, *(means + spread)])
        limits = dict(sorted((row["epoch"], row["two_over_rate"]) for row in of_setting))
        axes.plot(list(limits), list(limits.values()), color="#777777", linewidth=1.2)
        # The learning rate falls to 0, so its curve leaves any axis at the end.
        axes.set_ylim(0, 1.1 * max(highest, min(limits.values())))
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(library().ticker.MaxNLocator(integer=True))
        plots.from_zero(axes, [np.array(list(limits))])
        axes.set_title(setting, fontsize=9)
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("top eigenvalue of the Hessian")
    handles = [_handle(name, style, lies[name].width) for name, style in styles.items()]
    handles.append(_handle("2 / learning rate", ("#777777", "-")))
    return _finish(figure, title, handles, "line: mean; band: ± 1 standard deviation over seeds")


@drawn
def forest(differences: Sequence[Row], quantity: str, title: str) -> matplotlib.figure.Figure:
    """Paired differences of all settings, one below the other, with 95 % confidence intervals.

    Args:
      differences: as `side_by_side.differences_of` makes them.
      quantity: name and unit of the differences.
      title: what was trained.

    Returns:
      The figure; every seed is a dot, the mean a diamond.
    """
    rows = [row for row in differences if row["ours"] is not None]
    pairs = [f"{row['of'][1]} - {row['minus'][1]}" for row in rows]
    alike = len(set(pairs)) == 1
    names = [row["setting"] for row in rows]
    if not alike:
        names = [f"{name}: {pair}" for name, pair in zip(names, pairs, strict=True)]
    height = 1.6 + 0.28 * len(rows)
    figure = library().figure.Figure(figsize=(7, height), dpi=150, layout="constrained")
    axes = figure.subplots()
    look = plots.styles(pairs)
    for y, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        ours, color = row["ours"], look[pair][0]
        dots = ours["differences"]
        axes.plot(dots, [y] * len(dots), "o", color=color, alpha=0.35, markersize=3)
        half = 0.0 if ours["std"] is None else half_width(ours["std"], ours["n"])
        axes.errorbar(
            ours["mean"], y, xerr=half, marker="D", markersize=4.5, capsize=3, color=color
        )
    axes.axvline(0, color="#777777", linewidth=1)
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"{pairs[0] if alike else 'difference'}: {quantity}")
    axes.grid(axis="x", alpha=0.3)
    note = "diamond: mean and its 95 % confidence interval; dots: single seeds"
    return _finish(figure, title, [], note)


def _panels(
    lines: int, columns: int, width: float, height: float
) -> tuple[matplotlib.figure.Figure, list[list[matplotlib.axes.Axes]]]:
    size = max(width * columns, 5.0) + 0.4, height * lines + 1.0
    figure = library().figure.Figure(figsize=size, dpi=150, layout="constrained")
    return figure, figure.subplots(lines, columns, squeeze=False).tolist()


def _handle(name: str, style: Style, width: float = 1.5) -> matplotlib.lines.Line2D:
    line: Any = style[1]
    return library().lines.Line2D(
        [], [], color=style[0], linestyle=line, linewidth=width, label=name
    )


def _finish(
    figure: matplotlib.figure.Figure,
    title: str,
    handles: Sequence[matplotlib.lines.Line2D],
    note: str,
) -> matplotlib.figure.Figure:
    figure.suptitle(textwrap.fill(title, int(12 * figure.get_figwidth())), fontsize=10)
    columns = max(1, min(len(handles), math.floor(figure.get_figwidth() / 1.6)))
    figure.legend(
        handles=list(handles), loc="outside lower center", ncols=columns, frameon=False,
        fontsize=8, title=textwrap.fill(note, int(15 * figure.get_figwidth())), title_fontsize=8,
    )  # fmt: skip
    return figure
