"""What a compiled program moves, read from its text: over the wire, and in and out of memory."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# `%main.5 (x: f32[8]) -> f32[8] {`. What is in a computation is indented.
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+)\b.*\{\s*$")
# `%name = type opcode(operands), attributes`. A tuple's type has parentheses of its own, in
# layouts such as T(8,128) and around tuples in it; only after the last one comes an opcode.
_OPERATION = re.compile(r"\s+(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([a-z][\w-]*)\(")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|branch_computations|true_computation|false_computation"
    r"|called_computations|condition)=(\{[^{}]*\}|%?[\w.-]+)"
)
# A TPU's compiler writes `%all-reduce-scatter.1 (input: f32[8]) -> f32[1] {` around an all-reduce
# of which each device keeps its part; and a collective that it runs beside other work stands in
# every piece of that work, in computations named as below, under one channel.
_REDUCE_SCATTER = re.compile(r"%all-reduce-scatter[\w.-]* \(.*\) -> (.*) \{")
_PIECE = "async_collective_fusion"
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
# A product that is computed while its operands go round: its loop counts from 0 to this constant.
_ROUND = "windowed_dot_general_cond"
_CONSTANT = re.compile(r" constant\((\d+)\)")
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
# Operations that name memory, or a part of it, and those that wait for one that was counted.
_NO_TRAFFIC = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_NO_TRAFFIC |= {"copy-done", "slice-done", "async-done", "while", "conditional", "call"}
_SPACE = re.compile(r"S\(\d+\)")
_OPERAND = re.compile(r"%([\w.-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+(\d*)[a-z0-9]*)\[([^\]]*)\](\{[^}]*\})?")


@dataclass(frozen=True)
class Collective:
    """The operations of one kind.

    Attributes:
      count: how many there are.
      bytes: the size of their results on one device.
    """

    count: int
    bytes: int


def collectives(text: str) -> dict[str, Collective]:
    """The collectives of a compiled program, by kind.

    An asynchronous pair (`all-gather-start`, `all-gather-done`) is one operation, and so is one
    that a TPU runs in pieces. A loop's body counts as often as the loop runs where the text says so
    (`known_trip_count`, which CPUs and GPUs write and TPUs do not, and the loops in which a TPU
    passes operands round), and otherwise once: a loop that ends on a condition, as the search of
    a topology update does, moves its bytes on every pass. Of a conditional all branches count.
    An all-reduce of which a TPU keeps a part is a reduce-scatter.

    Args:
      text: `compiled.as_text()`, of `jax.jit(f).lower(...).compile()`, for CPUs, GPUs or TPUs.

    Returns:
      For each kind of `KINDS` that the program has, how many operations there are and how many
      bytes their results take on one device; arrays of a tuple are summed.

    Raises:
      ValueError: the text is no compiled program: it has not exactly one entry computation.
    """
    operations, calls, entries = _parse(text)
    _one_entry(entries)
    runs = _runs(entries[0], calls)
    by_kind: dict[str, Collective] = {}
    in_pieces = {channel for name, _, _, channel in operations if name.startswith(_PIECE)}
    for kind in KINDS:
        pieces: dict[str, tuple[int, int]] = {}
        counts = []
        for name, own, size, channel in operations:
            if own == kind and channel in in_pieces and runs[name]:
                # Of pieces that call each other the first runs once.
                pieces[channel] = min(pieces.get(channel, (runs[name], size)), (runs[name], size))
            elif own == kind:
                counts.append((runs[name], size))
        counts += pieces.values()
        if any(times for times, _ in counts):
            by_kind[kind] = Collective(
                sum(times for times, _ in counts), sum(times * size for times, size in counts)
            )
    return by_kind


def _parse(
    text: str,
) -> tuple[list[tuple[str, str, int, str]], dict[str, Counter[str]], list[str]]:
    """Collectives as (computation, kind, bytes, channel); calls by computation; entries' names."""
    operations: list[tuple[str, str, int, str]] = []
    calls: dict[str, Counter[str]] = {}
    entries: list[str] = []
    rounds: dict[str, int] = {}
    name, scattered = "", None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name, scattered = header[2], _REDUCE_SCATTER.match(line)
            calls[name] = Counter()
            if header[1]:
                entries.append(name)
        elif (operation := _OPERATION.match(line)) and name:
            result, opcode = operation.groups()
            attributes = line[operation.end() :]
            # The start of a pair has its operands and its progress in its result as well.
            kind = opcode.removesuffix("-done")
            if kind == "all-reduce" and scattered:
                kind, result = "reduce-scatter", scattered[1]
            if kind in KINDS:
                channel = _CHANNEL.search(attributes)
                operations.append((name, kind, _size(result), channel[1] if channel else ""))
            elif _ROUND in name and (constant := _CONSTANT.search(line)):
                rounds[name] = int(constant[1])
            calls[name].update(_called(attributes, opcode, rounds))
    return operations, calls, entries


