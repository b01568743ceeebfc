"""Kills training at random moments, starts it again, and compares the end with an undisturbed run.

    python -m experiments.soak --kills=20 [--workdir=DIR] [--seed=N]

Half of the kills (SIGKILL) fall into the writing of a checkpoint, a tenth into start-up and
compilation, the others between two checkpoints; one more follows after the last step. Then results,
metrics and the arrays of the checkpoints have to be those of the undisturbed run, bit for bit. It
exits with 0 where they are, and with 1, naming the first difference, where they are not.

It trains a small MLP on digits unless `--config=FILE` names another config, of one method and one
seed. `--config.FIELD=VALUE` works as for `experiments.train`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import Literal, NoReturn, Self

from experiments import command_line, metrics, workdir
from experiments.comparison import Comparison, compare
from experiments.config import Config, ConfigError
from experiments.paths import work_folder
from experiments.terminal import tolerant_output

Where = Literal["start-up", "step", "save", "end"]

_SMALL = (
    f"--config={pathlib.Path(__file__).parent / 'configs' / 'digits.py'}",
    "--config.compare=",
    "--config.seeds=1",
    "--config.batch_size=128",
    "--config.model=mlp",
    "--config.hidden=256",
    "--config.log_every=5",
    "--config.eval_every=3",
    "--config.diagnostics_every=20",
    "--config.checkpoint_every=25",
    "--config.mesh_data=1",
)
"""11 steps an epoch, a topology update at every eighth, a checkpoint at every 25th."""

_TEMPORARY = ".orbax-checkpoint-tmp"
_LIMIT_SECONDS = 1800
_POLL_SECONDS = 0.002


class SoakError(RuntimeError):
    """Training failed by itself, hung, or was over too soon."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """Where training was when it was killed.

    Attributes:
      where: in start-up; between two checkpoints; within the save of one; after the last step.
      step: that of the last line in `metrics.jsonl`, or of the checkpoint that was being saved.
      seconds: how long the process had run.
    """

    where: Where
    step: int
    seconds: float

    def __str__(self) -> str:
        """Place and time in words."""
        place = {
            "start-up": "in start-up",
            "step": f"at step {self.step}",
            "save": f"during the save of step {self.step}",
            "end": f"after the last step, {self.step}",
        }[self.where]
        return f"{place}, {self.seconds:.2f} s after its start"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a soak came to."""

    kills: tuple[Kill, ...]
    comparison: Comparison


@dataclasses.dataclass
class _Pace:
    """How long things take, in seconds, from the undisturbed run on."""

    start: float
    line: float
    save: float
    end: float


