"""Trains a grid of methods and seeds: `python -m experiments.train --config=FILE --workdir=DIR`.

Every method sees the same data order and starts from the same weights, seed by seed. Started
again with the same config and folder, it goes on with the first run that is not finished.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sparseopt_jax as sx
from experiments import build, command_line, data, metrics, report, workdir
from experiments.config import Config, ConfigError
from experiments.programs import MethodPrograms, ModelPrograms, State, compile_method, compile_model
from experiments.progress import Progress
from experiments.stepping import Stepper, bound_in_flight

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""


class DivergedError(RuntimeError):
    """The training loss is no longer a finite number."""


def train_run(
    config: Config,
    model: ModelPrograms,
    programs: MethodPrograms,
    dataset: data.Data,
    seed: int,
    folder: pathlib.Path,
    progress: Progress,
) -> None:
    """Trains one method with one seed, from the first step to `result.json` in its own folder.

    Args:
      config: the config of that method alone.
      model: the compiled programs of the model.
      programs: those of the method.
      dataset: what to train and to test on.
      seed: of weights, masks and data order.
      folder: where metrics, fan-ins and result go; what an interrupted run left is overwritten.
      progress: told of every evaluation and logged step.

    Raises:
      DataError: an image cannot be decoded, or a file be read; the message names it.
      DivergedError: the loss is not finite; the message names the step.
    """
    (method,) = config.methods()
    sparse = config.topology != "dense"
    per_epoch = data.steps_per_epoch(config, dataset)
    last_step = total_steps(config, dataset)
    folder.mkdir(parents=True, exist_ok=True)

    state = programs.start(*model.init(jnp.int32(seed)), jnp.int32(seed))
    maskable = active = sum(model.layers.values())
    masks = itop_rate = churn = None
    if sparse:
        first_masks = sx.get_masks(state.opt_state)
        fan_ins = _fan_ins(first_masks, model.layers, "before")
        active, _, itop_rate, masks = programs.measure(state.opt_state, first_masks)
    step = 0
    test: dict[str, float] = {}
    shown: dict[str, float] = {}
    line: dict[str, Any] = {}
    pending: list[dict[str, jax.Array]] = []  # of the steps since the last line, on the device
    logged_step, training_seconds, since = 0, 0.0, time.monotonic()

    with (
        metrics.JsonLines(folder / "metrics.jsonl") as lines,
        contextlib.closing(Stepper(programs, dataset, seed, step)) as stepper,
    ):
        while step < last_step:
            epoch = step // per_epoch + 1
            log_at = (step // config.log_every + 1) * config.log_every
            count = min(log_at, epoch * per_epoch, last_step) - step
            state, measured = stepper.advance(state, count)
            pending += measured
            step += count
            if step in (log_at, last_step):
                values = _mean_of_finite(pending, step, f"{method} seed {seed}", config)
                if sparse:
                    active, churn, itop_rate, masks = programs.measure(state.opt_state, masks)
                elapsed = time.monotonic() - since
                line = {
                    "kind": "train", "method": method, "seed": seed,
                    "step": step, "epoch": step / per_epoch, **values,
                    "learning_rate": float(programs.learning_rate(step - 1)),
                    "density": int(active) / maskable,
                    "mask_churn": churn, "itop_rate": itop_rate,
                    "examples_per_second": (step - logged_step) * config.batch_size / elapsed,
                }  # fmt: skip
                if config.max_corrupt:
                    line["corrupt_examples"] = len(dataset.corrupt)
                lines.write(line)
                shown |= {"loss": line["loss"], "density": line["density"]}
                progress.update(step, epoch, shown)
                training_seconds += elapsed
                pending, logged_step, since = [], step, time.monotonic()
            if step < epoch * per_epoch and step < last_step:
                continue
            jax.block_until_ready(state)  # type: ignore[no-untyped-call]
            paused = time.monotonic()
            where = {"method": method, "seed": seed, "step": step, "epoch": step / per_epoch}
            if epoch % config.eval_every == 0 or step == last_step:
                test = _test(model, state, dataset)
                lines.write({"kind": "eval"} | where | test)
                shown |= test
                progress.update(step, epoch, shown)
            found = _diagnostics(
                config, programs, state, stepper.last_batch(), epoch, step == last_step
            )
            if found:
                lines.write({"kind": "diagnostics"} | where | found)
            since += time.monotonic() - paused  # neither is training time

    if sparse:
        masks = sx.get_masks(state.opt_state)
        fan_ins |= _fan_ins(masks, model.layers, "after")
        arrays = io.BytesIO()
        np.savez(arrays, **fan_ins)  # type: ignore[arg-type]
        metrics.write_atomically(folder / "fan_in.npz", arrays.getvalue())
    # Last of all: a run is finished when this file is there.
    metrics.write_json(
        folder / "result.json",
        {
            "method": method, "seed": seed, "steps": step, "epochs": step / per_epoch, **test,
            "train_loss": line["loss"], "train_accuracy": line["train_accuracy"],
            "density": int(active) / maskable, "itop_rate": itop_rate,
            "active_weights": int(active), "maskable_weights": maskable,
            "corrupt_examples": len(dataset.corrupt),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "state_sha256": metrics.state_sha256(state.params, masks if sparse else None),
            "timing": {
                "training_seconds": training_seconds,
                "compilation_seconds": programs.seconds,
                "examples_per_second": step * config.batch_size / training_seconds,
            },
            "environment": metrics.environment(),
        },
    )  # fmt: skip


def total_steps(config: Config, dataset: data.Data) -> int:
    """Training steps of one run."""
    steps = config.epochs * data.steps_per_epoch(config, dataset)
    return steps if config.steps == -1 else min(steps, config.steps)


def _mean_of_finite(
    pending: list[dict[str, jax.Array]], step: int, run: str, config: Config
) -> dict[str, float]:
    """Means over the steps up to `step`; raises DivergedError where a loss is not finite."""
    fetched = jax.device_get(pending)
    columns = {
        name: np.concatenate([np.atleast_1d(values[name]) for values in fetched])
        for name in fetched[0]
    }
    losses = columns["loss"]
    if not np.isfinite(losses).all():
        index = np.argmin(np.isfinite(losses))  # the first one
        raise DivergedError(
            f"{run}: the loss is {losses[index]} at step {step - len(losses) + 1 + index}; a"
            f" smaller learning_rate than {config.learning_rate:g} or warmup_epochs may help"
        )
    return {name: float(values.mean(dtype=np.float64)) for name, values in columns.items()}


def _test(model: ModelPrograms, state: State, dataset: data.Data) -> dict[str, float]:
    """Accuracy and mean loss over all test examples, each counted once."""
    sums: list[tuple[jax.Array, ...]] = []
    for batch in dataset.eval_batches():
        sums.append(model.evaluate(state.params, state.batch_stats, batch))
        bound_in_flight(sums)
    columns = zip(*jax.device_get(sums), strict=True)
    examples, correct, losses = (sum(map(float, column)) for column in columns)
    if not examples:
        raise data.DataError("there is no test image that can be decoded")
    return {"test_accuracy": correct / examples, "test_loss": losses / examples}


def _diagnostics(
    config: Config,
    programs: MethodPrograms,
    state: State,
    batch: tuple[jax.Array, jax.Array],
    epoch: int,
    last: bool,
) -> dict[str, Any]:
    """What is due at the end of this epoch, measured on the last batch; empty if nothing is."""

    def due(every: int) -> bool:
        return every > 0 and (epoch % every == 0 or last)

    found: dict[str, Any] = {}
    if due(config.diagnostics_every):
        found |= programs.diagnose(state, *batch)
    if due(config.hessian_every):
        found |= programs.sharpness(state, *batch)
    return jax.device_get(found)


def _fan_ins(masks: Any, layers: Mapping[str, int], when: str) -> dict[str, np.ndarray]:
    """Fan-ins of every layer, and its dense fan-in, as `report.Run.fan_in` has them."""
    leaves = metrics.path_leaves(masks)
    arrays = {}
    for path in layers:
        fan_in = np.asarray(sx.fan_in(leaves[path]))
        arrays[f"{when}/{path}"] = fan_in
        arrays[f"size/{path}"] = np.asarray(leaves[path].size // fan_in.size)
    return arrays


def train_grid(config: Config, folder: pathlib.Path, console: Any = None) -> None:
    """Does all runs of a config that `folder` does not hold yet, then reports on all of them.

    Args:
      config: what to train.
      folder: where everything goes; made where there is none.
      console: a rich console; by default standard output.

    Raises:
      ConfigError: the folder holds runs of another config, or the config does not fit the data.
      DataError: a file of the dataset is damaged.
      DivergedError: the loss of a run is not finite.
    """
    say = functools.partial(console.print, markup=False) if console else print
    dataset = data.load(config, say)
    steps = total_steps(config, dataset)
    methods = {method: config.for_method(method) for method in config.methods()}
    for method_config in methods.values():  # what cannot work is said before anything is written
        build.check(method_config, data.steps_per_epoch(config, dataset))
    workdir.open_for(config, folder)

    seeds = range(config.seed, config.seed + config.seeds)
    todo = {m: [s for s in seeds if not workdir.is_finished(folder, m, s)] for m in methods}
    missing, total = sum(map(len, todo.values())), len(methods) * len(seeds)
    progress = Progress(
        runs=missing,
        steps_per_run=steps,
        epochs=config.epochs,
        finished=total - missing,
        console=console,
    )
    print_ = progress.console.print
    print_(
        f"{config.model} on {config.dataset}: {', '.join(methods)}; {len(seeds)} seed(s) each,"
        f" {steps} steps a run; {total - missing} of {total} runs are done\nrun folder: {folder}\n",
        markup=False,
    )
    if missing:
        print_("compiling (not repeated for further seeds) ...")
        model = compile_model(config, dataset)
        left = {method: methods[method] for method in methods if todo[method]}
        programs = _compile_methods(left, dataset, model)
    with progress.live():
        for method, seed in ((m, s) for m, seeds_left in todo.items() for s in seeds_left):
            run_folder = workdir.run_folder(folder, method, seed)
            with progress.running(method, seed):
                train_run(
                    methods[method], model, programs[method], dataset, seed, run_folder, progress
                )
            workdir.merge_metrics(folder, methods, seeds)
    workdir.merge_results(config, folder, methods, seeds)
    print_("\n" + report.report(folder), markup=False)
    for name in ("result.json", "metrics.jsonl", "config.json"):
        print_(str(folder / name), markup=False)
    print_(f"\nrun folder: {folder}", markup=False)


def _compile_methods(
    configs: Mapping[str, Config], dataset: data.Data, model: ModelPrograms
) -> dict[str, MethodPrograms]:
    """Compiles methods side by side, since each compilation takes one core."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        futures = {m: pool.submit(compile_method, c, dataset, model) for m, c in configs.items()}
        return {method: future.result() for method, future in futures.items()}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code.

    That is 0, 1 (diverged, or damaged data), 2 (wrong setting) or 130 (Ctrl-C).
    """
    asked: command_line.CommandLine | None = None
    try:
        asked = command_line.parse(sys.argv[1:] if argv is None else argv)
        train_grid(asked.config, asked.workdir)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (DivergedError, data.DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        words = shlex.join(asked.words) if asked else ""
        print(f"\ninterrupted; to continue: python -m experiments.train {words}", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    exit_code = main()
    if exit_code == INTERRUPTED:
        # A compilation cannot be stopped, and the interpreter would wait for it to end.
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
