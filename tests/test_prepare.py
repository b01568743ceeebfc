"""`experiments.prepare`, read back and compared with what the tests put into the source files."""

import functools
import gzip
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments import prepare, prepare_errors
from experiments.data import sources
from experiments.data.errors import DataError
from tests import make_data
from tests.make_data import CIFAR_URLS
from tests.make_data import run_prepare_here as run


@pytest.fixture(autouse=True)
def with_tensorflow(monkeypatch):
    """What is tested in this process ends before TensorFlow would be imported."""
    monkeypatch.setattr(prepare_errors, "has_tensorflow", lambda: True)


def pixels(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)))


def sorted_pairs(images, labels):
    """Images and their labels, in an order that does not depend on where they lay."""
    return sorted(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


def read_all(source):
    examples = source.read(range(len(source)))
    return sorted_pairs([pixels(e.encoded) for e in examples], [e.label for e in examples])


# imagenet2012, by its own builder.


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    return make_data.prepared_imagenet(tmp_path_factory)


@pytest.mark.parametrize(("split", "opened"), [("train", "train"), ("validation", "")])
def test_imagenet_has_the_images_and_labels_of_the_tars(imagenet, split, opened):
    source = sources.open_source("imagenet2012", str(imagenet.data_dir), opened)
    written = getattr(imagenet.written, split)
    assert source.split == split
    assert source.num_classes == 1000
    assert source.image_shape == (None, None, 3)
    assert len(source) == len(written) == {"train": 160, "validation": 64}[split]
    examples = source.read(range(len(source)))
    # JPEGs are stored byte for byte.
    assert sorted(examples) == sorted(sources.Example(*image) for image in written.values())
    assert len({image.encoded for image in written.values()}) == len(written)
    name = re.escape(f"imagenet2012-{split}.array_record-00000-of-00001") + ", record 7"
    assert re.search(name, source.name(7))


def test_imagenet_says_what_is_there_and_how_to_go_on(imagenet, capsys):
    folder = imagenet.data_dir / "imagenet2012" / "5.1.0"
    summary = f"train: 160 images\nvalidation: 64 images\nlabel: 1,000 classes\nfolder: {folder}\n"
    assert summary in imagenet.output
    assert "20 class tars; ImageNet's has 1,000" in imagenet.output
    to_train = f"--config.dataset=imagenet2012 --config.data_dir={imagenet.data_dir}"
    assert re.search(
        f"python -m experiments.train --config=.* {to_train} --config.model=resnet50\n",
        imagenet.output,
    )
    # A second time there is nothing to do, and neither tars nor TensorFlow are asked for.
    code, out, _ = run(capsys, "--dataset=imagenet2012", f"--data_dir={imagenet.data_dir}")
    assert code == 0
    assert "imagenet2012 is already prepared." in out
    assert summary in out


@pytest.mark.parametrize("there", [[], ["ILSVRC2012_img_val.tar"]])
def test_imagenet_says_which_tars_are_missing(tmp_path, capsys, there):
    manual = tmp_path / "manual"
    manual.mkdir()
    for name in there:
        (manual / name).touch()
    arguments = ["--dataset=imagenet2012", f"--data_dir={tmp_path}", f"--manual_dir={manual}"]
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "register at https://image-net.org" in err
    assert f"--manual_dir={manual}" in err
    assert "ILSVRC2012_img_train.tar (138 GB): missing" in err
    assert f"ILSVRC2012_img_val.tar (6.28 GB): {'there' if there else 'missing'}" in err


def test_all_that_is_missing_is_said_at_once(capsys, monkeypatch):
    monkeypatch.setattr(prepare_errors, "has_tensorflow", lambda: False)
    code, _, err = run(capsys, "--dataset=imagenet2012")
    assert code == 2
    assert err.startswith("error: --data_dir= must be a local folder")
    assert "put these two files into --manual_dir=FILES\n" in err
    assert "imagenet2012: preparing it needs TensorFlow" in err
    command = "experiments.prepare --dataset=imagenet2012 --data_dir=DIR --manual_dir=FILES\n"
    assert err.endswith(f"what would work:\n  python -m {command}")
    code, _, err = run(capsys)
    assert code == 2
    assert "python -m experiments.prepare --dataset=cifar10 --data_dir=data" in err


def test_imagenet_with_a_truncated_tar(tmp_path, capsys):
    make_data.imagenet_tars(tmp_path, classes=2, images_per_class=2, validation_images=2)
    os.truncate(tmp_path / "ILSVRC2012_img_train.tar", 5_000)
    arguments = ["--dataset=imagenet2012", f"--data_dir={tmp_path}", f"--manual_dir={tmp_path}"]
    code, _, err = run(capsys, *arguments)
    assert code == 1
    assert f"{tmp_path / 'ILSVRC2012_img_train.tar'}: not a tar file, or truncated" in err
    assert "the original has 147,897,477,120 bytes, this one 5,000" in err


def test_imagenet_without_room_on_the_disk(tmp_path, capsys, monkeypatch):
    make_data.imagenet_tars(tmp_path, classes=2, images_per_class=2, validation_images=2)
    usage = functools.partial(type(shutil.disk_usage("/")), 2**30, 2**30)
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: usage(10))
    arguments = ["--dataset=imagenet2012", f"--data_dir={tmp_path}", f"--manual_dir={tmp_path}"]
    code, _, err = run(capsys, *arguments)
    assert code == 1
    assert "has 0.00 GB free; imagenet2012 needs" in err


