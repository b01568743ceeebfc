"""Methods and seeds in one program: equal to the same runs one by one, and as interruptible."""

import dataclasses
import itertools
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt_jax as sx
from experiments import batched, export, metrics, report, sweep, train, workdir
from experiments.config import Config
from tests.train_runs import (
    compiled_once,
    read_lines,
    standard_promotion,
    train_here,
    without_timing,
)

METHODS = ("dense", "sgd", "sparseopt")
STEPS = 25
# Topology updates at steps 5, 10 and 15; an epoch has 11 steps.
CONFIG = Config(
    mesh_data=1, model="mlp", hidden=8, sparsity=0.8, compare=METHODS, seeds=2, epochs=3,
    steps=STEPS, update_interval=5, update_end=0.5, log_every=4, augmentation="crop",
    diagnostics_every=1, checkpoint_every=7, keep_best=False, learning_rate=0.05,
)  # fmt: skip
TOGETHER = ("--config.batch_runs=yes", "--config.steps_per_call=3")


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    """Three methods take a while to compile: once for all of the tests."""
    made, cache = train.Batched, {}

    def cached(members, model, dataset, steps_per_call):
        key = tuple(members), steps_per_call
        if key not in cache:
            cache[key] = made(members, model, dataset, steps_per_call)
        return cache[key]

    with standard_promotion(), compiled_once(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Batched", cached)
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert train_here(folder, CONFIG) == 0
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together") / "run"
    assert train_here(folder, CONFIG, *TOGETHER) == 0
    return folder


def test_six_runs_together_equal_six_single_runs(alone, together):
    """Masks, fan-ins and counts exactly, losses and accuracies but for the order of additions."""
    assert not (alone / "batches").exists()
    pairs = zip(report.load_runs(alone), report.load_runs(together), strict=True)
    for one, other in pairs:
        for name in ("method", "seed", "steps", "active_weights", "itop_rate", "flops_per_example"):
            assert one.result[name] == other.result[name], name
        # One of the 355 test images more or less.
        assert abs(one.result["test_accuracy"] - other.result["test_accuracy"]) < 1.01 / 355
        assert one.fan_in.keys() == other.fan_in.keys()
        for path, fan_in in one.fan_in.items():
            np.testing.assert_array_equal(fan_in, other.fan_in[path], err_msg=path)
        assert [(x["kind"], x["step"]) for x in one.metrics] == [
            (x["kind"], x["step"]) for x in other.metrics
        ]
        for ours, theirs in zip(one.metrics, other.metrics, strict=True):
            assert ours.keys() == theirs.keys()
            if ours["kind"] == "train":
                assert ours["mask_churn"] == theirs["mask_churn"]
                np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)
                np.testing.assert_allclose(
                    ours["gradient_norm"], theirs["gradient_norm"], rtol=1e-3
                )
            if ours["kind"] == "diagnostics":
                np.testing.assert_allclose(
                    ours["gradient_norm"], theirs["gradient_norm"], rtol=1e-3
                )


def test_every_run_of_the_batch_is_a_run_of_its_own(together):
    runs = report.load_runs(together)
    assert [(run.result["method"], run.result["seed"]) for run in runs] == [
        (method, seed) for method in METHODS for seed in (0, 1)
    ]
    assert len({run.result["state_sha256"] for run in runs}) == 6
    assert {run.result["environment"]["backend"] for run in runs} == {"cpu"}


def test_every_run_can_be_exported_bit_for_bit(alone, together, tmp_path, capsys):
    """The digests of what the files hold are those that the runs left."""
    for folder, run in itertools.product((alone, together), METHODS):
        path, file = folder / "runs" / f"{run}-seed1", tmp_path / f"{folder.parent.name}-{run}"
        assert export.main([str(path), f"--to={file}"]) == 0
        result = metrics.read_json(path / "result.json")
        variables = sx.load_compact(file)
        dense = result["density"] == 1
        masks = None if dense else sx.load_compact_masks(file)["params"]
        assert metrics.state_sha256(variables["params"], masks) == result["state_sha256"]
        assert variables["batch_stats"].keys() == {"norm0", "norm1"}
        assert export.main([str(path), f"--to={file}.npz"]) == 0
        with np.load(f"{file}.npz") as state:
            weight = state["dense1.weight"]
        np.testing.assert_array_equal(weight, variables["params"]["dense1"]["kernel"].T)
        said = capsys.readouterr().out.splitlines()
        kept = result["parameters"] - result["maskable_weights"] + result["active_weights"]
        counts = f"{kept:,} of {result['parameters']:,} parameters"
        assert [line.endswith(counts) for line in said] == [True, True, False]
        assert "with images [8, 8, 1] of values" in said[-1]


