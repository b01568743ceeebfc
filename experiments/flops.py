"""FLOPs of sparse ResNet-50 beside those that RigL published.

    python -m experiments.flops [--interval=STEPS] [--output=FILE]

The model is traced for one image of 224x224 pixels; no mask is drawn, each layer counts with the
density that its distribution gives it. RigL published two decimals of the inference factor, and the
training factor of runs of five times the usual length, which gives a digit more.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import sparseopt_jax as sx
from experiments import metrics
from experiments.config import ConfigError
from experiments.paths import output_file
from experiments.terminal import tolerant_output
from sparseopt_jax import models
from sparseopt_jax.flops import flops
from sparseopt_jax.model_flops import ModelFLOPs

STEPS, BATCH_SIZE = 32_000, 4096
"""RigL's training run on ImageNet."""

DENSE = {"inference": 8.2e9, "training": 3.2e18}
"""RigL's FLOPs of the dense model: one image, and that training run."""

TOLERANCE = 0.01
"""How far a factor may lie from the published one."""


class Published(NamedTuple):
    """A row of the table of RigL's repository: its factors of the dense model's FLOPs.

    `training_5x` is that of a run of five times the length, over one dense run.
    """

    distribution: str
    sparsity: float
    inference: float
    training_5x: float


PUBLISHED = (
    Published("ERK", 0.8, 0.42, 2.09),
    Published("ERK", 0.9, 0.24, 1.23),
    Published("ERK", 0.95, 0.12, 0.63),
    Published("ERK", 0.965, 0.09, 0.45),
    Published("ERK", 0.99, 0.05, 0.29),
    Published("Uniform", 0.8, 0.23, 1.14),
    Published("Uniform", 0.9, 0.13, 0.66),
    Published("Uniform", 0.95, 0.08, 0.42),
    Published("Uniform", 0.965, 0.07, 0.34),
)
"""RigL's "Extended Training Results". The first layer is dense under Uniform, and in ERK's 0.99."""

CONVENTION = """\
all       a multiply-add is two FLOPs; normalisation, ReLU, pooling and
          additions are one an element, and dense; compared with RigL
conv, fc  only the multiply-adds of the 53 convolutions and the dense layer
training  (3 f_S delta-T + 2 f_S + f_D) / (delta-T + 1), over 3 f_D; RigL's are
          those of its runs of five times the length, over five
These are counts of what has to be computed: masked dense arrays save no time."""


def distribution(row: Published) -> sx.ERK | sx.Uniform:
    """The distribution of a row, with the layers that RigL kept dense."""
    if row.distribution == "Uniform":
        return sx.Uniform(row.sparsity, dense_first="conv_stem/kernel")
    overrides = {"conv_stem/kernel": 0.0} if row.sparsity == 0.99 else None
    return sx.ERK(row.sparsity, overrides=overrides)


@functools.cache
def resnet50() -> tuple[models.ResNet, Any, jax.ShapeDtypeStruct]:
    """The model, and the shapes of its variables and of one image."""
    model = models.ResNet50()
    image = jax.eval_shape(lambda: jnp.zeros((1, 224, 224, 3)))
    return model, jax.eval_shape(model.init, jax.random.key(0), image), image


def count(chosen: sx.ERK | sx.Uniform | None) -> ModelFLOPs:
    """FLOPs of ResNet-50 on one image, with the densities of a distribution or dense."""
    model, variables, image = resnet50()
    leaves = metrics.path_leaves(variables["params"])
    shapes = {path: x.shape for path, x in leaves.items() if sx.default_prunable(path, x)}
    kept = chosen.layer_counts(shapes) if chosen else {}

    def logits(params: Any, batch_stats: Any, image: jax.Array) -> Any:
        return model.apply({"params": params, "batch_stats": batch_stats}, image)

    densities = {path: n / math.prod(shapes[path]) for path, n in kept.items()}
    return flops(logits, variables["params"], densities, variables["batch_stats"], image)


def compare(interval: int) -> dict[str, Any]:
    """Our factors beside each of RigL's, as JSON; the convention is in the text of `table`."""
    dense = count(None)
    topology = sx.RigL(interval=interval, drop_fraction=0.3, end_step=max(25_000, interval))
    rows = []
    for published in PUBLISHED:
        counted = count(distribution(published))
        products = [layer.sparse for layer in counted.layers.values()]
        of_dense = [layer.dense for layer in counted.layers.values()]
        rows.append(
            {
                "distribution": published.distribution,
                "sparsity": published.sparsity,
                "inference": counted.sparse / counted.dense,
                "inference_products": sum(products) / sum(of_dense),
                "inference_published": published.inference,
                "training": counted.training(topology) / counted.training(),
                "training_published": published.training_5x / 5,
            }
        )
    return {
        "inference": dense.dense,
        "inference_products": sum(layer.dense for layer in dense.layers.values()),
        "inference_published": DENSE["inference"],
        "training": dense.training() * STEPS * BATCH_SIZE,
        "training_published": DENSE["training"],
        "interval": interval,
        "rows": rows,
    }


def table(comparison: dict[str, Any]) -> str:
    """The comparison as text, 80 columns wide."""
    lines = [
        f"{'ResNet-50 on 224x224, dense':<31}      all  conv, fc     RigL",
        f"{'inference of one image':<31}{comparison['inference']:9.3e} "
        f"{comparison['inference_products']:9.3e}  {comparison['inference_published']:.1e}",
        f"{f'training, {STEPS} x {BATCH_SIZE} images':<31}{comparison['training']:9.3e}"
        f"{'':12}{comparison['training_published']:.1e}",
        "",
        f"{'sparse over dense FLOPs':<25}inference{'':24}training,"
        f" delta-T {comparison['interval']}",
        "distribution  sparsity     all  conv, fc  RigL  difference         all   RigL",
    ]
    for row in comparison["rows"]:
        difference = row["inference"] - row["inference_published"]
        lines.append(
            f"{row['distribution']:<12}  {row['sparsity']:<8g}   {row['inference']:.3f}"
            f"  {row['inference_products']:8.3f}  {row['inference_published']:.2f}"
            f"  {difference:+10.3f}       {row['training']:.3f}  {row['training_published']:.3f}"
        )
    return "\n".join([*lines, "", verdict(comparison), CONVENTION])


def verdict(comparison: dict[str, Any]) -> str:
    """How far our numbers are from the published ones, in one line."""
    worst = max(abs(row["inference"] - row["inference_published"]) for row in comparison["rows"])
    off = comparison["inference"] / comparison["inference_published"] - 1
    within = "within" if worst <= TOLERANCE else "NOT within"
    return (
        f"Dense: {off:+.2%} from RigL's. Largest difference of a factor: {worst:.4f}, "
        f"{within} {TOLERANCE}."
    )


@tolerant_output()
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.flops")
    parser.add_argument(
        "--interval", type=int, default=100, help="steps between topology updates (delta-T)"
    )
    parser.add_argument("--output", help="JSON file for the result")
    asked = parser.parse_args(argv)
    if asked.interval < 1:
        parser.error(f"--interval must be at least 1, got {asked.interval}")
    try:
        output = output_file("--output", asked.output) if asked.output else None
    except ConfigError as error:
        parser.error(str(error))
    comparison = compare(asked.interval)
    print(table(comparison))
    if output is not None:
        command = f"{parser.prog} --interval={asked.interval}"
        record = {"command": command, "convention": CONVENTION} | comparison
        metrics.write_json(output, record | {"environment": metrics.environment()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
