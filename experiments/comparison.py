"""Whether two runs are the same, bit for bit, in all that they have left in their work folders."""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import checkpoint, metrics

_TIMING = ("timing", "environment", "examples_per_second", "step_seconds", "data_wait_seconds")
"""What may differ between two runs that are the same."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was compared, and the first difference, which is None where there is none."""

    difference: str | None
    values: int = 0
    lines: int = 0
    arrays: int = 0
    bytes: int = 0


def compare(one: pathlib.Path, other: pathlib.Path) -> Comparison:
    """Whether two work folders of one config are the same but for timing, bit for bit.

    Args:
      one: a finished work folder.
      other: another one.

    Returns:
      What was compared, up to the first difference.
    """
    counts: collections.Counter[str] = collections.Counter()
    return Comparison(_difference(one, other, counts), **counts)


def _difference(
    one: pathlib.Path, other: pathlib.Path, counts: collections.Counter[str]
) -> str | None:
    runs = [path.parent.relative_to(one) for path in sorted(one.glob("runs/*/result.json"))]
    for folder in (pathlib.Path(), *runs):
        for name in ("result.json", "metrics.jsonl"):
            path = folder / name
            if not (other / path).is_file():
                return f"{other / path} is missing"
            differ = _lines_difference if name == "metrics.jsonl" else _result_difference
            difference = differ(one / path, other / path, str(path), counts)
            if difference:
                return difference
    for run in runs:
        damaged = sorted((other / run / "damaged-checkpoints").glob("*"))
        if damaged:
            return f"{damaged[0]}: a checkpoint was put aside as damaged"
        difference = _fan_in_difference(one / run, other / run)
        difference = difference or _checkpoint_difference(one / run, other / run, counts)
        if difference:
            return difference
    return None


def _result_difference(
    one: pathlib.Path, other: pathlib.Path, name: str, counts: collections.Counter[str]
) -> str | None:
    return _json_difference(metrics.read_json(one), metrics.read_json(other), name, counts)


def _json_difference(
    one: Any, other: Any, name: str, counts: collections.Counter[str]
) -> str | None:
    """The first value that differs, by its place within `name`."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in [*one, *(key for key in other if key not in one)]:
            if key in _TIMING:
                continue
            if key not in one or key not in other:
                return f"{name}: {key} is only in {'one' if key in one else 'the other'}"
            difference = _json_difference(one[key], other[key], f"{name}: {key}", counts)
            if difference:
                return difference
        return None
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            difference = _json_difference(*pair, f"{name}[{index}]", counts)
            if difference:
                return difference
        return None
    counts["values"] += 1
    return None if one == other else f"{name}: {one!r}, not {other!r}"


def _lines_difference(
    one: pathlib.Path, other: pathlib.Path, name: str, counts: collections.Counter[str]
) -> str | None:
    lines = [path.read_text().splitlines() for path in (one, other)]
    for index, pair in enumerate(zip(*lines, strict=False)):
        ours, theirs = map(json.loads, pair)
        uncounted: collections.Counter[str] = collections.Counter()
        difference = _json_difference(ours, theirs, f"{name} line {index + 1}", uncounted)
        if difference:
            return difference
    if len(lines[0]) != len(lines[1]):
        return f"{name}: {len(lines[0])} lines, not {len(lines[1])}"
    counts["lines"] += len(lines[0])
    return None


def _fan_in_difference(one: pathlib.Path, other: pathlib.Path) -> str | None:
    files = [folder / "fan_in.npz" for folder in (one, other)]
    present = [file.is_file() for file in files]
    if not any(present):  # a dense run has none
        return None
    if not all(present):
        return f"{files[present.index(False)]} is missing"
    with np.load(files[0]) as ours, np.load(files[1]) as theirs:
        return _arrays_difference(dict(ours), dict(theirs), str(files[1]))


def _checkpoint_difference(
    one: pathlib.Path, other: pathlib.Path, counts: collections.Counter[str]
) -> str | None:
    newest = []
    for folder in (one, other):
        names = [path.name for path in (folder / "checkpoints").iterdir()]
        newest.append(max((int(name) for name in names if name.isdecimal()), default=0))
    if newest[0] != newest[1]:
        return f"{other}: the newest checkpoint is that of step {newest[1]}, not {newest[0]}"
    try:
        ours, theirs = (
            metrics.path_leaves(checkpoint.read_arrays(folder / "checkpoints", newest[0]))
            for folder in (one, other)
        )
    except checkpoint.CheckpointError as error:
        return str(error)
    counts["arrays"] += len(ours)
    counts["bytes"] += sum(array.nbytes for array in ours.values())
    return _arrays_difference(ours, theirs, f"the checkpoint of step {newest[0]}")


def _arrays_difference(
    one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], what: str
) -> str | None:
    if one.keys() != other.keys():
        return f"{what}: arrays {', '.join(sorted(one.keys() ^ other.keys()))} are in one only"
    for name, array in one.items():
        if (array.dtype, array.shape) != (other[name].dtype, other[name].shape):
            return f"{what}: {name} has another dtype or shape"
        if array.tobytes() != other[name].tobytes():
            return f"{what}: {name} differs"
    return None
