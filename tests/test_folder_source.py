"""Folders of class folders against the files that the tests wrote into them."""

import os
import pathlib
import pickle
import re
import shutil

import numpy as np
import pytest

from experiments.config import ConfigError
from experiments.data.errors import DataError
from experiments.data.sources import Example, counted, open_source
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
    """By their ending without a look into them; others by what they begin with, or counted."""
    folder = photos_copy / "train" / "cat"
    by_name = ["a.JfIf", "b.JPEG", "c.jpe", "d.pgm", "e.avif", "f.tif", "g.WebP", "h.jp2", "é.PNG"]
    for name in by_name:
        (folder / name).write_bytes(name.encode())
    content = (folder / "000.jpg").read_bytes()
    by_content = ["x", "x.0001", "x.heic", "x.jpg~"]
    for name in by_content:
        (folder / name).write_bytes(content)
    for name in ("1.heic", "2.HEIC", "3.heic"):
        (folder / name).write_bytes(b"\0\0\0\x18ftypheic")
    for name in ("notes.txt", "LICENSE", "BMP.csv", "P5 of 6"):
        (folder / name).write_bytes(name.encode())
    for name in (".DS_Store", "._000.jpg", ".hidden.jpg", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(content)
    (folder / "empty").touch()
    (photos_copy / "train" / ".cache").mkdir()
    (photos_copy / "train" / "__MACOSX").mkdir()
    (photos_copy / "train" / "README.md").write_text("")
    source = open_source("folder", str(photos_copy), "train")
    names = [source.name(i) for i in range(len(source)) if "/cat/" in source.name(i)]
    found = [f"{i:03d}.jpg" for i in range(3)] + by_name + by_content
    assert names == [str(folder / name) for name in sorted(found)]
    assert source.read([names.index(str(folder / "é.PNG")) + 3]) == [Example("é.PNG".encode(), 1)]
    assert source.classes == ("Bird", "cat", "dog")
    assert source.passed_over == {
        "hidden": 7, ".heic": 3, "without an ending": 3, ".txt": 1, ".csv": 1, ".md": 1
    }  # fmt: skip
    assert counted(source.passed_over) == (
        "7 hidden, 3 .heic, 3 without an ending, 1 .csv, 1 .md, 1 .txt"
    )
    assert open_source("folder", str(photos_copy)).passed_over == {}


def test_links(photos_copy, tmp_path):
    """To an image, to a class folder; one that leads nowhere, or in a circle, is an error."""
    cat = photos_copy / "train" / "cat"
    (cat / "000.jpg").rename(tmp_path / "elsewhere")
    (cat / "000.jpg").symlink_to(tmp_path / "elsewhere")
    (photos_copy / "train" / "dog").rename(tmp_path / "dogs")
    (photos_copy / "train" / "dog").symlink_to(tmp_path / "dogs")
    source = open_source("folder", str(photos_copy), "train")
    assert len(source) == 9
    assert source.read([3]) == [Example((tmp_path / "elsewhere").read_bytes(), 1)]
    (tmp_path / "elsewhere").unlink()
    with pytest.raises(DataError, match=r"cat/000\.jpg is a link to .*/elsewhere, which is not a"):
        open_source("folder", str(photos_copy), "train")
    (cat / "000.jpg").unlink()
    (cat / "000.jpg").symlink_to(cat / "000.jpg")
    with pytest.raises(DataError, match=r"cat/000\.jpg: cannot be read: Too many levels"):
        open_source("folder", str(photos_copy), "train")
    (cat / "000.jpg").unlink()
    os.mkfifo(cat / "000.jpg")
    with pytest.raises(DataError, match=r"cat/000\.jpg is there, but not a file"):
        open_source("folder", str(photos_copy), "train")


@pytest.mark.parametrize(
    ("names", "evaluation"),
    [
        (["val"], "val"),
        (["validation"], "validation"),
        (["valid"], "valid"),
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
        path.write_text("<svg/>")
        path.rename(path.with_suffix(".svg"))
    (folder / ".DS_Store").touch()
    dog = photos_copy / "train" / "dog"
    shutil.rmtree(dog)
    dog.mkdir()
    (photos_copy / "train" / "Bird" / "nest").mkdir()
    with pytest.raises(DataError) as caught:
        open_source("folder", str(photos_copy), "train")
    bird, cat, dog = str(caught.value).splitlines()  # all that is wrong at once
    assert "Bird is a class folder, but has a folder in it, nest; images must lie dir" in bird
    assert re.search(rf"^{folder} is a class folder without images \(JPEG, PNG, .*\)", cat)
    assert cat.endswith("; passed over: 3 .svg, 1 hidden")
    assert dog.endswith("PPM)")


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
    with pytest.raises(ConfigError, match=f"Did you mean data_dir={photos_copy}?"):
        open_source("folder", str(tmp_path))
    shutil.rmtree(photos_copy / "val")
    with pytest.raises(ConfigError, match="none of the folders test, validation, val, valid"):
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
