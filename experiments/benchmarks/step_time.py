"""Time of a sparse train step over the dense one's, topology updates amortised in.

    python -m experiments.benchmarks.step_time [--config=FILE] [--config.FIELD=VALUE ...]
        [--repeats=N] [--image_size=N] [--trace=DIR] [--json=FILE]

By default ResNet-20 on images of 32x32, batches of 128; for a GPU
`--config=experiments/configs/imagenet_resnet50.py --image_size=224 --config.batch_size=256`. Both
programs are those that training compiles: dense with SGD, sparse with the config's optimizer and
topology. They take turns on the same random batch, and medians are of ratios. A step that updates
the topology is timed by itself, and counts once in `update_interval` steps. A profile says in which
part of a step the time goes; `--trace` keeps it for TensorBoard or Perfetto.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import command_line, programs
from experiments import mesh as meshes
from experiments.benchmarks import measuring, profiles
from experiments.config import Config, ConfigError
from experiments.functions import method_functions, model_functions


class RandomImages:
    """The shapes of images that are drawn at random; see `data.Shapes`."""

    train_examples = 50_000
    mean, std = np.full(3, 127.5, np.float32), np.full(3, 60.0, np.float32)

    def __init__(self, image_size: int, num_classes: int) -> None:
        """For one device, the one at hand."""
        self.mesh = meshes.make_mesh(Config(), jax.devices()[:1])
        self.image_shape = (image_size, image_size, 3)
        self.num_classes = num_classes


class Training:
    """A method's compiled train step and the state that its calls replace."""

    def __init__(self, config: Config, images: RandomImages) -> None:
        """Compiles the step and draws weights, masks and a batch."""
        model = model_functions(config, images)
        method = method_functions(config, images, model)
        self._step = programs.lower_step(model, method, images.mesh).compile()
        self.text: str = self._step.as_text()
        seed = np.int32(0)
        self._state = jax.jit(method.start)(*jax.jit(model.init)(seed), seed)
        rng = np.random.default_rng(0)
        shape = (config.batch_size, *images.image_shape)
        self._batch = jax.device_put(
            (
                rng.integers(0, 256, shape, np.uint8),
                rng.integers(0, images.num_classes, shape[0]).astype(np.int32),
            ),
            meshes.batch_sharding(images.mesh),
        )

    def step(self, at: int | None = None) -> Any:
        """One step; where sparse, `at` is the number that the topology goes by."""
        if at is not None:
            opt_state = self._state.opt_state._replace(step=jax.numpy.int32(at))
            self._state = self._state._replace(opt_state=opt_state)
        self._state, measured = self._step(self._state, *self._batch)
        return measured


def parse(argv: Sequence[str]) -> tuple[Any, Any, Config]:
    """The parser, what it parsed, and the sparse config."""
    parser = measuring.parser("step_time", "Time of a sparse train step over the dense one's.")
    parser.add_argument(
        "--config", type=measuring.path, metavar="FILE", help="a config; by default ResNet-20's"
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed steps, at least 1 (15)")
    parser.add_argument("--image_size", type=int, default=32, help="pixels, at least 8 (32)")
    parser.add_argument("--trace", type=measuring.path, metavar="DIR", help="where profiles go")
    config = Config(sparsity=0.9, epochs=10)
    try:
        shown = command_line.config_for_help(argv) or (config, "ResNet-20's config")
    except ConfigError as error:
        parser.error(str(error))
    command_line.add_overrides(parser, *shown)
    asked = parser.parse_args(list(argv))
    if asked.repeats < 1 or asked.image_size < 8:
        parser.error("--repeats must be at least 1 and --image_size at least 8")
    try:
        if asked.config is not None:
            config = command_line.load_config(asked.config)
        config = dataclasses.replace(config, compare=(), **command_line.overrides(asked))
    except ConfigError as error:
        parser.error(str(error))
    if config.topology not in ("set", "rigl"):
        parser.error(f"--config.topology={config.topology} must be set or rigl")
    return parser, asked, config


def profile(
    training: Mapping[str, Training], steps: int, folder: pathlib.Path | None
) -> dict[str, dict[str, float]]:
    """Milliseconds by part of ordinary steps of each; see `profiles.profile`."""
    with tempfile.TemporaryDirectory() as scratch:
        profiled = {}
        for name, one in training.items():
            step = functools.partial(one.step, None if name == "dense" else 0)
            into = (folder or pathlib.Path(scratch)) / name
            profiled[name] = profiles.profile(step, steps, one.text, into)
    return profiled


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser, asked, config = parse(argv)
    images = RandomImages(asked.image_size, config.num_classes or 10)
    methods = {
        "dense": dataclasses.replace(config, topology="dense", optimizer="sgd"),
        "sparse": config,
    }
    training = {name: Training(method, images) for name, method in methods.items()}
    sparse = training["sparse"]
    calls: dict[str, Callable[[], Any]] = {"dense": training["dense"].step}
    # The first update is due after an interval.
    seconds = measuring.alternating(calls | {"sparse": lambda: sparse.step(0)}, asked.repeats)
    due = {"sparse": lambda: sparse.step(config.update_interval)}
    updates = measuring.alternating(calls | due, min(asked.repeats, 5))
    dense = statistics.median(seconds["dense"])
    ordinary = measuring.median_ratio(seconds["sparse"], seconds["dense"])
    update = measuring.median_ratio(updates["sparse"], updates["dense"])
    amortised = ordinary + (update - ordinary) / config.update_interval
    print(f"{config.model}, {config.dtype}, batch {config.batch_size}, {asked.image_size} pixels")
    print(f"dense step {1e3 * dense:.1f} ms (median of {asked.repeats})")
    print(f"over it: a sparse step {ordinary:.4f}, one that updates the topology {update:.3f}")
    print(f"amortised over {config.update_interval} steps: {amortised:.4f}")
    profiled = profile(training, asked.repeats, asked.trace)
    print("ms of a step by part, over all threads: " + ", ".join(profiles.PARTS))
    for name, spent in profiled.items():
        print(f"{name:>7}: " + ", ".join(f"{spent[part]:.2f}" for part in profiles.PARTS))
    result = {
        "config": dataclasses.asdict(config),
        "dense_seconds": dense,
        "ratios": {"ordinary": ordinary, "update": update, "amortised": amortised},
        "profile_ms": profiled,
    }
    measuring.append(asked, parser, argv, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
