"""What a run writes down: JSON lines, JSON files, its environment, a digest of its state."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from types import TracebackType
from typing import Any, BinaryIO, Self

import jax
import numpy as np

from experiments.config import ConfigError

SETTINGS: Mapping[str, Any] = {
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_enable_x64": False,
}
"""JAX's own settings that say which numbers a seed draws, and their defaults."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "sparseopt-jax")


def _plain(value: Any) -> Any:
    """`value` as JSON has it: arrays as numbers and lists, NaN and infinities as null."""
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        value = np.asarray(value).tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _is_of(line: bytes, last_step: float) -> bool:
    """Whether a line is JSON, and of a step up to `last_step`."""
    try:
        return bool(json.loads(line).get("step", 0) <= last_step)
    except ValueError:
        return False


def json_line(record: Mapping[str, Any]) -> bytes:
    """A line of a file of JSON objects; NaN and infinities become null."""
    return json.dumps(_plain(record), allow_nan=False).encode() + b"\n"


class JsonLines:
    """A file of one JSON object a line; whoever reads it sees a line once it is written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with JsonLines(f"{folder}/metrics.jsonl") as lines:
      ...         lines.write({"step": 10, "loss": 0.5})
    """

    def __init__(
        self, path: str | os.PathLike[str], keep: int = 0, last_step: float = math.inf
    ) -> None:
        """Opens `path` and drops what it held beyond its first `keep` bytes.

        Lines of a later step than `last_step` go too. There are some where the file was deleted,
        and begun anew, after somebody noted how long it was.

        Attributes:
          missing: how many of those bytes, cut down to whole lines, it does not hold.
        """
        path = pathlib.Path(path)
        held = path.read_bytes()[:keep] if keep and path.exists() else b""
        lines = held[: held.rfind(b"\n") + 1].splitlines(keepends=True)
        while lines and not _is_of(lines[-1], last_step):
            lines.pop()
        held = b"".join(lines)
        self.missing = keep - len(held)
        # Closed by __exit__.
        self._file: BinaryIO = path.open("r+b" if held else "wb")
        self._file.truncate(len(held))
        self._file.seek(len(held))

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends `record`; NaN and infinities become null."""
        self._file.write(json_line(record))
        self._file.flush()

    def sync(self) -> int:
        """Has everything on the disk, where a loss of power leaves it; returns its size."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the file."""
        self._file.close()


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file so that a reader, or a machine that loses power, sees it whole or not at all.

    The content goes into a temporary file beside it, to the disk, and then takes its name.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically; NaN and infinities become null."""
    text = json.dumps(_plain(value), indent=2, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file; raises ConfigError where it is not one."""
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not a JSON file: {error}") from error


def settings() -> dict[str, Any]:
    """`SETTINGS` as they are now."""
    return {name: getattr(jax.config, name) for name in SETTINGS}


def environment() -> dict[str, Any]:
    """What a result depends on besides its config: commit, versions, devices.

    `git_commit` and `git_dirty` (uncommitted changes) are None outside a git checkout.
    """
    devices = jax.devices()
    commit, status = checkout()
    return {
        "git_commit": commit,
        "git_dirty": None if status is None else bool(status),
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        "settings": settings(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "backend": jax.default_backend(),
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
    }


@functools.cache
def checkout() -> tuple[str | None, str | None]:
    """Commit and uncommitted changes of the code, as they were on the first call.

    Commands call it when they start: what is committed later is not what they run.
    """
    return _git("rev-parse", "HEAD"), _git("status", "--porcelain")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    folder = str(pathlib.Path(__file__).resolve().parent)
    try:
        answer = subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def path_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their '/'-joined paths, sorted by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return dict(sorted(named.items()))


def state_sha256(params: Any, masks: Any) -> str:
    """A digest of parameters and masks: equal where all their bits, shapes and names are.

    Args:
      params: pytree of arrays.
      masks: pytree of bool arrays, or None for a dense model.

    Returns:
      64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for kind, tree in (("params", params), ("masks", masks)):
        for path, leaf in path_leaves(tree).items():
            array = np.asarray(leaf)
            digest.update(f"{kind}/{path} {array.dtype} {array.shape}\n".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()
