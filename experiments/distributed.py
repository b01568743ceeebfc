"""Several processes that train together: how they find each other, and agree on what to do.

Only process 0 writes logs and results. What it reads from the disk, or decides, the others take
from it, so a file that appears meanwhile cannot part them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.config import ConfigError

Value = TypeVar("Value")

LOST = 75
"""The exit code where another process is gone: EX_TEMPFAIL, start all of them again."""

HEARTBEAT_SECONDS = 30
"""A process that has not been heard of for so long is gone; the others then end."""

_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class LockedError(ConfigError):
    """Another process trains in a folder."""


def initialize() -> None:
    """Joins the processes of a TPU pod, SLURM, GKE or Open MPI job; nothing happens elsewhere.

    JAX finds out which of them it runs in. Without any, three environment variables do the same:
    JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. It must
    be called before JAX is used.

    Raises:
      ConfigError: only some of the variables are set, or they are not right.
    """
    given = {name: os.environ[name] for name in _BY_HAND if os.environ.get(name)}
    options: dict[str, Any] = {}
    if {"JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} & given.keys():
        missing = [name for name in _BY_HAND if name not in given]
        if missing:
            raise ConfigError(
                f"{', '.join(given)} is set but not {', '.join(missing)}; set all of"
                f" {', '.join(_BY_HAND)}, or none"
            )
        count, index = (_integer(name, given[name]) for name in _BY_HAND[1:])
        if not 0 <= index < count:
            raise ConfigError(f"JAX_PROCESS_ID={index} must be in [0, {count}), JAX_NUM_PROCESSES")
        options = {"num_processes": count, "process_id": index}
    try:
        jax.distributed.initialize(
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=2 * HEARTBEAT_SECONDS,
            **options,
        )
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise ConfigError(f"the processes of this job cannot be joined: {error}") from error


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} must be an integer") from None


def is_main() -> bool:
    """Whether this is process 0, which writes logs and results."""
    return jax.process_index() == 0


def from_main(function: Callable[[], Value]) -> Value:
    """What `function` returns on process 0, on all of them; the others do not call it.

    Args:
      function: returns what JSON can hold.

    Raises:
      ConfigError, LockedError: process 0 raised it.
    """
    if jax.process_count() == 1:
        return function()
    answer: dict[str, Any] = {}
    if is_main():
        try:
            answer["value"] = function()
        except ConfigError as error:
            answer["error"] = str(error)
            answer["locked"] = isinstance(error, LockedError)
    content = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    buffer = np.zeros(size, np.uint8)
    if is_main():
        buffer[:] = content
    answer = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))))
    if "error" in answer:
        raise (LockedError if answer["locked"] else ConfigError)(answer["error"])
    value: Value = answer["value"]
    return value


@contextlib.contextmanager
def lock(hold: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Process 0 enters what `hold` returns while the body runs on all; ConfigError if it cannot."""
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(hold())

        from_main(enter)
        yield


def to_host(tree: Any) -> Any:
    """The arrays of a pytree as NumPy's, put together from all processes where that takes it."""

    def fetch(array: jax.Array) -> np.ndarray:
        if array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        gathered: np.ndarray = multihost_utils.process_allgather(array, tiled=True)
        return gathered

    return jax.tree.map(fetch, tree)


def all_succeeded(success: bool) -> bool:
    """Whether `success` is true on every process."""
    if jax.process_count() == 1:
        return success
    return bool(np.all(multihost_utils.process_allgather(np.asarray(success))))