# CIFAR, by its own builders.


@pytest.mark.parametrize("dataset", CIFAR_URLS)
def test_cifar_from_a_finished_download(tmp_path, dataset):
    archive = tmp_path / f"{dataset}.tar.gz"
    written = make_data.cifar_archive(dataset, archive, train=40, test=20)
    make_data.put_into_downloads(tmp_path, dataset, CIFAR_URLS[dataset], archive)
    # No proxy listens there: the download that is in place must do.
    done = make_data.run_prepare(
        f"--dataset={dataset}", f"--data_dir={tmp_path}", HTTPS_PROXY="http://127.0.0.1:9"
    )
    assert done.returncode == 0, done.stderr
    classes = {name: number for name, (number, _) in make_data.CIFAR[dataset][0].items()}
    assert all(f"{label}: {number} classes\n" in done.stdout for label, number in classes.items())
    for split, data in written.items():
        assert data.labels.keys() == classes.keys()
        for label, labels in data.labels.items():
            source = sources.open_source(dataset, str(tmp_path), split, label)
            assert source.num_classes == classes[label]
            assert source.image_shape == (32, 32, 3)
            assert read_all(source) == sorted_pairs(data.images, labels)


def test_a_file_with_the_wrong_checksum(tmp_path, capsys):
    archive = tmp_path / "cifar-100-binary.tar.gz"
    make_data.cifar_archive("cifar100", archive, train=2, test=1)
    arguments = ["--dataset=cifar100", f"--data_dir={tmp_path}", f"--manual_dir={tmp_path}"]
    code, _, err = run(capsys, *arguments)
    assert code == 1
    url = CIFAR_URLS["cifar100"]
    assert f"Artifact {url}, downloaded to {archive}, has wrong checksum" in err
    assert archive.exists()


# The MNIST family, from idx files and without TensorFlow.


@pytest.mark.parametrize("dataset", prepare.IDX_DATASETS)
@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files(tmp_path, capsys, dataset, zipped):
    written = make_data.idx_files(tmp_path / "idx", train=30, test=12, zipped=zipped)
    arguments = [f"--dataset={dataset}", f"--data_dir={tmp_path}", f"--idx_dir={tmp_path / 'idx'}"]
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    assert "train: 30 images\ntest: 12 images\nlabel: 10 classes\n" in out
    for split, (images, labels) in written.items():
        source = sources.open_source(dataset, str(tmp_path), split)
        assert source.image_shape == (28, 28, 1)
        assert source.num_classes == 10
        assert read_all(source) == sorted_pairs(images, labels)
    # The dataset that is registered under this name, not only one like it.
    stored = tfds.builder_from_directory(tmp_path / dataset / "3.0.1").info
    registered = tfds.builder(dataset, data_dir=tmp_path / "empty").info
    assert stored.full_name == registered.full_name
    assert stored.features["label"].names == registered.features["label"].names
    assert stored.features.to_json() == registered.features.to_json()


def _labels(folder, name, values):
    content = make_data.idx_bytes(np.asarray(values, np.uint8))
    (folder / f"{name}-labels-idx1-ubyte").write_bytes(content)


def _images(folder, name, shape):
    content = make_data.idx_bytes(np.zeros(shape, np.uint8))
    (folder / f"{name}-images-idx3-ubyte").write_bytes(content)


def _cut(folder, name, size):
    os.truncate(folder / name, size)


