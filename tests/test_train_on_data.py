"""Training from end to end on data from disk: streamed ImageNet, class folders, small images."""

import dataclasses
import json
import pathlib
import sys

import cv2
import jax
import numpy as np
import pytest

from experiments import programs, report, train
from experiments.config import Config
from tests import make_data


@pytest.fixture(autouse=True, scope="module")
def _promotion():
    """optax's cosine schedule takes the minimum of an int32 and a float."""
    before = jax.config.jax_numpy_dtype_promotion
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", before)


def run(folder, config):
    """Runs the command with `config`, in this process."""
    path = pathlib.Path(folder).with_suffix(".py")
    path.write_text(
        f"from experiments.config import Config\n\ndef get_config():\n    return {config!r}\n"
    )
    return train.main([f"--config={path}", f"--workdir={folder}"])


def lines_of(folder, kind):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


MLP = Config(
    mesh_data=1, model="mlp", hidden=8, sparsity=0.5, topology="static", dataset="folder",
    image_size=8, batch_size=4, epochs=2, log_every=3, diagnostics_every=0,
)  # fmt: skip


def test_a_narrow_resnet18_on_imagenet(tmp_path, tmp_path_factory, monkeypatch):
    """160 + 64 images through the real builder; the number of workers changes no bit."""
    prepared = make_data.prepared_imagenet(tmp_path_factory)
    config = Config(
        mesh_data=1, dataset="imagenet2012", data_dir=str(prepared.data_dir), model="resnet18",
        base_channels=2, image_size=32, batch_size=24, epochs=1, topology="static", sparsity=0.8,
        log_every=2, learning_rate=0.01, diagnostics_every=0, loader_threads=1,
    )  # fmt: skip
    cache = {}

    def once(function):
        def cached(_, *arguments):
            if function not in cache:
                cache[function] = function(config, *arguments)
            return cache[function]

        return cached

    monkeypatch.setattr(train, "compile_model", once(programs.compile_model))
    monkeypatch.setattr(train, "compile_method", once(programs.compile_method))
    results = []
    for threads in (1, 3):
        folder = tmp_path / str(threads)
        assert run(folder, dataclasses.replace(config, loader_threads=threads)) == 0
        (one,) = report.load_runs(folder)
        assert one.result["steps"] == 160 // 24
        assert [line["step"] for line in lines_of(folder, "train")] == [2, 4, 6]
        assert all(0 < line["loss"] < 20 for line in lines_of(folder, "train"))
        (evaluation,) = lines_of(folder, "eval")
        right = evaluation["test_accuracy"] * 64  # a count over all validation images
        assert round(right) == pytest.approx(right)
        assert np.isfinite(evaluation["test_loss"])
        results.append((one.result["state_sha256"], evaluation["test_loss"]))
    assert results[0] == results[1]
    assert "tensorflow" not in sys.modules


def test_class_folders_are_learnt(tmp_path):
    """Two classes, black and white: any pipeline that mixes up labels stays at a half."""
    for split, images in (("train", 20), ("val", 7)):
        for name, value in (("black", 0), ("white", 255)):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(images):
                pixels = np.full((12 + index, 20, 3), value, np.uint8)
                cv2.imwrite(str(folder / f"{index}.png"), pixels)
    config = dataclasses.replace(MLP, data_dir=str(tmp_path / "data"), epochs=4)
    assert run(tmp_path / "run", config) == 0
    (one,) = report.load_runs(tmp_path / "run")
    assert one.result["steps"] == 4 * 10
    assert one.result["test_accuracy"] == 1
    assert one.result["corrupt_examples"] == 0


def test_a_corrupt_image_ends_training_or_is_counted(tmp_path, capsys):
    root = tmp_path / "data"
    paths = make_data.class_folders(root, "train", ["cat", "dog"], 8)
    make_data.class_folders(root, "val", ["cat", "dog"], 3)
    paths[5].write_bytes(paths[5].read_bytes()[:200])
    config = dataclasses.replace(MLP, data_dir=str(root))
    assert run(tmp_path / "run", config) == 1
    said = capsys.readouterr().err
    assert str(paths[5]) in said
    assert "max_corrupt=0" in said
    assert not (tmp_path / "run/result.json").exists()

    # The same folder goes on as the message says.
    assert run(tmp_path / "run", dataclasses.replace(config, max_corrupt=1)) == 0
    assert f"(1 of at most 1): {paths[5]}" in capsys.readouterr().out.replace("\n", " ")
    assert lines_of(tmp_path / "run", "train")[-1]["corrupt_examples"] == 1
    (one,) = report.load_runs(tmp_path / "run")
    assert one.result["corrupt_examples"] == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_classes": 3}, "num_classes=3 must be 2, the number of classes of folder"),
        ({"augmentation": "crop"}, "augmentation='crop' must be auto, none or random_resized_crop"),
        ({"storage": "device"}, "storage='device' must be auto or stream"),
        ({"train_split": "trian"}, "split 'trian'"),
        ({"data_dir": ""}, "data_dir is empty"),
        ({"batch_size": 100}, "batch_size=100 must be at most 4"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(changes, named, tmp_path, capsys):
    make_data.class_folders(tmp_path / "data", "train", ["cat", "dog"], 2)
    make_data.class_folders(tmp_path / "data", "val", ["cat", "dog"], 1)
    config = dataclasses.replace(MLP, data_dir=str(tmp_path / "data"))
    assert run(tmp_path / "run", dataclasses.replace(config, **changes)) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_prepared_dataset_of_small_images_trains_on_the_device(tmp_path):
    """The same images streamed are scaled up, so only the device's run sees 28x28x1."""
    make_data.idx_files(tmp_path / "idx", train=40, test=10)
    arguments = [f"--data_dir={tmp_path / 'data'}", f"--idx_dir={tmp_path / 'idx'}"]
    done = make_data.run_prepare("--dataset=fashion_mnist", *arguments)
    assert done.returncode == 0, done.stderr
    config = dataclasses.replace(
        MLP, dataset="fashion_mnist", data_dir=str(tmp_path / "data"), batch_size=8
    )
    assert run(tmp_path / "device", config) == 0
    (one,) = report.load_runs(tmp_path / "device")
    assert (one.result["steps"], one.fan_in["size/dense0/kernel"]) == (10, 28 * 28)
    streamed = dataclasses.replace(config, storage="stream", epochs=1)
    assert run(tmp_path / "stream", streamed) == 0
    (one,) = report.load_runs(tmp_path / "stream")
    assert (one.result["steps"], one.fan_in["size/dense0/kernel"]) == (5, 8 * 8 * 3)
