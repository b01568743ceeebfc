"""The paper's published numbers: SparseOpt, arXiv 2605.27541 (ICML 2026).

The tables are as printed. What the paper shows in figures alone was read off them, and is marked as
approximate wherever it is shown. All of it is in percent, but for the gradient ratios.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping

SOURCE = "SparseOpt, arXiv 2605.27541 (ICML 2026)"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A published number, in percent.

    Attributes:
      mean: the number, or the mean of several runs.
      std: their standard deviation, or None where none is given.
      approximate: it was read off a figure.
    """

    mean: float
    std: float | None = None
    approximate: bool = False

    def __str__(self) -> str:
        """The number as the paper prints it, e.g. `61.34 ± 0.35`; `~74` if read off a figure."""
        if self.approximate:
            return f"~{self.mean:g}"
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"


Key = tuple[str, float, str, str]
"""Topology, sparsity, what is grown by (gradient or corrected_gradient), and method."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Published numbers of one model on one dataset.

    Attributes:
      model: as `Config.model` names it.
      dataset: as `Config.dataset` names it.
      quantity: what the numbers are.
      epochs: lengths of training.
      cells: numbers in the order of `epochs`.
    """

    model: str
    dataset: str
    quantity: str
    epochs: tuple[int, ...]
    cells: Mapping[Key, tuple[Cell, ...]]

    def cell(self, key: Key, epochs: int) -> Cell | None:
        """The number of one setting and length; None where the paper has none."""
        if key not in self.cells or epochs not in self.epochs:
            return None
        return self.cells[key][self.epochs.index(epochs)]


def _cells(text: str) -> tuple[Cell, ...]:
    """Cells from text, e.g. `"61.34 0.35, 63.12 0.39"`: means, and deviations behind them."""
    numbers = ([float(word) for word in part.split()] for part in text.split(","))
    return tuple(Cell(mean, std[0] if std else None) for mean, *std in numbers)


def _table(
    model: str,
    dataset: str,
    epochs: tuple[int, ...],
    rows: Mapping[tuple[str, float, str], str],
) -> Table:
    cells = {
        (topology, sparsity, "gradient", method): _cells(text)
        for (topology, sparsity, method), text in rows.items()
    }
    return Table(model, dataset, "test accuracy (%)", epochs, types.MappingProxyType(cells))


IMAGENET = _table(
    "resnet50",
    "imagenet2012",
    (90, 180, 270),
    {
        ("rigl", 0.9, "sgd"): "73.88, 74.99, 75.26",
        ("rigl", 0.9, "sparseopt"): "74.41, 75.06, 75.26",
        ("set", 0.9, "sgd"): "73.69, 74.83, 75.17",
        ("set", 0.9, "sparseopt"): "74.15, 74.81, 74.85",
        ("rigl", 0.95, "sgd"): "72.33, 73.36, 73.62",
        ("rigl", 0.95, "sparseopt"): "72.93, 73.62, 73.95",
        ("set", 0.95, "sgd"): "71.84, 73.51, 73.82",
        ("set", 0.95, "sparseopt"): "72.59, 73.75, 73.79",
        ("rigl", 0.97, "sgd"): "69.94, 72.00, 72.35",
        ("rigl", 0.97, "sparseopt"): "71.15, 72.65, 72.66",
        ("set", 0.97, "sgd"): "70.12, 72.17, 72.65",
        ("set", 0.97, "sparseopt"): "71.43, 72.40, 72.73",
    },
)
"""Top-1 test accuracy of ResNet-50 on ImageNet; no spread is given."""

CIFAR100 = _table(
    "resnet20",
    "cifar100",
    (100, 200, 300, 500),
    {
        ("rigl", 0.9, "sgd"): "60.66 0.43, 62.93 0.17, 63.77 0.35, 64.66 0.17",
        ("rigl", 0.9, "sparseopt"): "61.34 0.35, 63.12 0.39, 64.30 0.08, 65.22 0.40",
        ("rigl", 0.95, "sgd"): "55.80 0.73, 59.22 0.55, 60.00 0.54, 61.45 0.65",
        ("rigl", 0.95, "sparseopt"): "56.80 0.49, 59.91 0.45, 60.67 0.63, 61.74 0.35",
        ("rigl", 0.97, "sgd"): "52.53 0.35, 54.87 0.78, 56.50 0.33, 57.32 0.16",
        ("rigl", 0.97, "sparseopt"): "53.95 0.40, 57.01 0.19, 57.62 0.59, 58.35 0.34",
        # The table of HAM, with the same lengths.
        ("rigl", 0.95, "ham"): "56.72 0.40, 58.76 0.60, 60.38 0.23, 61.66 0.26",
        ("rigl", 0.95, "sparseopt_ham"): "57.31 0.54, 60.41 0.28, 60.91 0.45, 62.20 0.38",
    },
)
"""Test accuracy of ResNet-20 on CIFAR-100, mean and standard deviation; how many runs is not said.

The paper's table is of RigL alone.
"""

ITOP = Table(
    "resnet50",
    "imagenet2012",
    "ITOP rate R_m (%)",
    (270,),
    types.MappingProxyType(
        {
            ("rigl", sparsity, grow_by, method): (Cell(value, approximate=True),)
            for (grow_by, method), values in {
                ("gradient", "sgd"): (74, 54, 40),
                ("gradient", "sparseopt"): (75, 56, 43),
                ("corrected_gradient", "sparseopt"): (61, 39.5, 27),
            }.items()
            for sparsity, value in zip((0.9, 0.95, 0.97), values, strict=True)
        }
    ),
)
"""The ITOP rate after 270 epochs, read off a figure."""

GRADIENT_RATIO: Mapping[float, float] = types.MappingProxyType({0.5: 1.53, 0.9: 3.55})
"""Gradient, sparse over dense, by sparsity, with batch normalisation; two-layer MLP on MNIST.

Read off a figure; 1 / sqrt(1 - sparsity) is 1.41 and 3.16 there.
"""

GRADIENT_RATIO_WITHOUT_NORM = (1.00, 1.08)
"""The lowest and highest ratio without normalisation, for sparsities from 0 to 0.9."""

TRAIN_ACCURACY: Mapping[str, tuple[Cell, ...]] = types.MappingProxyType(
    {
        "sgd": tuple(Cell(value, approximate=True) for value in (69, 72.5, 74)),
        "sparseopt": tuple(Cell(value, approximate=True) for value in (74.5, 77.5, 79)),
    }
)
"""Training accuracy of ResNet-50 at 0.97 on ImageNet after 90, 180 and 270 epochs, off curves."""
