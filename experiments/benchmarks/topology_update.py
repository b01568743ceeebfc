"""RigL's topology update of ResNet-50 against the same by argsort, by jaxpruner and by torch.

    python -m experiments.benchmarks.topology_update [--repeats=N] [--peers=jaxpruner,torch]
        [--topology=v5e:1x1] [--json=FILE]

By argsort is the way of jaxpruner, written anew from its description: each layer's magnitudes
are sorted to find what to keep, then its gradients to find what to grow, and a mask is scattered
from the first of the sorted indices. All replace the same numbers of the same random weights of
ERK masks at a sparsity of 0.9, no two of a layer equal, and must give equal masks (jaxpruner's
counts are rounded in float32: its masks may differ by two weights a layer). Compiled once; calls
take turns; medians.
With `--peers` jaxpruner itself (cloned from its repository, with ml_collections, on PYTHONPATH)
and `torch.topk` on the GPU, if there is one, take part.
With `--topology` what is of JAX is compiled for a TPU that is not there, and nothing is run.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
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
from experiments.benchmarks.topology_peers import jaxpruner_update
from experiments.benchmarks.workers import Side

# A quarter of a number is exact in float32 as well, so ours and argsort's drop as many.
DROP_FRACTION = 0.25
TOPOLOGY = sx.RigL(interval=100, drop_fraction=DROP_FRACTION, end_step=10**9)
STEP = 100
TORCH = "experiments.benchmarks.topology_peers:TorchUpdate"

# What must be importable for a peer.
PEERS = {"jaxpruner": ("jaxpruner", "ml_collections"), "torch": ("torch",)}


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


def updates(peers: Sequence[str] = ()) -> dict[str, Callable[..., Any]]:
    """The updates that JAX compiles, ours first."""
    functions = {"sparseopt_jax": update, "argsort": argsort_update}
    if "jaxpruner" in peers:
        functions["jaxpruner"] = jaxpruner_update(DROP_FRACTION, STEP)
    return functions


def compiled(
    params: Any, device: Any = None, peers: Sequence[str] = ()
) -> dict[str, tuple[Any, dict[str, float]]]:
    """Each update compiled, with the seconds that took and the bytes of its temporaries.

    Args:
      params: shapes of the kernels.
      device: what to compile for; None: the one at hand.
      peers: names from `PEERS`; only those of JAX are compiled.
    """
    masks = jax.tree.map(lambda leaf: meshes.struct(leaf.shape, jnp.bool_), params)
    shapes = jax.eval_shape(lambda: jax.random.key(0)), masks, params, params
    sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)
    programs = {}
    for name, function in updates(peers).items():
        start = time.perf_counter()
        lowered = jax.jit(function).lower(*measuring.placed(shapes, sharding))
        traced = time.perf_counter()
        program = lowered.compile()
        cost = {
            "trace_seconds": traced - start,
            "compile_seconds": time.perf_counter() - traced,
            "temporary_bytes": measuring.memory(program).temp_size_in_bytes,
        }
        programs[name] = program, cost
    return programs


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


def run(
    programs: Mapping[str, Any], arguments: Any, repeats: int, torch: Any = None
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each call, and how many places of its masks differ from ours.

    Args:
      programs: what `updates` compiled, ours first.
      arguments: of them.
      repeats: timed calls of each.
      torch: the process of a `TorchUpdate`, or None.

    Raises:
      AssertionError: masks differ; of jaxpruner's, more than two weights a layer.
    """
    ours = programs["sparseopt_jax"](*arguments)
    others = {name: p(*arguments) for name, p in programs.items() if name != "sparseopt_jax"}
    calls = {name: functools.partial(program, *arguments) for name, program in programs.items()}
    timers = {name: functools.partial(measuring.timed, call) for name, call in calls.items()}
    if torch is not None:
        layers = [tuple(np.asarray(tree[path]) for tree in arguments[1:]) for path in ours]
        torch("prepare", layers, DROP_FRACTION)
        timers["torch"] = functools.partial(torch, "run")
        timers["torch"]()
        others["torch"] = dict(zip(ours, torch("masks"), strict=True))
    differing = {}
    for name, masks in others.items():
        by_layer = {path: int(np.sum(ours[path] != masks[path])) for path in ours}
        allowed = 2 if name == "jaxpruner" else 0
        for path, count in by_layer.items():
            assert count <= allowed, f"{name}: {count} places of {path}'s mask differ"
        differing[name] = sum(by_layer.values())
    return measuring.in_turns(timers, repeats), differing


