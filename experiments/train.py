"""Trains a grid of methods and seeds: `python -m experiments.train --config=FILE --workdir=DIR`.

Every method sees the same data order and starts from the same weights, seed by seed. Started
again with the same config and folder, it goes on with the first run that is not finished, from its
last checkpoint. On several processes (a TPU pod, SLURM, GKE, Open MPI) all of them run the same
command, with a folder that they share.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import pathlib
import shlex
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NoReturn

import jax
import rich.console

from experiments import (
    build,
    command_line,
    corrections,
    data,
    distributed,
    loggers,
    metrics,
    report,
    workdir,
)
from experiments.batched import Batched
from experiments.checkpoint import CheckpointError
from experiments.config import Config, ConfigError
from experiments.divergence import DivergedError
from experiments.programs import (
    ModelPrograms,
    choose_steps_per_call,
    compile_method,
    compile_model,
    kept_in,
    on_cpu,
)
from experiments.progress import Progress
from experiments.run import Run, StoppedError, total_steps
from experiments.run_batch import Member, RunBatch, Single
from experiments.stopping import StopRequests
from experiments.terminal import tolerant_output

Report = Callable[[Config, pathlib.Path, data.Data], str]
"""Reports on the finished runs of a config in a work folder, which its data were loaded for."""

_MANY = 10**6  # steps an epoch, for which no setting is too large


def train_grid(
    config: Config, folder: pathlib.Path, stop: StopRequests, further: Report | None = None
) -> None:
    """Does all runs of a config that `folder` does not hold yet, then reports on all of them.

    Args:
      config: what to train.
      folder: where everything goes; made where there is none.
      stop: says when to stop.
      further: reports on more, on every process; what it returns is said after the report.

    Raises:
      CheckpointError: a checkpoint cannot be written.
      ConfigError: the folder holds runs of another config, or another process trains in it, or the
        config does not fit the data or the devices.
      DataError: a file of the dataset is damaged.
      DivergedError: the loss of a run is not finite.
      StoppedError: it was asked to stop, and has saved a checkpoint.
    """
    console = make_console()
    say = functools.partial(console.print, markup=False)
    check_loggers(config, folder)
    dataset = data.load(config, say, check=check)
    check(config, dataset)  # images may have been left out
    with distributed.lock(lambda: workdir.lock(folder)), kept_in(folder):
        todo = open_folder(config, folder)
        total, steps = len(config.runs()), total_steps(config, dataset)
        progress = Progress(len(todo), steps * len(todo), total - len(todo), console)
        say(
            f"{config.model} on {config.dataset}: {', '.join(config.methods())};"
            f" {config.seeds} seed(s) each, {steps} steps a run; {total - len(todo)} of {total}"
            f" runs are done\n{devices(dataset)}\nrun folder: {folder}\n"
        )
        with progress.live():
            train_missing(config, folder, todo, dataset, progress, stop)
        if distributed.is_main():
            say("\n" + report.report(folder))
        if further is not None:
            say("\n" + further(config, folder, dataset) + "\n")
        if distributed.is_main():
            for name in ("result.json", "metrics.jsonl", "config.json"):
                say(str(folder / name))
            say(f"\nrun folder: {folder}")


def make_console() -> rich.console.Console:
    """Where to say things: standard output, on process 0 alone."""
    return rich.console.Console(highlight=False, soft_wrap=True, quiet=not distributed.is_main())


def check_loggers(config: Config, folder: pathlib.Path) -> None:
    """Raises ConfigError where a logger that is asked for cannot work.

    For runs that go on, perhaps by themselves on a new machine, nobody need be logged in.
    """

    def log_in() -> None:
        paths = [workdir.run_folder(folder, *run) for run in workdir.missing(config, folder)]
        if not all((path / "run.json").is_file() for path in paths):
            loggers.check_login(config.loggers)

    loggers.check_installed(config.loggers)
    distributed.from_main(log_in)


def check(config: Config, dataset: data.Data | data.Facts | None) -> None:
    """Says what cannot work before anything is written; raises ConfigError.

    Args:
      config: what to train.
      dataset: what it is to be trained on; None, where it cannot be opened, takes it to be large.
    """
    steps = _MANY if dataset is None else data.steps_per_epoch(config, dataset)
    for method in config.methods():
        build.check(config.for_method(method), steps)
    if dataset is not None:
        batches_runs(config, dataset)


def open_folder(config: Config, folder: pathlib.Path) -> list[tuple[str, int]]:
    """Makes or opens the work folder of a config, which has to be locked.

    Returns:
      Method and seed of each run that it does not hold, in the order of the grid.
    """

    def missing() -> list[tuple[str, int]]:
        workdir.open_for(config, folder)
        return workdir.missing(config, folder)

    return [(method, seed) for method, seed in distributed.from_main(missing)]


def train_missing(
    config: Config,
    folder: pathlib.Path,
    todo: Sequence[tuple[str, int]],
    dataset: data.DeviceData | data.StreamedData,
    progress: Progress,
    stop: StopRequests,
    prefix: str = "",
    diverged: Callable[[Member, DivergedError], None] | None = None,
) -> None:
    """Trains runs of a config, and brings together what all of its finished runs have left.

    Args:
      config: what to train.
      folder: its work folder, open and locked.
      todo: method and seed of each run to do.
      dataset: what the config names.
      progress: shows how far it is.
      stop: says when to stop.
      prefix: comes before the name of a run where its progress is shown.
      diverged: called for a run whose loss is not finite, after which the others go on; without it
        DivergedError is raised. Runs that trained with it are then trained one by one.

    Raises:
      CheckpointError, DataError, DivergedError, StoppedError: as `train_grid`.
    """
    main = distributed.is_main()
    steps = total_steps(config, dataset)
    epochs = -(-steps // data.steps_per_epoch(config, dataset))  # `steps` may cut them short

    def compiled(run_batches: RunBatches) -> RunBatches:
        methods = [m for m in config.methods() if any(m == method for method, _ in todo)]
        what, printed = f"{prefix}compiling {', '.join(methods)}, once for all seeds", True
        while True:
            with progress.doing(what, printed):
                following = next(run_batches, None)
            if following is None:
                return
            yield following
            printed = False
            del following  # before the next one is compiled

    def train_all(run_batches: RunBatches) -> None:
        for run_batch, checkpoints in compiled(run_batches):
            folders = [workdir.run_folder(folder, m.method, m.seed) for m in run_batch.members]
            left = sum(not (path / "result.json").is_file() for path in folders)
            run = Run(run_batch, dataset, folders, checkpoints, progress, stop)
            try:
                with progress.running(prefix + name_of(run_batch), steps, epochs, left):
                    run.train()
            except DivergedError as error:
                if diverged is None:
                    raise
                if len(run_batch.members) > 1:
                    (checkpoints.parent / "runs.json").unlink(missing_ok=True)  # it is given up
                    members = {(member.method, member.seed) for member in run_batch.members}
                    runs = [run for run in workdir.missing(config, folder) if run in members]
                    progress.console.print(f"{error}\none by one, then:", markup=False)
                    train_all(_singles(config, folder, runs, dataset, run_batch.model))
                else:
                    progress.skipped(1, steps)
                    diverged(run_batch.members[0], error)
            if main:
                workdir.merge_metrics(folder)
            del run_batch, run  # before the next one is compiled
            gc.collect()

    if todo:
        with progress.doing(f"{prefix}compiling {config.model}", printed=True):
            model = compile_model(config, dataset)
        make = _batched if batches_runs(config, dataset) else _singles
        with contextlib.closing(make(config, folder, todo, dataset, model)) as run_batches:
            train_all(run_batches)
    if main:
        workdir.merge_metrics(folder)  # it may have been stopped just before
        workdir.merge_results(folder)


def batches_runs(config: Config, dataset: data.Data | data.Facts) -> bool:
    """Whether methods and seeds train in one program; raises ConfigError where they cannot."""
    if config.batch_runs == "no":
        return False
    fits = not dataset.streamed and dataset.mesh.size == 1
    if config.batch_runs == "yes":
        if not fits:
            raise ConfigError(
                "batch_runs='yes' must be auto or no, since it takes one device with the dataset in"
                f" its memory; there are {dataset.mesh.size} device(s), storage={config.storage}",
                {"batch_runs": "auto"},
            )
        return True
    small = config.model in ("resnet8", "resnet20", "mlp")
    return fits and small and len(config.runs()) > 1 and not on_cpu(dataset.mesh)


def name_of(run_batch: RunBatch) -> str:
    """Methods and seeds of a run batch, in words."""
    methods = list(dict.fromkeys(member.method for member in run_batch.members))
    seeds = list(dict.fromkeys(str(member.seed) for member in run_batch.members))
    return f"{', '.join(methods)} seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"


RunBatches = Generator[tuple[RunBatch, pathlib.Path], None, None]
"""Run batches, and where the checkpoints of each go."""


def _singles(
    config: Config,
    folder: pathlib.Path,
    todo: Sequence[tuple[str, int]],
    dataset: data.Data,
    model: ModelPrograms,
) -> RunBatches:
    """One by one; on a CPU a run trains while the methods of later ones are compiled."""
    methods = [m for m in config.methods() if any(m == n for n, _ in todo)]
    # Each compilation takes a core, of which one is left to the runs.
    cores, cpu = os.cpu_count() or 1, on_cpu(dataset.mesh)
    pool = ThreadPoolExecutor(max(1, cores - cpu))
    try:
        programs = {
            m: pool.submit(compile_method, config.for_method(m), dataset, model) for m in methods
        }
        if not cpu:  # other compilers try programs out, on a device that should be free
            wait(programs.values())
        for method, seed in todo:
            member = Member(config.for_method(method), seed)
            run_batch = Single(member, model, programs[method].result(), dataset)
            yield run_batch, workdir.run_folder(folder, method, seed) / "checkpoints"
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _batched(
    config: Config,
    folder: pathlib.Path,
    todo: Sequence[tuple[str, int]],
    dataset: data.Data,
    model: ModelPrograms,
) -> RunBatches:
    assert isinstance(dataset, data.DeviceData)
    for own_folder, runs in workdir.together(config, folder, todo):
        own_folder.mkdir(parents=True, exist_ok=True)
        metrics.write_json(own_folder / "runs.json", runs)
        members = [Member(config.for_method(method), seed) for method, seed in runs]
        steps_per_call = choose_steps_per_call(config, dataset)
        yield Batched(members, model, dataset, steps_per_call), own_folder / "checkpoints"


def devices(dataset: data.Data) -> str:
    """The devices that a dataset is used on, in words."""
    mesh = dataset.mesh
    kind = mesh.devices.flat[0].device_kind
    text = f"{mesh.size} device(s) ({kind}), data={mesh.shape['data']} fsdp={mesh.shape['fsdp']}"
    processes = jax.process_count()
    return text if processes == 1 else f"{text}, {processes} processes"


@tolerant_output()
def main(argv: Sequence[str] | None = None) -> int:
    """The command, in processes that have found each other; returns its exit code (`guarded`)."""
    return command("experiments.train", sys.argv[1:] if argv is None else argv)


def command(name: str, argv: Sequence[str], further: Report | None = None) -> int:
    """A command that trains a config's grid.

    Args:
      name: its module.
      argv: its arguments.
      further: as `train_grid` takes it.

    Returns:
      Its exit code (`guarded`).
    """
    asked: command_line.CommandLine | None = None

    def body(stop: StopRequests) -> None:
        nonlocal asked
        asked = command_line.parse(argv, name)
        try:
            with stop:
                train_grid(asked.config, asked.workdir, stop, further)
        except ConfigError as error:
            raise corrections.with_command(error, name, asked.words) from error

    return guarded(body, lambda: f"python -m {name} {shlex.join(asked.words) if asked else ''}")


def guarded(body: Callable[[StopRequests], None], again: Callable[[], str]) -> int:
    """Runs a command that trains, and says in a line or two what went wrong.

    Args:
      body: the command; it enters the StopRequests that it is given while it trains.
      again: the command line that goes on where it was.

    Returns:
      The exit code: 0, 1 (diverged, damaged data, a full disk), 2 (wrong setting), 75 (another
      process is gone), 130 (Ctrl-C) or 143 (SIGTERM, or a preemption notice).
    """

    def tell(text: str) -> None:
        who = "" if distributed.is_main() else f"process {jax.process_index()}: "
        print(f"{who}{text.lstrip()}" if who else text, file=sys.stderr)

    metrics.checkout()
    stop = StopRequests()
    try:
        body(stop)
    except StoppedError as stopped:
        tell(f"\nstopped and saved: {stopped}; to continue: {again()}")
        return stop.exit_code()
    except ConfigError as error:
        tell(f"error: {error}")
        return 2
    except (DivergedError, data.DataError, CheckpointError) as error:
        tell(f"error: {error}")
        return 1
    except OSError as error:
        tell(f"error: {error}; to continue: {again()}")
        return 1
    except jax.errors.JaxRuntimeError as error:
        line = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" in line:
            tell(
                f"error: a device has too little memory ({line}); a smaller batch_size or"
                " model, bfloat16, runs one by one (batch_runs=no), or parameters over more devices"
                " (mesh_fsdp) take less"
            )
            return 1
        if jax.process_count() == 1:
            raise
        print(
            f"error: process {jax.process_index()} has lost another one ({line}); start all of them"
            f" again, they go on from the last checkpoint; to continue: {again()}",
            file=sys.stderr,
        )
        return distributed.LOST
    except KeyboardInterrupt:
        tell(f"\ninterrupted; to continue: {again()}")
        return stop.exit_code(signal.SIGINT)
    return 0


def leave(exit_code: int) -> NoReturn:
    """Ends the program, also where something is under way that cannot be stopped."""
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


def join_and_run(main: Callable[[], int]) -> int:
    """Joins the other processes of the job, if there are any, and runs a command."""
    try:
        distributed.initialize()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return main()


if __name__ == "__main__":
    leave(join_and_run(main))
