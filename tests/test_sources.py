"""Datasets of tensorflow-datasets against the records that the tests themselves wrote."""

import json
import os
import pathlib
import pickle
import re
import resource
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from experiments.config import ConfigError
from experiments.data.errors import DataError
from experiments.data.sources import Example, open_source
from tests import make_data

IMAGE = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
CLASSES = tfds.features.ClassLabel


def store(data_dir, splits, name="pictures", version="1.0.0", format_="array_record", **features):
    """Writes a dataset as tensorflow-datasets stores it; `splits` has a list of shards each.

    Returns:
      The folder of the dataset.
    """
    folder = pathlib.Path(data_dir, name, version)
    folder.mkdir(parents=True)
    features = features or {"image": IMAGE, "label": CLASSES(num_classes=5)}
    tfds.features.FeaturesDict(features).save_config(folder)
    infos = []
    for split, shards in splits.items():
        infos.append({"name": split, "shardLengths": [str(len(shard)) for shard in shards]})
        infos[-1]["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        for number, shard in enumerate(shards):
            end = f"{split}.{format_}-{number:05d}-of-{len(shards):05d}"
            path = folder / f"{name.split('/')[0]}-{end}"
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for values in shard:
                example = tf_example_pb2.Example()
                for key, value in values.items():
                    feature = example.features.feature[key]
                    if isinstance(value, bytes):
                        feature.bytes_list.value.append(value)
                    else:
                        feature.int64_list.value.append(value)
                writer.write(example.SerializeToString())
            writer.close()
    info = {"name": name.split("/")[0], "version": version, "fileFormat": format_, "splits": infos}
    if "/" in name:
        info["configName"] = name.split("/")[1]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def records(start, stop):
    """Examples of one shard, each with contents and a label of its own."""
    return [{"image": b"image %d" % i, "label": i % 5} for i in range(start, stop)]


def expected(start, stop):
    return [Example(b"image %d" % i, i % 5) for i in range(start, stop)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A dataset of three shards to train on and one to test; nobody may write into it."""
    data_dir = tmp_path_factory.mktemp("pictures")
    shards = [records(0, 4), records(4, 9), records(9, 12)]
    store(data_dir, {"train": shards, "test": [records(20, 25)]})
    return data_dir


@pytest.fixture
def copied(pictures, tmp_path):
    """A copy of `pictures`, to be damaged."""
    return pathlib.Path(shutil.copytree(pictures, tmp_path / "copied"))


def shard_of(data_dir, number):
    return data_dir / "pictures" / "1.0.0" / f"pictures-train.array_record-{number:05d}-of-00003"


def test_reads_every_record_in_the_order_of_the_shards(pictures):
    source = open_source("pictures", str(pictures), "train")
    assert len(source) == 12
    assert source.num_classes == 5
    assert source.image_shape == (None, None, 3)
    assert source.split == "train"
    assert source.read(range(12)) == expected(0, 12)
    assert source.read([11, 0, 5, 5]) == [expected(i, i + 1)[0] for i in (11, 0, 5, 5)]
    assert source.read(np.array([8, 3])) == [expected(8, 9)[0], expected(3, 4)[0]]
    assert source.read([]) == []
    assert source.name(3) == f"{shard_of(pictures, 0)}, record 3"
    assert source.name(4) == f"{shard_of(pictures, 1)}, record 0"


@pytest.mark.parametrize("index", [-1, 12])
def test_an_index_outside_is_an_error(pictures, index):
    source = open_source("pictures", str(pictures), "train")
    with pytest.raises(IndexError, match=rf"index={index} must be in \[0, 12\)"):
        source.read([index])


@pytest.mark.parametrize(
    ("split", "indices"),
    [
        ("train[:50%]", range(6)),
        ("train[50%:]", range(6, 12)),
        ("train[3:10]", range(3, 10)),
        ("train[-2:]", range(10, 12)),
        ("train[:2]+train[10:]", [0, 1, 10, 11]),
        ("", range(20, 25)),
    ],
)
def test_parts_of_splits(pictures, split, indices):
    source = open_source("pictures", str(pictures), split)
    assert source.read(range(len(source))) == [expected(i, i + 1)[0] for i in indices]
    if split == "train[3:10]":
        assert source.name(0) == f"{shard_of(pictures, 0)}, record 3"
        assert source.name(1) == f"{shard_of(pictures, 1)}, record 0"


def test_can_be_pickled_and_read_from_many_threads(pictures):
    source = open_source("pictures", str(pictures), "train")
    source.read([0])  # an open file must not hinder
    copies = pickle.loads(pickle.dumps(source))
    assert copies.read(range(12)) == expected(0, 12)
    assert copies.name(7) == source.name(7)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: copies.read([i % 12, (5 * i) % 12]), range(300)))
    for i, found in enumerate(read):
        assert found == [expected(j, j + 1)[0] for j in (i % 12, (5 * i) % 12)]


def test_tensorflow_is_not_imported(pictures):
    open_source("pictures", str(pictures), "train").read([0])
    assert "tensorflow" not in sys.modules


def test_newest_version_and_a_version_by_name(tmp_path):
    store(tmp_path, {"test": [records(0, 1)]}, version="1.9.0")
    store(tmp_path, {"test": [records(1, 2)]}, version="1.10.0")
    assert open_source("pictures", str(tmp_path)).read([0]) == expected(1, 2)
    assert open_source("pictures:1.9.0", str(tmp_path)).read([0]) == expected(0, 1)
    assert open_source("pictures:1.9.*", str(tmp_path)).read([0]) == expected(0, 1)
    with pytest.raises(ConfigError, match=r"not prepared in version 2\.0\.0.*pictures:1\.10\.0"):
        open_source("pictures:2.0.0", str(tmp_path))


def test_configs(tmp_path):
    store(tmp_path, {"test": [records(0, 1)]}, name="pictures/small")
    store(tmp_path, {"test": [records(1, 2)]}, name="pictures/large")
    (tmp_path / "pictures" / ".config").mkdir()
    metadata = tmp_path / "pictures" / ".config" / "metadata.json"
    metadata.write_text('{"default_config_name": "large"}')
    assert open_source("pictures/small", str(tmp_path)).read([0]) == expected(0, 1)
    assert open_source("pictures", str(tmp_path)).read([0]) == expected(1, 2)
    with pytest.raises(ConfigError, match=r"pictures/large:1\.0\.0, pictures/small:1\.0\.0"):
        open_source("pictures/medium", str(tmp_path))


def test_evaluation_split_is_the_first_with_labels(tmp_path):
    unlabelled = [{"image": b"?", "label": -1} for _ in range(20)]
    store(tmp_path, {"test": [unlabelled], "validation": [records(0, 3)]})
    assert open_source("pictures", str(tmp_path)).split == "validation"
    with pytest.raises(ConfigError, match="split 'test' of pictures has no labels; splits: test"):
        open_source("pictures", str(tmp_path), "test")


def test_no_split_to_evaluate_on(tmp_path):
    store(tmp_path, {"train": [records(0, 3)]})
    with pytest.raises(
        ConfigError, match=r"no split test, validation, val .*train \(3\).*\[90%:\]"
    ):
        open_source("pictures", str(tmp_path))


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_out_of_range_names_the_record(tmp_path, label):
    wrong = [*records(0, 2), {"image": b"?", "label": label}]
    store(tmp_path, {"train": [wrong]})
    source = open_source("pictures", str(tmp_path), "train")
    with pytest.raises(DataError, match=rf"record 2: 'label' is {label}; it must be from 0 to 4"):
        source.read(range(3))


def test_which_label_to_learn(tmp_path):
    features = {"image": IMAGE, "label": CLASSES(num_classes=9), "kind": CLASSES(num_classes=3)}
    store(tmp_path, {"test": [[{"image": b"a", "label": 8, "kind": 2}]]}, **features)
    assert open_source("pictures", str(tmp_path)).read([0]) == [Example(b"a", 8)]
    kind = open_source("pictures", str(tmp_path), label="kind")
    assert kind.num_classes == 3
    assert kind.read([0]) == [Example(b"a", 2)]
    with pytest.raises(ConfigError, match=r"label='kin'.*'kind'\?.*kind \(3 classes\)"):
        open_source("pictures", str(tmp_path), label="kin")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"image": IMAGE, "size": CLASSES(num_classes=2)}, r"label='label'.*Labels: size"),
        ({"image": IMAGE, "text": tfds.features.Text()}, r"no class label.*text \(Text\)"),
        ({"text": tfds.features.Text(), "label": CLASSES(num_classes=2)}, "0 features that are im"),
        (
            {"left": IMAGE, "right": IMAGE, "label": CLASSES(num_classes=2)},
            "2 features that are im",
        ),
        (
            {
                "image": tfds.features.Image(shape=(4, 4, 1), dtype=np.uint16),
                "label": CLASSES(num_classes=2),
            },
            "uint16; only images of type uint8",
        ),
    ],
)
def test_what_is_no_image_classification_dataset(tmp_path, features, message):
    store(tmp_path, {"test": [[{"label": 0}]]}, **features)
    with pytest.raises(ConfigError, match=message):
        open_source("pictures", str(tmp_path))


def test_the_image_among_several(tmp_path):
    features = {"image": IMAGE, "mask": IMAGE, "label": CLASSES(num_classes=2)}
    store(tmp_path, {"test": [[{"image": b"a", "mask": b"b", "label": 1}]]}, **features)
    assert open_source("pictures", str(tmp_path)).read([0]) == [Example(b"a", 1)]


@pytest.mark.parametrize("data_dir", ["", "gs://bucket/data"])
def test_data_dir_is_not_a_local_folder(data_dir):
    command = "python -m experiments.prepare --dataset=cifar10 --data_dir=DIR"
    with pytest.raises(ConfigError, match=f"data_dir='{data_dir}'.*{command}"):
        open_source("cifar10", data_dir)


def test_data_dir_is_not_there(tmp_path):
    missing = tmp_path / "missing"
    command = f"python -m experiments.prepare --dataset=cifar10 --data_dir={missing}"
    with pytest.raises(ConfigError, match=f"{missing}: no such folder.*{command}"):
        open_source("cifar10", str(missing))


def test_a_dataset_that_is_not_prepared(pictures):
    with pytest.raises(ConfigError, match=r"which has: pictures:1\.0\.0\. Did you mean 'pictures'"):
        open_source("picture", str(pictures))


def test_a_folder_of_class_folders_is_no_prepared_dataset(tmp_path):
    make_data.class_folders(tmp_path, "train", ["a"], 1)
    with pytest.raises(ConfigError, match=r"which has: none\. For folders of images set dataset="):
        open_source("imagenet2012", str(tmp_path))


@pytest.mark.parametrize("name", ["a b", "kaggle:cats", "cifar10/a=1", "../cifar10"])
def test_a_name_that_is_none(pictures, name):
    with pytest.raises(ConfigError, match="must be digits, folder, or a dataset of tensorflow-dat"):
        open_source(name, str(pictures))


def test_another_format(tmp_path):
    folder = store(tmp_path, {"test": [records(0, 1)]}, format_="tfrecord")
    with pytest.raises(ConfigError) as caught:
        open_source("pictures", str(tmp_path))
    message = str(caught.value)
    assert f"{folder} is stored as tfrecord" in message
    assert "experiments.prepare --dataset=pictures --data_dir=ANOTHER_DIR" in message
    assert f"move {folder} away" in message


def test_array_record_beside_another_format(tmp_path):
    folder = store(tmp_path, {"test": [records(0, 2)]})
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert open_source("pictures", str(tmp_path)).read(range(2)) == expected(0, 2)


@pytest.mark.parametrize("split", ["trian", "train[", "train[20:30]", "validation", "train[:0]"])
def test_a_split_that_is_not_there(pictures, split):
    with pytest.raises(ConfigError) as caught:
        open_source("pictures", str(pictures), split)
    assert f"split {split!r}" in str(caught.value)
    assert "splits: train (12), test (5)" in str(caught.value)
    assert ("Did you mean 'train'?" in str(caught.value)) == (split in ("trian", "train["))


def test_a_missing_record_file(copied):
    shard_of(copied, 1).unlink()
    with pytest.raises(DataError, match=f"{re.escape(str(shard_of(copied, 1)))} is missing"):
        open_source("pictures", str(copied), "train")
    assert len(open_source("pictures", str(copied), "test")) == 5


def test_an_empty_record_file(copied):
    shard_of(copied, 2).write_bytes(b"")
    message = f"{re.escape(str(shard_of(copied, 2)))} is empty .*experiments.prepare"
    with pytest.raises(DataError, match=f"(?s){message}"):
        open_source("pictures", str(copied), "train")


@pytest.mark.parametrize("kept", [1, 70_000])
def test_a_truncated_record_file(tmp_path, kept):
    noise = np.random.default_rng(0).bytes(100_000)
    folder = store(tmp_path, {"test": [[{"image": noise, "label": 1}] * 2]})
    path = folder / "pictures-test.array_record-00000-of-00001"
    os.truncate(path, kept if kept > 1 else path.stat().st_size - 1)
    with pytest.raises(DataError, match=f"{re.escape(str(path))} is truncated or damaged"):
        open_source("pictures", str(tmp_path))


def test_several_wrong_record_files(copied):
    shutil.copy(shard_of(copied, 0), shard_of(copied, 1))
    shard_of(copied, 2).unlink()
    message = (
        r"00001-of-00003 has 4 records, but dataset_info.json says 5 \(and 1 more of 3 files\)"
    )
    with pytest.raises(DataError, match=message):
        open_source("pictures", str(copied), "train")


def test_a_damaged_record_inside_a_file(tmp_path):
    rng = np.random.default_rng(0)
    shard = [{"image": rng.bytes(20_000), "label": 0} for _ in range(20)]
    folder = store(tmp_path, {"test": [shard]})
    path = folder / "pictures-test.array_record-00000-of-00001"
    content = bytearray(path.read_bytes())
    content[content.index(shard[18]["image"][9_000:9_016])] ^= 0xFF
    path.write_bytes(content)
    source = open_source("pictures", str(tmp_path))
    assert source.read([17, 19]) == [Example(shard[i]["image"], 0) for i in (17, 19)]
    with pytest.raises(DataError, match=f"{re.escape(str(path))}, record 18: cannot be read"):
        source.read(range(20))


def test_a_file_of_something_else(tmp_path):
    folder = store(tmp_path, {"test": [records(0, 2)]})
    path = folder / "pictures-test.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for _ in range(2):
        writer.write(b"\xff no example")
    writer.close()
    with pytest.raises(DataError, match=f"{re.escape(str(path))}, record 0: no example with"):
        open_source("pictures", str(tmp_path))


def test_an_alpha_channel_is_not_counted(tmp_path):
    features = {"image": tfds.features.Image(shape=(8, 8, 4)), "label": CLASSES(num_classes=5)}
    store(tmp_path, {"test": [records(0, 2)]}, **features)
    assert open_source("pictures", str(tmp_path)).image_shape == (8, 8, 3)


@pytest.mark.parametrize("data_dir", ["~no such user/data", "x" * 300])
def test_a_folder_that_cannot_be(data_dir):
    for dataset in ("folder", "pictures"):
        with pytest.raises(ConfigError, match=r"data_dir=.*: not a path that can be used"):
            open_source(dataset, data_dir)


def test_a_record_without_the_image(tmp_path):
    store(tmp_path, {"test": [[*records(0, 1), {"label": 1}]]})
    source = open_source("pictures", str(tmp_path))
    with pytest.raises(DataError, match="record 1: no example with 'image' and 'label'"):
        source.read([0, 1])


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_the_files_that_describe_a_dataset(copied, file):
    path = copied / "pictures" / "1.0.0" / file
    path.write_text(path.read_text()[:20])
    with pytest.raises(DataError, match=rf"{path.parent}: .*{file}.* cannot be read"):
        open_source("pictures", str(copied))
    path.unlink()
    with pytest.raises(DataError, match=f"{path.parent} has no {file}: its preparation, or copy"):
        open_source("pictures", str(copied))


def test_an_interrupted_preparation(copied):
    base = copied / "pictures"
    (base / "1.0.0").rename(base / "incomplete.ABC123_1.0.0")
    with pytest.raises(
        DataError, match=f"{base}: a preparation was interrupted; to start it again"
    ):
        open_source("pictures", str(copied))


def test_more_record_files_than_a_process_may_open(tmp_path, monkeypatch):
    store(tmp_path, {"test": [records(i, i + 1) for i in range(3)]})
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    asked = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, hard))
    assert len(open_source("pictures", str(tmp_path))) == 3
    assert asked == [(3 + 1024, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (50, 60))
    with pytest.raises(ConfigError, match=r"3 record files.*may open 60 files only.*ulimit -n"):
        open_source("pictures", str(tmp_path))
