"""Class folders as a dataset of tensorflow-datasets: records that hold the files byte for byte.

Images of one shape then lie on the device, as those of CIFAR do; others are streamed from a few
large files in place of many small ones.
"""

from __future__ import annotations

import functools
import pathlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from experiments.config import ConfigError
from experiments.data import decode, prepared, sources
from experiments.data.errors import CorruptImageError, DataError
from experiments.data.folder import (
    EVALUATION,
    PREFIX,
    TRAIN,
    FolderSource,
    folder_names,
    open_folder,
)

VERSION = "1.0.0"

REPORT_EVERY = 30.0
"""Seconds between lines on progress."""

_READ_AT_ONCE = 256


class OwnImages(NamedTuple):
    """Class folders that are to be stored, or have been."""

    name: str
    origin: pathlib.Path
    folder: pathlib.Path
    splits: Mapping[str, FolderSource]

    def description(self) -> str:
        """What the records say of where they come from."""
        return f"Class folders of {self.origin}"

    def check_prepared(self, info: Any) -> None:
        """Raises ConfigError where the records are not those of the class folders."""
        stored = {split.name: split.num_examples for split in info.splits.values()}
        counts = {name: len(source) for name, source in self.splits.items()}
        classes = list(info.features["label"].names)
        if info.description.strip() != self.description():
            reason = f"holds something else ({info.description.strip()})"
        elif stored != counts or classes != list(self.splits[TRAIN].classes):
            reason = f"has {_counts(stored)}, but {self.origin} has {_counts(counts)} now"
        else:
            return
        raise ConfigError(
            f"{self.folder} {reason}; take another --data_dir, or delete that folder and give the"
            " same command again"
        )

    def builder(self) -> Any:
        """The builder that writes the records; decodes every image first.

        Raises:
          DataError: images cannot be decoded.
        """
        import tensorflow_datasets as tfds

        splits = self.splits
        height, width, channels = _common_shape(list(splits.values()))
        description, name = self.description(), self.name
        classes = splits[TRAIN].classes
        with tfds.core.registered.skip_registration():

            class FromFolder(tfds.core.GeneratorBasedBuilder):
                VERSION = tfds.core.Version(VERSION)

                def _info(self) -> Any:
                    features = {
                        "image": tfds.features.Image(shape=(height, width, channels)),
                        "label": tfds.features.ClassLabel(names=list(classes)),
                    }
                    return tfds.core.DatasetInfo(
                        builder=self,
                        description=description,
                        features=tfds.features.FeaturesDict(features),
                        supervised_keys=("image", "label"),
                    )

                def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                    del dl_manager
                    return {
                        name: self._generate_examples(source) for name, source in splits.items()
                    }

                def _generate_examples(self, source: FolderSource) -> Iterator[tuple[int, Any]]:
                    for index in range(len(source)):
                        (example,) = source.read([index])
                        yield index, {"image": example.encoded, "label": example.label}

        FromFolder.name = name
        return FromFolder(data_dir=self.folder.parents[1])


def find(origin: pathlib.Path, root: pathlib.Path) -> OwnImages:
    """The class folders in `origin`, and where in `root` their records go.

    Raises:
      ConfigError: there are none, or `root` lies among the images.
      DataError: as `folder.open_folder`.
    """
    origin, root = origin.resolve(), root.resolve()
    if root == origin or origin in root.parents:
        raise ConfigError(
            f"--data_dir={root} must not lie in --manual_dir={origin}, which holds the images"
        )
    opened = functools.partial(open_folder, str(origin), argument="--manual_dir")
    splits = {TRAIN: opened(TRAIN)}
    first = opened()  # of the splits to evaluate on; an error where there is none
    for split in EVALUATION:
        if split == first.split:
            splits[split] = first
        elif (origin / split).is_dir() and folder_names(origin / split):
            splits[split] = opened(split)
    if odd := [name for name in first.classes if not name.isprintable() or name != name.strip()]:
        raise ConfigError(
            f"{first.split}: names of classes must be printable, without spaces around them, to be"
            f" stored as lines of text: {', '.join(map(ascii, odd))}"
        )
    for source in splits.values():
        if source.passed_over:
            print(f"{source.split}: passed over: {sources.counted(source.passed_over)}", flush=True)
    name = PREFIX + (re.sub(r"\W+", "_", origin.name.lower()).strip("_") or "images")
    prepared.parse_name(name)
    return OwnImages(name, origin, root / name / VERSION, splits)


def _common_shape(splits: Sequence[FolderSource]) -> tuple[int | None, int | None, int]:
    """Height, width and channels of all images; None where images differ in height or width."""
    total = sum(map(len, splits))
    print(f"checking {total:,} images ...", flush=True)
    chunks = [
        (source, range(first, min(first + _READ_AT_ONCE, len(source))))
        for source in splits
        for first in range(0, len(source), _READ_AT_ONCE)
    ]
    shapes: set[tuple[int, int]] = set()
    grey, wrong, done, reported = True, list[str](), 0, time.monotonic()
    with ThreadPoolExecutor() as pool:
        for (_, indices), checked in zip(chunks, pool.map(_check, chunks), strict=True):
            shapes |= checked.shapes
            grey = grey and checked.grey
            wrong += checked.wrong
            done += len(indices)
            if time.monotonic() - reported > REPORT_EVERY:
                reported = time.monotonic()
                print(f"{done:,} of {total:,} images are checked", flush=True)
    if wrong:
        more = f"\nand {len(wrong) - 10:,} more" if len(wrong) > 10 else ""
        raise DataError(
            f"{len(wrong):,} of {total:,} images cannot be decoded; repair them, or move them"
            " away:\n" + "\n".join(wrong[:10]) + more
        )
    height, width = shapes.pop() if len(shapes) == 1 else (None, None)
    return height, width, 1 if grey else 3


class _Checked(NamedTuple):
    shapes: set[tuple[int, int]]
    grey: bool
    wrong: list[str]


def _check(chunk: tuple[FolderSource, range]) -> _Checked:
    source, indices = chunk
    shapes: set[tuple[int, int]] = set()
    grey, wrong = True, []
    for index in indices:
        (example,) = source.read([index])
        try:
            height, width, _ = decode.decode(example.encoded).shape
            shapes.add((height, width))
            grey = grey and decode.is_grey(example.encoded)
        except CorruptImageError as error:
            wrong.append(f"{source.name(index)}: {error}")
    return _Checked(shapes, grey, wrong)


def _counts(splits: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {number:,} images" for name, number in sorted(splits.items()))
