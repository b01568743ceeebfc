"""How large a sparse ResNet-50 is in each format, how exact, and how fast in its own runtime.

    python -m experiments.benchmarks.exports [--sparsity=0.95] [--batch_size=1] [--image_size=224]
        [--repeats=N] [--json=FILE]

Weights at random, masks by ERK, float32. An error is the largest difference from the logits of
`jax.jit(model.apply)`, over the largest logit. Formats whose package is not installed (onnx,
onnxruntime, TensorFlow) are left out. Runtimes take turns, with a thread for each core.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import sparseopt_jax as sx
from experiments.benchmarks import measuring, removal
from sparseopt_jax import models
from sparseopt_jax.models import export

# What gives the logits; None where a file is no program.
Call = Callable[[], Any] | None
FORMATS = {
    "compact file": (),
    "StableHLO, variables apart": (),
    "StableHLO": (),
    "ONNX": ("onnx", "onnxruntime"),
    "ONNX, sparse=False": ("onnx", "onnxruntime"),
    "LiteRT": ("tensorflow",),
    "LiteRT, sparse=False": ("tensorflow",),
    "SavedModel": ("tensorflow",),
    "PyTorch's state dict, .npz": (),
}


def measure(
    model: models.ResNet, sparsity: float, x: np.ndarray, repeats: int, names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Bytes, and where the format is a program its error and seconds, by format.

    Args:
      model: to export.
      sparsity: shared out by ERK.
      x: images, (batch, height, width, channels).
      repeats: calls of each.
      names: keys of `FORMATS`.
    """
    variables = removal.with_dead_channels(model, 0.0, x.shape[1])
    masks = sx.init_masks(jax.random.key(0), variables["params"], sx.ERK(sparsity))
    variables["params"] = sx.apply_masks(variables["params"], masks)
    variables = jax.tree.map(np.asarray, variables)
    calls: dict[str, Callable[[], Any]] = {
        "jax.jit(model.apply)": functools.partial(
            jax.jit(model.apply), jax.device_put(variables), x
        )
    }
    expected = np.asarray(calls["jax.jit(model.apply)"]())
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            file = pathlib.Path(folder, str(len(found)))
            call = _written(name, file, model, variables, masks, x)
            files = [path for path in (file, *file.rglob("*")) if path.is_file()]
            found[name] = {"bytes": sum(path.stat().st_size for path in files)}
            if call is not None:
                calls[name] = call
                error = np.abs(np.asarray(call()) - expected).max() / np.abs(expected).max()
                found[name]["error"] = float(error)
        for name, seconds in measuring.alternating(calls, repeats).items():
            found.setdefault(
                name, {"bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(variables))}
            )
            found[name]["median_seconds"] = statistics.median(seconds)
    return found


def _written(
    name: str, file: pathlib.Path, model: Any, variables: Any, masks: Any, x: np.ndarray
) -> Call:
    """Writes a format; a call of its runtime."""
    kind, _, option = name.partition(", ")
    shape, sparse = x.shape[1:], option != "sparse=False"
    if kind == "compact file":
        sx.save_compact(file, variables, {"params": masks, "batch_stats": None})
        return None
    if kind == "StableHLO":
        content = export.to_stablehlo(model, variables, shape, constants=not option)
        file.write_bytes(content)
        program = jax.jit(jax.export.deserialize(bytearray(content)).call)
        arguments = (jax.device_put(variables), x) if option else (x,)
        return functools.partial(program, *arguments)
    if kind == "ONNX":
        file.write_bytes(export.to_onnx(model, variables, shape, sparse=sparse))
        runtime = importlib.import_module("onnxruntime")
        session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"x": x})[0]
    if kind == "LiteRT":
        file.write_bytes(export.to_tflite(model, variables, shape, sparse=sparse))
        return _litert(file, x)
    if kind == "SavedModel":
        export.to_saved_model(file, model, variables, shape)
        loaded = importlib.import_module("tensorflow").saved_model.load(str(file))
        return lambda: loaded.predict(x).numpy()
    state: dict[str, Any] = dict(export.to_pytorch(model, variables))
    with file.open("wb") as npz:
        np.savez_compressed(npz, **state)
    return None


def _litert(file: pathlib.Path, x: np.ndarray) -> Call:
    lite = importlib.import_module("tensorflow").lite
    interpreter = lite.Interpreter(model_path=str(file), num_threads=os.cpu_count())
    (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(given["index"], x.shape)
    interpreter.allocate_tensors()

    def call() -> Any:
        interpreter.set_tensor(given["index"], x)
        interpreter.invoke()
        return interpreter.get_tensor(result["index"])

    return call


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = measuring.parser("exports", "Size, error and speed of ResNet-50 in each format.")
    parser.add_argument("--sparsity", type=float, default=0.95, help="by ERK (0.95)")
    parser.add_argument("--batch_size", type=int, default=1, help="images (1)")
    parser.add_argument("--image_size", type=int, default=224, help="pixels (224)")
    parser.add_argument("--repeats", type=int, default=7, help="calls of each (7)")
    argv = sys.argv[1:] if argv is None else argv
    asked = parser.parse_args(argv)
    if not 0 < asked.sparsity < 1 or min(asked.batch_size, asked.image_size, asked.repeats) < 1:
        parser.error("--sparsity must lie in (0, 1), all others must be at least 1")
    shape = (asked.batch_size, asked.image_size, asked.image_size, 3)
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    there = [name for name, needed in FORMATS.items() if all(map(importlib.util.find_spec, needed))]
    found = measure(models.ResNet50(), asked.sparsity, x, asked.repeats, there)
    for name, row in found.items():
        error = f"{row['error']:.1e}" if "error" in row else "-"
        seconds = f"{row['median_seconds']:.3f}" if "median_seconds" in row else "-"
        print(f"{name:28} {row['bytes'] / 1e6:6.1f} MB  error {error:>7}  {seconds:>6} s a call")
    for name in FORMATS:
        if name not in found:
            print(f"{name}: left out, needs {' and '.join(FORMATS[name])}")
    measuring.append(asked, parser, argv, {"formats": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
