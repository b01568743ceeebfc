"""Shows the lines of metrics.jsonl in TensorBoard and in Weights & Biases as well.

metrics.jsonl is the record of a run and these are views of it: a logger that fails says so once, on
standard error, and is left behind while training goes on. Their packages are imported only when
they are asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import os
import pathlib
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from experiments.config import Config, ConfigError
from experiments.metrics import write_atomically

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""The package that each logger needs."""

PROJECT = "sparseopt_jax"
"""The project of W&B where WANDB_PROJECT does not name another."""

UPLOAD_SECONDS = 60
"""How long W&B may upload at a run's end, where WANDB_FINISH_TIMEOUT does not say it."""

_LABELS = ("kind", "method", "seed", "step")  # which line it is, not what was measured


def check_installed(names: Sequence[str]) -> None:
    """Raises where the package of a logger cannot be imported.

    Args:
      names: of loggers, the config's field `loggers`.

    Raises:
      ConfigError: a logger is unknown or its package is absent; the message names the package.
    """
    for name in names:
        if name not in PACKAGES:
            raise ConfigError(f"loggers={name!r} must be one of {', '.join(PACKAGES)}")
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError as error:
            raise ConfigError(
                f"loggers={name} needs the package {PACKAGES[name]}:"
                f" pip install {PACKAGES[name]} ({error})"
            ) from error


def check_login(names: Sequence[str]) -> None:
    """Raises where W&B is asked for and would refuse a run; on a terminal it asks for the key.

    Args:
      names: of loggers, the config's field `loggers`.

    Raises:
      ConfigError: nobody is logged in, nor is it offline, or a setting of W&B is wrong.
    """
    if "wandb" not in names:
        return
    wandb = importlib.import_module("wandb")
    try:
        wandb.login(verify=False)  # without a word to the server, which may be out of reach
    except (wandb.UsageError, wandb.errors.AuthenticationError, ValueError) as error:
        raise ConfigError(
            f"loggers=wandb: {error}\nLog in by `wandb login` or WANDB_API_KEY, or set"
            " WANDB_MODE=offline, to upload the lines later by `wandb sync`"
        ) from error
    except Exception:
        return  # of its service, not of the settings; the first run will tell, and go on


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line by their tags.

    Args:
      line: as it is in metrics.jsonl, with its `kind`; numbers may be arrays of no dimensions.

    Returns:
      The numbers by `KIND/NAME`, and those of nested dicts by `KIND/NAME/.../NAME`. What is not a
      finite number (None, text, true and false, lists) is left out.
    """
    return {
        f"{line['kind']}/{name}": value
        for name, value in _numbers({k: v for k, v in line.items() if k not in _LABELS})
    }


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", number) for inner, number in _numbers(value))
        elif value is not None and not isinstance(value, (str, list, tuple)):
            array = np.asarray(value)
            if array.ndim == 0 and array.dtype != np.bool_ and math.isfinite(float(array)):
                yield name, float(array)


class _Logger(Protocol):
    def write(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self, exit_code: int) -> None: ...


class _TensorBoard:
    """One event file, written line by line.

    tensorboardX's SummaryWriter is not used: it writes from a thread of its own, and where that
    thread dies, of a full disk for one, the next lines wait for it for ever, and training with
    them. Here an error comes out of `write`.
    """

    def __init__(self, folder: pathlib.Path, first_step: int) -> None:
        self._event = importlib.import_module("tensorboardX.proto.event_pb2").Event
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads a folder's files in the order of their names.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._records = importlib.import_module("tensorboardX").RecordWriter(str(folder / name))
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._records.close)
            self._add(file_version="brain.Event:2")
            # The start of a session hides what earlier files have from its step on.
            hidden_from = first_step + 1 if first_step else 0
            self._add(step=hidden_from, session_log={"status": "START"})
            self._records.flush()
            on_error.pop_all()

    def _add(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def write(self, values: Mapping[str, float], step: int) -> None:
        tagged = [{"tag": tag, "simple_value": value} for tag, value in values.items()]
        self._add(step=step, summary={"value": tagged})
        self._records.flush()

    def close(self, exit_code: int) -> None:
        self._records.close()


class _WandB:
    """One run of W&B, the same one each time the training run goes on.

    A step that W&B has seen before an interruption it ignores, with a warning; training repeats
    such a step bit for bit.
    """

    def __init__(self, folder: pathlib.Path, config: Config, method: str, seed: int) -> None:
        wandb = importlib.import_module("wandb")
        limited = "WANDB_FINISH_TIMEOUT" in os.environ
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                dir=str(folder),
                group=folder.resolve().parents[1].name,
                name=f"{method}-seed{seed}",
                id=_wandb_id(folder),
                resume="allow",
                reinit="create_new",
                config=dataclasses.asdict(config) | {"method": method, "seed": seed},
                allow_val_change=True,  # fields such as data_dir may differ when a run goes on
                settings={} if limited else {"finish_timeout": UPLOAD_SECONDS},
            )
        except wandb.UsageError as error:
            raise ConfigError(f"loggers=wandb: {error}") from error

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def _wandb_id(folder: pathlib.Path) -> str:
    """The id in the run's folder; a new one where there is none."""
    path = folder / "wandb_id"
    run_id = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    if not run_id:
        run_id = uuid.uuid4().hex
        write_atomically(path, f"{run_id}\n".encode())
    return run_id


