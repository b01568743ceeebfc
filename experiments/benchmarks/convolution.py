"""Processor time of the models' gradients over their forward passes, on a CPU.

    python -m experiments.benchmarks.convolution [--peers=torch] [--models=resnet20,resnet50]
        [--repeats=N] [--json=FILE]

ResNet-20 on 32x32 images, batches of 128, and ResNet-50 on 64x64, batches of 32, float32: forward
pass and gradient of a training step, each with the models' convolutions and with XLA's
(`fast_cpu_convolutions=False`). Calls take turns, and medians are of ratios. Processor time sums
the threads, and leaves out what other programs do meanwhile, but not their use of the caches.

With `--peers=torch`, where torch and torchvision can be imported, whole steps with SGD as well:
ours over PyTorch's of the same model, compiled and channels last as in `against_torch`.

Predicted before the first run of this script: gradient over forward pass 3.5 for ResNet-20 and 4.0
for ResNet-50, steps over PyTorch's 1.2 for both.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from experiments.benchmarks import measuring
from experiments.benchmarks.step_time import RandomImages, Training
from experiments.benchmarks.workers import Side
from experiments.config import Config
from sparseopt_jax import models


class Setting(NamedTuple):
    """A model and what it is given."""

    model: Callable[..., models.ResNet]
    image_size: int
    batch_size: int
    num_classes: int


SETTINGS = {
    "resnet20": Setting(models.ResNet20, 32, 128, 10),
    "resnet50": Setting(models.ResNet50, 64, 32, 1000),
}
_TORCH = "experiments.benchmarks.torch_worker:TorchWorker"


def processor_seconds(call: Callable[[], Any]) -> float:
    """Seconds of a call over all threads of this process, its result included."""
    begin = time.process_time()
    jax.block_until_ready(call())  # type: ignore[no-untyped-call]
    return time.process_time() - begin


def passes(setting: Setting, fast: bool) -> dict[str, Callable[[], Any]]:
    """The compiled forward pass and gradient of a training step, both of the same batch."""
    model = setting.model(num_classes=setting.num_classes, fast_cpu_convolutions=fast)
    shape = setting.batch_size, setting.image_size, setting.image_size, 3
    x = jax.random.normal(jax.random.key(0), shape)
    labels = jnp.arange(setting.batch_size) % setting.num_classes
    variables = jax.jit(model.init)(jax.random.key(1), x)

    def loss(params: Any, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        given = {"params": params, "batch_stats": stats}
        logits, new = model.apply(given, x, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), new

    given = variables["params"], variables["batch_stats"], x
    return {
        "forward": functools.partial(jax.jit(loss), *given),
        "gradient": functools.partial(jax.jit(jax.grad(loss, has_aux=True)), *given),
    }


def gradients(setting: Setting, repeats: int) -> dict[str, Any]:
    """Medians of the seconds of each pass, and of ratios between them."""
    calls = passes(setting, True)
    calls |= {f"{name}_by_xla": call for name, call in passes(setting, False).items()}
    timers = {name: functools.partial(processor_seconds, call) for name, call in calls.items()}
    seconds = measuring.in_turns(timers, repeats)
    pairs = {
        "gradient_over_forward": ("gradient", "forward"),
        "by_xla": ("gradient_by_xla", "forward_by_xla"),
        "gradient_by_xla_over_ours": ("gradient_by_xla", "gradient"),
    }
    return {
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        **{name: measuring.median_ratio(seconds[a], seconds[b]) for name, (a, b) in pairs.items()},
    }


def steps(name: str, repeats: int, torch: Callable[..., Any]) -> dict[str, Any]:
    """Medians of the seconds of dense steps, ours and PyTorch's, and of their ratio.

    Args:
      name: of the model.
      repeats: how often each is timed.
      torch: calls the methods of a `torch_worker.TorchWorker`.
    """
    setting, model = SETTINGS[name], cast(Any, name)
    config = Config(
        model=model, topology="dense", optimizer="sgd", epochs=10, batch_size=setting.batch_size
    )
    images = RandomImages(setting.image_size, setting.num_classes)
    ours = Training(config, images)
    case = {
        "model": name, "dtype": "float32", "image_size": setting.image_size, "seeds": 1,
        "batch_size": setting.batch_size, "examples": 8 * setting.batch_size,
    }  # fmt: skip
    torch("prepare", case)
    timers = {
        "ours": functools.partial(processor_seconds, ours.step),
        "torch": functools.partial(torch, "processor_seconds", case, 1),
    }
    seconds = measuring.in_turns(timers, repeats)
    torch("drop")
    return {
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "ours_over_torch": measuring.median_ratio(seconds["ours"], seconds["torch"]),
    }


def parse(argv: Sequence[str]) -> tuple[Any, Any]:
    """The parser, and what it parsed."""
    parser = measuring.parser("convolution", "Gradients over forward passes, on a CPU.")
    parser.add_argument("--peers", choices=("torch",), help="what steps are compared with")
    parser.add_argument("--models", default=",".join(SETTINGS), metavar="NAME,...")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each (15)")
    asked = parser.parse_args(list(argv))
    asked.models = asked.models.split(",")
    if wrong := [name for name in asked.models if name not in SETTINGS]:
        parser.error(f"--models: {wrong[0]} must be one of {', '.join(SETTINGS)}")
    if asked.repeats < 1:
        parser.error(f"--repeats={asked.repeats} must be at least 1")
    missing = [n for n in ("torch", "torchvision") if importlib.util.find_spec(n) is None]
    if asked.peers and missing:
        parser.error(f"--peers=torch needs {' and '.join(missing)}, which cannot be imported")
    return parser, asked


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser, asked = parse(argv)
    result: dict[str, Any] = {}
    for name in asked.models:
        found = result[name] = gradients(SETTINGS[name], asked.repeats)
        shown = ", ".join(f"{k} {1e3 * s:.0f}" for k, s in found["seconds"].items())
        print(f"{name}, processor-ms: {shown}")
        print(
            f"gradient over forward {found['gradient_over_forward']:.2f}, XLA's own"
            f" {found['by_xla']:.2f}; its gradient over ours"
            f" {found['gradient_by_xla_over_ours']:.2f}",
            flush=True,
        )
    if asked.peers:
        # Threads of OpenMP would spin where they wait, which is no work and counts as such.
        os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
        torch = Side("torch", _TORCH)
        result["torch"] = torch("environment")
        for name in asked.models:
            found = result[name]["step"] = steps(name, asked.repeats, torch)
            shown = ", ".join(f"{k} {1e3 * s:.0f}" for k, s in found["seconds"].items())
            print(f"{name}, a step, processor-ms: {shown}; {found['ours_over_torch']:.2f}")
        torch.close()
    measuring.append(asked, parser, argv, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
