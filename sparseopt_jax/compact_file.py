"""The container of a compact file: named arrays, a record of them, a checksum; written whole.

The layout is that of safetensors: eight bytes with the header's length, the header in JSON, the
arrays end to end. So whatever reads safetensors reads a compact file's dense arrays; nothing of
that package is needed here. The header begins with our own name and version and with the SHA-256 of
all other bytes of the file, at a fixed place.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

VERSION = 1

_KEY = "sparseopt_jax.compact"
_BEGIN = re.compile(
    rb'\{"__metadata__":\{"sparseopt_jax\.compact":"(\d+)","sha256":"([0-9a-f]{64})"'
    rb',"bytes":"(\d{20})"'
)
_LENGTH = 8  # bytes that say how long the header is

# What safetensors calls the dtypes that it knows; other arrays are bytes there.
_NAMES = {
    "bool": "BOOL", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


class Contents(NamedTuple):
    """What is in a file.

    Attributes:
      arrays: bytes by name.
      record: what was written beside them, JSON values.
    """

    arrays: Mapping[str, bytes]
    record: Any


def write(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], record: Any) -> None:
    """Write a file so that a reader sees it whole or not at all.

    Args:
      path: of the file; one that is there is replaced.
      arrays: by name, ``"__metadata__"`` excepted.
      record: JSON values.
    """
    # Larger elements first keep every array at a multiple of its element's size.
    ordered = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)
    tensors: dict[str, Any] = {}
    end = 0
    for name, array in ordered:
        kind = _NAMES.get(array.dtype.name)
        start, end = end, end + array.nbytes
        tensors[name] = {
            "dtype": kind or "U8",
            "shape": list(array.shape) if kind else [array.nbytes],
            "data_offsets": [start, end],
        }
    own = {_KEY: str(VERSION), "sha256": "0" * 64, "bytes": "0" * 20, "record": _json(record)}
    header = _json({"__metadata__": own} | tensors).encode()
    header += b" " * (-len(header) % 8)
    size = _LENGTH + len(header) + end
    header = header.replace(b'"bytes":"' + b"0" * 20, b'"bytes":"' + b"%020d" % size, 1)
    content = b"".join(
        [len(header).to_bytes(_LENGTH, "little"), header, *(a.tobytes() for _, a in ordered)]
    )
    begin = _BEGIN.match(header)
    assert begin is not None
    start, stop = (_LENGTH + edge for edge in begin.span(2))
    digest = _digest(content, start, stop)
    _replace(pathlib.Path(path), [content[:start], digest, content[stop:]])


def read(path: str | os.PathLike[str]) -> Contents:
    """The contents of a file that ``write`` wrote.

    Raises:
      ValueError: it is cut short or damaged, was written by something else, or by a newer version.
      OSError: it cannot be read.
    """
    content = pathlib.Path(path).read_bytes()
    begin = _BEGIN.match(content[_LENGTH : _LENGTH + 256])
    what = f"{os.fspath(path)!r}"
    if begin is None:
        raise ValueError(
            f"{what} is no compact file, or its beginning is damaged ({len(content):,} bytes): "
            "load_compact reads what save_compact wrote"
        )
    if int(begin[1]) > VERSION:
        raise ValueError(
            f"{what} is a compact file of version {int(begin[1])}, and this sparseopt_jax reads "
            f"version {VERSION}: install a newer one"
        )
    size = int(begin[3])
    if len(content) < size:
        raise ValueError(f"{what} is cut short: it has {len(content):,} of {size:,} bytes")
    start, stop = (_LENGTH + edge for edge in begin.span(2))
    if _digest(content, start, stop) != begin[2]:
        raise ValueError(
            f"{what} is damaged: its checksum is not that of its {len(content):,} bytes"
        )
    data = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
    header = json.loads(content[_LENGTH:data])
    record = json.loads(header.pop("__metadata__")["record"])
    arrays = {}
    for name, tensor in header.items():
        first, last = tensor["data_offsets"]
        arrays[name] = content[data + first : data + last]
    return Contents(arrays, record)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _digest(content: bytes, start: int, stop: int) -> bytes:
    """SHA-256 in hexadecimal of all but the bytes that hold it."""
    digest = hashlib.sha256(content[:start])
    digest.update(memoryview(content)[stop:])
    return digest.hexdigest().encode()


def _replace(path: pathlib.Path, parts: list[bytes]) -> None:
    """A temporary file beside it goes to the disk, then takes its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
