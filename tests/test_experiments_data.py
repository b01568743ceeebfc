"""Data, metrics and progress of the experiments."""

import io
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from experiments import data, metrics, programs
from experiments.config import Config, ConfigError
from experiments.progress import Progress


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_digits_are_split_by_class_and_normalised(digits):
    train, test = np.asarray(digits.train_labels), np.asarray(digits.test_labels)
    assert len(train) + len(test) == 1797
    assert digits.train_images.shape == (len(train), 8, 8, 1)
    assert digits.train_images.dtype == digits.test_images.dtype == jnp.float32
    assert digits.train_labels.dtype == digits.test_labels.dtype == jnp.int32
    shares = np.bincount(test) / np.bincount(np.concatenate([train, test]))
    assert len(shares) == digits.num_classes == 10
    np.testing.assert_allclose(shares, 0.2, atol=0.005)
    np.testing.assert_allclose(np.mean(digits.train_images), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(digits.train_images), 1, atol=1e-5)


def test_split_holds_every_example_once():
    labels = np.array([0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0])
    train, test = data.split_by_class(labels)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(12))
    # The fifth 0 and the fifth 1.
    np.testing.assert_array_equal(test, [5, 9])


def test_permutation_is_given_by_seed_and_epoch_alone():
    first = np.asarray(data.epoch_permutation(3, 5, 100))
    np.testing.assert_array_equal(np.sort(first), np.arange(100))
    np.testing.assert_array_equal(first, data.epoch_permutation(3, 5, 100))
    others = [data.epoch_permutation(*pair, 100) for pair in ((3, 6), (4, 5), (5, 3))]
    assert all((first != np.asarray(other)).any() for other in others)


def test_train_batches_follow_the_permutation(digits):
    batches = list(data.train_batches(digits, seed=1, epoch=2, batch_size=100))
    order = np.asarray(data.epoch_permutation(1, 2, len(digits.train_labels)))[:1400]
    assert len(batches) == data.steps_per_epoch(digits, 100) == 14
    labels = np.concatenate([labels for _, labels in batches])
    images = np.concatenate([images for images, _ in batches])
    np.testing.assert_array_equal(labels, np.asarray(digits.train_labels)[order])
    np.testing.assert_array_equal(images, np.asarray(digits.train_images)[order])


def test_a_batch_larger_than_the_data_is_refused(digits):
    with pytest.raises(ConfigError, match=r"batch_size=2000 must be at most 14\d\d"):
        data.steps_per_epoch(digits, 2000)


@pytest.mark.parametrize(("examples", "batch_size"), [(10, 4), (12, 4), (3, 8), (1, 1)])
def test_eval_batches_hold_every_example_once(examples, batch_size):
    images = jnp.arange(examples * 4.0).reshape(examples, 2, 2, 1)
    labels = jnp.arange(examples)
    batches = data.eval_batches(images, labels, batch_size)
    assert all(batch.images.shape == (batch_size, 2, 2, 1) for batch in batches)
    weights = np.concatenate([batch.weights for batch in batches]).astype(bool)
    assert weights.sum() == examples
    seen = np.concatenate([batch.labels for batch in batches])[weights]
    np.testing.assert_array_equal(seen, labels)
    np.testing.assert_array_equal(np.concatenate([b.images for b in batches])[weights], images)


def test_evaluation_counts_every_test_example_once(digits):
    """Against one unpadded batch of all test images; 355 images do not fill batches of 100."""
    config = Config(model="mlp", hidden=8, batch_size=100)
    model = programs.compile_model(config, digits)
    params, batch_stats = model.init(jnp.int32(0))
    batches = data.eval_batches(digits.test_images, digits.test_labels, 100)
    sums = [model.evaluate(params, batch_stats, batch) for batch in batches]
    variables = {"params": params, "batch_stats": batch_stats}
    logits = np.asarray(model.module.apply(variables, digits.test_images, train=False))
    labels = np.asarray(digits.test_labels)
    assert len(labels) % 100 != 0
    assert sum(int(correct) for correct, _ in sums) == (logits.argmax(-1) == labels).sum()
    shifted = logits - logits.max(-1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(labels)), labels]
    np.testing.assert_allclose(sum(float(loss) for _, loss in sums), losses.sum(), rtol=1e-5)


