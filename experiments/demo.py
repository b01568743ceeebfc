"""The demo: trains the digits, then shows what the library did: `python -m experiments.demo`.

It takes the arguments of `experiments.train`, and trains `configs/digits.py` unless another config
is named. Below the table of accuracies comes what needs no luck with seeds: the gradients that
SparseOpt corrects (`mechanism`), the weights and FLOPs that are left of each layer, and what a
file of them takes.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from experiments import data, distributed, export, mechanism, metrics, train
from experiments.config import Config
from experiments.functions import model_functions
from experiments.reporting import plots
from experiments.reporting.finished_runs import load_runs, task
from experiments.terminal import tolerant_output
from sparseopt_jax.model_flops import ModelFLOPs

_CONFIG = pathlib.Path(__file__).parent / "configs" / "digits.py"
_HEADER = (
    "layers", "kernel", "weights", "kept", "density", "fan-in", "MFLOPs", "sparse", "of dense",
)  # fmt: skip
_SUFFIX = "/kernel"


def ending(config: Config, folder: pathlib.Path, dataset: data.Data) -> str:
    """Measures and draws the mechanism.

    Args:
      config: what was trained; with a sparse method.
      folder: its work folder, where `mechanism.png` and `mechanism.json` go.
      dataset: what it was trained on.

    Returns:
      The mechanism's slopes, the table of layers of the last sparse run, the size of its compact
      file beside the dense one, and what was written; without a sparse method that there is none.
    """
    if all(config.for_method(method).topology == "dense" for method in config.methods()):
        return "No method is sparse: there are no masks, and nothing to correct."
    seeds = mechanism.measure(config, dataset)
    if not distributed.is_main():
        return ""
    runs = load_runs(folder)
    picture, numbers = folder / "mechanism.png", folder / "mechanism.json"
    slopes = mechanism.slopes(seeds)
    plots.save(
        mechanism.figure(seeds, f"{task(runs)}: gradients by fan-in, before the first step"),
        picture,
    )
    metrics.write_json(numbers, slopes)
    neurons = sum(layer.fan_in.size for layer in seeds[0])
    sparse = [run for run in runs if run.fan_in][-1]
    model = model_functions(config, dataset)
    shapes = {path: leaf.shape for path, leaf in metrics.path_leaves(model.weights[0]).items()}
    fan_ins = {path: sparse.fan_in[f"after/{path}"] for path in model.layers}
    active = sorted((path, fan_in.sum().item()) for path, fan_in in fan_ins.items())
    method, seed = sparse.result["method"], sparse.result["seed"]
    run = folder / "runs" / f"{method}-seed{seed}"
    return "\n\n".join(
        [
            mechanism.table(slopes, neurons, len(seeds[0])),
            f"Weights after training, and FLOPs of one image's forward pass: {method} seed {seed}\n"
            + layer_table(fan_ins, shapes, model.count_forward(tuple(active))),
            export.export(run, folder / "model.compact"),
            f"{picture}\n{numbers}",
        ]
    )


def layer_table(
    fan_ins: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[int]], count: ModelFLOPs
) -> str:
    """Weights and FLOPs by layer; layers of one shape and stage share a row.

    Args:
      fan_ins: of the neurons of each layer, by the path of its kernel.
      shapes: of the kernels, (..., neurons).
      count: FLOPs with the masks, by the same paths.

    Returns:
      Lines of at most 100 columns for paths of usual length. FLOPs of everything but matrix
      products and convolutions have a row of their own.

    Example:
      >>> from sparseopt_jax.model_flops import LayerFLOPs
      >>> count = ModelFLOPs({"a/kernel": LayerFLOPs(16_000_000, 4e6)}, 0, 1_000_000)
      >>> print(layer_table({"a/kernel": np.array([2, 2])}, {"a/kernel": (8, 2)}, count))
      layers  kernel  weights  kept  density  fan-in  MFLOPs  sparse  of dense
      a          8x2       16     4    0.250    2..2  16.000   4.000     0.250
      others                                           1.000   1.000     1.000
      all                  16     4    0.250          17.000   5.000     0.294
    """
    together: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for path in fan_ins:
        stage = path.split("_")[0]  # of a ResNet
        together.setdefault((stage, tuple(shapes[path])), []).append(path)

    def numbers(paths: Sequence[str]) -> list[str]:
        weights = sum(int(np.prod(shapes[path])) for path in paths)
        kept = sum(fan_ins[path].sum().item() for path in paths)
        return [f"{weights:,}", f"{kept:,}", f"{kept / weights:.3f}"]

    def flops(dense: float, sparse: float) -> list[str]:
        return [f"{dense / 1e6:.3f}", f"{sparse / 1e6:.3f}", f"{sparse / dense:.3f}"]

    rows = [list(_HEADER)]
    for (_, shape), paths in together.items():
        lowest = min(fan_ins[path].min().item() for path in paths)
        highest = max(fan_ins[path].max().item() for path in paths)
        dense = sum(count.layers[path].dense for path in paths)
        sparse = sum(count.layers[path].sparse for path in paths)
        kernel = "x".join(map(str, shape))
        rows.append([_name(paths), kernel, *numbers(paths), f"{lowest}..{highest}"])
        rows[-1] += flops(dense, sparse)
    others = f"{(count.other + count.activations) / 1e6:.3f}"
    rows.append(["others", "", "", "", "", "", others, others, "1.000"])
    rows.append(["all", "", *numbers(list(fan_ins)), "", *flops(count.dense, count.sparse)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def _name(paths: Sequence[str]) -> str:
    """Of one layer, or what the names of several begin with and how many they are."""
    names = [path.removesuffix(_SUFFIX) for path in paths]
    if len(names) == 1:
        return names[0]
    lowest, highest = min(names), max(names)
    pairs = enumerate(zip(lowest, highest, strict=False))
    same = next((i for i, (one, other) in pairs if one != other), len(lowest))
    return f"{lowest[:same]}* ({len(names)})"


@tolerant_output()
def main(argv: Sequence[str] | None = None) -> int:
    """The command, in processes that have found each other; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return train.command("experiments.demo", [f"--config={_CONFIG}", *arguments], ending)


if __name__ == "__main__":
    train.leave(train.join_and_run(main))
