"""A short soak, and whether it would notice a difference."""

import itertools
import json
import os
import pathlib
import random
import shutil
import stat
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import comparison, metrics, soak
from experiments.checkpoint import Checkpoints, read_arrays
from experiments.config import ConfigError

# 11 steps an epoch; 275 steps, evaluations at the epochs 9, 18 and 25.
WORDS = (
    f"--config={pathlib.Path(soak.__file__).parent / 'configs/digits.py'}",
    "--config.compare=",
    "--config.seeds=1",
    "--config.batch_size=128",
    "--config.model=mlp",
    "--config.hidden=32",
    "--config.epochs=25",
    "--config.log_every=5",
    "--config.eval_every=9",
    "--config.checkpoint_every=25",
    "--config.diagnostics_every=0",
    "--config.mesh_data=1",
)
RUN, STEPS = "runs/sparseopt-seed0", 275


@pytest.fixture(scope="module")
def soaked(tmp_path_factory):
    """A soak with a kill in a save, and one after the last step."""
    folder, said = tmp_path_factory.mktemp("soak"), []
    return folder, soak.soak(WORDS, folder, kills=1, seed=1, say=said.append), said


def test_killed_training_ends_as_if_nothing_had_happened(soaked):
    folder, outcome, said = soaked
    places = [kill.where for kill in outcome.kills]
    assert len(places) >= 2
    assert "save" in places
    found = outcome.comparison
    assert found.difference is None
    # Two files each of 55 lines and 3 evaluations; parameters, masks, momentum and more.
    assert found.lines == 2 * (55 + 3)
    assert found.values > 20
    assert found.arrays > 30
    assert found.bytes > 2 * 4 * (64 * 32 + 32 * 32 + 32 * 10)
    for number, kill in enumerate(outcome.kills, 1):
        assert f"kill {number}: {kill}" in said
        assert kill.seconds > 0
    output = (folder / "killed.txt").read_text()
    assert output.count("continuing from step") >= 1


@pytest.fixture
def copies(soaked, tmp_path):
    folders = tmp_path / "one", tmp_path / "other"
    for folder in folders:
        shutil.copytree(soaked[0] / "whole", folder)
    return folders


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_lines(path, change):
    lines = path.read_text().splitlines()
    path.write_text("\n".join(change(lines)) + "\n")


def edit_array(folder):
    """Another sign for one element of the momentum, in the newest checkpoint."""
    found = metrics.path_leaves(read_arrays(folder, STEPS))
    (name,) = [name for name in found if name.endswith("trace/dense1/kernel")]
    index = tuple(np.argwhere(found[name])[0])
    found[name][index] = -found[name][index]
    tree = {}
    for path, array in found.items():
        *branches, leaf = path.split("/")
        place = tree
        for branch in branches:
            place = place.setdefault(branch, {})
        place[leaf] = jnp.asarray(array)
    with Checkpoints(folder, 2, True) as checkpoints:
        checkpoints.save(STEPS, tree, {})


def edit_fan_in(path):
    with np.load(path) as arrays:
        content = dict(arrays)
    content["after/head/kernel"][2] += 1
    np.savez(path, **content)


def set_item(key, value):
    return lambda content: content.__setitem__(key, value)


