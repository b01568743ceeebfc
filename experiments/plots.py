"""The pictures of a grid of runs: accuracy against epochs, and fan-in before and after training."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence

import matplotlib.figure
import matplotlib.lines
import matplotlib.ticker
import numpy as np

from experiments.metrics import write_atomically

# Colours that stay apart for colour-blind readers (M. Okabe and K. Ito, 2008), and a line style
# of each method's own for prints without colour.
STYLES: dict[str, tuple[str, str]] = {
    "dense": ("#000000", ":"),
    "sgd": ("#D55E00", "--"),
    "sparseopt": ("#0072B2", "-"),
}
_OTHER = ("#009E73", "-.")
_BEFORE = "#BBBBBB"

Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""By method: epochs (evaluations,), and accuracies in [0, 1] (runs, evaluations)."""


def accuracy(curves: Curves, title: str, path: str | os.PathLike[str]) -> None:
    """Draws test accuracy against epochs: the mean over runs, and its standard deviation as a band.

    Args:
      curves: epochs (evaluations,) and accuracies (runs, evaluations) of each method.
      title: what was trained.
      path: the PNG to write.
    """
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    low, high, lowest = 100.0, 0.0, 100.0
    for method, (epochs, accuracies) in curves.items():
        color, line = STYLES.get(method, _OTHER)
        mean = 100 * accuracies.mean(axis=0)
        runs = len(accuracies)
        label = f"{method} (n = {runs})"
        axes.plot(epochs, mean, line, color=color, label=label, linewidth=1.8)
        spread = 100 * accuracies.std(axis=0, ddof=1) if runs > 1 else np.zeros_like(mean)
        axes.fill_between(
            epochs, mean - spread, np.minimum(mean + spread, 100), color=color, alpha=0.18, lw=0
        )
        # The first third climbs from chance; the axis is chosen for what comes after it.
        late = epochs >= epochs[-1] / 3
        low = min(low, float((mean - spread)[late].min()))
        high = max(high, float((mean + spread)[late].max()))
        lowest = min(lowest, float(mean.min()))
    margin = max(0.08 * (high - low), 0.5)
    bottom = max(low - margin, 0.0)
    axes.set_ylim(bottom, min(high + margin, 100.3))
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    note = "line: mean; band: ± 1 standard deviation over seeds"
    if lowest < bottom:
        note += "; the first epochs lie below the axis"
    figure.legend(
        loc="outside lower center", ncols=len(curves), frameon=False, fontsize=9,
        title=note, title_fontsize=8,
    )  # fmt: skip
    _save(figure, path)


FanIn = Mapping[str, np.ndarray]
"""Fan-in of every neuron of a layer by the layer's path; more dimensions are flattened."""


def fan_in(
    before: FanIn,
    after: Mapping[str, FanIn],
    sizes: Mapping[str, int],
    title: str,
    path: str | os.PathLike[str],
) -> None:
    """Draws, for every layer, how many active incoming weights its neurons have.

    Args:
      before: fan-in before training, by layer, in the order to draw.
      after: the same after training, by method.
      sizes: dense fan-in by layer.
      title: what was trained.
      path: the PNG to write.
    """
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
            color, line = STYLES.get(method, _OTHER)
            axes.hist(
                values.ravel(), bins, weights=_share(values), histtype="step",
                color=color, linestyle=line, linewidth=1.3,
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
        color, line = STYLES.get(method, _OTHER)
        label = f"after, {method}"
        handles.append(matplotlib.lines.Line2D([], [], color=color, ls=line, label=label))
    figure.suptitle(title, fontsize=11, x=0.01, horizontalalignment="left")
    figure.supxlabel("fan-in: active incoming weights of a neuron", fontsize=9)
    figure.supylabel("neurons (% of the layer, all seeds)", fontsize=9)
    figure.legend(
        handles=handles, loc="outside upper right", ncols=len(handles), fontsize=8, frameon=False
    )
    _save(figure, path)


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


def _save(figure: matplotlib.figure.Figure, path: str | os.PathLike[str]) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(path, picture.getvalue())
