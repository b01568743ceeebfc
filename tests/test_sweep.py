"""A sweep of settings: stopped and started again, shared between processes, extended."""

import contextlib
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from experiments import comparison, data, distributed, stepping, sweep, train, workdir
from experiments.config import Config, ConfigError
from tests.train_runs import compiled_once, read_lines, sigterm_in_step, standard_promotion

# Static masks, which compile faster; that moving ones go on is tested with a single grid.
BASE = Config(
    mesh_data=1, model="mlp", hidden=8, sparsity=0.8, compare=("sgd", "sparseopt"), seeds=2,
    epochs=2, steps=14, topology="static", log_every=4, diagnostics_every=0, checkpoint_every=6,
    keep_best=False,
)  # fmt: skip
# The second one shares its images, the third does not, and has half the runs.
SETTINGS = {
    "base": BASE,
    "batch/64": dataclasses.replace(BASE, batch_size=64, compare=("sgd",)),
    "pooled": dataclasses.replace(BASE, pool=2, compare=("sgd",)),
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
        assert len(result["runs"]) == len(config.runs())
        assert result["config"]["pool"] == config.pool
        assert "git_commit" in result["environment"]
        # Four lines, and an evaluation at the end of each epoch and of the run.
        lines = 4 + (1 if name == "batch/64" else 2)
        assert len(read_lines(whole / name / "metrics.jsonl")) == len(result["runs"]) * lines


class Killed(BaseException):
    """Nothing catches it, as nothing answers a SIGKILL."""


@contextlib.contextmanager
def killed_in_step(step):
    """The body raises Killed where it would take the given step: no checkpoint, no last word."""
    single = stepping.Stepper._single

    def killed(self, state):
        if self.step + 1 == step:
            raise Killed
        return single(self, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping.Stepper, "_single", killed)
        try:
            yield
        except Killed:
            return
    raise AssertionError(f"nothing was killed in step {step}")


def test_stopped_and_started_again_it_is_the_same_sweep(whole, tmp_path, capsys):
    """SIGTERM in step 13 of the first run, then killed six times until the second setting."""
    folder = tmp_path / "sweep"
    with sigterm_in_step(13):
        assert run(folder) == (143, [])
    assert "sgd seed 0, at step 13; to continue: the command" in capsys.readouterr().err
    assert workdir.missing(BASE, folder / "base") == BASE.runs()
    # In step 5 a run has no checkpoint yet.
    for step, finished in ((9, 1), (5, 2), (9, 2), (5, 3), (9, 3), (5, 4)):
        with killed_in_step(step):
            run(folder)
        assert len(list(folder.glob("*/**/runs/*/result.json"))) == finished
    assert "continuing from step 6" in capsys.readouterr().out
    assert run(folder) == (0, [True])
    assert "three: 3 setting(s), 4 of 8 runs are done" in capsys.readouterr().out
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
    assert "6 of 8 runs are done" in capsys.readouterr().out
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
    kept, keep = [], sweep._Datasets.keep

    def watched(self, configs):
        keep(self, configs)
        kept.append(len(self._loaded))

    monkeypatch.setattr(sweep._Datasets, "keep", watched)
    assert run(whole) == (0, [True])
    assert len(loaded) == 2
    assert kept == [2, 1, 0]  # and dropped after the last setting that needs them


def test_what_cannot_work_is_said_before_anything_is_written(tmp_path, capsys):
    settings = SETTINGS | {"last": dataclasses.replace(BASE, pool=3)}
    assert run(tmp_path / "sweep", settings) == (2, [])
    assert "pool=3 must divide" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_settings_of_earlier_and_of_others_stay_in_the_sweep(whole, tmp_path):
    folder = tmp_path / "sweep"
    shutil.copytree(whole, folder)
    assert run(folder, {"pooled": SETTINGS["pooled"]}) == (0, [True])
    assert json.loads((folder / "sweep.json").read_text())["settings"] == list(SETTINGS)
    # Fewer seeds and methods than there are: what is there stays.
    few = dataclasses.replace(BASE, seeds=1, compare=("sparseopt",))
    assert run(folder, {"base": few}) == (0, [True])
    result = json.loads((folder / "base/result.json").read_text())
    assert [(r["method"], r["seed"]) for r in result["runs"]] == BASE.runs()
    assert result["state_sha256"] == json.loads((whole / "base/result.json").read_text())[
        "state_sha256"
    ]  # fmt: skip


def test_a_run_that_diverges_does_not_end_the_sweep(tmp_path, capsys):
    wild = dataclasses.replace(SETTINGS["pooled"], learning_rate=1e30, seeds=1)
    settings = {"wild": wild, "pooled": SETTINGS["pooled"]}
    folder = tmp_path / "sweep"
    assert run(folder, settings) == (1, [])
    said = capsys.readouterr()
    assert "error: wild: sgd seed 0: the loss is " in said.err
    assert (folder / "pooled/result.json").is_file()
    path = folder / "wild/runs/sgd-seed0/diverged.json"
    content = json.loads(path.read_text())
    assert (content["method"], content["seed"]) == ("sgd", 0)
    assert "smaller learning_rate" in content["message"]
    # It is known now, and not tried again.
    assert run(folder, settings) == (1, [])
    again = capsys.readouterr()
    assert "2 of 3 runs are done, 1 diverged" in again.out
    assert "compiling" not in again.out
    assert again.err == said.err


def test_another_config_in_a_folder_is_said_before_anything_trains(whole, tmp_path, capsys):
    folder = tmp_path / "sweep"
    (folder / "pooled").mkdir(parents=True)
    shutil.copy(whole / "base/config.json", folder / "pooled/config.json")
    assert run(folder) == (2, [])
    assert "holds runs with pool=1, not 2" in capsys.readouterr().err
    assert not (folder / "base").exists()


def test_a_lock_is_told_of_on_every_process(tmp_path, monkeypatch):
    """Process 0 of two finds the folder taken; what it sends is all that the other one has."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        distributed.multihost_utils, "broadcast_one_to_all", lambda value: np.asarray(value)
    )

    def taken():
        raise distributed.LockedError("another process trains in it")

    def wrong():
        raise ConfigError("learning_rate=0 must be above 0")

    with pytest.raises(distributed.LockedError, match="another process"):
        distributed.from_main(taken)
    with pytest.raises(ConfigError, match="learning_rate=0") as caught:
        distributed.from_main(wrong)
    assert not isinstance(caught.value, distributed.LockedError)
