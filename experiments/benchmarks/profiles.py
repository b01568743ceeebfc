"""Where the time of a compiled training step goes, from a profile of it."""

from __future__ import annotations

import gzip
import json
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import jax

PARTS = ("forward", "backward", "optimizer", "other")

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+)\b.*\{\s*$")
_OPERATION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (?:\(.*?\)|\S+) [a-z][\w-]*\((.*?)\)(.*)")
_NAME = re.compile(r"op_name=\"([^\"]*)\"")
_CALLS = re.compile(r"\bcalls=%?([\w.-]+)")
_OPERAND = re.compile(r"%([\w.-]+)")


def part_of(op_name: str) -> str:
    """The part of a training step that an operation with this name in its metadata belongs to.

    Args:
      op_name: as JAX writes it, e.g. "jit(step)/transpose(jvp(ResNet))/conv/dot_general".
        What is in the scope "optimizer" is the optimizer's, masks and topology among it.
    """
    if "/optimizer/" in op_name:
        return "optimizer"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "other"


def operations(text: str) -> dict[str, str]:
    """The part of each operation of a compiled program, by name.

    One without a name in its metadata, as the compiler leaves where it rewrites, has the latest
    part among what it is fused from, or else among its operands.
    """
    parts: dict[str, str] = {}
    within: dict[str, str] = {}
    computation = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[1]
        elif operation := _OPERATION.match(line):
            name, operands, rest = operation.groups()
            if named := _NAME.search(rest):
                part = part_of(named[1])
            elif (called := _CALLS.search(rest)) and within.get(called[1], "other") != "other":
                part = within[called[1]]
            else:
                part = _latest(parts.get(o, "other") for o in _OPERAND.findall(operands))
            parts[name] = part
            within[computation] = _latest((within.get(computation, "other"), part))
    return parts


def _latest(parts: Iterable[str]) -> str:
    order = ("other", "forward", "backward", "optimizer")
    return max(parts, key=order.index, default="other")


def profile(
    call: Callable[[], Any], steps: int, text: str, folder: pathlib.Path
) -> dict[str, float]:
    """Milliseconds of a step by part, added up over all threads and streams.

    Args:
      call: takes a step, of the program that `text` is of.
      steps: how many to take.
      text: `compiled.as_text()`.
      folder: where the trace goes, for TensorBoard or Perfetto.

    Returns:
      For each of `PARTS`; what belongs to none of the first three is "other".
    """
    with jax.profiler.trace(str(folder)):
        for _ in range(steps):
            jax.block_until_ready(call())  # type: ignore[no-untyped-call]
    path = max(folder.glob("plugins/profile/*/*.trace.json.gz"), key=lambda p: p.stat().st_mtime)
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    parts, module = operations(text), re.match(r"HloModule (\S+?),", text)
    assert module is not None
    spent: Counter[str] = Counter()
    for event in events:
        named = event.get("args", {})
        if "hlo_op" in named and named.get("hlo_module", "").startswith(module[1]):
            spent[parts.get(named["hlo_op"], "other")] += event["dur"] / 1e3
    return {part: spent[part] / steps for part in PARTS}
