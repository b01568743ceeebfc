"""Memory of sparse training over dense: peak of the train step, and checkpoints on disk.

    python -m experiments.benchmarks.memory [--batch_size=64] [--topology=v5e:1x1] [--json=FILE]

ResNet-50 on images of 224x224, SGD with momentum and weight decay; sparse: SparseOpt with RigL at a
sparsity of 0.95 by ERK. The peak is the compiler's (`memory_analysis`) for the step that training
runs; nothing is run. Checkpoints are written by `experiments.checkpoint` after an update with
random gradients, so that every active weight has a momentum, and read again: they must be equal bit
for bit.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import sparseopt_jax as sx
from experiments import build, compile_check, programs
from experiments import mesh as meshes
from experiments.benchmarks import measuring
from experiments.checkpoint import Checkpoints
from experiments.config import Config
from experiments.configs import imagenet_resnet50
from experiments.functions import method_functions, model_functions

STEPS_PER_EPOCH = 1000


def configs(batch_size: int) -> dict[str, Config]:
    """Of each method, in float32."""
    sparse = dataclasses.replace(
        imagenet_resnet50.get_config(),
        batch_size=batch_size, sparsity=0.95, dtype="float32", compare=(), optimizer="sparseopt",
    )  # fmt: skip
    dense = dataclasses.replace(sparse, topology="dense", optimizer="sgd")
    return {"dense": dense, "sparse": sparse}


def step_memory(config: Config, device: jax.Device) -> dict[str, int]:
    """Bytes of the train step on one device: the peak, and what it is given and needs meanwhile."""
    shapes = compile_check.ImageNetShapes(meshes.make_mesh(config, [device]), config.image_size)
    model = model_functions(config, shapes)
    step = programs.lower_step(model, method_functions(config, shapes, model), shapes.mesh)
    memory = measuring.memory(step.compile())
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        # What a step is given is held throughout; its outputs lie where the state lay.
        "peak": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    }


def checkpoint_bytes(config: Config, folder: pathlib.Path) -> int:
    """Bytes on disk of a checkpoint of parameters and optimizer state after one update."""
    params = jax.tree.map(_normal, measuring.resnet50_params())
    tx = build.make_optimizer(config, STEPS_PER_EPOCH)
    opt_state = tx.init(params)
    if config.topology != "dense":
        params = sx.apply_masks(params, sx.get_masks(opt_state))
    updated = jax.jit(measuring.update(tx))(params, opt_state, jax.tree.map(_normal, params))
    with Checkpoints(folder, keep_last=1, keep_best=False) as checkpoints:
        checkpoints.save(1, updated, {})
        checkpoints.wait()
        shapes = jax.tree.map(lambda x: meshes.struct(x.shape, x.dtype, x.sharding), updated)
        restored = checkpoints.restore(shapes)
    assert restored is not None  # it was written a moment ago
    jax.tree.map(np.testing.assert_array_equal, restored.arrays, updated)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _normal(leaf: Any) -> jax.Array:
    rng = np.random.default_rng(leaf.size)
    return jax.numpy.asarray(rng.normal(size=leaf.shape).astype(np.float32))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = measuring.parser("memory", "Peak of the train step and checkpoints, over dense.")
    parser.add_argument("--batch_size", type=int, default=64, help="images, at least 1 (64)")
    measuring.add_topology(parser)
    argv = sys.argv[1:] if argv is None else argv
    asked = parser.parse_args(argv)
    if asked.batch_size < 1:
        parser.error(f"--batch_size={asked.batch_size} must be at least 1")
    device = measuring.tpu(parser, asked.topology) or jax.devices()[0]
    memory, disk = {}, {}
    for name, config in configs(asked.batch_size).items():
        memory[name] = step_memory(config, device)
        sizes = ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in memory[name].items())
        print(f"{name:>6}: train step, MB: {sizes}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            disk[name] = checkpoint_bytes(config, pathlib.Path(folder))
        print(f"{name:>6}: checkpoint on disk, MB: {disk[name] / 1e6:.1f}", flush=True)
    ratios = {
        "peak": memory["sparse"]["peak"] / memory["dense"]["peak"],
        "checkpoint": disk["sparse"] / disk["dense"],
    }
    print(f"sparse over dense: peak {ratios['peak']:.4f}, checkpoint {ratios['checkpoint']:.4f}")
    result = {"compiled_for": asked.topology, "train_step": memory, "checkpoint_bytes": disk}
    measuring.append(asked, parser, argv, result | {"ratios": ratios})
    return 0


if __name__ == "__main__":
    sys.exit(main())
