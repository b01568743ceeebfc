"""Small datasets, written to disk as their publishers do: class folders, ILSVRC tars, CIFAR, idx.

Every function returns what it wrote, so that a test can compare it with what it reads back.
"""

from __future__ import annotations

import fcntl
import gzip
import importlib.util
import io
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from experiments import prepare

ROOT = pathlib.Path(__file__).parents[1]

CIFAR_URLS = {
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "cifar100": "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
}


class Written(NamedTuple):
    """An encoded image and its label, as they were written."""

    encoded: bytes
    label: int


def texture(rng: np.random.Generator, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Waves, edges and some noise: uint8, (height, width, channels)."""
    y, x = np.mgrid[:height, :width] / 20
    planes = []
    for _ in range(channels):
        a, b, c, d = rng.uniform(-3, 3, 4)
        waves = np.sin(a * x + b * y + c) + 0.5 * np.sign(np.cos(d * x - a * y))
        planes.append(128 + 70 * waves + rng.normal(0, 8, (height, width)))
    return np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, quality: int = 92) -> bytes:
    """`pixels` as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def varied_jpeg(rng: np.random.Generator, low: int = 40, high: int = 90) -> bytes:
    """A textured JPEG, its sides drawn from `low` to `high`."""
    height, width = rng.integers(low, high + 1, 2)
    return jpeg(texture(rng, int(height), int(width)))


def class_folders(
    root: str | os.PathLike[str],
    split: str,
    classes: Sequence[str],
    images_per_class: int,
    seed: int = 0,
) -> list[pathlib.Path]:
    """Writes `root/split/<class>/<n>.jpg`.

    Args:
      root: the folder of the dataset.
      split: name of the split's folder.
      classes: names of the class folders.
      images_per_class: how many textured JPEGs of varying size each class gets.
      seed: of the pictures; other splits get other pictures.

    Returns:
      The files, sorted by class and name.
    """
    rng = np.random.default_rng([seed, *split.encode()])
    paths = []
    for name in sorted(classes):
        folder = pathlib.Path(root, split, name)
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(images_per_class):
            path = folder / f"{index:03d}.jpg"
            path.write_bytes(varied_jpeg(rng))
            paths.append(path)
    return paths


def _tfds_file(*parts: str) -> pathlib.Path:
    """A file of the installed package tensorflow-datasets, which is not imported."""
    spec = importlib.util.find_spec("tensorflow_datasets")
    assert spec is not None
    assert spec.submodule_search_locations
    return pathlib.Path(spec.submodule_search_locations[0], *parts)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


class ImagenetWritten(NamedTuple):
    """What `imagenet_tars` wrote: images by their file name."""

    train: Mapping[str, Written]
    validation: Mapping[str, Written]


def imagenet_tars(
    manual_dir: str | os.PathLike[str],
    classes: int = 20,
    images_per_class: int = 8,
    validation_images: int = 64,
) -> ImagenetWritten:
    """Writes ILSVRC2012_img_train.tar (a tar a class) and ILSVRC2012_img_val.tar.

    The class names are the first synsets; the labels of the validation images are the real ones
    of ILSVRC 2012, from the list that tensorflow-datasets has of them, so they run up to 999.
    """
    manual_dir = pathlib.Path(manual_dir)
    manual_dir.mkdir(parents=True, exist_ok=True)
    folder = ("datasets", "imagenet2012")
    synsets = _tfds_file(*folder, "labels.txt").read_text().split()
    answers = _tfds_file(*folder, "validation_labels.txt").read_text().split()
    rng = np.random.default_rng(2012)
    train = {}
    with tarfile.open(manual_dir / "ILSVRC2012_img_train.tar", "w") as outer:
        for label, synset in enumerate(synsets[:classes]):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for index in range(images_per_class):
                    name = f"{synset}_{index}.JPEG"
                    train[name] = Written(varied_jpeg(rng), label)
                    _add(inner, name, train[name].encoded)
            _add(outer, f"{synset}.tar", buffer.getvalue())
    validation = {}
    with tarfile.open(manual_dir / "ILSVRC2012_img_val.tar", "w") as tar:
        for index in range(validation_images):
            name = f"ILSVRC2012_val_{index + 1:08d}.JPEG"
            validation[name] = Written(varied_jpeg(rng), synsets.index(answers[index]))
            _add(tar, name, validation[name].encoded)
    return ImagenetWritten(train, validation)


class CifarSplit(NamedTuple):
    """Images, uint8, (n, 32, 32, 3), and labels by name, each uint8, (n,)."""

    images: np.ndarray
    labels: dict[str, np.ndarray]


# Labels in the order of a record's first bytes, with the number of their classes and the file of
# their names; then the files of each split.
CIFAR = {
    "cifar10": (
        {"label": (10, "batches.meta.txt")},
        {"train": [f"data_batch_{n}.bin" for n in range(1, 6)], "test": ["test_batch.bin"]},
        "cifar-10-batches-bin",
    ),
    "cifar100": (
        {"coarse_label": (20, "coarse_label_names.txt"), "label": (100, "fine_label_names.txt")},
        {"train": ["train.bin"], "test": ["test.bin"]},
        "cifar-100-binary",
    ),
}


def cifar_archive(
    dataset: str, path: str | os.PathLike[str], train: int, test: int
) -> dict[str, CifarSplit]:
    """Writes CIFAR's archive: a record is a byte a label and 1,024 bytes a channel."""
    kinds, files, folder = CIFAR[dataset]
    rng = np.random.default_rng(100)
    written = {}
    with tarfile.open(path, "w:gz") as tar:
        for split, count in (("train", train), ("test", test)):
            images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            labels = {
                name: rng.integers(0, classes, count, dtype=np.uint8)
                for name, (classes, _) in kinds.items()
            }
            written[split] = CifarSplit(images, labels)
            records = np.concatenate(
                [
                    *(x[:, None] for x in labels.values()),
                    images.transpose(0, 3, 1, 2).reshape(count, -1),
                ],
                axis=1,
            )
            for name, part in zip(
                files[split], np.array_split(records, len(files[split])), strict=True
            ):
                _add(tar, f"{folder}/{name}", part.tobytes())
        for kind, (classes, name) in kinds.items():
            names = "".join(f"{kind} {index}\n" for index in range(classes))
            _add(tar, f"{folder}/{name}", names.encode())
    return written


def put_into_downloads(
    data_dir: str | os.PathLike[str], dataset: str, url: str, path: pathlib.Path
) -> None:
    """Puts a file where tensorflow-datasets keeps what it has downloaded from `url`."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import resource

    checked = tfds.builder_cls(dataset).url_infos[url]
    target = pathlib.Path(
        data_dir, "downloads", dataset, resource.get_dl_fname(url, checked.checksum)
    )
    target.parent.mkdir(parents=True)
    target.write_bytes(path.read_bytes())
    note = {"original_fname": path.name, "urls": [url], "dataset_names": [dataset]}
    target.with_name(target.name + ".INFO").write_text(json.dumps(note))


def idx_bytes(array: np.ndarray) -> bytes:
    """An array of unsigned bytes as an idx file: type and dimensions, sizes, then the values."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def idx_files(
    folder: str | os.PathLike[str], train: int, test: int, zipped: bool = True
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Writes the four files of an MNIST-like dataset; returns images and labels by split."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(28)
    written = {}
    for split, prefix, count in (("train", "train", train), ("test", "t10k", test)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        written[split] = images, labels
        for name, array in ((f"{prefix}-images-idx3", images), (f"{prefix}-labels-idx1", labels)):
            content = idx_bytes(array)
            path = folder / f"{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content, 1) if zipped else content)
    return written


def run_prepare(*arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m experiments.prepare` to its end; `options` are environment variables."""
    return subprocess.run(
        [sys.executable, "-m", "experiments.prepare", *arguments],
        cwd=ROOT,
        env=os.environ | options,
        capture_output=True,
        text=True,
        timeout=600,
    )


def run_prepare_here(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of the command, run in this process, without TensorFlow."""
    capsys.readouterr()
    code = prepare.main(arguments)
    assert "tensorflow" not in sys.modules
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, err


class PreparedImagenet(NamedTuple):
    """The folder that `experiments.prepare` made of the small tars, and what went into it."""

    data_dir: pathlib.Path
    written: ImagenetWritten
    output: str


def prepared_imagenet(tmp_path_factory: pytest.TempPathFactory) -> PreparedImagenet:
    """The real imagenet2012 builder over `imagenet_tars`, in a process of its own, once a test run.

    All workers of pytest-xdist share it; nobody may write into it.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / "imagenet"
    with (base / "imagenet.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = folder / "result.pickle"
        if not result.exists():
            written = imagenet_tars(folder / "manual")
            done = run_prepare(
                "--dataset=imagenet2012",
                f"--data_dir={folder / 'data'}",
                f"--manual_dir={folder / 'manual'}",
            )
            assert done.returncode == 0, done.stdout + done.stderr
            result.write_bytes(pickle.dumps((written, done.stdout)))
        written, output = pickle.loads(result.read_bytes())
    return PreparedImagenet(folder / "data", written, output)
