"""The page of results and README's table, from what `experiments/results/` holds.

    python -m experiments.benchmarks.page

Every number comes from the newest result of its command: the last such line of `benchmarks.jsonl`,
or a JSON file of its own. `make bench` ends with it, and a test compares both texts with what the
committed results give, so neither can be older than they are. A new row is an entry in `rows.py`.
"""

from __future__ import annotations

import argparse
import json
import operator
import pathlib
import re
import string
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.benchmarks.rows import ROWS, Row

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"
BEGIN, END = "<!-- results: `make bench` writes these lines -->", "<!-- end of results -->"
HEADINGS = ("what", "number", "mark", "command", "commit", "versions", "device")
MARKS = {"at most": operator.le, "at least": operator.ge}

# Arguments that do not change what a number means: how long is measured, and beside what.
EFFORT = ("--peers=", "--repeats=", "--seconds=", "--images=", "--workers=", "--plot=", "--trace=")

INTRODUCTION = """\
# Results

`make bench` writes this page, and README's table with it: each number is of the newest result of
its command, in [benchmarks.jsonl](benchmarks.jsonl) or a file of its own here. Times are medians;
they leave out compilation unless it is what is timed. Marks are compared with what is printed. What
was predicted, and why marks are missed: [experiments/README.md](../README.md).

"""


class _Quotients(string.Formatter):
    """Formats with fields that are paths, or quotients of paths and numbers."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        value, *divisors = (
            float(part)
            if part[0].isdigit()
            else string.Formatter.get_field(self, part, args, kwargs)[0]
            for part in field_name.split("/")
        )
        for divisor in divisors:
            value /= divisor
        return value, field_name


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """All results of a folder, later ones of one command after earlier ones.

    Raises:
      ValueError: something there is no JSON object; it names the file and the line.
    """
    results = []
    for path in [*sorted(folder.glob("*.json")), *sorted(folder.glob("*.jsonl"))]:
        text = path.read_text(encoding="utf-8")
        for number, part in enumerate([text] if path.suffix == ".json" else text.splitlines(), 1):
            try:
                results.append(dict(json.loads(part)))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{path.name}, line {number}, is no JSON object: {error}"
                ) from error
    return results


def shows(row: Row, result: Mapping[str, Any]) -> bool:
    """Whether a row is of the command and backend of a result."""
    (words, peers), (those, with_peers) = _parts(row.command), _parts(result.get("command", ""))
    backend = result.get("environment", {}).get("backend")
    return words == those and peers <= with_peers and row.backend == backend


def _parts(command: str) -> tuple[set[str], set[str]]:
    words = command.split()
    peers = [word.partition("=")[2].split(",") for word in words if word.startswith("--peers=")]
    return {word for word in words if not word.startswith(EFFORT)}, set().union(*peers)


def cells(row: Row, results: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """A row as `HEADINGS` has it, from the last of the results that it is of.

    Raises:
      ValueError: that result has no such number; it names the row and the path.
    """
    result = next((result for result in reversed(results) if shows(row, result)), None)
    if result is None:
        return row.what, "not yet run", row.mark, f"`{row.command}`", "", "", ""
    fill, mark = _Quotients().vformat, row.mark
    try:
        number = fill(row.number, (), result)
        if mark:
            kind, _, limit = mark.rpartition(" ")
            printed = float(fill(row.number[: row.number.index("}") + 1], (), result))
            mark += ": met" if MARKS[kind](printed, float(limit)) else ": **missed**"
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"the newest result of {result['command']} must have what the row {row.what!r} shows:"
            f" {type(error).__name__}: {error}"
        ) from error
    made = result["environment"]
    versions = made["versions"]
    python = ".".join(versions["python"].split(".")[:2])
    machine = re.search("x86_64|aarch64|arm64|AMD64", made["platform"])
    device = f"{made['device_count']} {made['device_kind']}"
    if made["backend"] == "cpu":
        device = f"{made['cpu_count']} CPU cores" + (f" ({machine[0]})" if machine else "")
    return (
        row.what,
        number,
        mark,
        f"`{result['command']}`",
        str(made["git_commit"])[:7] + (" with changes" if made["git_dirty"] else ""),
        f"Python {python}, jax {versions['jax']}, optax {versions['optax']}",
        device,
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of as many columns as there are headings."""
    lines = [headings, ["---"] * len(headings), *(row[: len(headings)] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(rows: Sequence[Row], results: Sequence[Mapping[str, Any]]) -> str:
    """The page of all rows."""
    return INTRODUCTION + table(HEADINGS, [cells(row, results) for row in rows])


def readme(text: str, rows: Sequence[Row], results: Sequence[Mapping[str, Any]]) -> str:
    """README with the table of its rows between `BEGIN` and `END`, and what they were measured on.

    Raises:
      ValueError: it lacks one of these lines.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must have the lines {BEGIN} and {END}")
    shown = [cells(row, results) for row in rows if row.readme]
    machines = " or ".join(sorted({f"{device}, {v}" for *_, v, device in shown if device}))
    return f"{before}{begin}\n\n{table(HEADINGS[:5], shown)}\nOn {machines}.\n\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.page",
        description="Writes experiments/results/README.md and README's table of results.",
    ).parse_args(argv)
    try:
        results, path = read(RESULTS), ROOT / "README.md"
        made = readme(path.read_text(encoding="utf-8"), ROWS, results)
        (RESULTS / "README.md").write_text(page(ROWS, results), encoding="utf-8")
        path.write_text(made, encoding="utf-8")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for result in results:
        if "benchmark" in result and not any(shows(row, result) for row in ROWS):
            print(f"no row of the page is of {result['command']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
