"""What `.ci/run` and `make test-newest` choose: the newest Python, and the library's tests."""

import os
import pathlib
import subprocess
import sys
import types

import pytest

from tests import conftest

ROOT = pathlib.Path(__file__).parent.parent
OWN = sys.version_info.minor


def stub(path, said, code=0):
    """A program that answers as a Python of some version would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{said}'\nexit {code}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def newest(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "newest_python.py"],
        env=os.environ | {"PYENV_ROOT": str(tmp_path / "managed"), "PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_nothing_newer(tmp_path):
    """Neither an own patch release, an older one, nor what is no released CPython that works."""
    assert newest(tmp_path) == ""
    managed = tmp_path / "managed" / "versions"
    stub(managed / "own" / "bin" / "python3", f"3 {OWN} 99 final 0")
    stub(managed / "old" / "bin" / "python3", "3 9 18 final 0")
    stub(managed / "alpha" / "bin" / "python3", f"3 {OWN + 2} 0 alpha 1")
    stub(managed / "without-venv" / "bin" / "python3", "", code=1)
    stub(tmp_path / "bin" / f"python3.{OWN + 2}-config", f"3 {OWN + 2} 0 final 0")
    (managed / "empty").mkdir()
    stub(managed / "cannot-run" / "bin" / "python3", "3 99 0 final 0")
    (managed / "cannot-run" / "bin" / "python3").chmod(0o644)
    assert newest(tmp_path) == ""


def test_the_newest_of_both_places(tmp_path):
    by_name = stub(tmp_path / "bin" / f"python3.{OWN + 9}", f"3 {OWN + 9} 0 final 0")
    assert newest(tmp_path) == by_name
    stub(tmp_path / "managed" / "versions" / "a" / "bin" / "python3", f"3 {OWN + 10} 2 final 0")
    # As numbers: 10 comes after 2.
    patch = tmp_path / "managed" / "versions" / "b" / "bin" / "python3"
    stub(patch, f"3 {OWN + 10} 10 final 0")
    assert newest(tmp_path) == str(patch)


@pytest.mark.parametrize(
    ("text", "ignored"),
    [
        ("import experiments\n", True),
        ("import jax\nfrom experiments import hlo, data\n", True),
        ("from experiments.benchmarks import measuring, step_time\n", True),
        (
            "from experiments.benchmarks import measuring, update_bytes\nimport experiments.soak\n",
            True,
        ),
        ("from experiments.hlo import collectives\n", False),
        ("from experiments.benchmarks import measuring, update_bytes\n", False),
        ('PROGRAM = "experiments"\nimport sparseopt_jax as sx\n', False),
    ],
    ids=range(7),
)
def test_files_of_the_library(text, ignored, tmp_path):
    path = tmp_path / "test_something.py"
    path.write_text(text, encoding="utf-8")
    for library in (True, False):
        config = types.SimpleNamespace(getoption={"library": library}.__getitem__)
        assert conftest.pytest_ignore_collect(path, config) == ((ignored and library) or None)
    assert conftest.pytest_ignore_collect(tmp_path, config) is None


def test_the_library_has_most_of_its_tests_there():
    """By what the files are for: each module with a file of its own, but models and packages."""
    config = types.SimpleNamespace(getoption={"library": True}.__getitem__)
    modules = {path.stem for path in (ROOT / "sparseopt_jax").glob("*.py")}
    files = [ROOT / "tests" / f"test_{module}.py" for module in modules]
    files = [path for path in files if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if conftest.pytest_ignore_collect(path, config)]
