"""Dense layers with compressed kernels (`sx.to_bcsr`) against the dense product, on this device.

    python -m experiments.benchmarks.bcsr [--sizes=1024,2048] [--repeats=N] [--json=FILE]

A layer of as many inputs as outputs, random masks, float32, batches of 1, 8 and 32. Both products
are compiled; calls alternate; a ratio is the median of the dense call's time over that of the
sparse one beside it, so above 1 it pays to compress. Nothing else should run on the machine
meanwhile: the dense product takes all cores.

Where it pays: on CPUs, for dense layers, with batches from 8 on: clearly at a sparsity of 0.99, at
0.95 where the dense product has no AVX-512, or many examples. A single example costs as much as
eight. Convolutions have no such product.
"""

from __future__ import annotations

import argparse
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

SPARSITIES = (0.9, 0.95, 0.99)
BATCHES = (1, 8, 32)


def compare(size: int, sparsity: float, batch: int, repeats: int) -> dict[str, Any]:
    """Times both products; raises AssertionError where they differ by more than rounding."""
    keys = jax.random.split(jax.random.key(0), 3)
    masks = sx.init_masks(keys[0], jnp.zeros((size, size)), sx.Uniform(sparsity, dense_first=False))
    kernel = sx.apply_masks(jax.random.normal(keys[1], (size, size)), masks)
    x = jax.random.normal(keys[2], (batch, size))
    matmul = jax.jit(sx.bcsr_matmul)
    calls = {
        "dense": functools.partial(matmul, x, kernel),
        "sparse": functools.partial(matmul, x, sx.to_bcsr(kernel, masks)),
    }
    dense, sparse = (np.asarray(call()) for call in calls.values())
    np.testing.assert_allclose(sparse, dense, rtol=1e-4, atol=1e-4 * np.abs(dense).max())
    seconds = measuring.alternating(calls, repeats)
    return {
        "size": size,
        "sparsity": sparsity,
        "batch": batch,
        "ratio": measuring.median_ratio(seconds["dense"], seconds["sparse"]),
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
    }


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(int(word) for word in text.split(","))
    if min(sizes) < 2:
        raise argparse.ArgumentTypeError(f"{text} must be ints of at least 2")
    return sizes


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = measuring.parser("bcsr", "Compressed kernels of dense layers against dense ones.")
    parser.add_argument(
        "--sizes", type=_sizes, default=(1024, 2048), help="inputs and outputs (1024,2048)"
    )
    parser.add_argument("--repeats", type=int, default=25, help="calls of each product (25)")
    argv = sys.argv[1:] if argv is None else argv
    asked = parser.parse_args(argv)
    if asked.repeats < 1:
        parser.error(f"--repeats={asked.repeats} must be at least 1")
    rows = []
    heads = "".join(f"{f'batch {batch}':>10}" for batch in BATCHES)
    print(f"time of the dense product over the sparse one\n{'layer':>10} {'sparsity':>8}{heads}")
    for size in asked.sizes:
        for sparsity in SPARSITIES:
            found = [compare(size, sparsity, batch, asked.repeats) for batch in BATCHES]
            ratios = "".join(f"{row['ratio']:>10.2f}" for row in found)
            print(f"{f'{size}x{size}':>10} {sparsity:>8}{ratios}", flush=True)
            rows += found
    paying = [row["ratio"] for row in rows if row["sparsity"] == 0.95 and row["batch"] > 1]
    print(f"0.95, batches of 8 and 32: {min(paying):.1f} to {max(paying):.1f}")
    result = {"rows": rows, "at_095": {"min": min(paying), "max": max(paying)}}
    measuring.append(asked, parser, argv, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
