"""Class folders stored as records: the same images, and on the device the same batches."""

import pathlib
import shutil

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import data
from experiments.config import Config, ConfigError
from experiments.data import own_images
from experiments.data.sources import Example, open_source
from tests import make_data
from tests.make_data import run_prepare_here


def run(capsys, origin, root, *more):
    return run_prepare_here(
        capsys, "--dataset=folder", f"--manual_dir={origin}", f"--data_dir={root}", *more
    )


def write(root, split, name, files):
    folder = root / split / name
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)


def small(rng, size=8):
    return cv2.imencode(".png", rng.integers(0, 256, (size, size, 3), np.uint8))[1].tobytes()


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Small images of one shape; nobody may write into them."""
    root = tmp_path_factory.mktemp("data") / "My toys-2"
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("car", "doll house"):
            files = {f"{i}.png": small(rng) for i in range(count)}
            files["a.jpg"] = make_data.jpeg(rng.integers(0, 256, (8, 8, 3), np.uint8))
            write(root, split, name, files)
    (root / "train" / "car" / "notes.txt").write_text("a note")
    (root / "test").mkdir()
    (root / "test" / "1.png").write_bytes(small(rng))
    return root


@pytest.fixture
def toys_copy(toys, tmp_path):
    return pathlib.Path(shutil.copytree(toys, tmp_path / "toys"))


def test_records_hold_the_files_byte_for_byte(toys, tmp_path, capsys):
    root = tmp_path / "records"
    code, out, err = run(capsys, toys, root)
    assert code == 0, err
    assert "train: passed over: 1 .txt\nchecking 20 images ..." in out
    assert "train: 14 images\nval: 6 images\nlabel: 2 classes\n" in out
    to_train = f"--config.dataset=folder_my_toys_2 --config.data_dir={root}\n"
    assert out.endswith(to_train)
    assert sorted(p.name for p in toys.iterdir()) == ["test", "train", "val"]
    for split in ("train", "val"):
        source = open_source("folder_my_toys_2", str(root), split)
        paths = sorted((toys / split).glob("*/*.[pj]*"))
        wanted = [Example(p.read_bytes(), int(p.parent.name == "doll house")) for p in paths]
        assert sorted(source.read(range(len(source)))) == sorted(wanted)
        assert (source.image_shape, source.num_classes) == ((8, 8, 3), 2)
    info = tfds.builder_from_directory(root / "folder_my_toys_2" / "1.0.0").info
    assert info.features["label"].names == ["car", "doll house"]
    loaded = data.load(Config(dataset="folder_my_toys_2", data_dir=str(root)))
    assert loaded.image_shape == (8, 8, 3)

    code, out, _ = run(capsys, toys, root)
    assert code == 0
    assert "folder_my_toys_2 is already prepared." in out
    assert "checking" not in out


def test_batches_are_those_of_the_same_images_from_elsewhere(tmp_path, capsys):
    """Fashion-MNIST from idx files, and the same 28x28 greys as PNGs in class folders."""
    written = make_data.idx_files(tmp_path / "idx", train=60, test=20)
    for (split, (images, labels)), prefix in zip(written.items(), ("train", "t10k"), strict=True):
        labels[:10] = range(10)
        order = np.argsort(labels, kind="stable")
        images[:], labels[:] = images[order], labels[order]
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = tmp_path / "idx" / f"{prefix}-{kind}-ubyte"
            path.with_name(f"{path.name}.gz").unlink()
            path.write_bytes(make_data.idx_bytes(array))
        for number in range(10):
            chosen = np.flatnonzero(labels == number)
            files = {f"{i:03}.png": cv2.imencode(".png", images[i])[1].tobytes() for i in chosen}
            write(tmp_path / "greys", split, str(number), files)
    root = tmp_path / "records"
    idx = ("--dataset=fashion_mnist", f"--data_dir={root}", f"--idx_dir={tmp_path / 'idx'}")
    assert run_prepare_here(capsys, *idx)[0] == 0
    assert run(capsys, tmp_path / "greys", root)[0] == 0
    loaded = [
        data.load(Config(dataset=name, data_dir=str(root), batch_size=16, mesh_data=1))
        for name in ("fashion_mnist", "folder_greys")
    ]
    for dataset in loaded:
        assert isinstance(dataset, data.DeviceData)
        assert (dataset.image_shape, dataset.augmentation) == ((28, 28, 1), "crop_flip")
    assert loaded[0].mean == loaded[1].mean
    assert loaded[0].std == loaded[1].std
    batches = [dataset.train_batches(seed=3, first_step=0) for dataset in loaded]
    for _ in range(4):  # into the second epoch
        one, other = (next(each) for each in batches)
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)
    for one, other in zip(*(dataset.eval_batches() for dataset in loaded), strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)


def test_images_of_several_shapes_are_streamed(toys_copy, tmp_path, capsys):
    extra = toys_copy / "val" / "car" / "large.png"
    extra.write_bytes(small(np.random.default_rng(1), size=9))
    assert run(capsys, toys_copy, tmp_path / "records")[0] == 0
    config = Config(
        dataset="folder_toys", data_dir=str(tmp_path / "records"), batch_size=2, mesh_data=1
    )
    assert isinstance(data.load(config), data.StreamedData)
    assert open_source("folder_toys", config.data_dir).image_shape == (None, None, 3)


def test_damaged_images_are_all_named(toys_copy, tmp_path, capsys):
    cars = toys_copy / "train" / "car"
    (cars / "0.png").write_bytes(b"")
    (cars / "a.jpg").write_bytes((cars / "a.jpg").read_bytes()[:-9])
    code, _, err = run(capsys, toys_copy, tmp_path / "records")
    assert code == 1
    first, empty, cut = err.splitlines()
    assert first.startswith("error: 2 of 20 images cannot be decoded; repair them, or move them")
    assert empty == f"{cars / '0.png'}: it is empty (0 bytes)"
    assert cut.startswith(f"{cars / 'a.jpg'}: damaged JPEG: ")
    assert not (tmp_path / "records").exists()


def test_records_of_another_folder_or_of_an_earlier_state(toys_copy, tmp_path, capsys):
    root = tmp_path / "records"
    assert run(capsys, toys_copy, root)[0] == 0
    extra = toys_copy / "val" / "car" / "new.png"
    extra.write_bytes(small(np.random.default_rng(1)))
    code, _, err = run(capsys, toys_copy, root)
    assert code == 2
    assert f"{root / 'folder_toys/1.0.0'} has train: 14 images, val: 6 images, but" in err
    assert f"{toys_copy} has train: 14 images, val: 7 images now; take another --data_dir" in err
    extra.unlink()
    (tmp_path / "other").mkdir()
    moved = shutil.move(toys_copy, tmp_path / "other" / "toys")
    code, _, err = run(capsys, moved, root)
    assert code == 2
    assert f"holds something else (Class folders of {toys_copy})" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data_dir={}/records"], "--data_dir={}/records must not lie in --manual_dir={}"),
        (["--data_dir={}"], "--data_dir={} must not lie in --manual_dir={}"),
        (["--manual_dir={}/train"], "--manual_dir={}/train has no folder train/"),
        (["--manual_dir={}/.."], "Did you mean --manual_dir={}?"),
        (
            ["--manual_dir={}/no", "--data_dir="],
            "--data_dir= must be a local folder for the dataset\n--manual_dir={}/no: no such",
        ),
        (
            ["--data_dir="],
            "experiments.prepare --dataset=folder --data_dir=DIR '--manual_dir={}'\n",
        ),
        (["--dataset=folder_x"], "--dataset=folder --data_dir="),
    ],
)
def test_wrong_folders(toys, tmp_path, capsys, more, message):
    code, _, err = run(capsys, toys, tmp_path / "r", *(word.format(toys) for word in more))
    assert code == 2
    assert message.format(toys, toys) in err


def test_names_that_are_no_lines_of_text(toys_copy, tmp_path, capsys):
    for split in ("train", "val"):
        (toys_copy / split / "car").rename(toys_copy / split / "car\n")
    code, _, err = run(capsys, toys_copy, tmp_path / "records")
    assert code == 2
    assert r"to be stored as lines of text: 'car\n'" in err


def test_training_says_how_to_get_at_them(toys, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"--dataset=folder --manual_dir='.*' --data_dir=RECORDS"):
        data.load(Config(dataset="folder", data_dir=str(toys), storage="device", batch_size=2))
    (tmp_path / f"{own_images.PREFIX}toys").mkdir()
    with pytest.raises(ConfigError, match=r"Did you mean dataset=folder_toys\?"):
        data.load(Config(dataset="folder", data_dir=str(tmp_path)))
