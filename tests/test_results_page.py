"""The page of results and README's table are what the newest results give, and nothing else."""

import json
import re

import pytest

from experiments.benchmarks import page
from experiments.benchmarks.rows import ROWS, Row

README = page.ROOT / "README.md"
WRITE = "python -m experiments.benchmarks.page writes it"


def test_the_texts_are_of_the_committed_results():
    results, text = page.read(page.RESULTS), README.read_text(encoding="utf-8")
    written = (page.RESULTS / "README.md").read_text(encoding="utf-8")
    assert written == page.page(ROWS, results), WRITE
    assert text == page.readme(text, ROWS, results), WRITE
    for link in re.findall(r"\]\((.*?)\)", page.INTRODUCTION):
        assert (page.RESULTS / link).exists()


def test_what_make_bench_runs_has_rows():
    makefile = (page.ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^bench:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    commands = re.findall(r"-m (experiments\.benchmarks\.\w+) --json=", recipe)
    assert len(commands) == len(set(commands)) >= 7
    assert not {f"python -m {command}" for command in commands} - {row.command for row in ROWS}
    assert recipe.endswith("-m experiments.benchmarks.page\n")


def result(command, backend="cpu", **values):
    versions = {"python": "3.11.2", "jax": "0.10.2", "optax": "0.2.8"}
    environment = {
        "git_commit": "0123456789", "git_dirty": False, "versions": versions, "backend": backend,
        "platform": "Linux-6.1-x86_64-with-glibc", "cpu_count": 2, "device_kind": "H",
        "device_count": 1,
    }  # fmt: skip
    return {"command": command, **values, "environment": environment}


def numbers(rows, *results):
    return [page.cells(row, results)[1] for row in rows]


def test_a_row_by_hand():
    row = Row("bytes", "run", "{bytes[sparse]/bytes[dense]:.2f} of {bytes[dense]/1e6:.1f} MB")
    made = result("run --repeats=3", bytes={"sparse": 3_000_000, "dense": 2_000_000})
    versions = "Python 3.11, jax 0.10.2, optax 0.2.8"
    assert page.cells(row, [made]) == (
        "bytes", "1.50 of 2.0 MB", "", "`run --repeats=3`", "0123456", versions,
        "2 CPU cores (x86_64)",
    )  # fmt: skip
    made["environment"].update(git_dirty=True, platform="?")
    assert page.cells(row, [made])[4:] == ("0123456 with changes", versions, "2 CPU cores")
    made["environment"].update(backend="gpu")
    assert page.cells(row, [made])[1] == "not yet run"
    assert page.cells(row._replace(backend="gpu"), [made])[-1] == "1 H"


def test_the_newest_result_of_the_command_counts():
    rows = [
        Row("a", "run", "{x}"),
        Row("b", "run --peers=torch", "{x}"),
        Row("c", "run --size=2", "{x}"),
        Row("d", "run", "{x}", backend="gpu"),
    ]
    first = result("run --peers=jaxpruner,torch", x=1)
    assert numbers(rows, first) == ["1", "1", "not yet run", "not yet run"]
    later = result("run --repeats=9", x=2)
    assert numbers(rows, first, later) == ["2", "1", "not yet run", "not yet run"]
    assert numbers(rows, later, first) == ["1", "1", "not yet run", "not yet run"]
    others = result("run --size=2", x=3), result("run", "gpu", x=4), result("runs", x=5)
    assert numbers(rows, first, later, *others) == ["2", "1", "3", "4"]
    assert page.cells(rows[2], [first])[3] == "`run --size=2`"


@pytest.mark.parametrize(
    ("mark", "value", "expected"),
    [
        ("at most 1.03", 1.0304, "at most 1.03: met"),  # it is printed as 1.030
        ("at most 1.03", 1.031, "at most 1.03: **missed**"),
        ("at least 2", 2.0, "at least 2: met"),
        ("at least 2", 1.9, "at least 2: **missed**"),
        ("", 1.9, ""),
    ],
)
def test_marks(mark, value, expected):
    row = Row("a", "run", "{x:.3f} ({y})", mark)
    assert page.cells(row, [result("run", x=value, y="text")])[2] == expected


def test_a_result_without_the_number_is_named_and_no_older_one_taken():
    row = Row("a thing", "run", "{x[y]:.2f}")
    message = (
        r"newest result of run --repeats=1 must have .* the row 'a thing' shows: KeyError: 'y'"
    )
    with pytest.raises(ValueError, match=message):
        page.cells(row, [result("run", x={"y": 1}), result("run --repeats=1", x={})])
    with pytest.raises(ValueError, match="TypeError"):  # NaN is null in JSON
        page.cells(row, [result("run", x={"y": None})])
    with pytest.raises(ValueError, match="KeyError: 'below'"):
        page.cells(row._replace(mark="below 3"), [result("run", x={"y": 1})])


def test_only_what_is_between_the_lines_is_replaced():
    rows = [Row("a", "run", "{x}", readme=True), Row("b", "run", "{x}")]
    made = [result("run", x=1)]
    text = f"above\n{page.BEGIN}\n| old |\n{page.END}\n\nbelow\n"
    expected = f"""above
{page.BEGIN}

| what | number | mark | command | commit |
| --- | --- | --- | --- | --- |
| a | 1 |  | `run` | 0123456 |

On 2 CPU cores (x86_64), Python 3.11, jax 0.10.2, optax 0.2.8.

{page.END}

below
"""
    assert page.readme(text, rows, made) == expected == page.readme(expected, rows, made)
    with pytest.raises(ValueError, match="must have the lines"):
        page.readme("above\nbelow\n", rows, made)


def test_the_command(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(page, "RESULTS", results)
    monkeypatch.setattr(page, "ROWS", [Row("a", "run", "{x}", readme=True)])
    (tmp_path / "README.md").write_text(f"{page.BEGIN}{page.END}")
    lines = [{"benchmark": "run"} | result(command, x=7) for command in ("run", "other --size=3")]
    (results / "own.json").write_text(json.dumps(result("run", x=6)))
    (results / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert page.main([]) == 0
    assert capsys.readouterr().out == "no row of the page is of other --size=3\n"
    for folder in (tmp_path, results):
        written = (folder / "README.md").read_text()
        assert "| a | 7 |  | `run` | 0123456 |" in written
    for broken in ("{", "[1]"):
        (results / "all.jsonl").write_text(f"{json.dumps(lines[0])}\n{broken}\n")
        assert page.main([]) == 1
        assert "error: all.jsonl, line 2, is no JSON object" in capsys.readouterr().err
    assert (results / "README.md").read_text() == written