class Loggers:
    """The loggers of one run; made by `open_loggers`, and closed at the end of a `with`."""

    def __init__(self) -> None:
        """Has no logger yet."""
        self._open: dict[str, _Logger] = {}

    def write(self, line: Mapping[str, Any]) -> None:
        """Hands the numbers of `line` to every logger that has not failed.

        Args:
          line: with its `kind` and `step`, as it is in metrics.jsonl.
        """
        values, step = scalars(line), int(line["step"])
        for name, logger in list(self._open.items()):
            try:
                logger.write(values, step)
            except Exception as error:
                self._drop(name, error)

    def close(self, exit_code: int = 0) -> None:
        """Closes what is open; a second time there is nothing left to close.

        Args:
          exit_code: how the run ended, for W&B: 0 finished, anything else failed or interrupted.
        """
        for name, logger in list(self._open.items()):
            try:
                logger.close(exit_code)
            except Exception as error:
                _report(name, error)
        self._open = {}

    def _drop(self, name: str, error: Exception) -> None:
        logger = self._open.pop(name)
        _report(name, error)
        try:
            logger.close(1)
        except Exception:
            return  # it has been reported

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes what is open, as failed where an exception ends the run."""
        self.close(0 if error is None else 1)


def open_loggers(
    names: Sequence[str],
    folder: pathlib.Path,
    config: Config,
    method: str,
    seed: int,
    first_step: int,
) -> Loggers:
    """Opens the loggers of one run. Of several processes, only process 0 may.

    TensorBoard's files go into `tensorboard` in the run's folder. W&B's run has the run's name, is
    grouped under the work folder's, and its id is kept in the file `wandb_id` in the run's folder.
    WANDB_PROJECT, WANDB_MODE and W&B's other environment variables work as they do elsewhere.

    Args:
      names: of loggers, the config's field `loggers`.
      folder: the run's own, `WORKDIR/runs/METHOD-seedK`.
      config: the config of that method.
      method: its name.
      seed: of the run.
      first_step: the steps that are done already, 0 for a new run. TensorBoard hides what an
        interrupted run wrote about later ones.

    Returns:
      The loggers that could be opened, to be used in a `with`; one that could not be says so on
      standard error.

    Raises:
      ConfigError: a new run's setting of W&B is wrong, e.g. nobody is logged in.
    """
    loggers = Loggers()
    for name in names:
        try:
            if name == "tensorboard":
                loggers._open[name] = _TensorBoard(folder / "tensorboard", first_step)
            else:
                loggers._open[name] = _WandB(folder, config, method, seed)
        except Exception as error:
            # Whoever starts a run is there to set it right. A run that goes on, perhaps at night
            # on a new machine, is not stopped for the sake of a view.
            if isinstance(error, ConfigError) and not first_step:
                loggers.close(1)
                raise
            _report(name, error)
    return loggers


def _report(name: str, error: Exception) -> None:
    print(
        f"warning: logger {name} failed and gets no more lines; training goes on, and"
        f" metrics.jsonl has every line: {type(error).__name__}: {error}",
        file=sys.stderr,
        flush=True,
    )
