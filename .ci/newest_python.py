"""Prints the newest Python of this machine that is newer than the one that runs this, if any is.

Looked for among a version manager's (`$PYENV_ROOT`, by default `~/.pyenv`) and, as `python3.N`, on
PATH: a released CPython of at least 3.11, with its lock, that can set up a virtual environment.
"""

import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

ASK = """
import ensurepip, sys, sysconfig, venv
assert sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
print(*sys.version_info)
"""
RELEASE = re.compile(r"(\d+) (\d+) (\d+) final 0\n")


def candidates() -> Iterator[pathlib.Path]:
    """Every file that may be a Python."""
    managed = pathlib.Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser()
    yield from managed.glob("versions/*/bin/python3")
    for folder in os.get_exec_path():
        for path in pathlib.Path(folder).glob("python3.*"):
            if re.fullmatch(r"python3\.\d+", path.name):
                yield path


def version(python: pathlib.Path) -> tuple[int, ...]:
    """Major, minor and micro version; nothing of what is no such Python."""
    try:
        said = subprocess.run([python, "-c", ASK], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = RELEASE.fullmatch(said.stdout)
    return tuple(map(int, found.groups())) if found else ()


if __name__ == "__main__":
    newest = max(((version(path), str(path)) for path in candidates()), default=((), ""))
    if newest[0][:2] > max(sys.version_info[:2], (3, 10)):
        print(newest[1])
