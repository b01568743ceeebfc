"""Checkpoints of a run, by orbax: written in the background, whole or not at all, verified.

A checkpoint has the arrays of a run and its notes, which are all else that it needs to go on (step,
config, position in the log): plain JSON. Orbax notices a file that is missing or cut short, but not
one with a wrong bit; so the notes have a fingerprint of every array and a digest of themselves, and
a checkpoint that has others is not used. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from orbax.checkpoint import v1 as ocp

from experiments import distributed


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none of them be used; the message says why."""


class DamagedError(ValueError):
    """A checkpoint cannot be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read back: its step, its arrays, and its notes."""

    step: int
    arrays: Any
    notes: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in a folder of their own; all processes call it alike."""

    def __init__(
        self,
        folder: pathlib.Path,
        keep_last: int,
        keep_best: bool,
        say: Callable[[str], object] = print,
    ) -> None:
        """Opens or makes the folder, and removes what an interrupted save has left.

        Args:
          folder: an absolute path, on a file system that all processes share.
          keep_last: how many checkpoints to keep, counted from the newest.
          keep_best: keep the one with the highest accuracy as well.
          say: called with a line of text for each checkpoint that cannot be used.
        """
        keep = ocp.training.preservation_policies
        policies: list[Any] = [keep.LatestN(keep_last)]
        if keep_best:
            policies.append(
                keep.BestN(
                    get_metric_fn=lambda metrics: metrics.get("test_accuracy", 0.0),
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        _silence()
        self._folder, self._say = folder.absolute(), say
        self._policy = keep.AnyPreservationPolicy(policies)
        try:
            self._orbax = self._open()
        except Exception:  # it reads the notes and accuracies of all checkpoints
            self._put_aside_unreadable()
            self._orbax = self._open()
        self._saving: tuple[int, Any] | None = None

    def __enter__(self) -> Self:
        """The checkpoints themselves."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for a save that is under way; its error is raised unless there is one already."""
        try:
            self.wait()
        except CheckpointError:
            if error is None:
                raise
        finally:
            try:
                self._orbax.close()
            except Exception as late:  # the error of a save that has been told of already
                del late

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, in order."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def _on_disk(self) -> list[int]:
        """The steps of those that are whole; orbax gives them their names last."""
        names = [path.name for path in self._folder.iterdir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def save(
        self, step: int, arrays: Any, notes: Mapping[str, Any], accuracy: float | None = None
    ) -> None:
        """Begins to write a checkpoint; returns once `arrays` may change.

        Args:
          step: how many steps are done. An earlier checkpoint of that step is replaced.
          arrays: pytree of arrays, of any sharding.
          notes: JSON values.
          accuracy: that of an evaluation at this step, if there was one.

        Raises:
          CheckpointError: this one, or the one before it, cannot be written.
        """
        self.wait()
        notes = dict(notes) | {"fingerprint": fingerprint(arrays)}
        notes["sha256"] = _digest(notes)
        metrics = None if accuracy is None else {"test_accuracy": accuracy}
        try:
            response = self._orbax.save_checkpointables_async(
                step,
                {"arrays": arrays},
                force=True,
                overwrite=step in self.steps(),
                metrics=metrics,
                custom_metadata=notes,
            )
        except (ValueError, OSError, RuntimeError) as error:
            raise self._cannot_write(step, error) from error
        self._saving = step, response

    def wait(self) -> None:
        """Waits until the last save is on the disk; raises CheckpointError where it failed."""
        if self._saving is None:
            return
        (step, response), self._saving = self._saving, None
        try:
            response.result()
        except (ValueError, OSError, RuntimeError) as error:
            raise self._cannot_write(step, error) from error

    def _cannot_write(self, step: int, error: BaseException) -> CheckpointError:
        good = [other for other in self.steps() if (self._folder / str(other)).is_dir()]
        last = f"the last good one is that of step {max(good)}" if good else "there is none yet"
        return CheckpointError(
            f"the checkpoint of step {step} cannot be written to {self._folder}: {_reason(error)};"
            f" {last}. With that mended, the same command goes on from there"
        )

    def restore(
        self, arrays: Any, check: Callable[[dict[str, Any]], object] = lambda notes: None
    ) -> Restored | None:
        """The newest checkpoint that is whole; newer ones are named and put aside.

        Args:
          arrays: pytree of `jax.ShapeDtypeStruct`s with shardings, as the arrays are to come back;
            those of the saved ones may have been others.
          check: called with the notes before arrays are read; what it raises is raised.

        Returns:
          The checkpoint, or None where there is none at all.

        Raises:
          CheckpointError: there are checkpoints, but none can be used; or a save that was under way
            has failed.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            problem, restored = None, None
            try:
                notes = self._notes(step)
                check(notes)
                restored = Restored(step, self._arrays(step, arrays, notes["fingerprint"]), notes)
            except DamagedError as error:
                problem = str(error)
            if distributed.all_succeeded(problem is None):
                self._put_aside(damaged, step)
                self._orbax.reload()
                return restored
            damaged[step] = problem or "another process cannot read it"
        if not damaged:
            return None
        raise self._none_usable(damaged)

    def _none_usable(self, damaged: Mapping[int, str]) -> CheckpointError:
        listed = "; ".join(f"step {step}: {problem}" for step, problem in damaged.items())
        return CheckpointError(
            f"no checkpoint in {self._folder} can be used ({listed}). To start the run anew, move"
            f" {self._folder.parent} away"
        )

    def _notes(self, step: int) -> dict[str, Any]:
        try:
            notes = self._orbax.metadata(step).custom_metadata
        except Exception as error:  # damaged files raise errors of many kinds
            raise _damage(error) from error
        if not notes or "fingerprint" not in notes:
            raise DamagedError("its notes are missing")
        if notes.get("sha256") != _digest(notes):
            raise DamagedError("its notes are not those that were saved")
        return dict(notes)

    def _arrays(self, step: int, arrays: Any, expected: str) -> Any:
        try:
            loaded = self._orbax.load_checkpointables(step, {"arrays": arrays})["arrays"]
        except Exception as error:  # as above
            raise _damage(error) from error
        if fingerprint(loaded) != expected:
            raise DamagedError("its arrays are not those that were saved")
        return loaded

    def _open(self) -> Any:
        return ocp.training.Checkpointer(
            self._folder, preservation_policy=self._policy, cleanup_tmp_directories=True
        )

    def _put_aside_unreadable(self) -> None:
        """Puts aside the checkpoints that orbax fails at when it opens the folder."""
        damaged: dict[int, str] = {}
        good: list[int] = []
        for step in reversed(self._on_disk()):
            problem, path = None, self._folder / str(step)
            try:
                ocp.checkpointables_metadata(path)
                for accuracy in path.glob("metrics/metrics"):
                    json.loads(accuracy.read_bytes())
            except Exception as error:  # damaged files raise errors of many kinds
                problem = str(_damage(error))
            if distributed.all_succeeded(problem is None):
                good.append(step)
            else:
                damaged[step] = problem or "another process cannot read it"
        if damaged and not good:
            raise self._none_usable(damaged)
        if damaged:
            self._put_aside(damaged, good[0])

    def _put_aside(self, damaged: Mapping[int, str], good: int) -> None:
        """Moves checkpoints away, or the run could not save others of the same steps."""
        if not damaged:
            return
        folder = self._folder.with_name("damaged-checkpoints")
        for step, problem in damaged.items():
            aside = folder / f"{step}-{time.time_ns()}"
            if distributed.is_main():
                folder.mkdir(exist_ok=True)
                os.replace(self._folder / str(step), aside)
            self._say(
                f"the checkpoint of step {step} is damaged ({problem}) and was moved to {aside};"
                f" that of step {good} is used"
            )
        distributed.all_succeeded(True)  # the others wait until they are gone


def read_arrays(folder: pathlib.Path, step: int) -> Any:
    """The arrays of one checkpoint, without the model and the optimizer that they are of.

    Args:
      folder: that of the checkpoints.
      step: the checkpoint's.

    Returns:
      NumPy's arrays, in dicts and lists.

    Raises:
      CheckpointError: it is not there, or damaged.
    """
    path = (folder / str(step)).absolute()  # orbax takes no other
    what = f"the checkpoint of step {step} in {folder}"
    if not path.is_dir():
        raise CheckpointError(f"{what} is missing")
    _silence()
    try:
        described = ocp.checkpointables_metadata(path)
        expected = described.custom_metadata["fingerprint"]
        shapes = jax.tree.map(
            lambda leaf: np.empty(leaf.shape, leaf.dtype), described.metadata["arrays"]
        )
        arrays = ocp.load_checkpointables(path, {"arrays": shapes})["arrays"]
    except Exception as error:  # damaged files raise errors of many kinds
        raise CheckpointError(f"{what} is damaged: {_reason(error)}") from error
    # On the disk a named tuple is a dict, whose leaves come in the order of their names.
    if _by_leaf(fingerprint(arrays)) != _by_leaf(expected):
        raise CheckpointError(f"{what} is damaged: its arrays are not those that were saved")
    return arrays


def _by_leaf(fingerprint: str) -> list[str]:
    return sorted(fingerprint[i : i + 8] for i in range(0, len(fingerprint), 8))


def _digest(notes: Mapping[str, Any]) -> str:
    """Of all notes but the digest itself."""
    others = {name: value for name, value in notes.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def fingerprint(arrays: Any) -> str:
    """Eight hexadecimal digits for each leaf, which any change of one element changes.

    Of other changes, one in four billion goes unnoticed. They are sums of integers, so they do not
    depend on how the arrays are sharded.

    Example:
      >>> fingerprint({"a": jnp.zeros(3), "b": jnp.arange(2)})
      'cd27b2c9a64b3dd9'
    """
    leaves = jax.tree.leaves(arrays)
    if not leaves:
        return ""
    return "".join(f"{int(value):08x}" for value in jax.device_get(_leaf_sums(leaves)))


@jax.jit
def _leaf_sums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_leaf_sum(leaf) for leaf in leaves]


def _leaf_sum(leaf: jax.Array) -> jax.Array:
    """The sum of a hash of each element's bits and position, modulo 2**32."""
    if leaf.dtype == bool:
        bits = leaf.astype(jnp.uint32)
    else:
        width = min(leaf.dtype.itemsize, 4)  # one of 8 bytes becomes two of 4, on a new last axis
        bits = lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        position = position * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    # Both steps map different bits to different ones. The second, MurmurHash3's last, keeps changes
    # of several elements from cancelling out, such as two of opposite sign that swap places.
    mixed = bits + position * jnp.uint32(0x9E3779B1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ (mixed >> jnp.uint32(shift))) * jnp.uint32(factor)
    return jnp.sum(mixed, dtype=jnp.uint32)


def all_finite(tree: Any) -> bool:
    """Whether all floating leaves are free of NaN and infinities."""
    floats = [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]
    return bool(np.all(jax.device_get(_finite(floats)))) if floats else True


@jax.jit
def _finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def _damage(error: BaseException) -> Exception:
    """What an error in reading a checkpoint is: damage, unless another process failed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, jax.errors.JaxRuntimeError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return DamagedError(_reason(error))


def _reason(error: BaseException) -> str:
    """The first line of the innermost error, without tensorstore's description of the file."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).split(" [tensorstore_spec=")[0].strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if len(line) <= 300 else line[:300] + "..."


class _LogFilter(logging.Filter):
    """Drops orbax's own accounts of errors, which it raises as well, here or in other threads."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname and "tensorstore" not in record.getMessage()


class _UnraisableFilter:
    """Drops errors of the reads that orbax leaves alone once another one has failed."""

    def __init__(self, before: Callable[[Any], object]) -> None:
        self._before = before

    def __call__(self, unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        left_alone = code is not None and "orbax" in code.co_filename
        if not left_alone and str(unraisable.exc_value) != "Event loop is closed":
            self._before(unraisable)


_LOG_FILTER = _LogFilter()


def _silence() -> None:
    """Has errors of orbax, which are raised and told of here, not printed a second time."""
    for name in ("absl", "asyncio", ""):
        logging.getLogger(name).addFilter(_LOG_FILTER)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    if not isinstance(sys.unraisablehook, _UnraisableFilter):
        sys.unraisablehook = _UnraisableFilter(sys.unraisablehook)
