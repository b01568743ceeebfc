"""Training that is stopped, killed, damaged or diverges, in this process; `test_soak.py` kills."""

import collections
import fcntl
import json
import os
import shutil
import signal
import types

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import experiments.run
import sparseopt_jax as sx
from experiments import data, programs, report, stepping, train
from experiments.checkpoint import Checkpoints
from experiments.comparison import compare
from experiments.config import Config
from tests import train_runs

# 11 steps an epoch: lines at 4, 8, ..., evaluations at 22 and 40, checkpoints at 14 and 28 besides,
# topology updates at 3, 6, ..., 30.
CONFIG = Config(
    mesh_data=1, model="mlp", hidden=16, sparsity=0.8, update_interval=3, epochs=4, steps=40,
    log_every=4, checkpoint_every=14, eval_every=2, diagnostics_every=2,
)  # fmt: skip
RUN, STEPS = "runs/sparseopt-seed0", 40


@pytest.fixture(autouse=True, scope="module")
def _promotion():
    with train_runs.standard_promotion():
        yield


@pytest.fixture(scope="module")
def compiled():
    dataset = data.load(CONFIG)
    model = programs.compile_model(CONFIG, dataset)
    return types.SimpleNamespace(
        model=model, method=programs.compile_method(CONFIG, dataset, model), dataset=dataset
    )


def use(compiled, patch):
    patch.setattr(train, "compile_model", lambda *_: compiled.model)
    patch.setattr(train, "compile_method", lambda *_: compiled.method)
    patch.setattr(report, "write_pictures", lambda *_: [])


@pytest.fixture(autouse=True)
def _quick(compiled, monkeypatch):
    use(compiled, monkeypatch)


@pytest.fixture(scope="module")
def whole(compiled, tmp_path_factory):
    """The folder of a run that nothing has happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        use(compiled, patch)
        assert run(folder) == 0
    return folder


def run(folder, *overrides):
    return train_runs.train_here(folder, CONFIG, *overrides)


def saved_steps(folder):
    return sorted(int(path.name) for path in (folder / RUN / "checkpoints").iterdir())


def lines_of(folder):
    lines = train_runs.read_lines(folder / RUN / "metrics.jsonl")
    return [(line["kind"], line["step"]) for line in lines]


def sigterm_in_evaluation(monkeypatch, evaluation):
    """Has the process get a SIGTERM after the first of the three batches of an evaluation."""
    batches, bound = [], experiments.run.bound_in_flight

    def signalled(results):
        batches.append(1)
        if len(batches) == 3 * (evaluation - 1) + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        bound(results)

    monkeypatch.setattr(experiments.run, "bound_in_flight", signalled)


def stop_at(folder, step):
    """A run that was stopped after some step."""
    with train_runs.sigterm_in_step(step):
        assert run(folder) == 143


def test_the_undisturbed_run(whole):
    """What the others are compared with has a bit of everything."""
    logged = [("train", step) for step in range(4, 41, 4)]
    evaluated = [("eval", step) for step in (22, 40)]
    measured = [("diagnostics", step) for step in (22, 40)]
    kinds = ["train", "eval", "diagnostics"]
    expected = sorted(logged + evaluated + measured, key=lambda x: (x[1], kinds.index(x[0])))
    assert lines_of(whole) == expected
    assert saved_steps(whole) == [28, 40]


@pytest.mark.parametrize("step", [1, 33, 40])
def test_sigterm_in_a_step(step, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    stop_at(folder, step)
    said = capsys.readouterr().err
    assert f"stopped and saved: sparseopt seed 0, at step {step}; to continue: python -m" in said
    assert f"experiments.train --config={folder}.py --workdir={folder}\n" in said
    assert not (folder / RUN / "result.json").exists()
    assert saved_steps(folder)[-1] == step
    assert ("eval", step) not in lines_of(folder)
    assert run(folder) == 0
    assert f"continuing from step {step}" in capsys.readouterr().out
    assert compare(whole, folder).difference is None


@pytest.mark.parametrize(("evaluation", "step"), [(1, 22), (2, 40)])
def test_sigterm_in_an_evaluation(evaluation, step, whole, tmp_path, monkeypatch, capsys):
    """The last one too: there is no result without it."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        sigterm_in_evaluation(patch, evaluation)
        assert run(folder) == 143
    assert f"at step {step}; to continue" in capsys.readouterr().err
    assert ("eval", step) not in lines_of(folder)
    assert run(folder) == 0
    assert compare(whole, folder).difference is None


