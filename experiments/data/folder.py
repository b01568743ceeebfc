"""A folder of class folders: `train/<class>/<image>`, `val/<class>/<image>`.

A file is an image by its ending, in small or capital letters, or else by what it begins with;
others are passed over and counted.
"""

from __future__ import annotations

import os
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.command_line import closest
from experiments.config import ConfigError
from experiments.data import decode, sources
from experiments.data.errors import DataError
from experiments.data.sources import Example
from experiments.paths import local_path

TRAIN = "train"
EVALUATION = ("test", "validation", "val", "valid")
"""Splits to evaluate on, the first choice first."""

PREFIX = "folder_"
"""Begins the names of datasets made of class folders, and of no other; see `own_images`."""

_ENDINGS = tuple(ending for endings in decode.FORMATS.values() for ending in endings)

# What systems leave behind, besides the names that begin with a dot.
_SYSTEM = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir")


class FolderSource:
    """The images of one split, by class and then by name; see `sources.Source`."""

    def __init__(
        self,
        folder: str,
        classes: Sequence[str],
        names: Sequence[Sequence[str]],
        passed_over: Mapping[str, int],
    ) -> None:
        """Takes the split's folder, its class folders, and the file names in each of these."""
        self.split = os.path.basename(folder)
        self.classes = tuple(classes)
        self.passed_over = passed_over
        self.num_classes = len(classes)
        self.image_shape: tuple[int | None, int | None, int] = (None, None, 3)
        self._folder = folder
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
        return os.path.join(self._folder, self.classes[self._labels[index]], name)


def open_folder(
    data_dir: str, split: str = "", label: str = "label", argument: str = "data_dir"
) -> FolderSource:
    """Opens `data_dir/split`; the arguments are those of `sources.open_source`.

    The folder is called `argument` in messages.

    Raises:
      ConfigError: there is no such folder, split or label.
      DataError: a class folder has no images, the split's classes are not those of train, an image
        lies where it belongs to no class, or a link leads nowhere.
    """
    if label != "label":
        raise ConfigError(f"label={label!r} must be 'label': class folders have one label only")
    layout = "<split>/<class>/<image>, e.g. train/cat/1.jpg and val/cat/2.jpg"
    own = {"data_dir": "FOLDER"}
    if not data_dir:
        raise ConfigError(
            f"{argument} is empty; dataset=folder needs a folder of {layout}", stand_ins=own
        )
    root = local_path(argument, data_dir)
    if not root.is_dir():
        raise ConfigError(
            f"{argument}={data_dir}: no such folder; it must hold {layout}", stand_ins=own
        )
    splits = folder_names(root)
    if TRAIN not in splits:
        deeper = [name for name in splits if (root / name / TRAIN).is_dir()]
        better = [("dataset", name) for name in splits if name.startswith(PREFIX)]
        better += [("data_dir", str(root / name)) for name in deeper]
        hint = "".join(f" Did you mean {key}={value}?" for key, value in better[:3])
        raise ConfigError(
            f"{argument}={data_dir} has no folder train/; it must hold {layout}; its folders:"
            f" {_listed(splits)}.{hint.replace('data_dir=', f'{argument}=')}",
            dict(better) if len(better) == 1 else {},
            {} if better else own,
        )
    split = split or _evaluation_split(root, splits)
    if split not in splits:
        raise ConfigError(
            f"split {split!r}: {root} has no such folder.{closest(split, splits)}"
            f" Its splits: {_listed(splits)} (slices are for tensorflow-datasets only)"
        )
    there = _class_folders(root / split)
    if split != TRAIN:
        _check_same_classes(root, split, there.folders)
    class_listings = [_list(root / split / name) for name in there.folders]
    if wrong := [text for each in class_listings if (text := _wrong_with_class(each))]:
        more = f"\nand {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise DataError("\n".join(wrong[:5]) + more)
    passed_over = sum((each.passed_over for each in class_listings), there.passed_over)
    return FolderSource(
        str(root / split), there.folders, [each.images for each in class_listings], passed_over
    )


def _evaluation_split(root: pathlib.Path, splits: Sequence[str]) -> str:
    """The first split to evaluate on that has class folders; ImageNet's test often has none."""
    there = [name for name in EVALUATION if name in splits]
    if not there:
        raise ConfigError(
            f"{root} has none of the folders {', '.join(EVALUATION)} to evaluate on; its folders:"
            f" {_listed(splits)}"
        )
    labelled = [name for name in there if folder_names(root / name)]
    return (labelled or there)[0]


def _check_same_classes(root: pathlib.Path, split: str, classes: Sequence[str]) -> None:
    expected = _class_folders(root / TRAIN).folders
    missing = sorted(set(expected) - set(classes))
    extra = sorted(set(classes) - set(expected))
    if missing or extra:
        raise DataError(
            f"{root / split} must have the same class folders as {root / TRAIN};"
            + (f" missing: {_listed(missing)}" if missing else "")
            + (";" if missing and extra else "")
            + (f" not in {TRAIN}: {_listed(extra)}" if extra else "")
        )


class _Listing(NamedTuple):
    """Names of the folders and of the images in a folder, sorted; how many other files, by kind."""

    path: pathlib.Path
    folders: list[str]
    images: list[str]
    passed_over: Counter[str]


def _list(path: pathlib.Path) -> _Listing:
    listing = _Listing(path, [], [], Counter())
    try:
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                _sort_in(entry, listing)
    except OSError as error:
        raise DataError(
            f"{error.filename or path}: cannot be read: {error.strerror or error}"
        ) from error
    return listing


def _sort_in(entry: os.DirEntry[str], listing: _Listing) -> None:
    """Puts an entry of a folder into its listing; raises DataError or OSError."""
    name = entry.name.lower()
    if _is_hidden(name):
        listing.passed_over["hidden"] += 1
    elif entry.is_dir():
        listing.folders.append(entry.name)
    elif not entry.is_file():  # a link to nothing, or a pipe, which would be waited for
        target = f"a link to {os.readlink(entry)}, which is" if entry.is_symlink() else "there, but"
        raise DataError(f"{entry.path} is {target} not a file")
    elif name.endswith(_ENDINGS) or decode.is_image(entry.path):
        listing.images.append(entry.name)
    else:
        listing.passed_over[os.path.splitext(name)[1] or "without an ending"] += 1


def _class_folders(folder: pathlib.Path) -> _Listing:
    """What is in a split; raises DataError where it has no class folders, or images beside them."""
    listing = _list(folder)
    if not listing.folders:
        raise DataError(
            f"{folder} has no class folders"
            + (f", but images: {_listed(listing.images)}" if listing.images else "")
        )
    if listing.images:
        raise DataError(
            f"{folder} has images beside its class folders, which belong to no class:"
            f" {_listed(listing.images)}"
        )
    return listing


def _wrong_with_class(listing: _Listing) -> str:
    """What is wrong with a class folder; empty where nothing is."""
    if listing.folders:
        return (
            f"{listing.path} is a class folder, but has a folder in it, {listing.folders[0]};"
            " images must lie directly in their class folder"
        )
    if not listing.images:
        return f"{listing.path} is a class folder without images ({', '.join(decode.FORMATS)})" + (
            f"; passed over: {sources.counted(listing.passed_over)}" if listing.passed_over else ""
        )
    return ""


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM


def folder_names(path: pathlib.Path) -> list[str]:
    """The names of the folders in a folder that are not hidden, sorted."""
    try:
        with os.scandir(path) as entries:
            return sorted(e.name for e in entries if not _is_hidden(e.name.lower()) and e.is_dir())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _listed(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more
