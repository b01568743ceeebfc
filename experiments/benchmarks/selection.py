"""`top_k_mask` against a full argsort, over all kernels of ResNet-50.

    python -m experiments.benchmarks.selection [--repeats=N] [--keep=SHARE] [--output=FILE]

Both mark the k largest of each kernel's magnitudes. The argsort way is the usual one: sort the
flattened scores, scatter ranks to their places, keep the ranks below k. Both are compiled once per
shape; calls alternate; medians, without compilation. The masks must be equal, bit for bit.
"""

from __future__ import annotations

import argparse
import collections
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sparseopt_jax as sx
from experiments import metrics
from sparseopt_jax import models


def argsort_mask(scores: jax.Array, k: int) -> jax.Array:
    """Marks the k largest scores by sorting all of them; ties to the lowest flat index."""
    flat = scores.ravel()
    order = jnp.argsort(-flat)
    ranks = jnp.zeros(flat.size, jnp.int32).at[order].set(jnp.arange(flat.size, dtype=jnp.int32))
    return (ranks < k).reshape(scores.shape)


def kernel_shapes() -> collections.Counter[tuple[int, ...]]:
    """The shapes of ResNet-50's 54 kernels, and how many kernels have each."""
    init = functools.partial(models.ResNet50().init, jax.random.key(0))
    variables = jax.eval_shape(lambda: init(jnp.zeros((1, 224, 224, 3))))
    leaves = metrics.path_leaves(variables["params"])
    return collections.Counter(
        leaf.shape for path, leaf in leaves.items() if sx.default_prunable(path, leaf)
    )


def seconds(function: Callable[[jax.Array], jax.Array], scores: jax.Array) -> float:
    """How long one call takes, its result included."""
    start = time.perf_counter()
    function(scores).block_until_ready()
    return time.perf_counter() - start


def compare(shape: tuple[int, ...], keep: float, repeats: int) -> dict[str, Any]:
    """Times both methods on one shape; raises AssertionError where their masks differ."""
    scores = jnp.abs(jax.random.normal(jax.random.key(0), shape))
    k = max(1, round(keep * scores.size))
    methods: dict[str, Callable[[jax.Array], jax.Array]] = {
        "top_k_mask": jax.jit(functools.partial(sx.top_k_mask, k=k)),
        "argsort": jax.jit(functools.partial(argsort_mask, k=k)),
    }
    first, second = (np.asarray(method(scores)) for method in methods.values())
    np.testing.assert_array_equal(first, second)
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            times[name].append(seconds(method, scores))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {"shape": list(shape), "k": k, "median_seconds": medians}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.selection")
    parser.add_argument("--repeats", type=int, default=5, help="calls of each method and shape")
    parser.add_argument("--keep", type=float, default=0.1, help="share of the weights to mark")
    parser.add_argument("--output", help="JSON file for the result")
    asked = parser.parse_args(argv)
    if asked.repeats < 1 or not 0 < asked.keep < 1:
        parser.error("--repeats must be at least 1 and --keep in (0, 1)")

    shapes = kernel_shapes()
    rows, totals = [], {"top_k_mask": 0.0, "argsort": 0.0}
    print(f"{'kernel':>20} {'count':>5} {'argsort ms':>11} {'top_k_mask ms':>13} {'ratio':>6}")
    for shape, count in sorted(shapes.items(), key=lambda item: np.prod(item[0])):
        row = compare(shape, asked.keep, asked.repeats)
        rows.append(row | {"count": count})
        fast, slow = row["median_seconds"]["top_k_mask"], row["median_seconds"]["argsort"]
        totals["top_k_mask"] += count * fast
        totals["argsort"] += count * slow
        name = "x".join(map(str, shape))
        print(f"{name:>20} {count:>5} {slow * 1e3:>11.2f} {fast * 1e3:>13.2f} {slow / fast:>6.1f}")
    ratio = totals["argsort"] / totals["top_k_mask"]
    print(
        f"all {sum(shapes.values())} kernels: argsort {totals['argsort']:.2f} s, "
        f"top_k_mask {totals['top_k_mask']:.2f} s, {ratio:.1f} times faster"
    )
    if asked.output:
        command = f"{parser.prog} --repeats={asked.repeats} --keep={asked.keep}"
        record = {"command": command, "ratio": ratio, "total_seconds": totals, "kernels": rows}
        metrics.write_json(asked.output, record | {"environment": metrics.environment()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