class _Child:
    """One start of the command, watched from outside through the files that it writes."""

    def __init__(self, words: Sequence[str], folder: pathlib.Path, run: pathlib.Path) -> None:
        """Starts it.

        Args:
          words: arguments of `experiments.train`, without the folder.
          folder: the work folder.
          run: the folder of the only run in it.
        """
        self._log, self._saves = run / "metrics.jsonl", run / "checkpoints"
        self._read: tuple[int, int] = (0, 0)
        self._step = 0
        self._before = self._stamp()
        self._stale = self._temporary()  # what the process before has left, until it is cleared
        self._output = folder.with_name(f"{folder.name}.txt")
        cache = folder.with_name("compilation-cache")
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        with self._output.open("ab") as output:
            # Its own session: a Ctrl-C on the terminal is for this process, which ends that one.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "experiments.train", *words, f"--workdir={folder}"],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment | os.environ,
                start_new_session=True,
            )
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        """The child itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves no process behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _stamp(self) -> tuple[int, int]:
        try:
            status = self._log.stat()
        except FileNotFoundError:
            return 0, 0
        return status.st_mtime_ns, status.st_size

    def _temporary(self) -> set[str]:
        try:
            return {name for name in os.listdir(self._saves) if name.endswith(_TEMPORARY)}
        except FileNotFoundError:
            return set()

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self._started

    def began(self) -> bool:
        """Whether it has written to the log, so training is under way."""
        return self._stamp() != self._before

    def step(self) -> int:
        """That of the last line it has written; 0 where it has written none."""
        stamp = self._stamp()
        if stamp in (self._read, self._before):
            return self._step
        self._read = stamp
        with self._log.open("rb") as file:
            file.seek(max(0, stamp[1] - 2**16))
            whole_lines = file.read().rpartition(b"\n")[0]
        # Cut out of a longer line it is not JSON; the next line will tell.
        with contextlib.suppress(ValueError):
            self._step = json.loads(whole_lines.rpartition(b"\n")[2] or b"{}").get("step", 0)
        return self._step

    def saving(self) -> int | None:
        """The step of the checkpoint that is being written, if there is one."""
        names = self._temporary()
        self._stale &= names
        steps = [name.removesuffix(_TEMPORARY) for name in names - self._stale]
        return next((int(step) for step in steps if step.isdecimal()), None)

    def has_saved(self, step: int) -> bool:
        """Whether the checkpoint of `step` is in place."""
        return (self._saves / str(step)).is_dir()

    def wait(self, until: Callable[[], bool]) -> bool:
        """Waits until something is so; False where the process has ended in good order first.

        Raises:
          SoakError: it ended with an error, or runs for too long.
        """
        while not until():
            code = self._process.poll()
            if code == 0:
                return False
            if code is not None:
                raise SoakError(f"training ended with exit code {code}:\n{self._tail()}")
            if self.seconds > _LIMIT_SECONDS:
                raise SoakError(f"training has not ended in {_LIMIT_SECONDS} s:\n{self._tail()}")
            time.sleep(_POLL_SECONDS)
        return True

    def wait_for(self, seconds: float) -> bool:
        """Waits for some time; returns and raises as `wait` does."""
        end = time.monotonic() + seconds
        return self.wait(lambda: time.monotonic() >= end)

    def kill(self, last_step: int) -> Kill | None:
        """Kills it where it is; None where it had ended before."""
        self._process.kill()
        seconds = self.seconds
        if self._process.wait() != -signal.SIGKILL:
            return None
        saving, step = self.saving(), self.step()
        if saving is not None:
            return Kill("save", saving, seconds)
        if not self.began():
            return Kill("start-up", step, seconds)
        ended = step == last_step and self.has_saved(last_step)
        return Kill("end" if ended else "step", step, seconds)

    def _tail(self) -> str:
        lines = self._output.read_text(errors="replace").splitlines()
        return "\n".join([*lines[-15:], f"(the end of {self._output})"])


def soak(
    words: Sequence[str],
    folder: pathlib.Path,
    kills: int,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> Outcome:
    """Trains twice, in `folder/whole` without a break and in `folder/killed` with many.

    Args:
      words: arguments of `experiments.train`, without the folder, for one method and one seed.
      folder: where to train; made where there is none, and empty.
      kills: how many times to kill it before its last step.
      seed: chooses the moments, as far as the machine takes equally long for the same.
      say: called with a line of text for each kill.

    Returns:
      Where it was killed, and whether both ended alike.

    Raises:
      ConfigError: an argument is wrong.
      SoakError: training failed, or was over before it was killed so often.
    """
    if kills < 1:
        raise ConfigError(f"--kills={kills} must be at least 1")
    _check_empty(folder)
    whole, killed = folder / "whole", folder / "killed"
    config = command_line.parse([*words, f"--workdir={whole}"]).config
    _check_one_run(config)
    (method,) = config.methods()
    runs = [workdir.run_folder(path, method, config.seed) for path in (whole, killed)]
    say(f"training without interruption in {whole} ...")
    with _Child(words, whole, runs[0]) as child:
        pace = _measure(child)
    steps = metrics.read_json(runs[0] / "result.json")["steps"]
    say(f"{steps} steps; a start takes {pace.start:.1f} s, a save {pace.save:.2f} s\n")
    done = []
    for kill in _kill_and_start(
        lambda: _Child(words, killed, runs[1]), kills, steps, pace, random.Random(seed)
    ):
        done.append(kill)
        say(f"kill {len(done)}: {kill}")
    return Outcome(tuple(done), compare(whole, killed))


def _check_empty(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"--workdir={folder} must be empty, or a folder that is not there")
    except OSError as error:
        raise ConfigError(f"--workdir={folder}: {error.strerror or error}") from error


def _check_one_run(config: Config) -> None:
    if len(config.methods()) > 1:
        names = ",".join(config.compare)
        raise ConfigError(f"compare={names} must name one method, e.g. --config.compare=")
    if config.seeds > 1:
        raise ConfigError(f"seeds={config.seeds} must be 1, e.g. --config.seeds=1")


def _measure(child: _Child) -> _Pace:
    """Waits for the undisturbed run, and finds out how long its parts take."""
    lines: list[tuple[float, int]] = []  # when a line for a later step was first seen
    saves: list[tuple[float, int | None]] = [(0.0, None)]  # when what is being saved changed

    def look() -> bool:
        now, step, saving = child.seconds, child.step(), child.saving()
        if step > (lines[-1][1] if lines else 0):
            lines.append((now, step))
        if saving != saves[-1][1]:
            saves.append((now, saving))
        return False

    child.wait(look)
    look()
    spans = [end - begin for (begin, step), (end, _) in itertools.pairwise(saves) if step]
    first, last = lines[0][0], lines[-1][0]
    return _Pace(
        start=first,
        line=(last - first) / len(lines),
        save=statistics.median(spans) if spans else 0.0,
        end=child.seconds - last,
    )


def _kill_and_start(
    start: Callable[[], _Child],
    kills: int,
    steps: int,
    pace: _Pace,
    chance: random.Random,
) -> Iterator[Kill]:
    """Yields every kill; trains to the end after the last one."""
    saves, starts = (kills + 1) // 2, kills // 10
    missing = collections.Counter[Where](
        {"save": saves, "start-up": starts, "step": kills - saves - starts}
    )
    reached = 0
    late = 1.0  # how far into a save a kill may fall; less where it came too late
    while missing.total():
        # Such that the targets of all kills that are left are spread over the steps that are left.
        left = missing["save"] + missing["step"]
        target = reached + chance.uniform(0, 2 * max(0.9 * steps - reached, 0) / (left + 1))
        wish = chance.choice([*missing.elements()])
        with start() as child:
            there = _wait_for_place(child, wish, target, late, pace, chance)
            kill = child.kill(steps) if there else None
        if kill is None:
            raise SoakError(
                f"the run was over with {missing.total()} of {kills} kills still to come; it needs"
                " more steps, e.g. by --config.epochs"
            )
        yield kill
        if wish == "save" and kill.where != "save":
            late /= 2
        if wish == "start-up" and kill.where != "start-up":
            pace.start = min(pace.start, kill.seconds)
        reached = max(reached, kill.step)
        missing = +(missing - collections.Counter[Where]([kill.where]))
    with start() as child:
        ended = child.wait(lambda: child.step() == steps and child.has_saved(steps))
        alive = ended and child.wait_for(chance.uniform(0, 0.8 * pace.end))
        if alive and (kill := child.kill(steps)):
            yield kill
    with start() as child:
        child.wait(lambda: False)


def _wait_for_place(
    child: _Child, wish: Where, target: float, late: float, pace: _Pace, chance: random.Random
) -> bool:
    """Waits until `child` is where it is to be killed; False where it ended first."""
    if wish == "start-up":
        delay = chance.uniform(0, pace.start)
        return child.wait(lambda: child.seconds >= delay or child.began())
    if wish == "save":
        delay = chance.uniform(0, late * pace.save)
        return child.wait(lambda: (child.saving() or -1) >= target) and child.wait_for(delay)
    delay = chance.uniform(0, pace.line)
    there = child.wait(lambda: child.step() >= target) and child.wait_for(delay)
    return there and child.wait(lambda: child.saving() is None)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = command_line.Parser(
        prog="python -m experiments.soak",
        description="Kills and resumes training; compares with an undisturbed run bit for bit.",
        epilog="--config=FILE and --config.FIELD=VALUE are those of experiments.train.",
        allow_abbrev=False,
    )
    parser.add_argument("--kills", type=int, default=20, help="how often to kill (default: 20)")
    parser.add_argument("--workdir", metavar="DIR", help="default: runs/soak-<time>")
    parser.add_argument("--seed", type=int, default=0, help="chooses the moments (default: 0)")
    given, rest = parser.parse_known_args(list(argv))
    own_config = any(word == "--config" or word.startswith("--config=") for word in rest)
    # Every kill in a save needs a save of its own, about two epochs later.
    epochs = f"--config.epochs={max(60, 3 * given.kills)}"
    return given, rest if own_config else [*_SMALL, epochs, *rest]


@tolerant_output()
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 the same, 1 not so, 2 a wrong setting, 130 Ctrl-C."""
    try:
        given, words = _parse(sys.argv[1:] if argv is None else argv)
        default = f"runs/soak-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = work_folder(given.workdir or default)
        outcome = soak(words, folder, given.kills, given.seed)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SoakError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    places = collections.Counter(kill.where for kill in outcome.kills)
    comparison = outcome.comparison
    print(
        f"\n{len(outcome.kills)} kills: {places['start-up']} in start-up, {places['step']} between"
        f" checkpoints, {places['save']} during a save, {places['end']} after the last step"
    )
    if comparison.difference is not None:
        print(f"DIFFERENT from the undisturbed run: {comparison.difference}")
        return 1
    print(
        f"equal to the undisturbed run, bit for bit: {comparison.values} values of results,"
        f" {comparison.lines} lines of metrics, {comparison.arrays} arrays of checkpoints"
        f" ({comparison.bytes:,} bytes)"
    )
    return 0


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)  # so that the child does not stay behind
    sys.exit(main())
