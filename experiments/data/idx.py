"""The idx files of the MNIST family: four files of images and labels, packed with gzip or not."""

from __future__ import annotations

import gzip
import pathlib
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np

from experiments.config import ConfigError
from experiments.data.errors import DataError
from experiments.paths import local_path

_PREFIXES = {"train": "train", "test": "t10k"}
_IMAGES, _LABELS = 2051, 2049  # magic numbers: unsigned bytes in 3 dimensions, and in 1
_KINDS = {_IMAGES: "images", _LABELS: "labels"}


class IdxSplit(NamedTuple):
    """Images, uint8, (examples, height, width), and labels, uint8, (examples,)."""

    images: np.ndarray
    labels: np.ndarray


def read_folder(
    idx_dir: str, num_classes: int, image_shape: tuple[int, int]
) -> dict[str, IdxSplit]:
    """Reads the four files of a dataset.

    Args:
      idx_dir: the folder with train-images-idx3-ubyte, train-labels-idx1-ubyte,
        t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each with or without .gz.
      num_classes: labels must be below it.
      image_shape: height and width that the images must have.

    Returns:
      The splits train and test.

    Raises:
      ConfigError: a file is not there.
      DataError: a file does not hold what it should.
    """
    folder = local_path("--idx_dir", idx_dir)
    if not folder.is_dir():
        raise ConfigError(f"--idx_dir={idx_dir}: no such folder")
    paths = {
        split: (_find(folder, f"{prefix}-images", 3), _find(folder, f"{prefix}-labels", 1))
        for split, prefix in _PREFIXES.items()
    }
    splits = {}
    for split, (images_path, labels_path) in paths.items():
        images, labels = _read(images_path, _IMAGES), _read(labels_path, _LABELS)
        if images.shape[1:] != image_shape:
            raise DataError(
                f"{images_path} has images of {images.shape[1]}x{images.shape[2]} pixels;"
                f" they must be {image_shape[0]}x{image_shape[1]}"
            )
        if len(images) != len(labels) or not len(images):
            raise DataError(
                f"{images_path} has {len(images)} images and {labels_path} {len(labels)} labels;"
                " there must be as many of each, and at least one"
            )
        if labels.max() >= num_classes:
            index = int(np.argmax(labels >= num_classes))
            raise DataError(
                f"{labels_path}: label number {index} is {labels[index]}; labels must be from 0 to"
                f" {num_classes - 1}"
            )
        splits[split] = IdxSplit(images, labels)
    return splits


def _find(folder: pathlib.Path, stem: str, dimensions: int) -> pathlib.Path:
    name = f"{stem}-idx{dimensions}-ubyte"
    for candidate in (name, f"{name}.gz", name.replace("-idx", ".idx")):
        if (folder / candidate).is_file():
            return folder / candidate
    raise ConfigError(
        f"--idx_dir={folder} has no file {name} or {name}.gz; it must hold the four idx files of"
        " the dataset: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte"
        " and t10k-labels-idx1-ubyte"
    )


def _read(path: pathlib.Path, expected: int) -> np.ndarray:
    """The array in an idx file with the magic number `expected`; raises DataError."""
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked: {error}") from error
    dimensions = expected % 256
    header = 4 * (1 + dimensions)
    magic = int.from_bytes(content[:4], "big")
    if len(content) >= 4 and magic != expected:
        kind = f" ({_KINDS[magic]})" if magic in _KINDS else ""
        raise DataError(
            f"{path} starts with the magic number {magic}{kind}; it must be {expected}"
            f" ({_KINDS[expected]})"
        )
    if len(content) < header:
        raise DataError(f"{path} has {len(content)} bytes, too few for an idx file")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    size = int(np.prod(shape, dtype=np.int64))
    if len(content) - header != size:
        raise DataError(
            f"{path} has {len(content) - header} bytes of {_KINDS[expected]}, but its header says"
            f" {'x'.join(map(str, shape))} = {size}: it is truncated or damaged"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def make_builder(builder: Any, idx_dir: str, root: pathlib.Path) -> Any:
    """A builder of the same dataset, with its features, from idx files instead of a download."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    height, width, _ = features["image"].shape
    splits = read_folder(idx_dir, features["label"].num_classes, (height, width))
    registered: Any = type(builder)
    with tfds.core.registered.skip_registration():

        class FromIdx(registered):
            name = registered.name

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                del dl_manager
                return {split: self._generate_examples(data) for split, data in splits.items()}

            def _generate_examples(self, data: IdxSplit) -> Iterator[tuple[int, Any]]:
                for key, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
                    # PNG, as tensorflow-datasets would store it, but TensorFlow would encode it.
                    encoded = cv2.imencode(".png", image)[1].tobytes()
                    yield key, {"image": encoded, "label": int(label)}

    FromIdx.__module__ = registered.__module__
    return FromIdx(data_dir=root, version=str(builder.version))
