"""What it saves to take dead channels out: ResNet-50 whole, masked, against `remove_dead_neurons`.

    python -m experiments.benchmarks.removal [--share=0.5] [--batch_size=8] [--image_size=224]
        [--repeats=N] [--json=FILE]

A share of the inner channels of each block, chosen at random, is read by nothing. Both forward
passes (evaluation, float32) are compiled; calls alternate; the ratio is the median of the whole
model's time over the smaller one's beside it. Their logits must agree to rounding.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sparseopt_jax as sx
from experiments.benchmarks import measuring
from sparseopt_jax import models
from sparseopt_jax.dead_neurons import Removal


def with_dead_channels(model: models.ResNet, share: float, image_size: int) -> Any:
    """Variables at random, in which a share of each layer's inner channels is read by nothing."""
    init = functools.partial(model.init, jax.random.key(0))
    shapes = jax.eval_shape(lambda: init(jnp.zeros((1, image_size, image_size, 3))))
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> np.ndarray:
        if len(leaf.shape) == 1:  # scales and variances of 1, biases and means as well
            return np.ones(leaf.shape, np.float32)
        scale = np.float32((2 / np.prod(leaf.shape[:-1])) ** 0.5)
        return scale * rng.standard_normal(leaf.shape, np.float32)

    variables = jax.tree.map(draw, shapes)
    for chain in model.neuron_chains():
        for reader in chain[1:]:
            block, conv = reader.module.split("/")
            kernel = variables["params"][block][conv]["kernel"]
            dead = rng.permutation(kernel.shape[-2])[: round(share * kernel.shape[-2])]
            kernel[..., dead, :] = 0
    return variables


def compare(
    model: models.ResNet, share: float, batch_size: int, image_size: int, repeats: int
) -> tuple[Removal, dict[str, Any]]:
    """Times both; raises AssertionError where their logits differ by more than rounding."""
    variables = with_dead_channels(model, share, image_size)
    x = jax.random.normal(jax.random.key(1), (batch_size, image_size, image_size, 3))
    removal = sx.remove_dead_neurons(model, variables, x)
    calls = {
        "whole": functools.partial(jax.jit(model.apply), jax.device_put(variables), x),
        "smaller": functools.partial(
            jax.jit(removal.model.apply), jax.device_put(removal.variables), x
        ),
    }
    whole, smaller = (np.asarray(call()) for call in calls.values())
    np.testing.assert_allclose(smaller, whole, rtol=1e-3, atol=1e-3 * np.abs(whole).max())
    seconds = measuring.alternating(calls, repeats)
    size = [sum(leaf.size for leaf in jax.tree.leaves(v["params"]))
            for v in (variables, removal.variables)]  # fmt: skip
    return removal, {
        "ratio": measuring.median_ratio(seconds["whole"], seconds["smaller"]),
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "parameters": {"whole": size[0], "smaller": size[1]},
        "largest_difference": float(np.abs(smaller - whole).max() / np.abs(whole).max()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = measuring.parser("removal", "ResNet-50 without its dead channels, over the whole.")
    parser.add_argument("--share", type=float, default=0.5, help="of the inner channels (0.5)")
    parser.add_argument("--batch_size", type=int, default=8, help="images (8)")
    parser.add_argument("--image_size", type=int, default=224, help="pixels (224)")
    parser.add_argument("--repeats", type=int, default=5, help="calls of each (5)")
    argv = sys.argv[1:] if argv is None else argv
    asked = parser.parse_args(argv)
    if not 0 < asked.share < 1 or min(asked.batch_size, asked.image_size, asked.repeats) < 1:
        parser.error("--share must lie in (0, 1), all others must be at least 1")
    model = models.ResNet50()
    removal, result = compare(model, asked.share, asked.batch_size, asked.image_size, asked.repeats)
    print(removal)
    sizes, seconds = result["parameters"], result["median_seconds"]
    print(
        f"parameters {sizes['whole']:,} -> {sizes['smaller']:,}; forward pass"
        f" {seconds['whole']:.3f} -> {seconds['smaller']:.3f} s, {result['ratio']:.2f} times as"
        f" fast; logits differ by {result['largest_difference']:.1e} of the largest"
    )
    measuring.append(asked, parser, argv, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