CHANGES = {
    "a result": (
        lambda f: edit_json(f / RUN / "result.json", set_item("test_loss", 0.5)),
        f"{RUN}/result.json: test_loss: ",
    ),
    "a missing result": (
        lambda f: (f / RUN / "result.json").unlink(),
        f"{RUN}/result.json is missing",
    ),
    "a value more": (
        lambda f: edit_json(f / "result.json", set_item("more", 1)),
        "result.json: more is only in the other",
    ),
    "a line twice": (
        lambda f: edit_lines(f / "metrics.jsonl", lambda lines: [*lines, lines[-1]]),
        "metrics.jsonl: 58 lines, not 59",
    ),
    "a gap": (
        lambda f: edit_lines(f / RUN / "metrics.jsonl", lambda lines: lines[:5] + lines[6:]),
        f"{RUN}/metrics.jsonl line 6: step: 30, not 35",
    ),
    "fan-ins": (lambda f: edit_fan_in(f / RUN / "fan_in.npz"), "after/head/kernel differs"),
    "a bit of a checkpoint": (
        lambda f: edit_array(f / RUN / "checkpoints"),
        f"the checkpoint of step {STEPS}: state/opt_state/inner_state/",
    ),
    "a missing checkpoint": (
        lambda f: shutil.rmtree(f / RUN / "checkpoints" / str(STEPS)),
        f"not {STEPS}",
    ),
    "a damaged checkpoint": (
        lambda f: (f / RUN / "damaged-checkpoints/100-1").mkdir(parents=True),
        "was put aside as damaged",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_difference_is_found_and_named(change, copies):
    one, other = copies
    edit, named = CHANGES[change]
    edit(other)
    assert named in comparison.compare(one, other).difference


def test_timing_and_environment_may_differ(copies):
    one, other = copies
    edit_json(other / "result.json", set_item("environment", {}))
    for name in ("metrics.jsonl", f"{RUN}/metrics.jsonl"):
        edit_lines(
            other / name,
            lambda lines: [json.dumps(json.loads(x) | {"step_seconds": 9.0}) for x in lines],
        )
    assert comparison.compare(one, other).difference is None


def test_folders_may_be_named_from_here(copies, monkeypatch):
    one, other = copies
    monkeypatch.chdir(one.parent)
    found = comparison.compare(one.relative_to(one.parent), other.relative_to(one.parent))
    assert found == comparison.compare(one, other)
    assert found.arrays > 0


STEPS_SIMULATED = 10_000


class Simulated:
    """As a process that trains 10,000 steps, a step a millisecond, and saves at every 50th."""

    progress = 0

    def __init__(self):
        self.seconds, self._step = 0.0, Simulated.progress
        self._ended, self._left = False, 1000  # milliseconds that it takes to write its results

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def began(self):
        return self.seconds >= 5

    def step(self):
        return self._step if self.began() else 0

    def saving(self):
        place = self._step % 50
        saves = self.began() and 50 <= self._step < STEPS_SIMULATED and place < 20
        return self._step - place if saves else None

    def has_saved(self, step):
        return step <= self._step

    def wait(self, until):
        while not until():
            if self._ended:
                return False
            self.seconds += 0.001
            self._left -= self._step == STEPS_SIMULATED
            self._ended = not self._left
            self._step = min(self._step + self.began(), STEPS_SIMULATED)
        return True

    def wait_for(self, seconds):
        end = self.seconds + seconds
        return self.wait(lambda: self.seconds >= end)

    def kill(self, last_step):
        if self._ended:
            return None
        saving, began = self.saving(), self.began()
        if began:
            Simulated.progress = self._step - self._step % 50
        if saving is not None:
            return soak.Kill("save", saving, self.seconds)
        if not began:
            return soak.Kill("start-up", 0, self.seconds)
        return soak.Kill("end" if self._step == last_step else "step", self._step, self.seconds)


def simulate(kills, seed):
    Simulated.progress = 0
    pace = soak._Pace(start=5.0, line=0.005, save=0.02, end=1.0)
    return list(soak._kill_and_start(Simulated, kills, STEPS_SIMULATED, pace, random.Random(seed)))


@pytest.mark.parametrize("kills", [1, 2, 7, 20])
def test_kills_of_every_kind_over_the_whole_run(kills):
    first, other = simulate(kills, 0), simulate(kills, 1)
    assert simulate(kills, 0) == first != other
    for done in (first, other):
        places = [kill.where for kill in done]
        assert places.count("save") >= (kills + 1) // 2
        assert places.count("start-up") >= kills // 10
        assert len(places) >= kills
        assert places.index("end") == len(places) - 1
        if kills >= 20:
            steps = sorted(kill.step for kill in done)
            assert max(later - earlier for earlier, later in itertools.pairwise(steps)) < 3000


def test_a_run_that_is_too_short_is_an_error(monkeypatch):
    monkeypatch.setattr(Simulated, "kill", lambda self, _: self.wait(lambda: False) or None)
    with pytest.raises(soak.SoakError, match="the run was over with 3 of 3 kills still to come"):
        simulate(3, 0)


@pytest.fixture
def interpreter(tmp_path, monkeypatch):
    """Has a script take the place of Python."""

    def use(script):
        path = tmp_path / "interpreter"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(path))

    return use


def test_training_that_fails_by_itself(tmp_path, interpreter):
    interpreter("echo it is broken; exit 3")
    with pytest.raises(soak.SoakError, match="ended with exit code 3:\nit is broken\n"):
        soak.soak(WORDS, tmp_path / "soak", kills=1)


def test_ctrl_c_ends_the_training_too(tmp_path, interpreter, monkeypatch, capsys):
    interpreter(f"echo $$ > {tmp_path}/pid; exec sleep 600")

    def interrupt(seconds):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(soak.time, "sleep", interrupt)
    assert soak.main([f"--workdir={tmp_path / 'soak'}"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--kills=0"], "--kills=0 must be at least 1"),
        (["--kills=some"], "--kills: invalid int value: 'some'"),
        (["--config.hidden=0"], "--config.hidden=0 must be an integer at least 1"),
        (["--config.seeds=2"], "seeds=2 must be 1"),
        (["--config.compare=sgd,sparseopt"], "compare=sgd,sparseopt must name one method"),
        (["--config=nowhere.py"], "--config=nowhere.py: no such file"),
        (["--kill=3"], "--kill=3: no such argument"),
    ],
)
def test_wrong_arguments(arguments, named, tmp_path, capsys):
    folder = tmp_path / "soak"
    assert soak.main([f"--workdir={folder}", *arguments]) == 2
    assert named in capsys.readouterr().err
    assert not folder.exists() or not any(folder.iterdir())


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="must be empty, or a folder that is not there"):
        soak.soak(WORDS, tmp_path, kills=1)
    with pytest.raises(ConfigError, match=f"--workdir={tmp_path / 'file'}"):
        soak.soak(WORDS, tmp_path / "file", kills=1)


def test_the_verdict(monkeypatch, tmp_path, capsys):
    kills = soak.Kill("save", 25, 3.0), soak.Kill("end", 60, 5.0)
    for difference, code, verdict in (
        (None, 0, "equal to the undisturbed run, bit for bit: 9 values of results"),
        ("a difference", 1, "DIFFERENT from the undisturbed run: a difference"),
    ):
        outcome = soak.Outcome(kills, comparison.Comparison(difference, values=9))
        monkeypatch.setattr(soak, "soak", lambda *_, outcome=outcome: outcome)
        assert soak.main([f"--workdir={tmp_path}"]) == code
        said = capsys.readouterr().out
        assert "2 kills: 0 in start-up, 0 between checkpoints, 1 during a save, 1 after" in said
        assert verdict in said
