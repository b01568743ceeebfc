"""What has to be there before a dataset can be prepared: TensorFlow, files, room on the disk."""

from __future__ import annotations

import inspect
import pathlib
import shutil
import tarfile
from typing import Any

from experiments import prepare_errors
from experiments.data.errors import DataError

# The two files of ILSVRC 2012: what they hold, how many members, and bytes.
_IMAGENET = {
    "ILSVRC2012_img_train.tar": ("class tars", 1000, 147_897_477_120),
    "ILSVRC2012_img_val.tar": ("images", 50_000, 6_744_924_160),
}


def missing(builder: Any, manual: pathlib.Path) -> list[str]:
    """What has to be downloaded by hand, or installed, before `builder` can do its work."""
    problems = []
    if builder.name == "imagenet2012":
        there = {name: (manual / name).is_file() for name in _IMAGENET}
        if not all(there.values()):
            lines = [
                f"  {name} ({size / 2**30:.3g} GB): {'there' if there[name] else 'missing'}"
                for name, (_, _, size) in _IMAGENET.items()
            ]
            problems.append(
                "imagenet2012 has to be downloaded by hand: register at https://image-net.org/ and"
                f" put these two files into --manual_dir={manual}\n" + "\n".join(lines)
            )
    elif builder.MANUAL_DOWNLOAD_INSTRUCTIONS and not (manual.is_dir() and any(manual.iterdir())):
        instructions = inspect.cleandoc(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)
        problems.append(
            f"{builder.name} has to be downloaded by hand, into --manual_dir={manual}, where there"
            f" is nothing; tensorflow-datasets says:\n{instructions}"
        )
    if not prepare_errors.has_tensorflow():
        problems.append(f"{builder.name}: {prepare_errors.NO_TENSORFLOW}")
    return problems


def check_imagenet(manual: pathlib.Path, root: pathlib.Path) -> None:
    """Raises DataError unless ILSVRC's two tar files are whole and the disk of `root` has room."""
    paths = {name: manual / name for name in _IMAGENET}
    for name, path in paths.items():
        print(f"checking {path} ...", flush=True)
        try:
            with tarfile.open(path, "r:") as tar:
                members = sum(member.isfile() for member in tar)
        except (tarfile.TarError, OSError) as error:
            raise DataError(
                f"{path}: not a tar file, or truncated ({error}); the original has"
                f" {_IMAGENET[name][2]:,} bytes, this one {path.stat().st_size:,}"
            ) from error
        kind, expected, _ = _IMAGENET[name]
        if members != expected:
            print(f"note: {path} has {members:,} {kind}; ImageNet's has {expected:,}")
    needed = sum(path.stat().st_size for path in paths.values())
    existing = next(path for path in (root, *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DataError(
            f"{root} has {gigabytes(free)} free; imagenet2012 needs {gigabytes(needed)} there"
        )


def gigabytes(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.2f} GB"
