"""What the benchmarks share: their arguments, alternating calls, one line of JSON a run."""

from __future__ import annotations

import argparse
import functools
import math
import pathlib
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sparseopt_jax as sx
from experiments import mesh as meshes
from experiments import metrics
from experiments.config import ConfigError
from experiments.paths import local_path, output_file
from sparseopt_jax import models


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """A parser with the argument that all benchmarks take, `--json=FILE`.

    Args:
      module: the benchmark's name in this package, e.g. "update_bytes".
      description: one line for `--help`.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m experiments.benchmarks.{module}",
        description=description,
        allow_abbrev=False,
    )
    made.add_argument(
        "--json", type=output, metavar="FILE", help="file to append the result to, a line"
    )
    return made


def add_topology(made: argparse.ArgumentParser) -> None:
    """Adds `--topology=NAME` for programs that can be compiled for TPUs that are not there."""
    made.add_argument("--topology", metavar="NAME", help="a TPU to compile for, e.g. v5e:1x1")


def tpu(made: argparse.ArgumentParser, name: str | None) -> jax.Device | None:
    """The first chip of a topology; None for none. Leaves the program where there is no such."""
    if name is None:
        return None
    # It brings in what reads images, which nothing else here needs.
    from experiments import compile_check

    try:
        return compile_check.topology_devices(name)[0]
    except ConfigError as error:
        made.error(str(error))


def memory(compiled: Any) -> Any:
    """The compiler's account of a program's memory."""
    return compiled.memory_analysis()


def path(text: str) -> pathlib.Path:
    """The path of what there is, or is to be, as an argument names it."""
    return local_path("path", text)


def output(text: str) -> pathlib.Path:
    """The path of a file to write, as an argument names it."""
    try:
        return output_file("FILE", text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def append(
    asked: argparse.Namespace, made: argparse.ArgumentParser, argv: Sequence[str], result: Any
) -> None:
    """Appends a line to the file that `--json` names, if any; earlier lines stay.

    Args:
      asked: what `made` parsed.
      made: what `parser` returned.
      argv: the arguments, for the record; the file's own name is left out of it.
      result: a mapping that JSON can hold.
    """
    if asked.json is None:
        return
    file = asked.json
    words = [w for w in argv if w != "--json" and path(w.removeprefix("--json=")) != file]
    record = {
        "benchmark": made.prog.rpartition(".")[2],
        "command": shlex.join([*made.prog.split(), *words]),
        **result,
        "environment": metrics.environment(),
    }
    before = asked.json.read_bytes() if asked.json.exists() else b""
    metrics.write_atomically(asked.json, before + metrics.json_line(record))


def alternating(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds that each call takes, its result included; calls take turns.

    Args:
      calls: by name; each returns arrays, or nothing. Called once beforehand, untimed.
      repeats: how often each is timed.
    """
    return in_turns({name: functools.partial(timed, call) for name, call in calls.items()}, repeats)


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call, its result included."""
    start = time.perf_counter()
    _finish(call())
    return time.perf_counter() - start


def in_turns(timers: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds by name as the timers return them, in turns, after one call of each."""
    for timer in timers.values():
        timer()
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(repeats):
        for name, timer in timers.items():
            seconds[name].append(timer())
    return seconds


def _finish(arrays: Any) -> None:
    jax.block_until_ready(arrays)  # type: ignore[no-untyped-call]


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median of the ratios of times that were taken in turns."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


@functools.cache
def resnet50_params() -> Any:
    """Shapes of ResNet-50's parameters, 25.6 M in 161 arrays, float32."""
    init = functools.partial(models.ResNet50().init, jax.random.key(0))
    return jax.eval_shape(lambda: init(jnp.zeros((1, 224, 224, 3))))["params"]


def kernels(tree: Any) -> dict[str, Any]:
    """The leaves that can be sparse, by path."""
    leaves = metrics.path_leaves(tree)
    return {path: leaf for path, leaf in leaves.items() if sx.default_prunable(path, leaf)}


def optimizer(topology: Any = None, sparsity: float = 0.9) -> optax.GradientTransformation:
    """The recipe for ImageNet: SGD with momentum and weight decay; SparseOpt where sparse.

    Args:
      topology: of the sparse one; None for dense.
      sparsity: shared out by ERK.
    """
    if topology is None:
        kernels = functools.partial(jax.tree.map, lambda leaf: leaf.ndim >= 2)
        return optax.chain(optax.add_decayed_weights(1e-4, kernels), optax.sgd(0.1, momentum=0.9))
    return sx.sparse_training(
        sx.sparseopt(0.1, weight_decay=1e-4), distribution=sx.ERK(sparsity), topology=topology
    )


def update(tx: optax.GradientTransformation) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """The function (params, state, gradients) -> params, state."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def placed(shapes: Any, sharding: Any) -> Any:
    """Shapes with a sharding; None: as they are."""
    if sharding is None:
        return shapes
    return jax.tree.map(lambda leaf: meshes.struct(leaf.shape, leaf.dtype, sharding), shapes)


def size(tree: Any) -> int:
    """Bytes of a tree's arrays, or of their shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