def test_json_lines_are_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("left by an interrupted run\n")
    with metrics.JsonLines(path) as lines:
        lines.write({"step": 1, "loss": np.float32(0.5)})
        assert json.loads(path.read_text()) == {"step": 1, "loss": 0.5}
        lines.write({"step": jnp.int32(2), "loss": float("nan")})
    read = [json.loads(line) for line in path.read_text().splitlines()]
    assert read == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    metrics.write_json(path, {"a": [1, (2, 3)], "b": np.arange(2)})
    assert metrics.read_json(path) == {"a": [1, [2, 3]], "b": [0, 1]}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        metrics.write_json(path, {"a": 2})
    assert metrics.read_json(path)["a"] == [1, [2, 3]]
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not a JSON file"):
        metrics.read_json(tmp_path / "config.json")


def test_environment_names_versions_and_device(monkeypatch):
    found = metrics.environment()
    assert found["versions"]["jax"] == jax.__version__
    assert set(found["versions"]) == {"python", *metrics.PACKAGES}
    assert (found["device_kind"], found["device_count"]) == ("cpu", jax.device_count())
    monkeypatch.setenv("PATH", "")  # no git
    assert metrics.environment()["git_commit"] is None


def test_digest_sees_values_names_dtypes_and_masks():
    params = {"b": jnp.arange(3.0), "a": {"kernel": jnp.ones((2, 2))}}
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    digest = metrics.state_sha256(params, masks)
    assert len(digest) == 64
    # The order in which a dict was made does not matter.
    assert digest == metrics.state_sha256(dict(reversed(params.items())), masks)
    others = [
        metrics.state_sha256(params, None),
        metrics.state_sha256(params, jax.tree.map(jnp.logical_not, masks)),
        metrics.state_sha256(params | {"b": jnp.array([0.0, 1.0, 2.0000002])}, masks),
        metrics.state_sha256(params | {"b": jnp.arange(3)}, masks),
        metrics.state_sha256({"c": params["b"], "a": params["a"]}, masks),
    ]
    assert len({digest, *others}) == 6


def test_progress_prints_lines_without_a_terminal():
    now = [0.0]
    text = io.StringIO()
    progress = Progress(
        runs=2,
        steps_per_run=10,
        epochs=5,
        finished=1,
        console=rich.console.Console(file=text, width=200, soft_wrap=True),
        clock=lambda: now[0],
    )
    with progress.live():
        assert progress.time_left() is None
        with progress.running("sgd", 4):
            now[0] += 10
            progress.update(5, 3, {"loss": 0.25, "test_accuracy": 0.915, "density": 0.05})
            # 15 steps at 2 seconds each.
            assert progress.time_left() == pytest.approx(30)
            now[0] += 1
            progress.update(6, 3, {"loss": 0.2})  # too soon after the last line
            now[0] += 9
            progress.update(10, 5, {"loss": 0.125, "test_accuracy": 0.9204, "density": 0.05})
    first, *_, last = text.getvalue().splitlines()
    assert first == (
        "[2/3] sgd seed 4  epoch 3/5  loss 0.250  accuracy 91.5%  density 0.050  0:30 left"
    )
    assert last.startswith("[2/3] sgd seed 4  epoch 5/5  loss 0.125  accuracy 92.0%")
    assert "0.200" not in text.getvalue()


def test_progress_draws_a_bar_on_a_terminal():
    text = io.StringIO()
    console = rich.console.Console(file=text, width=80, force_terminal=True)
    progress = Progress(runs=1, steps_per_run=2, epochs=1, console=console)
    with progress.live(), progress.running("dense", 0):
        progress.update(2, 1, {"loss": 0.5, "test_accuracy": 0.9, "density": 1.0})
    for part in (
        "[1/1] dense seed 0",
        "epoch 1/1",
        "accuracy 90.0%",
        "density 1.000",
        "100%",
        "left",
    ):
        assert part in text.getvalue()
