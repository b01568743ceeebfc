"""Folders of class folders against the files that the tests wrote into them."""

import pathlib
import pickle
import re
import shutil

import numpy as np
import pytest

from experiments.config import ConfigError
from experiments.data.errors import DataError
from experiments.data.sources import Example, open_source
from tests import make_data


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Class folders to train on and to evaluate on; nobody may write into them."""
    root = tmp_path_factory.mktemp("photos")
    for split, images in (("train", 3), ("val", 2)):
        make_data.class_folders(root, split, ["dog", "cat", "Bird"], images)
    return root


@pytest.fixture
def photos_copy(photos, tmp_path):
    return pathlib.Path(shutil.copytree(photos, tmp_path / "photos"))


def test_reads_every_file_with_the_label_of_its_class(photos):
    source = open_source("folder", str(photos), "train")
    names = ["Bird", "cat", "dog"]  # capital letters sort first
    paths = [photos / "train" / name / f"{i:03d}.jpg" for name in names for i in range(3)]
    assert len(source) == 9
    assert source.num_classes == 3
    assert source.image_shape == (None, None, 3)
    assert [source.name(i) for i in range(9)] == [str(path) for path in paths]
    wanted = [Example(path.read_bytes(), i // 3) for i, path in enumerate(paths)]
    assert source.read(range(9)) == wanted
    assert source.read(np.array([7, 0])) == [wanted[7], wanted[0]]
    assert pickle.loads(pickle.dumps(source)).read([4]) == [wanted[4]]
    with pytest.raises(IndexError, match=r"index=9 must be in \[0, 9\)"):
        source.read([9])


def test_kinds_of_files(photos_copy):
    folder = photos_copy / "train" / "cat"
    for name in ("é.PNG", "b.JPEG", ".hidden.jpg", "notes.txt"):
        (folder / name).write_bytes(name.encode())
    (photos_copy / "train" / ".cache").mkdir()
    (photos_copy / "train" / "README.md").write_text("")
    source = open_source("folder", str(photos_copy), "train")
    names = [source.name(i) for i in range(len(source)) if "/cat/" in source.name(i)]
    found = [f"{i:03d}.jpg" for i in range(3)] + ["b.JPEG", "é.PNG"]
    assert names == [str(folder / name) for name in found]
    assert source.read([7]) == [Example("é.PNG".encode(), 1)]


@pytest.mark.parametrize(
    ("names", "evaluation"),
    [
        (["val"], "val"),
        (["validation"], "validation"),
        (["test"], "test"),
        (["val", "test"], "test"),
        (["val", "validation"], "validation"),
    ],
)
def test_split_to_evaluate_on(photos_copy, names, evaluation):
    for name in names:
        if name != "val":
            shutil.copytree(photos_copy / "val", photos_copy / name)
    if "val" not in names:
        shutil.rmtree(photos_copy / "val")
    source = open_source("folder", str(photos_copy))
    assert source.split == evaluation
    assert len(source) == 6


def test_test_without_classes_is_passed_over(photos_copy):
    (photos_copy / "test").mkdir()
    (photos_copy / "test" / "1.jpg").write_bytes(b"")
    assert open_source("folder", str(photos_copy)).split == "val"
    with pytest.raises(DataError, match=r"/test has no class folders, but images: 1\.jpg"):
        open_source("folder", str(photos_copy), "test")


def test_classes_must_be_those_of_train(photos_copy):
    (photos_copy / "val" / "dog").rename(photos_copy / "val" / "dogs")
    with pytest.raises(DataError) as caught:
        open_source("folder", str(photos_copy))
    assert f"{photos_copy / 'val'} must have the same class folders as" in str(caught.value)
    assert "missing: dog; not in train: dogs" in str(caught.value)
    assert len(open_source("folder", str(photos_copy), "train")) == 9


def test_without_images(photos_copy):
    folder = photos_copy / "train" / "cat"
    for path in folder.iterdir():
        path.rename(path.with_suffix(".svg"))
    with pytest.raises(DataError, match=rf"{folder} is a class folder without images.*000\.svg"):
        open_source("folder", str(photos_copy), "train")
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(DataError, match=f"{folder} is a class folder without images"):
        open_source("folder", str(photos_copy), "train")


def test_without_class_folders(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=f"{tmp_path / 'train'} has no class folders"):
        open_source("folder", str(tmp_path), "train")


def test_with_an_image_or_a_folder_too_high_or_too_deep(photos_copy):
    stray = photos_copy / "train" / "stray.jpg"
    stray.write_bytes(b"")
    with pytest.raises(DataError, match=r"/train has images beside its class folders.*stray\.jpg"):
        open_source("folder", str(photos_copy), "train")
    stray.unlink()
    (photos_copy / "train" / "cat" / "images").mkdir()
    with pytest.raises(
        DataError, match="/train/cat is a class folder, but has a folder in it, ima"
    ):
        open_source("folder", str(photos_copy), "train")


@pytest.mark.parametrize("data_dir", ["", "/no/such/folder"])
def test_is_not_there(data_dir):
    with pytest.raises(ConfigError, match=f"data_dir(=| is empty).*{data_dir}.*train/cat/1.jpg"):
        open_source("folder", data_dir)


def test_without_train_or_evaluation(tmp_path, photos_copy):
    with pytest.raises(ConfigError, match=f"{tmp_path / 'photos' / 'train'} has no folder train/"):
        open_source("folder", str(photos_copy / "train"))
    shutil.rmtree(photos_copy / "val")
    with pytest.raises(ConfigError, match="none of the folders test, validation, val"):
        open_source("folder", str(photos_copy))


@pytest.mark.parametrize("split", ["vall", "train[:90%]"])
def test_split_that_is_not_there(photos, split):
    with pytest.raises(ConfigError, match=re.escape(f"split {split!r}") + ".*train, val"):
        open_source("folder", str(photos), split)


def test_has_one_label_only(photos):
    with pytest.raises(ConfigError, match="label='coarse_label' must be 'label'"):
        open_source("folder", str(photos), label="coarse_label")


def test_file_that_vanished(photos_copy):
    source = open_source("folder", str(photos_copy), "train")
    path = photos_copy / "train" / "cat" / "001.jpg"
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: cannot be read: No such file"):
        source.read([4])