def _called(attributes: str, opcode: str, rounds: Mapping[str, int]) -> Counter[str]:
    """The computations that an operation calls, and how often; `rounds` of loops by condition."""
    times = 1
    if opcode == "while" and (known := _TRIP_COUNT.search(attributes)):
        times = int(known[1])
    elif opcode == "while" and (condition := _CONDITION.search(attributes)):
        times = rounds.get(condition[1], 1)
    called: Counter[str] = Counter()
    for names in _CALLED.findall(attributes):
        called.update({name.strip().lstrip("%"): times for name in names.strip("{}").split(",")})
    return called


def _runs(entry: str, calls: dict[str, Counter[str]]) -> Counter[str]:
    """How often each computation runs; calls never form a circle."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        seen.add(name)
        for called in calls.get(name, ()):
            if called not in seen:
                visit(called)
        order.append(name)

    visit(entry)
    runs = Counter({entry: 1})
    for name in reversed(order):
        for called, times in calls.get(name, Counter[str]()).items():
            runs[called] += runs[name] * times
    return runs


def bytes_moved(text: str) -> dict[str, int]:
    """Bytes that a program reads and writes where none of its loops and conditionals runs.

    That is one training step between two topology updates: a topology update is a loop of one pass
    or none. Of each operation of the entry computation the operands and the results count, whole,
    as in `cost_analysis`; what a TPU keeps in its vector memory (`S(1)`) does not. A call counts as
    what it calls: a CPU's compiler puts a loop into a computation that holds nothing else, and the
    call hands it its buffers without a copy.

    Args:
      text: as for `collectives`.

    Returns:
      Bytes by kind of operation (fusion, copy, ...), those without any left out.

    Raises:
      ValueError: as `collectives`.
    """
    moved: Counter[str] = Counter()
    types: dict[str, str] = {}
    for name, result, opcode, rest in _operations(text):
        types[name] = result
        if opcode in _NO_TRAFFIC:
            continue
        operands = [types.get(operand, "") for operand in _OPERAND.findall(rest.split(")")[0])]
        # Of the start of a pair only the first array is a result. For a slice it is the second,
        # and no more than that is read.
        if opcode == "copy-start":
            result = _arrays(result)[0]
        elif opcode == "slice-start":
            operand, result = _arrays(result)[:2]
            operands = [_SPACE.sub("", result)] if _size(operand, in_main_memory=True) else []
        moved[opcode] += _size(result, in_main_memory=True)
        moved[opcode] += sum(_size(operand, in_main_memory=True) for operand in operands)
    return {opcode: count for opcode, count in moved.items() if count}


def _operations(text: str) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, opcode and what follows of each operation of the entry and of what it calls."""
    lines = text.splitlines()
    headers = {n: match for n, line in enumerate(lines) if (match := _COMPUTATION.match(line))}
    starts = {header[2]: number for number, header in headers.items()}
    entries = [header[2] for header in headers.values() if header[1]]
    _one_entry(entries)

    def of(computation: str) -> Iterator[tuple[str, str, str, str]]:
        body = lines[starts[computation] + 1 :]
        for line in itertools.takewhile(lambda line: not line.startswith("}"), body):
            if operation := _OPERATION.match(line):
                name = line.split(" = ", 1)[0].split()[-1].lstrip("%")
                result, opcode = operation.groups()
                attributes = line[operation.end() :]
                yield name, result, opcode, attributes
                if opcode == "call":
                    for called in _called(attributes, opcode, {}):
                        yield from of(called)

    return of(entries[0])


def _arrays(result: str) -> list[str]:
    return [match[0] for match in _ARRAY.finditer(result)]


def _one_entry(entries: Sequence[Any]) -> None:
    if len(entries) != 1:
        raise ValueError(
            f"text has {len(entries)} entry computations and must have 1: give what "
            "jax.jit(f).lower(...).compile().as_text() returns, not the text of the lowered program"
        )


def _size(result: str, in_main_memory: bool = False) -> int:
    """Bytes of a type's arrays. Elements of fewer than 8 bits lie side by side."""
    size = 0
    for dtype, digits, shape, layout in _ARRAY.findall(result):
        if in_main_memory and "S(1)" in layout:
            continue
        # The name says how many bits an element has; a token and the like have none.
        bits = 8 if dtype == "pred" else int(digits or 0)
        # `<=16` is a dimension that is only bounded.
        elements = math.prod(int(n.strip().lstrip("<=")) for n in shape.split(",") if n.strip())
        size += -(-bits * elements // 8)
    return size