def parse(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, Any]:
    """The parser, and what it parsed; leaves the program where something is off."""
    parser = measuring.parser("topology_update", "RigL's topology update against other ways.")
    parser.add_argument("--repeats", type=int, default=5, help="calls of each, at least 1 (5)")
    parser.add_argument("--peers", default="", metavar="NAME,...", help="jaxpruner, torch (none)")
    measuring.add_topology(parser)
    asked = parser.parse_args(argv)
    if asked.repeats < 1:
        parser.error(f"--repeats={asked.repeats} must be at least 1")
    asked.peers = [name for name in asked.peers.split(",") if name]
    for name in asked.peers:
        if name not in PEERS:
            parser.error(f"--peers: {name} must be one of {', '.join(PEERS)}")
        missing = [word for word in PEERS[name] if importlib.util.find_spec(word) is None]
        if missing:
            parser.error(f"--peers={name} needs {' and '.join(missing)}, which cannot be imported")
    if asked.topology and "torch" in asked.peers:
        parser.error("--peers=torch cannot be compiled for --topology: it must run")
    return parser, asked


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser, asked = parse(argv)
    if "torch" in asked.peers:
        # Both are on the card at one time; jax would take three quarters of it at once.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = measuring.tpu(parser, asked.topology)
    params = measuring.kernels(measuring.resnet50_params())
    print(f"{len(params)} kernels, {measuring.size(params) // 4:,} weights")
    compiled_updates = compiled(params, device, asked.peers)
    costs = {name: cost for name, (_, cost) in compiled_updates.items()}
    for name, cost in costs.items():
        print(
            f"{name:>14}: traced in {cost['trace_seconds']:.1f} s, compiled in"
            f" {cost['compile_seconds']:.1f} s, temporaries"
            f" {cost['temporary_bytes'] / 1e6:.1f} MB",
            flush=True,
        )
    ours = costs.pop("sparseopt_jax")
    over: dict[str, dict[str, float]] = {
        name: {
            "compile_seconds": theirs["compile_seconds"] / ours["compile_seconds"],
            "temporary_bytes": ours["temporary_bytes"] / theirs["temporary_bytes"],
        }
        for name, theirs in costs.items()
    }
    result: dict[str, Any] = {
        "compiled_for": asked.topology,
        "costs": {"sparseopt_jax": ours, **costs},
        "ratios": over,
    }
    if device is None:
        torch = Side("torch", TORCH) if "torch" in asked.peers else None
        programs = {name: program for name, (program, _) in compiled_updates.items()}
        arguments = random_arguments(params)
        try:
            seconds, result["masks_differ"] = run(programs, arguments, asked.repeats, torch)
            if torch is not None:
                result["torch"] = torch("environment")
                torch.close()
        except (AssertionError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        result["median_seconds"] = {k: statistics.median(v) for k, v in seconds.items()}
        for name, median in result["median_seconds"].items():
            print(f"{name:>14}: {median:.4g} s an update (median of {asked.repeats})")
        for name, times in seconds.items():
            if name != "sparseopt_jax":
                ratio = measuring.median_ratio(times, seconds["sparseopt_jax"])
                over.setdefault(name, {})["seconds"] = ratio
                print(
                    f"sparseopt_jax is {ratio:.1f} times as fast as {name}, whose masks differ in"
                    f" {result['masks_differ'][name]} places"
                )
    for name in costs:
        print(
            f"{name} takes {over[name]['compile_seconds']:.2f} times as long to compile;"
            f" our temporaries are {over[name]['temporary_bytes']:.3f} of its"
        )
    measuring.append(asked, parser, argv, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
