"""Metrics and progress of the experiments."""

import io
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from experiments import metrics
from experiments.config import ConfigError
from experiments.progress import Progress


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
    # The commit is that of the first call: what is committed later is not what this process runs.
    assert metrics.environment() == found
    metrics.checkout.cache_clear()
    assert metrics.environment()["git_commit"] is None
    metrics.checkout.cache_clear()


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
        steps=20,
        finished=1,
        console=rich.console.Console(file=text, width=200, soft_wrap=True),
        clock=lambda: now[0],
    )
    with progress.live():
        assert progress.time_left() is None
        with progress.running("sgd seed 4", 10, epochs=5):
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
    progress = Progress(runs=1, steps=2, console=console)
    with progress.live(), progress.running("dense seed 0", 2, epochs=1):
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


def test_a_bar_that_stands_still_says_why():
    """In place of the numbers, for which there is no room beside it."""
    text = io.StringIO()
    console = rich.console.Console(file=text, width=80, force_terminal=True)
    progress = Progress(runs=1, steps=2, console=console)

    def shown():
        """What the bar's line has been since it was last asked for."""
        drawn = text.getvalue()
        text.seek(0)
        text.truncate()
        return drawn

    with progress.live():
        with progress.doing("compiling sgd", printed=True):
            assert "compiling sgd ..." in shown()
        with progress.running("sgd seed 0", 2, epochs=1):
            progress.update(1, 1, {"loss": 0.5})
            with progress.doing("saving"):
                drawn = shown()
                assert "[1/1] sgd seed 0  saving ..." in drawn
                progress.update(2, 1, {"loss": 0.25})  # which must not hide it
                progress._bar.refresh()
                assert "saving ..." in shown()
            progress._bar.refresh()
            assert "loss 0.250" in shown().rpartition("saving")[2]

    plain = io.StringIO()
    console = rich.console.Console(file=plain, width=80, soft_wrap=True)
    progress = Progress(runs=1, steps=2, console=console)
    with progress.live(), progress.doing("compiling sgd", printed=True), progress.doing("saving"):
        pass
    assert plain.getvalue() == "compiling sgd ...\n"


def test_progress_of_runs_that_train_together_and_of_others_that_do_not():
    """Runs of 10 steps: three together, one that another process takes over, one more."""
    now = [0.0]
    text = io.StringIO()
    console = rich.console.Console(file=text, width=200, soft_wrap=True)
    progress = Progress(runs=5, steps=50, console=console, clock=lambda: now[0])
    with progress.running("sgd seeds 0-2", 10, epochs=2, together=3):
        progress.resumed(4)
        now[0] += 6
        progress.update(6, 2, {"loss": 0.5})
        # 6 of the 38 steps that were left are done.
        assert progress.time_left() == pytest.approx(32)
    progress.skipped(1, 10)
    with progress.running("sgd seed 4", 10, epochs=2):
        # 18 steps in 6 seconds; 10 are left.
        assert progress.time_left() == pytest.approx(10 * 6 / 18)
        now[0] += 4
        progress.update(10, 2, {"loss": 0.25})
        assert progress.time_left() == 0
    lines = text.getvalue().splitlines()
    assert lines[0] == "[1-3/5] sgd seeds 0-2: continuing from step 4"
    assert lines[-1] == "[5/5] sgd seed 4  epoch 2/2  loss 0.250  0:00 left"