def test_stopped_in_the_middle_it_goes_on_bit_for_bit(together, tmp_path, monkeypatch, capsys):
    """SIGTERM before the step of the topology update at 10."""
    folder, place = tmp_path / "run", batched.BatchedStepper._place

    def signalled(self, step):
        if step == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return place(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(batched.BatchedStepper, "_place", signalled)
        assert train_here(folder, CONFIG, *TOGETHER) == 143
    assert "at step 10; to continue: python -m experiments.train" in capsys.readouterr().err
    (checkpoints,) = folder.glob("batches/*/checkpoints")
    assert [path.name for path in checkpoints.glob("1*")] == ["10"]
    assert not list(folder.glob("runs/*/result.json"))
    assert train_here(folder, CONFIG, *TOGETHER) == 0
    assert "[1-6/6] dense, sgd, sparseopt seeds 0, 1: continuing from step 10" in (
        capsys.readouterr().out
    )
    ours, theirs = (json.loads((f / "result.json").read_text()) for f in (folder, together))
    assert ours["state_sha256"] == theirs["state_sha256"]
    for path in folder.glob("runs/*/run.json"):
        origin = json.loads(path.read_text())
        assert [session["from_step"] for session in origin["sessions"]] == [0, 10]
        assert origin["config"]["update_interval"] == 5
        assert origin["sessions"][1]["environment"]["versions"]["jax"]
    for path in sorted(folder.glob("runs/*/metrics.jsonl")):
        lines = [read_lines(f / path.relative_to(folder)) for f in (folder, together)]
        assert [without_timing(x) for x in lines[0]] == [without_timing(x) for x in lines[1]]


def test_runs_that_are_missing_train_together(tmp_path):
    """Methods that lack the same seeds; what was under way goes on as it was."""
    config = Config(compare=METHODS, seeds=2)
    todo = [("dense", 1), ("sgd", 0), ("sgd", 1), ("sparseopt", 0), ("sparseopt", 1)]
    groups = workdir.together(config, tmp_path, todo)
    assert [runs for _, runs in groups] == [todo[:1], todo[1:]]
    folder = groups[1][0]
    assert folder == tmp_path / "batches/sgd-sparseopt-seeds-0-1"
    folder.mkdir(parents=True)
    (folder / "runs.json").write_text(json.dumps(todo[1:]))
    left = [("sparseopt", 1)]
    # Killed while it wrote the results of the first three, which are of this very group.
    for method, seed in todo[1:4]:
        own = workdir.run_folder(tmp_path, method, seed)
        own.mkdir(parents=True)
        (own / "run.json").write_text(json.dumps({"group": folder.name}))
    assert workdir.together(config, tmp_path, left) == [(folder, todo[1:])]
    # One of them was done by itself meanwhile: nothing of it is to be written again.
    own = workdir.run_folder(tmp_path, "sgd", 1)
    (own / "run.json").write_text(json.dumps({"group": None}))
    ((_, runs),) = workdir.together(config, tmp_path, left)
    assert runs == left


def test_a_finished_run_of_a_group_is_left_as_it_is(together, tmp_path):
    """Results of two of the six runs are lost; the group goes on from its last checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(together, folder)
    lost = [folder / "runs" / name / "result.json" for name in ("dense-seed1", "sparseopt-seed0")]
    expected = [json.loads(path.read_text())["state_sha256"] for path in lost]
    for path in lost:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*.json*")}
    assert train_here(folder, CONFIG, *TOGETHER) == 0
    assert [json.loads(path.read_text())["state_sha256"] for path in lost] == expected
    changed = {path.parent for path, time in kept.items() if path.stat().st_mtime_ns != time}
    assert changed <= {path.parent for path in lost}


def test_a_loss_that_is_not_finite_names_the_run(tmp_path, monkeypatch, capsys):
    """That of the second method and first seed, at step 6, in a loop of several steps."""
    advance = batched.BatchedStepper.advance

    def broken(self, state, count, stop=lambda: False):
        first = self.step
        state, measured = advance(self, state, count, stop)
        for values in measured:
            steps = len(values["loss"])
            if first < 6 <= first + steps:
                values["loss"] = values["loss"].at[5 - first, 1, 0].set(np.nan)
            first += steps
        return state, measured

    monkeypatch.setattr(batched.BatchedStepper, "advance", broken)
    assert train_here(tmp_path / "run", CONFIG, *TOGETHER) == 1
    said = capsys.readouterr().err
    assert "error: sgd seed 0: the loss is nan at step 6; trained alone, with batch_runs=no" in said

    # In a sweep the runs of that group are trained one by one.
    alone = []
    monkeypatch.setattr(train, "_singles", lambda c, f, runs, d, m: alone.extend(runs) or iter(()))
    config = dataclasses.replace(CONFIG, batch_runs="yes", steps_per_call=3)

    def body(stop):
        with stop:
            sweep.train_sweep("one", {"six": config}, tmp_path / "sweep", stop)

    assert train.guarded(body, lambda: "the command") == 0
    assert alone == config.runs()
    assert not list((tmp_path / "sweep").glob("six/batches/*/runs.json"))


def test_batch_runs_needs_one_device(tmp_path, capsys):
    texts = ("--config.mesh_data=2", "--config.batch_size=130", *TOGETHER)
    assert train_here(tmp_path / "run", CONFIG, *texts) == 2
    assert "batch_runs='yes' must be auto or no" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dense_group_goes_on_too(tmp_path):
    """It has no masks to keep."""
    config = dataclasses.replace(
        CONFIG, compare=("dense",), steps=8, eval_steps=0, diagnostics_every=0, log_every=4
    )
    with standard_promotion():
        assert train_here(tmp_path / "whole", config, *TOGETHER) == 0
        texts = (*TOGETHER, "--config.checkpoint_every=4")
        place = batched.BatchedStepper._place
        with pytest.MonkeyPatch.context() as patch:

            def signalled(self, step):
                if step == 4:
                    os.kill(os.getpid(), signal.SIGTERM)
                return place(self, step)

            patch.setattr(batched.BatchedStepper, "_place", signalled)
            assert train_here(tmp_path / "parts", config, *texts) == 143
        assert train_here(tmp_path / "parts", config, *texts) == 0
    digests = [
        json.loads((tmp_path / name / "result.json").read_text())["state_sha256"]
        for name in ("whole", "parts")
    ]
    assert digests[0] == digests[1]


def test_gradients_of_convolutions_map_over_methods_and_seeds():
    """Strided convolutions, whose gradient JAX maps once but not twice, against one by one."""
    rng = np.random.default_rng(0)
    kernels = rng.normal(size=(3, 2, 3, 3, 2, 4)).astype(np.float32)  # (methods, seeds, ...)
    offsets = rng.normal(size=(3, 2, 4)).astype(np.float32)
    images = rng.normal(size=(2, 5, 6, 6, 2)).astype(np.float32)  # (seeds, batch, ...)

    def loss(kernel, offset, x):
        y = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(jnp.square(y + offset.reshape(1, 1, 1, -1)))

    over = jax.jit(batched._over_runs(jax.value_and_grad(loss)))
    values, gradients = over(kernels, offsets, images)
    shared = jax.jit(batched._over_runs(loss, batch_per_seed=False))(kernels, offsets, images[0])
    for method in range(3):
        for seed in range(2):
            kernel, offset = kernels[method, seed], offsets[method, seed]
            value, gradient = jax.value_and_grad(loss)(kernel, offset, images[seed])
            np.testing.assert_allclose(values[method, seed], value, rtol=1e-5)
            np.testing.assert_allclose(gradients[method, seed], gradient, rtol=1e-4, atol=1e-6)
            expected = loss(kernel, offset, images[0])
            np.testing.assert_allclose(shared[method, seed], expected, rtol=1e-5)
