"""RigL's topology update of ResNet-50 against the same by argsort.

    python -m experiments.benchmarks.topology_update [--repeats=N] [--topology=v5e:1x1]
        [--json=FILE]

The other one is the way of jaxpruner, written anew from its description: each layer's magnitudes
are sorted to find what to keep, then its gradients to find what to grow, and a mask is scattered
from the first of the sorted indices. Both replace the same numbers of the same random weights of
ERK masks at a sparsity of 0.9, no two of a layer equal, and must give equal masks. Compiled once;
calls take turns; medians.
With `--topology` both are compiled for a TPU that is not there, and nothing is run.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sparseopt_jax as sx
from experiments import mesh as meshes
from experiments.benchmarks import measuring
from experiments.benchmarks.selection import argsort_mask

# A quarter of a number is exact in float32 as well, so both drop as many.
TOPOLOGY = sx.RigL(interval=100, drop_fraction=0.25, end_step=10**9)
STEP = 100


def update(key: jax.Array, masks: Any, params: Any, grads: Any) -> Any:
    """Our update."""
    return TOPOLOGY.update(key, STEP, masks, params, grads)


def argsort_update(key: jax.Array, masks: Any, params: Any, grads: Any) -> Any:
    """The update by two sorts a layer; ties go to the first index, whatever the key."""

    def of_layer(mask: jax.Array, weight: jax.Array, grad: jax.Array) -> jax.Array:
        n_active = mask.sum(dtype=jnp.int32)
        n_drop = (TOPOLOGY.drop_fraction_at(STEP) * n_active).astype(jnp.int32)
        kept = argsort_mask(jnp.where(mask, jnp.abs(weight), -1.0), n_active - n_drop)
        return kept | argsort_mask(jnp.where(kept, -1.0, jnp.abs(grad)), n_drop)

    return jax.tree.map(of_layer, masks, params, grads)


UPDATES: Mapping[str, Callable[..., Any]] = {"sparseopt_jax": update, "argsort": argsort_update}


def compiled(params: Any, device: Any = None) -> dict[str, tuple[Any, dict[str, float]]]:
    """Each update compiled, with the seconds that took and the bytes of its temporaries.

    Args:
      params: shapes of the kernels.
      device: what to compile for; None: the one at hand.
    """
    masks = jax.tree.map(lambda leaf: meshes.shaped(leaf.shape, jnp.bool_), params)
    shapes = jax.eval_shape(lambda: jax.random.key(0)), masks, params, params
    sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)
    found = {}
    for name, function in UPDATES.items():
        start = time.perf_counter()
        lowered = jax.jit(function).lower(*measuring.placed(shapes, sharding))
        traced = time.perf_counter()
        program = lowered.compile()
        cost = {
            "trace_seconds": traced - start,
            "compile_seconds": time.perf_counter() - traced,
            "temporary_bytes": measuring.memory(program).temp_size_in_bytes,
        }
        found[name] = program, cost
    return found


def random_arguments(params: Any) -> tuple[Any, Any, Any, Any]:
    """A key, masks, weights and gradients; in each layer all magnitudes in (0, 1) are different."""
    key, rng = jax.random.key(0), np.random.default_rng(0)

    def distinct(leaf: Any) -> jax.Array:
        magnitudes = rng.permutation(leaf.size).astype(np.float32) + 1
        signs = np.where(rng.random(leaf.size) < 0.5, -1, 1).astype(np.float32)
        return jnp.asarray((signs * magnitudes / (leaf.size + 1)).reshape(leaf.shape))

    weights, grads = jax.tree.map(distinct, params), jax.tree.map(distinct, params)
    masks = sx.init_masks(key, weights, sx.ERK(0.9))
    return key, masks, sx.apply_masks(weights, masks), grads


def run(programs: Mapping[str, Any], arguments: Any, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call; raises AssertionError where the masks differ."""
    ours, theirs = (program(*arguments) for program in programs.values())
    for path, mask in ours.items():
        np.testing.assert_array_equal(mask, theirs[path], err_msg=path)
    calls = {name: functools.partial(program, *arguments) for name, program in programs.items()}
    return measuring.alternating(calls, repeats)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = measuring.parser("topology_update", "RigL's topology update against argsort.")
    parser.add_argument("--repeats", type=int, default=5, help="calls of each, at least 1 (5)")
    measuring.add_topology(parser)
    argv = sys.argv[1:] if argv is None else argv
    asked = parser.parse_args(argv)
    if asked.repeats < 1:
        parser.error(f"--repeats={asked.repeats} must be at least 1")
    device = measuring.tpu(parser, asked.topology)
    params = measuring.kernels(measuring.resnet50_params())
    print(f"{len(params)} kernels, {measuring.size(params) // 4:,} weights")
    found = compiled(params, device)
    costs = {name: cost for name, (_, cost) in found.items()}
    for name, cost in costs.items():
        print(
            f"{name:>14}: traced in {cost['trace_seconds']:.1f} s, compiled in"
            f" {cost['compile_seconds']:.1f} s, temporaries"
            f" {cost['temporary_bytes'] / 1e6:.1f} MB"
        )
    result: dict[str, Any] = {"compiled_for": asked.topology, "costs": costs}
    ours, theirs = costs.values()
    result["ratios"] = {
        "compile_seconds": theirs["compile_seconds"] / ours["compile_seconds"],
        "temporary_bytes": ours["temporary_bytes"] / theirs["temporary_bytes"],
    }
    if device is None:
        programs = {name: program for name, (program, _) in found.items()}
        seconds = run(programs, random_arguments(params), asked.repeats)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        for name, median in medians.items():
            print(f"{name:>14}: {median:.3f} s an update (median of {asked.repeats})")
        result["ratios"]["seconds"] = measuring.median_ratio(*list(seconds.values())[::-1])
        result["median_seconds"] = medians
        print(f"sparseopt_jax is {result['ratios']['seconds']:.1f} times faster")
    print(
        f"argsort takes {result['ratios']['compile_seconds']:.2f} times as long to compile;"
        f" our temporaries are {result['ratios']['temporary_bytes']:.3f} of its"
    )
    measuring.append(asked, parser, argv, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
