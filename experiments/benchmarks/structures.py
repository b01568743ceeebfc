"""What patterns cost: 2:4 of a large kernel over one pass, constant fan-in over no structure.

    python -m experiments.benchmarks.structures [--size=4096] [--repeats=N] [--json=FILE]

- `masks_from_scores` with `NM(2, 4)` of a kernel of `--size` by `--size`, over one pass over it,
  `jnp.abs(w) > t`. Both write a mask. Flax's layout, in which the rows of four lie across rows of
  the array, and (out, in), in which they lie along them.
- RigL's update of ResNet-50's kernels at ERK 0.9 with `ConstantFanIn()`, over the same without a
  structure; with `ablate=0.3`, too.

Compiled once, calls take turns, medians are of ratios. Predicted before the first run of this
script: 1.7 and 1.9 passes, for there are two kernels, of which the first reads the weights and
writes a byte a row of four, and comparing takes longer than reading; 1.1 with a constant fan-in,
since a search that has a threshold for each of 27,000 neurons ends later than one for 54 layers,
and 1.5 with ablation, whose salient weights are a third search.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import sparseopt_jax as sx
from experiments.benchmarks import measuring
from experiments.benchmarks.topology_update import STEP, TOPOLOGY, random_arguments

HALF = sx.Uniform(0.5, dense_first=False)
STRUCTURES = {
    "unstructured": None,
    "constant_fan_in": sx.ConstantFanIn(),
    "ablation": sx.ConstantFanIn(ablate=0.3),
}


def selections() -> dict[str, Callable[[jax.Array], jax.Array]]:
    """One pass, and masks of 2:4 by axis of the neurons."""

    def two_of_four(out_axes: int, kernel: jax.Array) -> jax.Array:
        scores = {"kernel": kernel}
        return sx.masks_from_scores(scores, HALF, sx.NM(2, 4), out_axes=out_axes)["kernel"]

    return {
        "pass": lambda kernel: jnp.abs(kernel) > 0.5,
        "flax": functools.partial(two_of_four, -1),
        "out_in": functools.partial(two_of_four, 0),
    }


def updates(params: Any) -> dict[str, Callable[..., Any]]:
    """RigL's update with each structure, of masks that have it."""
    key, masks, weights, grads = random_arguments(params)
    calls: dict[str, Callable[..., Any]] = {}
    for name, structure in STRUCTURES.items():
        layers = sx.describe_layers(masks, structure=structure)

        def update(key: Any, masks: Any, weights: Any, grads: Any, layers: Any = layers) -> Any:
            return TOPOLOGY.update(key, STEP, masks, weights, grads, layers)

        own = sx.init_masks(key, weights, sx.ERK(0.9), structure=structure) if structure else masks
        arguments = key, own, sx.apply_masks(weights, own), grads
        calls[name] = functools.partial(jax.jit(update), *arguments)
    return calls


def measure(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Median seconds, and ratios over the first."""
    seconds = measuring.alternating(calls, repeats)
    first = next(iter(calls))
    return {
        "median_seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "ratio": {
            name: measuring.median_ratio(s, seconds[first])
            for name, s in seconds.items()
            if name != first
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = measuring.parser("structures", "What patterns cost in selection and in updates.")
    parser.add_argument("--size", type=int, default=4096, help="of the kernel's axes (4096)")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each (15)")
    argv = sys.argv[1:] if argv is None else argv
    asked = parser.parse_args(argv)
    if asked.size < 4 or asked.size % 4 or asked.repeats < 1:
        parser.error("--size must be a positive multiple of 4, and --repeats at least 1")
    kernel = jax.random.normal(jax.random.key(0), (asked.size, asked.size))
    compiled = {n: functools.partial(jax.jit(f), kernel) for n, f in selections().items()}
    kept = int(jnp.sum(compiled["flax"]()))
    assert kept == kernel.size // 2, f"{kept} weights are kept"
    params = measuring.kernels(measuring.resnet50_params())
    result = {
        "selection": measure(compiled, asked.repeats),
        "update": measure(updates(params), asked.repeats),
    }
    for name, found in result.items():
        for one, seconds in found["median_seconds"].items():
            ratio = found["ratio"].get(one, 1.0)
            print(f"{name:>10} {one:>16}: {1e3 * seconds:8.1f} ms, ratio {ratio:.2f}")
    measuring.append(asked, parser, argv, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
