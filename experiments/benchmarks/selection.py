"""`top_k_mask` against a full argsort, over all kernels of ResNet-50.

    python -m experiments.benchmarks.selection [--repeats=N] [--keep=SHARE] [--json=FILE]

Both mark the k largest of each kernel's magnitudes. The argsort way is the usual one: sort the
flattened scores, scatter ranks to their places, keep the ranks below k. Both are compiled once per
shape; calls alternate; medians, without compilation. The masks must be equal, bit for bit.
"""

from __future__ import annotations

import collections
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sparseopt_jax as sx
from experiments.benchmarks import measuring


def argsort_mask(scores: jax.Array, k: int | jax.Array) -> jax.Array:
    """Marks the k largest scores by sorting all of them; ties to the lowest flat index."""
    flat = scores.ravel()
    order = jnp.argsort(-flat)
    ranks = jnp.zeros(flat.size, jnp.int32).at[order].set(jnp.arange(flat.size, dtype=jnp.int32))
    return (ranks < k).reshape(scores.shape)


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
    calls = {name: functools.partial(method, scores) for name, method in methods.items()}
    times = measuring.alternating(calls, repeats)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {"shape": list(shape), "k": k, "median_seconds": medians}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = measuring.parser("selection", "top_k_mask against argsort on ResNet-50's kernels.")
    parser.add_argument("--repeats", type=int, default=5, help="calls of each method and shape")
    parser.add_argument("--keep", type=float, default=0.1, help="share of the weights to mark")
    argv = sys.argv[1:] if argv is None else argv
    asked = parser.parse_args(argv)
    if asked.repeats < 1 or not 0 < asked.keep < 1:
        parser.error("--repeats must be at least 1 and --keep in (0, 1)")

    kernels = measuring.kernels(measuring.resnet50_params())
    shapes = collections.Counter(leaf.shape for leaf in kernels.values())
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
    result = {"ratio": ratio, "total_seconds": totals, "kernels": rows}
    measuring.append(asked, parser, argv, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
