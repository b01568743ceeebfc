"""A sweep of settings: stopped and started again, shared between processes, extended."""

import dataclasses
import json

import pytest

from experiments import comparison, data, sweep, train, workdir
from experiments.config import Config
from tests.train_runs import compiled_once, read_lines, sigterm_in_step, standard_promotion

BASE = Config(
    mesh_data=1, model="mlp", hidden=8, sparsity=0.8, compare=("sgd", "sparseopt"), seeds=2,
    epochs=2, steps=14, update_interval=5, log_every=4, diagnostics_every=0, checkpoint_every=6,
    keep_best=False,
)  # fmt: skip
# The second one shares its images, the third does not, and has half the runs.
SETTINGS = {
    "base": BASE,
    "batch/64": dataclasses.replace(BASE, batch_size=64, topology="static"),
    "pooled": dataclasses.replace(BASE, pool=2, compare=("sgd",), topology="static"),
}


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    with standard_promotion(), compiled_once():
        yield


def run(folder, settings=SETTINGS):
    """The sweep as a command runs it: its exit code, and whether it is complete."""
    complete = []

    def body(stop):
        with stop:
            complete.append(sweep.train_sweep("three", settings, folder, stop))

    code = train.guarded(body, lambda: "the command")
    return code, complete


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    assert run(folder) == (0, [True])
    return folder


def test_every_setting_is_a_work_folder_of_its_own(whole):
    content = json.loads((whole / "sweep.json").read_text())
    assert content == {"name": "three", "settings": list(SETTINGS)}
    for name, config in SETTINGS.items():
        assert workdir.missing(config, whole / name) == []
        result = json.loads((whole / name / "result.json").read_text())
        assert len(result["runs"]) == len(workdir.runs_of(config))
        assert result["config"]["pool"] == config.pool
        assert "git_commit" in result["environment"]
        # Four lines, and an evaluation at the end of each epoch and of the run.
        lines = 4 + (1 if name == "batch/64" else 2)
        assert len(read_lines(whole / name / "metrics.jsonl")) == len(result["runs"]) * lines


def test_stopped_and_started_again_it_is_the_same_sweep(whole, tmp_path, capsys):
    """SIGTERM in the last step of the first run; later, in a step of the second setting."""
    folder = tmp_path / "sweep"
    with sigterm_in_step(13):
        assert run(folder) == (143, [])
    assert "sgd seed 0, at step 13; to continue: the command" in capsys.readouterr().err
    assert workdir.missing(BASE, folder / "base") == workdir.runs_of(BASE)
    # The other three of the first setting, whose steps 13 stop it again and again, and one more.
    for finished in range(1, 5):
        with sigterm_in_step(13):
            assert run(folder) == (143, [])
        done = len(list(folder.glob("*/**/runs/*/result.json")))
        assert done == finished
    assert f"{4} of 10 runs are done" not in capsys.readouterr().out
    assert run(folder) == (0, [True])
    assert "three: 3 setting(s), 4 of 10 runs are done" in capsys.readouterr().out
    for name in SETTINGS:
        found = comparison.compare(whole / name, folder / name)
        assert found.difference is None
        assert found.arrays


def test_what_another_process_trains_is_left_to_it(whole, tmp_path, capsys):
    folder = tmp_path / "sweep"
    with workdir.lock(folder / "batch/64"):
        assert run(folder) == (0, [False])
    said = capsys.readouterr().out
    assert f"batch/64: another process trains in {folder / 'batch/64'}" in said
    assert not list((folder / "batch/64").glob("runs/*"))
    assert (folder / "pooled/result.json").is_file()
    assert run(folder) == (0, [True])
    assert "6 of 10 runs are done" in capsys.readouterr().out
    ours, theirs = (json.loads((f / "batch/64/result.json").read_text()) for f in (folder, whole))
    assert ours["state_sha256"] == theirs["state_sha256"]


def test_further_seeds_join_those_that_are_there(tmp_path):
    folder = tmp_path / "sweep"
    one = {"base": dataclasses.replace(BASE, seeds=1, compare=("sgd",))}
    assert run(folder, one) == (0, [True])
    before = (folder / "base/runs/sgd-seed0/result.json").stat().st_mtime_ns
    assert run(folder, {"base": BASE}) == (0, [True])
    assert (folder / "base/runs/sgd-seed0/result.json").stat().st_mtime_ns == before
    assert len(json.loads((folder / "base/result.json").read_text())["runs"]) == 4
    assert json.loads((folder / "base/config.json").read_text())["seeds"] == 2


def test_images_are_loaded_once_for_settings_that_share_them(whole, tmp_path, monkeypatch):
    loaded, load = [], data.load
    monkeypatch.setattr(data, "load", lambda *arguments: loaded.append(1) or load(*arguments))
    assert run(whole) == (0, [True])
    assert len(loaded) == 2


def test_what_cannot_work_is_said_before_anything_is_written(tmp_path, capsys):
    settings = SETTINGS | {"last": dataclasses.replace(BASE, pool=3)}
    assert run(tmp_path / "sweep", settings) == (2, [])
    assert "pool=3 must divide" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()
