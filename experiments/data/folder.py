"""A folder of class folders: `train/<class>/<image>`, `val/<class>/<image>`."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from experiments.command_line import closest
from experiments.config import ConfigError
from experiments.data.errors import DataError
from experiments.data.paths import local_folder
from experiments.data.sources import Example

EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
"""Endings of the files that are images, in small or capital letters; other files are ignored."""

TRAIN = "train"
EVALUATION = ("test", "validation", "val")
"""Splits to evaluate on, the first choice first."""


class FolderSource:
    """The images of one split, by class and then by name; see `sources.Source`."""

    def __init__(self, folder: str, classes: Sequence[str], names: Sequence[Sequence[str]]) -> None:
        """Takes the split's folder, its class folders, and the file names in each of these."""
        self.split = os.path.basename(folder)
        self.num_classes = len(classes)
        self.image_shape: tuple[int | None, int | None, int] = (None, None, 3)
        self._folder = folder
        self._classes = tuple(classes)
        self._labels = np.repeat(np.arange(len(classes), dtype=np.int32), [*map(len, names)])
        # One array of bytes, since a million strings would be copied into every worker process.
        encoded = [os.fsencode(name) for group in names for name in group]
        self._ends = np.cumsum([len(name) for name in encoded])
        self._names = b"".join(encoded)

    def __len__(self) -> int:
        """How many images there are."""
        return len(self._labels)

    def read(self, indices: Sequence[int]) -> list[Example]:
        """As `sources.Source.read`."""
        return [self._read(index) for index in indices]

    def _read(self, index: int) -> Example:
        path = self.name(index)
        try:
            with open(path, "rb") as file:
                return Example(file.read(), int(self._labels[index]))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error

    def name(self, index: int) -> str:
        """The path of the image."""
        if not 0 <= index < len(self):
            raise IndexError(f"index={index} must be in [0, {len(self)})")
        start = self._ends[index - 1] if index else 0
        name = os.fsdecode(self._names[start : self._ends[index]])
        return os.path.join(self._folder, self._classes[self._labels[index]], name)


def open_folder(data_dir: str, split: str = "", label: str = "label") -> FolderSource:
    """Opens `data_dir/split`; the arguments are those of `sources.open_source`.

    Raises:
      ConfigError: there is no such folder, split or label.
      DataError: a class folder has no images, the split's classes are not those of train, or an
        image lies where it belongs to no class.
    """
    if label != "label":
        raise ConfigError(f"label={label!r} must be 'label': class folders have one label only")
    layout = "<split>/<class>/<image>, e.g. train/cat/1.jpg and val/cat/2.jpg"
    if not data_dir:
        raise ConfigError(f"data_dir is empty; dataset=folder needs a folder of {layout}")
    root = local_folder("data_dir", data_dir)
    if not root.is_dir():
        raise ConfigError(f"data_dir={data_dir}: no such folder; it must hold {layout}")
    splits = [entry.name for entry in _visible(root) if entry.is_dir()]
    if TRAIN not in splits:
        raise ConfigError(
            f"data_dir={data_dir} has no folder train/; it must hold {layout};"
            f" its folders: {_listed(splits)}"
        )
    split = split or _evaluation_split(root, splits)
    if split not in splits:
        raise ConfigError(
            f"split {split!r}: {root} has no such folder.{closest(split, splits)}"
            f" Its splits: {_listed(splits)} (slices are for tensorflow-datasets only)"
        )
    classes = _class_folders(root / split)
    if split != TRAIN:
        _check_same_classes(root, split, classes)
    names = [_images(root / split / name) for name in classes]
    return FolderSource(str(root / split), classes, names)


def _evaluation_split(root: pathlib.Path, splits: Sequence[str]) -> str:
    """The first split to evaluate on that has class folders; ImageNet's test often has none."""
    there = [name for name in EVALUATION if name in splits]
    if not there:
        raise ConfigError(
            f"{root} has none of the folders {', '.join(EVALUATION)} to evaluate on; its folders:"
            f" {_listed(splits)}"
        )
    labelled = [name for name in there if any(e.is_dir() for e in _visible(root / name))]
    return (labelled or there)[0]


def _check_same_classes(root: pathlib.Path, split: str, classes: Sequence[str]) -> None:
    expected = _class_folders(root / TRAIN)
    missing = sorted(set(expected) - set(classes))
    extra = sorted(set(classes) - set(expected))
    if missing or extra:
        raise DataError(
            f"{root / split} must have the same class folders as {root / TRAIN};"
            + (f" missing: {_listed(missing)}" if missing else "")
            + (";" if missing and extra else "")
            + (f" not in {TRAIN}: {_listed(extra)}" if extra else "")
        )


def _class_folders(folder: pathlib.Path) -> list[str]:
    """Names of the class folders, sorted; raises DataError where there are none."""
    entries = _visible(folder)
    stray = [entry.name for entry in entries if _is_image(entry.name) and not entry.is_dir()]
    classes = [entry.name for entry in entries if entry.is_dir()]
    if not classes:
        raise DataError(
            f"{folder} has no class folders" + (f", but images: {_listed(stray)}" if stray else "")
        )
    if stray:
        raise DataError(
            f"{folder} has images beside its class folders, which belong to no class:"
            f" {_listed(stray)}"
        )
    return classes


def _images(folder: pathlib.Path) -> list[str]:
    """Names of the images in a class folder, sorted; raises DataError where there are none."""
    names: list[str] = []
    others: list[str] = []
    for entry in _visible(folder):
        if entry.is_dir():
            raise DataError(
                f"{folder} is a class folder, but has a folder in it, {entry.name};"
                " images must lie directly in their class folder"
            )
        (names if _is_image(entry.name) else others).append(entry.name)
    if not names:
        raise DataError(
            f"{folder} is a class folder without images ({' '.join(EXTENSIONS)})"
            + (f"; its other files: {_listed(others)}" if others else "")
        )
    return names


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _visible(folder: pathlib.Path) -> list[os.DirEntry[str]]:
    """The entries of a folder that are not hidden, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror or error}") from error
    return sorted(shown, key=lambda entry: entry.name)


def _listed(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more
