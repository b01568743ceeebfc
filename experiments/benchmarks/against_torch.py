"""Training speed against PyTorch on the same card, in the same run.

    python -m experiments.benchmarks.against_torch --model=resnet50 [--batch_sizes=128,256,512]
    python -m experiments.benchmarks.against_torch --model=resnet20 [--batch_sizes=128] [--seeds=8]
        [--dtype=bfloat16] [--image_size=N] [--examples=50000] [--steps=N] [--repeats=5]
        [--peak_tflops=N] [--json=FILE]

Each framework has a process; they take turns, and medians are of ratios. Synthetic data, bfloat16
by default (autocast in PyTorch), SGD with Nesterov momentum and weight decay.

resnet50: torchvision's in PyTorch (channels_last, torch.compile, fused optimizer), ours dense and
sparse (RigL + SparseOpt at 0.9, a step between two topology updates), each at its best batch size
of those that are given. Images per second and model FLOPs utilisation: three forward passes of
8.23 GFLOP an image over the card's peak.

resnet20: epochs of 50,000 images of 32x32 that stay on the card, with random crops and flips;
PyTorch compiled, with CUDA graphs; ours dense and sparse, one seed and several in one program,
topology updates included. Epochs a second of all seeds together.

torch and torchvision must be installed; this project does not ask for them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.benchmarks import measuring
from experiments.benchmarks.workers import Side

PEAKS = {"H200": 989e12, "H100 80GB HBM3": 989e12, "A100": 312e12}
"""FLOPs a second, bfloat16 without sparsity, as NVIDIA publishes them; by part of the name."""

WORKERS = {
    "torch": "experiments.benchmarks.torch_worker:TorchWorker",
    "jax": "experiments.benchmarks.against_torch:JaxWorker",
}

Case = dict[str, Any]


class JaxWorker:
    """Compiles trainings and times their steps, as `torch_worker.TorchWorker` does."""

    def __init__(self) -> None:
        """Nothing is compiled yet."""
        self._run: Callable[[int], Any] | None = None

    def environment(self) -> dict[str, Any]:
        """Versions and the device."""
        from experiments import metrics

        return metrics.environment()

    def prepare(self, case: Case) -> float:
        """Compiles a case and takes a few steps; returns the seconds that took."""
        begin = time.perf_counter()
        self._run = _resnet50(case) if case["model"] == "resnet50" else _resnet20(case)
        self.run(case, 5)
        return time.perf_counter() - begin

    def run(self, case: Case, steps: int) -> float:
        """Seconds of a number of steps."""
        import jax

        assert self._run is not None
        begin = time.perf_counter()
        jax.block_until_ready(self._run(steps))  # type: ignore[no-untyped-call]
        return time.perf_counter() - begin

    def parameters(self, case: Case) -> int:
        """How many numbers the model of a case trains."""
        import jax
        import jax.numpy as jnp

        from sparseopt_jax import models

        model = models.ResNet50() if case["model"] == "resnet50" else models.ResNet20()
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))

    def drop(self) -> None:
        """Gives back the memory of the last case."""
        self._run = None


def _config(case: Case) -> Any:
    from experiments.config import Config

    sparse = case["method"] == "sparse"
    return Config(
        model=case["model"], dtype=case["dtype"], batch_size=case["batch_size"], sparsity=0.9,
        topology="rigl" if sparse else "dense", optimizer="sparseopt" if sparse else "sgd",
        augmentation="crop_flip", epochs=10_000,
    )  # fmt: skip


def _resnet50(case: Case) -> Callable[[int], Any]:
    from experiments.benchmarks.step_time import RandomImages, Training

    training = Training(_config(case), RandomImages(case["image_size"], 1000))

    def run(steps: int) -> Any:
        # From step 1 on, so that no topology update falls among them.
        training.step(1 if case["method"] == "sparse" else None)
        for _ in range(steps - 1):
            result = training.step()
        return result

    return run


def _resnet20(case: Case) -> Callable[[int], Any]:
    import jax
    import numpy as np

    from experiments import mesh as meshes
    from experiments import programs
    from experiments.batched import Batched
    from experiments.data import DeviceData, on_device
    from experiments.data.corrupt import CorruptExamples
    from experiments.run_batch import Member, RunBatch, Single

    config, rng = _config(case), np.random.default_rng(0)
    mesh = meshes.make_mesh(config, jax.devices()[:1])
    shape = case["examples"], case["image_size"], case["image_size"], 3
    split = rng.integers(0, 256, shape, np.uint8), rng.integers(0, 10, shape[:1])
    dataset = DeviceData(
        on_device.make_dataset(split, split, 10, mesh), config, CorruptExamples(0), mesh
    )
    model = programs.compile_model(config, dataset)
    members = [Member(config, seed) for seed in range(case["seeds"])]
    run_batch: RunBatch
    if len(members) == 1:
        compiled = programs.compile_method(config, dataset, model)
        run_batch = Single(members[0], model, compiled, dataset)
    else:
        run_batch = Batched(
            members, model, dataset, programs.choose_steps_per_call(config, dataset)
        )
    stepper = run_batch.stepper(0)
    state: Any = run_batch.start()

    def run(steps: int) -> Any:
        nonlocal state
        while steps:
            count = min(steps, dataset.steps_per_epoch - stepper.step % dataset.steps_per_epoch)
            state, measured = stepper.advance(state, count)
            steps -= count
        return state, measured

    return run


def best_batch(side: Callable[..., Any], cases: Sequence[Case], steps: int) -> Case:
    """Of cases of different batch sizes the one of most images a second; it stays prepared.

    Raises:
      RuntimeError: none of them could be run.
    """
    rates: list[tuple[float, Case]] = []
    problems = []
    for case in cases:
        try:
            side("prepare", case)
            seconds = statistics.median(side("run", case, steps) for _ in range(3))
            rates.append((case["batch_size"] * case["seeds"] * steps / seconds, case))
            print(f"{_name(case):>32}: {rates[-1][0]:10.1f} images/s", flush=True)
        except RuntimeError as problem:
            problems.append(str(problem))
            print(f"{_name(case):>32}: {problem}", flush=True)
        side("drop")
    if not rates:
        raise RuntimeError(f"no batch size could be run: {problems[-1]}")
    best = max(rates, key=lambda rate: rate[0])[1]
    side("prepare", best)
    return best


def _name(case: Case) -> str:
    seeds = "" if case["seeds"] == 1 else f", {case['seeds']} seeds"
    return f"{case['framework']} {case['method']}{seeds}, batch {case['batch_size']}"


def compare(
    sides: Mapping[str, Callable[..., Any]], cases: Sequence[Sequence[Case]], asked: Any
) -> dict[str, Any]:
    """Times PyTorch beside each of our methods, in turns.

    Args:
      sides: PyTorch's and ours, by name.
      cases: for each method its batch sizes; PyTorch's first.
      asked: `steps` of a call, and `repeats`.

    Returns:
      For each of our methods the medians of images per second, theirs at the time, and the ratio.
    """
    theirs = best_batch(sides["torch"], cases[0], asked.steps)
    comparisons: dict[str, Any] = {}
    for of_method in cases[1:]:
        ours = best_batch(sides["jax"], of_method, asked.steps)
        rates: dict[str, list[float]] = {"torch": [], "jax": []}
        for _ in range(asked.repeats):
            for name, case in (("torch", theirs), ("jax", ours)):
                seconds = sides[name]("run", case, asked.steps)
                rates[name].append(asked.steps * case["batch_size"] * case["seeds"] / seconds)
        sides["jax"]("drop")
        key = ours["method"] + ("" if ours["seeds"] == 1 else f"_{ours['seeds']}_seeds")
        comparisons[key] = {
            "case": ours,
            "torch_case": theirs,
            "images_per_second": statistics.median(rates["jax"]),
            "torch_images_per_second": statistics.median(rates["torch"]),
            "ratio": measuring.median_ratio(rates["jax"], rates["torch"]),
        }
        print(f"{_name(ours)} over {_name(theirs)}: {comparisons[key]['ratio']:.2f}", flush=True)
    return comparisons


def parse(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, Any]:
    """The parser, and what it parsed; leaves the program where something is off."""
    parser = measuring.parser("against_torch", "Training speed against PyTorch on the same card.")
    parser.add_argument("--model", choices=("resnet50", "resnet20"), required=True)
    parser.add_argument("--batch_sizes", metavar="N,...", help="(128,256,512; ResNet-20: 128)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--image_size", type=int, help="pixels (224; ResNet-20: 32)")
    parser.add_argument("--examples", type=int, default=50_000, help="of ResNet-20's epoch (50000)")
    parser.add_argument("--seeds", type=int, default=8, help="ResNet-20's, in one program (8)")
    parser.add_argument("--steps", type=int, help="of a timed call (20; ResNet-20: an epoch)")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each (5)")
    parser.add_argument("--peak_tflops", type=float, help="the card's; known for H100, H200, A100")
    asked = parser.parse_args(argv)
    large = asked.model == "resnet50"
    words = (asked.batch_sizes or ("128,256,512" if large else "128")).split(",")
    if not all(word.isdigit() and int(word) for word in words):
        parser.error(f"--batch_sizes={asked.batch_sizes} must be whole numbers, e.g. 128,256")
    asked.batch_sizes = [int(word) for word in words]
    asked.image_size = asked.image_size or (224 if large else 32)
    if asked.examples < max(asked.batch_sizes):
        parser.error(f"--examples={asked.examples} must be at least a batch")
    asked.steps = asked.steps or (20 if large else asked.examples // asked.batch_sizes[0])
    if min(asked.steps, asked.repeats, asked.seeds, asked.image_size // 8) < 1:
        parser.error("--steps, --repeats and --seeds must be at least 1, --image_size at least 8")
    if large and asked.steps > 90:
        parser.error(f"--steps={asked.steps} must be at most 90: topology updates come every 100")
    missing = [n for n in ("torch", "torchvision") if importlib.util.find_spec(n) is None]
    if missing:
        parser.error(f"{' and '.join(missing)} must be installed: PyTorch is what is compared with")
    return parser, asked


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser, asked = parse(argv)
    # Both frameworks are on the card at one time; jax would take three quarters of it at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    methods = [("torch", "dense", 1), ("jax", "dense", 1), ("jax", "sparse", 1)]
    if asked.model == "resnet20" and asked.seeds > 1:
        methods += [("jax", "dense", asked.seeds), ("jax", "sparse", asked.seeds)]
    shared = {k: getattr(asked, k) for k in ("model", "dtype", "image_size", "examples")}
    cases = [
        [
            shared | {"framework": f, "method": m, "seeds": seeds, "batch_size": batch}
            for batch in asked.batch_sizes
        ]
        for f, m, seeds in methods
    ]
    sides = {name: Side(name, worker) for name, worker in WORKERS.items()}
    try:
        sizes = {name: side("parameters", cases[0][0]) for name, side in sides.items()}
        if sizes["torch"] != sizes["jax"]:
            raise RuntimeError(f"the models have different numbers of parameters: {sizes}")
        environments = {name: side("environment") for name, side in sides.items()}
        comparisons = compare(sides, cases, asked)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    device = environments["torch"]["device"]
    known = next((peak for name, peak in PEAKS.items() if name in device), None)
    peak = asked.peak_tflops * 1e12 if asked.peak_tflops else known
    for side in sides.values():
        side.close()
    for name, row in comparisons.items():
        rate, theirs = row["images_per_second"], row["torch_images_per_second"]
        text = f"{name:>16}: {rate:10.1f} images/s, PyTorch {theirs:10.1f}: {row['ratio']:.2f}"
        if asked.model == "resnet20":
            text += f"; epochs/s {rate / asked.examples:.3f}"
        elif peak:
            from experiments import flops

            image = 3 * flops.count(None).dense
            row["utilisation"], row["torch_utilisation"] = (
                rate * image / peak,
                theirs * image / peak,
            )
            text += f"; utilisation {row['utilisation']:.1%}, {row['torch_utilisation']:.1%}"
        print(text)
    measuring.append(asked, parser, argv, {"methods": comparisons, "environments": environments})
    return 0


if __name__ == "__main__":
    sys.exit(main())
