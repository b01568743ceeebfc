"""Prepared datasets of tensorflow-datasets on disk: where they are, and what they hold."""

from __future__ import annotations

import pathlib
import shlex
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_builder, naming
from tensorflow_datasets.core.utils import version as versions

from experiments.command_line import closest
from experiments.config import ConfigError
from experiments.data.errors import DataError
from experiments.data.folder import PREFIX
from experiments.paths import local_path

FORMAT = "array_record"
INFO, FEATURES = "dataset_info.json", "features.json"
"""The two files that a preparation writes last."""


class Name(NamedTuple):
    """A dataset as `name`, `name/config`, `name:version` or `name/config:version` says it."""

    name: str
    config: str | None
    version: str | None

    def __str__(self) -> str:
        """The dataset without its version."""
        return f"{self.name}/{self.config}" if self.config else self.name


def parse_name(dataset: str) -> Name:
    """Takes the name of a dataset apart; raises ConfigError where it is none."""
    try:
        name, rest = naming.parse_builder_name_kwargs(dataset)
    except ValueError:
        name, rest = None, {}
    if name is None or name.namespace or set(rest) - {"config", "version"}:
        raise ConfigError(
            f"dataset={dataset!r} must be digits, folder, or a dataset of tensorflow-datasets:"
            " its name, e.g. cifar10, or name/config; either may be followed by :version"
        )
    return Name(name.name, rest.get("config"), rest.get("version"))


def find_folder(name: Name, data_dir: str) -> pathlib.Path:
    """The folder of the newest prepared version; raises ConfigError or DataError."""
    if not data_dir or "://" in data_dir:
        raise ConfigError(
            f"data_dir={data_dir!r} must be a local folder, in which {name} has been prepared:"
            f" {prepare_command(name, 'DIR')}",
            stand_ins={"data_dir": "DIR"},
        )
    command = prepare_command(name, data_dir)
    root = local_path("data_dir", data_dir)
    if not root.is_dir():
        raise ConfigError(f"data_dir={data_dir}: no such folder; to make it: {command}")
    base = root / str(name)
    if not name.config and not versions.list_all_versions(base):
        default = _default_config(base)
        base = base / default if default else base
    matching = [v for v in versions.list_all_versions(base) if v.match(name.version or "*.*.*")]
    if matching:
        folder = base / str(matching[-1])
        check_complete(folder)
        return folder
    if any(base.glob("incomplete.*")):
        raise DataError(f"{base}: a preparation was interrupted; to start it again: {command}")
    prepared = list_prepared(root)
    advice = " For folders of images set dataset=folder." if (root / "train").is_dir() else ""
    hint = closest(str(name), {item.split(":")[0] for item in prepared} - {str(name)})
    version = f" in version {name.version}" if name.version else ""
    raise ConfigError(
        f"dataset={name}: not prepared{version} in data_dir={data_dir}, which has:"
        f" {', '.join(prepared) or 'none'}.{hint}{advice} To prepare it: {command}"
    )


def prepare_command(dataset: object, data_dir: object, manual_dir: object = None) -> str:
    """The command that prepares a dataset; FILES stands for what has to be there already."""
    name = "folder" if str(dataset).startswith(PREFIX) else str(dataset)
    words = ["python", "-m", "experiments.prepare", f"--dataset={name}", f"--data_dir={data_dir}"]
    if manual_dir or name in ("folder", "imagenet2012"):
        words.append(f"--manual_dir={manual_dir or 'FILES'}")
    return shlex.join(words)


def check_complete(folder: pathlib.Path) -> None:
    """Raises DataError where the files that are written last are not there."""
    for file in (INFO, FEATURES):
        if not (folder / file).is_file():
            raise DataError(
                f"{folder} has no {file}: its preparation, or copying it here, was interrupted;"
                f" delete the folder, then: {prepare_command(*dataset_and_root(folder))}"
            )


def _default_config(base: pathlib.Path) -> str | None:
    """The config that a dataset's name alone stands for, as its preparation noted it."""
    try:
        return dataset_builder.load_default_config_name(tfds.core.Path(base))
    except (OSError, ValueError):
        return None


