"""Trains a grid of methods and seeds: `python -m experiments.train --config=FILE --workdir=DIR`.

Every method sees the same data order and starts from the same weights, seed by seed. Started
again with the same config and folder, it goes on with the first run that is not finished, from its
last checkpoint. On several processes (a TPU pod, SLURM, GKE, Open MPI) all of them run the same
command, with a folder that they share.
"""

from __future__ import annotations

import functools
import os
import pathlib
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import rich.console

from experiments import build, command_line, data, distributed, loggers, report, workdir
from experiments.checkpoint import CheckpointError
from experiments.config import Config, ConfigError
from experiments.divergence import DivergedError
from experiments.programs import MethodPrograms, compile_method, compile_model
from experiments.progress import Progress
from experiments.run import Run, StoppedError, total_steps
from experiments.stopping import StopRequests


def train_grid(config: Config, folder: pathlib.Path, stop: StopRequests) -> None:
    """Does all runs of a config that `folder` does not hold yet, then reports on all of them.

    Args:
      config: what to train.
      folder: where everything goes; made where there is none.
      stop: says when to stop.

    Raises:
      CheckpointError: a checkpoint cannot be written.
      ConfigError: the folder holds runs of another config, or another process trains in it, or the
        config does not fit the data or the devices.
      DataError: a file of the dataset is damaged.
      DivergedError: the loss of a run is not finite.
      StoppedError: it was asked to stop, and has saved a checkpoint.
    """
    console = rich.console.Console(highlight=False, soft_wrap=True, quiet=not distributed.is_main())
    say = functools.partial(console.print, markup=False)
    loggers.check_installed(config.loggers)
    dataset = data.load(config, say)
    methods = {method: config.for_method(method) for method in config.methods()}
    for method_config in methods.values():  # what cannot work is said before anything is written
        build.check(method_config, data.steps_per_epoch(config, dataset))
    with distributed.lock(lambda: workdir.lock(folder)):
        _train_in(config, folder, stop, dataset, methods, console)


def _train_in(
    config: Config,
    folder: pathlib.Path,
    stop: StopRequests,
    dataset: data.Data,
    methods: Mapping[str, Config],
    console: rich.console.Console,
) -> None:
    seeds = range(config.seed, config.seed + config.seeds)

    def open_folder() -> dict[str, list[int]]:
        workdir.open_for(config, folder)
        return {m: [s for s in seeds if not workdir.is_finished(folder, m, s)] for m in methods}

    todo = distributed.from_main(open_folder)
    steps = total_steps(config, dataset)
    missing, total = sum(map(len, todo.values())), len(methods) * len(seeds)
    progress = Progress(
        runs=missing,
        steps_per_run=steps,
        epochs=config.epochs,
        finished=total - missing,
        console=console,
    )
    say = functools.partial(console.print, markup=False)
    say(
        f"{config.model} on {config.dataset}: {', '.join(methods)}; {len(seeds)} seed(s) each,"
        f" {steps} steps a run; {total - missing} of {total} runs are done\n"
        f"{_devices(dataset)}\nrun folder: {folder}\n"
    )
    if missing:
        say("compiling (not repeated for further seeds) ...")
        model = compile_model(config, dataset)
        left = {method: methods[method] for method in methods if todo[method]}
        programs = _compile_methods(
            left, lambda method_config: compile_method(method_config, dataset, model)
        )
    main = distributed.is_main()
    with progress.live():
        for method, seed in ((m, s) for m, seeds_left in todo.items() for s in seeds_left):
            run = Run(
                methods[method],
                model,
                programs[method],
                dataset,
                seed,
                workdir.run_folder(folder, method, seed),
                progress,
                stop,
            )
            with progress.running(method, seed):
                run.train()
            if main:
                workdir.merge_metrics(folder, methods, seeds)
    if not main:
        return
    workdir.merge_metrics(folder, methods, seeds)  # it may have been stopped just before
    workdir.merge_results(config, folder, methods, seeds)
    say("\n" + report.report(folder))
    for name in ("result.json", "metrics.jsonl", "config.json"):
        say(str(folder / name))
    say(f"\nrun folder: {folder}")


def _devices(dataset: data.Data) -> str:
    mesh = dataset.mesh
    kind = mesh.devices.flat[0].device_kind
    text = f"{mesh.size} device(s) ({kind}), data={mesh.shape['data']} fsdp={mesh.shape['fsdp']}"
    processes = jax.process_count()
    return text if processes == 1 else f"{text}, {processes} processes"


def _compile_methods(
    configs: Mapping[str, Config], compile_one: Callable[[Config], MethodPrograms]
) -> dict[str, MethodPrograms]:
    """Compiles methods side by side, since each compilation takes one core."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        futures = {method: pool.submit(compile_one, c) for method, c in configs.items()}
        return {method: future.result() for method, future in futures.items()}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command, in processes that have found each other; returns its exit code.

    That is 0, 1 (diverged, damaged data, a full disk), 2 (wrong setting), 75 (another process is
    gone), 130 (Ctrl-C) or 143 (SIGTERM, or a preemption notice).
    """
    asked: command_line.CommandLine | None = None

    def tell(text: str) -> None:
        who = "" if distributed.is_main() else f"process {jax.process_index()}: "
        print(f"{who}{text.lstrip()}" if who else text, file=sys.stderr)

    def again() -> str:
        return (
            f"to continue: python -m experiments.train {shlex.join(asked.words) if asked else ''}"
        )

    stop = StopRequests()
    try:
        asked = command_line.parse(sys.argv[1:] if argv is None else argv)
        with stop:
            train_grid(asked.config, asked.workdir, stop)
    except StoppedError as stopped:
        tell(f"\nstopped and saved: {stopped}; {again()}")
        return stop.exit_code()
    except ConfigError as error:
        tell(f"error: {error}")
        return 2
    except (DivergedError, data.DataError, CheckpointError) as error:
        tell(f"error: {error}")
        return 1
    except OSError as error:
        tell(f"error: {error}; {again()}")
        return 1
    except jax.errors.JaxRuntimeError as error:
        line = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" in line:
            tell(
                f"error: a device has too little memory ({line}); a smaller batch_size or"
                " model, bfloat16, or parameters over more devices (mesh_fsdp) take less"
            )
            return 1
        if jax.process_count() == 1:
            raise
        print(
            f"error: process {jax.process_index()} has lost another one ({line}); start all of them"
            f" again, they go on from the last checkpoint; {again()}",
            file=sys.stderr,
        )
        return distributed.LOST
    except KeyboardInterrupt:
        tell(f"\ninterrupted; {again()}")
        return stop.exit_code(signal.SIGINT)
    return 0


def command() -> int:
    """Joins the other processes of the job, if there are any, and trains."""
    try:
        distributed.initialize()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return main()


if __name__ == "__main__":
    exit_code = command()
    if exit_code > 128 and jax.process_count() > 1:
        # Or the others, which may not be done yet, would take this one for lost.
        jax.distributed.shutdown()  # type: ignore[no-untyped-call]
    if exit_code > 2:
        # The interpreter would wait for a compilation to end, which cannot be stopped, or for
        # processes that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