IDX_DAMAGES = {
    "missing": (
        lambda f: (f / "t10k-labels-idx1-ubyte").unlink(),
        2,
        "has no file t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz",
    ),
    "label out of range": (
        lambda f: _labels(f, "train", [0, 9, 3, 10]),
        1,
        "train-labels-idx1-ubyte: label number 3 is 10; labels must be from 0 to 9",
    ),
    "other counts": (
        lambda f: _labels(f, "t10k", [1, 2]),
        1,
        r"has 3 images and .*t10k-labels-idx1-ubyte 2 labels",
    ),
    "no images": (
        lambda f: (_labels(f, "t10k", []), _images(f, "t10k", (0, 28, 28))),
        1,
        "has 0 images and .* 0 labels",
    ),
    "other shape": (
        lambda f: _images(f, "train", (4, 32, 32)),
        1,
        "train-images-idx3-ubyte has images of 32x32 pixels; they must be 28x28",
    ),
    "swapped": (
        lambda f: shutil.copy(f / "train-labels-idx1-ubyte", f / "train-images-idx3-ubyte"),
        1,
        r"train-images-idx3-ubyte starts with the magic number 2049 \(labels\); it must be 2051",
    ),
    "truncated": (
        lambda f: _cut(f, "train-images-idx3-ubyte", 1_000),
        1,
        "has 984 bytes of images, but its header says 4x28x28 = 3136",
    ),
    "tiny": (
        lambda f: _cut(f, "train-images-idx3-ubyte", 5),
        1,
        "train-images-idx3-ubyte has 5 bytes, too few",
    ),
    "bad gzip": (
        lambda f: (f / "t10k-images-idx3-ubyte").write_bytes(gzip.compress(bytes(5_000))[:20]),
        1,
        "t10k-images-idx3-ubyte: cannot be unpacked",
    ),
}


@pytest.mark.parametrize("damage", IDX_DAMAGES)
def test_damaged_idx_files(tmp_path, capsys, damage):
    idx = tmp_path / "idx"
    make_data.idx_files(idx, train=4, test=3, zipped=False)
    change, expected, message = IDX_DAMAGES[damage]
    change(idx)
    arguments = ["--dataset=mnist", f"--data_dir={tmp_path / 'data'}", f"--idx_dir={idx}"]
    code, _, err = run(capsys, *arguments)
    assert code == expected
    assert re.search(message, err)
    assert str(idx) in err
    assert not (tmp_path / "data" / "mnist").exists()


# Interruptions.


def start(tmp_path, images=20_000):
    """Starts a preparation in a process of its own; returns it while it writes its records."""
    idx = tmp_path / "idx"
    if not idx.exists():
        make_data.idx_files(idx, train=images, test=5)
    arguments = ["--dataset=mnist", f"--data_dir={tmp_path}", f"--idx_dir={idx}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.prepare", *arguments],
        cwd=make_data.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list((tmp_path / "mnist").glob("incomplete.*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    return process, arguments


def test_killed_and_started_again(tmp_path, capsys):
    process, arguments = start(tmp_path)
    try:
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(DataError, match="a preparation was interrupted; to start it again"):
            sources.open_source("mnist", str(tmp_path), "train")
        # Not while another process is at it.
        code, _, err = run(capsys, *arguments)
        assert code == 1
        assert f"by another process (process {process.pid} on" in err
    finally:
        process.kill()
        process.communicate()
    (left,) = (tmp_path / "mnist").glob("incomplete.*")
    partial = tmp_path / "downloads" / "mnist" / f"train.gz.tmp.{'0a' * 16}"
    partial.mkdir(parents=True)
    (partial / "train.gz").write_bytes(b"half")
    make_data.idx_files(tmp_path / "idx", train=6, test=5)  # the rest need not take as long
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    assert f"removing what an interrupted run left: {left}" in out
    assert not left.exists()
    assert not partial.exists()
    assert len(sources.open_source("mnist", str(tmp_path), "train")) == 6


def test_ctrl_c(tmp_path):
    process, arguments = start(tmp_path)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (
        err == f"\ninterrupted; to continue: python -m experiments.prepare {' '.join(arguments)}\n"
    )
    assert not list((tmp_path / "mnist").iterdir())


SWALLOWED = """
import os, signal, sys
from experiments import prepare

class Cache:
    def __del__(self):  # Python cannot hand on what is raised here
        os.kill(os.getpid(), signal.SIGINT)
        sys.stderr.write("not reached")

def interrupted_in_a_callback(*settings):
    cache = Cache()
    del cache
    signal.pause()  # no more than that one signal comes from outside

prepare.prepare = interrupted_in_a_callback
for number in (signal.SIGINT, signal.SIGALRM):
    signal.signal(number, prepare._interrupt)
sys.exit(prepare.main(["--dataset=mnist", "--data_dir=."]))
"""


def test_ctrl_c_that_python_swallows():
    command = [sys.executable, "-c", SWALLOWED]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    again = "python -m experiments.prepare --dataset=mnist --data_dir=."
    assert (done.returncode, done.stderr) == (130, f"\ninterrupted; to continue: {again}\n")