def test_the_best_is_kept_where_its_evaluation_was_interrupted(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        sigterm_in_evaluation(patch, 1)
        assert run(folder) == 143
    for step in (24, 26, 27):
        stop_at(folder, step)
    assert saved_steps(folder) == [22, 26, 27]


def test_stopped_over_and_over(whole, tmp_path):
    folder = tmp_path / "run"
    for step in range(5, STEPS, 9):
        stop_at(folder, step)
        assert saved_steps(folder)[-1] == step
    assert run(folder) == 0
    assert compare(whole, folder).difference is None


def test_ctrl_c_saves_and_a_second_one_ends_at_once(whole, tmp_path, monkeypatch, capsys):
    folder, advance = tmp_path / "run", stepping.Stepper.advance

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return advance(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stepping.Stepper, "advance", interrupted)
        assert run(folder) == 130
        assert saved_steps(folder) == [1]
        patch.setattr(Checkpoints, "save", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert run(folder) == 130
    assert "interrupted; to continue: python -m" in capsys.readouterr().err
    assert saved_steps(folder) == [1]
    assert run(folder) == 0
    assert compare(whole, folder).difference is None


def test_sigterm_before_training_ends_at_once(tmp_path, monkeypatch, capsys):
    """There is nothing to save yet; a long compilation is not waited for."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "compile_model", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert run(tmp_path / "run") == 143
    assert "interrupted; to continue: python -m" in capsys.readouterr().err
    assert not (tmp_path / "run" / RUN).exists()


def test_an_error_of_any_kind_leaves_a_run_that_goes_on(whole, tmp_path, monkeypatch):
    folder, single = tmp_path / "run", stepping.Stepper._single

    def broken(self, state):
        if self.step == 30:
            raise RuntimeError("the device is gone")
        return single(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(stepping.Stepper, "_single", broken)
        with pytest.raises(RuntimeError, match="the device is gone"):
            run(folder)
    assert saved_steps(folder)[-1] == 28
    assert run(folder) == 0
    assert compare(whole, folder).difference is None


def cut_short(path):
    largest = max(path.glob("arrays/d/*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:500])


def test_a_damaged_checkpoint(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    stop_at(folder, 31)
    before = saved_steps(folder)[-2]
    cut_short(folder / RUN / "checkpoints/31")
    capsys.readouterr()
    assert run(folder) == 0
    said = capsys.readouterr().out
    assert "the checkpoint of step 31 is damaged (" in said
    assert f"sparseopt seed 0: continuing from step {before}\n" in said
    aside = folder / RUN / "damaged-checkpoints"
    assert [path.name.split("-")[0] for path in aside.iterdir()] == ["31"]
    shutil.rmtree(aside)
    assert compare(whole, folder).difference is None


def test_where_no_checkpoint_can_be_used_the_run_does_not_begin_anew(tmp_path, capsys):
    folder = tmp_path / "run"
    stop_at(folder, 5)
    cut_short(folder / RUN / "checkpoints/5")
    lines = lines_of(folder)
    assert run(folder) == 1
    said = capsys.readouterr().err
    assert "error: no checkpoint in " in said
    assert f"To start the run anew, move {folder / RUN} away" in said
    assert lines_of(folder) == lines


def test_checkpoints_of_another_config_are_refused(whole, tmp_path, capsys):
    """Also where `config.json` does not tell any more."""
    folder = tmp_path / "run"
    stop_at(folder, 20)
    assert run(folder, "--config.learning_rate=0.25") == 2
    said = capsys.readouterr().err
    assert f"--workdir={folder} holds runs with learning_rate=0.1, not 0.25" in said
    (folder / "config.json").unlink()
    assert run(folder, "--config.learning_rate=0.25") == 2
    said = capsys.readouterr().err
    assert (
        f"{folder / RUN}/checkpoints holds checkpoints of a run with learning_rate=0.1, not" in said
    )
    (folder / "config.json").unlink()
    # What is kept, and where data comes from, may change.
    assert run(folder, "--config.keep_last=1", "--config.data_dir=elsewhere") == 0
    assert saved_steps(folder)[-1] == 40
    digests = [json.loads((f / "result.json").read_text())["state_sha256"] for f in (whole, folder)]
    assert digests[0] == digests[1]


def test_checkpoints_whose_state_has_another_form_are_refused(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as earlier:
        earlier.setattr(experiments.run, "STATE_VERSION", 1)
        stop_at(folder, 20)
    capsys.readouterr()
    assert run(folder) == 2
    said = capsys.readouterr().err
    assert f"{folder / RUN}/checkpoints holds checkpoints of a run by an earlier commit" in said
    assert "give another --workdir" in said
    assert saved_steps(folder)[-1] == 20  # it is still there


def test_other_random_numbers_are_refused(whole, tmp_path, capsys):
    """Before anything is compiled; and where only the checkpoint tells of them."""
    folder = tmp_path / "run"
    stop_at(folder, 20)
    was = "JAX_DEFAULT_PRNG_IMPL=threefry2x32"
    try:
        for now in ("rbg", "unsafe_rbg"):
            jax.config.update("jax_default_prng_impl", now)
            assert run(folder) == 2
            said = capsys.readouterr().err
            assert f"error: --workdir={folder} holds runs with {was}, not {now}" in said
            assert f"set the environment variable {was}, or give another --workdir" in said
            (folder / "config.json").unlink()
            assert run(folder) == 2
            assert f"holds checkpoints of a run with {was}, not {now}" in capsys.readouterr().err
    finally:
        jax.config.update("jax_default_prng_impl", "threefry2x32")
    assert run(folder) == 0
    assert compare(whole, folder).difference is None


def test_a_run_that_goes_on_compiles_nothing(whole, tmp_path, monkeypatch):
    """All of it comes from the work folder, and the run ends as one that was compiled at once."""
    monkeypatch.setattr(train, "compile_model", programs.compile_model)
    monkeypatch.setattr(train, "compile_method", programs.compile_method)
    events = collections.Counter()
    folder, place = tmp_path / "run", jax.config.jax_compilation_cache_dir

    def count(event, **_):
        events[event.removeprefix("/jax/compilation_cache/")] += 1

    def of_own(start):
        """What happens where the user has set up no cache."""
        events.clear()
        jax.clear_caches()
        jax.config.update("jax_compilation_cache_dir", None)
        try:
            start()
            assert jax.config.jax_compilation_cache_dir is None
        finally:
            jax.config.update("jax_compilation_cache_dir", place)
            compilation_cache.reset_cache()
        return events["compile_requests_use_cache"], events["cache_hits"], events["cache_misses"]

    jax.monitoring.register_event_listener(count)
    try:
        asked, hits, misses = of_own(lambda: stop_at(folder, 30))
        assert asked == misses > 0 == hits
        kept = set((folder / "compilation_cache").iterdir())
        assert len(kept) == misses
        asked, hits, misses = of_own(lambda: run(folder))
        assert asked == hits > 0 == misses
        assert set((folder / "compilation_cache").iterdir()) == kept
    finally:
        jax.monitoring.unregister_event_listener(count)
    assert compare(whole, folder).difference is None
    assert not (whole / "compilation_cache").exists()  # these tests have set up one


def test_two_runs_in_one_folder(whole, capsys):
    with open(whole / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(whole) == 2
        said = capsys.readouterr().err
        assert (
            f"error: --workdir={whole}: another process trains in it (process {os.getpid()}" in said
        )
    assert run(whole) == 0


@pytest.mark.parametrize("again", [False, True])
def test_a_deleted_log(again, whole, tmp_path, monkeypatch, capsys):
    """Also where the run fails again before it has saved a checkpoint that knows of it."""
    folder = tmp_path / "run"
    stop_at(folder, 23)
    log = folder / RUN / "metrics.jsonl"
    size = log.stat().st_size
    log.unlink()
    if again:

        def broken(*arguments):
            raise RuntimeError("the machine is gone")

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "save", broken)
            with pytest.raises(RuntimeError, match="the machine is gone"):
                run(folder)
        assert lines_of(folder) == [("train", 24), ("train", 28)]
    assert run(folder) == 0
    assert f"{log}: {size} bytes of the lines up to step 23 are lost" in capsys.readouterr().out
    assert lines_of(folder) == [line for line in lines_of(whole) if line[1] > 23]


def edit_checkpoint(folder, compiled, path, change):
    """Changes one leaf of the newest checkpoint, as if training had come to that."""
    state = compiled.method.functions.state
    shapes = {"state": state, "logged_masks": sx.get_masks(state.opt_state)}

    def edit(where, leaf):
        if jax.tree_util.keystr(where, simple=True, separator="/") != path:
            return leaf
        return jax.device_put(np.asarray(change(np.array(leaf)), leaf.dtype), leaf.sharding)

    with Checkpoints(folder / RUN / "checkpoints", 2, True) as checkpoints:
        found = checkpoints.restore(shapes)
        arrays = jax.tree_util.tree_map_with_path(edit, found.arrays)
        checkpoints.save(found.step, arrays, found.notes)


def set_bias(leaf):
    leaf[3] = 3e38
    return leaf


@pytest.mark.parametrize(
    ("path", "change", "what", "where"),
    [
        (
            "state/params/dense1/kernel",
            lambda leaf: 1e38 * np.sign(leaf),
            "the loss is nan at step 24",
            "the output of dense1",
        ),
        (
            "state/params/head/bias",
            set_bias,
            "the loss is inf at step 24",
            "the loss of finite outputs",
        ),
        (
            "state/params/dense1/kernel",
            lambda leaf: 5e18 * np.sign(leaf),
            "weights or statistics are not finite after step 28",
            "the running statistics of norm1/var",
        ),
    ],
    ids=["output", "loss", "statistics"],
)
def test_a_diverged_run_stops_and_keeps_its_last_finite_checkpoint(
    path, change, what, where, compiled, tmp_path, capsys
):
    folder = tmp_path / "run"
    stop_at(folder, 23)
    edit_checkpoint(folder, compiled, path, change)
    kept = saved_steps(folder)
    capsys.readouterr()
    assert run(folder) == 1
    said = capsys.readouterr().err
    assert f"error: sparseopt seed 0: {what}; first at step 24, in {where}.\n" in said
    assert "the checkpoint of step 23 is finite. A smaller learning_rate than 0.1, or" in said
    assert not (folder / RUN / "result.json").exists()
    assert saved_steps(folder) == kept
    assert kept[-1] == 23
    # Asked again, it says the same again.
    assert run(folder) == 1
    assert capsys.readouterr().err == said