def list_prepared(root: pathlib.Path) -> list[str]:
    """Datasets in a folder as `name:version` or `name/config:version`."""
    folders = [path.parent for path in root.glob(f"*/*/{INFO}")]
    for configs in root.glob("*/.config"):
        folders += [path.parent for path in configs.parent.glob(f"*/*/{INFO}")]
    return sorted(
        f"{path.parent.relative_to(root).as_posix()}:{path.name}"
        for path in folders
        if not path.name.startswith("incomplete.")
    )


def read_info(folder: pathlib.Path) -> Any:
    """The dataset's `DatasetInfo`, with ArrayRecord files; raises ConfigError or DataError."""
    try:
        info = tfds.builder_from_directory(folder).info
        formats = sorted(item.value for item in info.available_file_formats())
        if FORMAT in formats and info.file_format.value != FORMAT:
            info.set_file_format(FORMAT, override=True, override_if_initialized=True)
    except Exception as error:  # whatever is wrong with its files
        raise DataError(
            f"{folder}: {INFO} or {FEATURES} cannot be read: {type(error).__name__}: {error}"
        ) from error
    if FORMAT not in formats:
        raise ConfigError(f"{folder} is stored as {', '.join(formats)}.\n{other_format(folder)}")
    return info


def other_format(folder: pathlib.Path) -> str:
    """The ways out for a dataset that is stored in another format."""
    dataset, root = dataset_and_root(folder)
    return (
        f"Only {FORMAT} can be read without TensorFlow. Either prepare it in another folder:\n"
        f"  {prepare_command(dataset, 'ANOTHER_DIR')}\n"
        f"or move {folder} away (what needs the other format will miss it), and prepare it here:\n"
        f"  {prepare_command(dataset, root)}"
    )


def dataset_and_root(folder: pathlib.Path) -> tuple[str, pathlib.Path]:
    """Name and `data_dir` of the dataset in a folder `data_dir/name[/config]/version`."""
    above = folder.parent.parent
    if (above / ".config").is_dir():
        return f"{above.name}/{folder.parent.name}", above.parent
    return folder.parent.name, above


def image_feature(features: Any, dataset: str) -> tuple[str, tuple[int | None, int | None, int]]:
    """Name and shape of the image, of whose channels an alpha channel is not counted.

    Raises:
      ConfigError: there is not exactly one image.
    """
    images = _of_type(features, tfds.features.Image)
    key = "image" if "image" in images else next(iter(images), "")
    if not key or (len(images) > 1 and key != "image"):
        raise ConfigError(
            f"{dataset} is not an image-classification dataset: it has {len(images)} features that"
            f" are images, not one; {_described(features)}"
        )
    shape, dtype = tuple(images[key].shape), np.dtype(images[key].np_dtype)
    if dtype != np.uint8 or len(shape) != 3 or shape[2] not in (1, 3, 4):
        raise ConfigError(
            f"{dataset}: {key!r} has shape {shape} and type {dtype}; only images of type uint8 and"
            " shape (height, width, channels) can be used"
        )
    height, width, channels = shape
    return key, (height, width, min(channels, 3))


def class_labels(features: Any, dataset: str) -> dict[str, int]:
    """Number of classes by label, 0 where it is not known before the dataset is prepared.

    Raises:
      ConfigError: the dataset has no label.
    """
    labels = _of_type(features, tfds.features.ClassLabel)
    if not labels:
        raise ConfigError(
            f"{dataset} is not an image-classification dataset: it has no class label;"
            f" {_described(features)}"
        )
    return {key: label.num_classes or 0 for key, label in labels.items()}


def _of_type(features: Any, kind: type) -> dict[str, Any]:
    items = sorted(features.items()) if isinstance(features, tfds.features.FeaturesDict) else ()
    return {key: feature for key, feature in items if type(feature) is kind}


def _described(features: Any) -> str:
    if not isinstance(features, tfds.features.FeaturesDict):
        return f"its examples are {type(features).__name__}"
    kinds = (f"{key} ({type(value).__name__})" for key, value in features.items())
    return "its features: " + ", ".join(kinds)
