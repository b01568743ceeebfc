"""Training runs from end to end: a small MLP on digits, all methods, two seeds."""

import dataclasses
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiments.run
import sparseopt_jax as sx
from experiments import data, metrics, programs, report, stepping, train, workdir
from experiments.config import Config

STEPS, SEEDS, METHODS = 25, 2, ("dense", "sgd", "sparseopt")
# 11 steps an epoch; 25 steps cut the third epoch short. Updates at 4, 8, 12, ..., 24.
CONFIG = Config(
    mesh_data=1,
    model="mlp",
    hidden=32,
    sparsity=0.9,
    update_interval=4,
    epochs=3,
    steps=STEPS,
    update_end=0.75,
    seeds=SEEDS,
    compare=METHODS,
    log_every=10,
)
FILE = """from experiments.config import Config

def get_config():
    return {config!r}
"""


@pytest.fixture(autouse=True, scope="module")
def _promotion():
    """optax's cosine schedule takes the minimum of an int32 and a float.

    Set for all threads, since compilation runs in others.
    """
    before = jax.config.jax_numpy_dtype_promotion
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", before)


def run(folder, config=CONFIG, *overrides):
    """Runs the command with `config`, in this process."""
    path = pathlib.Path(folder).with_suffix(".py")
    path.write_text(FILE.format(config=config))
    return train.main([f"--config={path}", f"--workdir={folder}", *overrides])


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_timing(record):
    """What does not depend on how fast the machine is."""
    timing = ("timing", "examples_per_second", "step_seconds", "data_wait_seconds")
    return {k: v for k, v in record.items() if k not in timing}


@pytest.fixture(scope="module")
def compiled():
    """The digits, and compilation that is done once a method for the tests that ask for it."""
    cache, dataset = {}, data.load(CONFIG)

    def once(function):
        def cached(config, digits, *model):
            key = function, dataclasses.replace(config, seed=0, seeds=1)
            if key not in cache:
                cache[key] = function(config, digits, *model)
            return cache[key]

        return cached

    model, method = once(programs.compile_model), once(programs.compile_method)
    return types.SimpleNamespace(dataset=dataset, model=model, method=method)


@pytest.fixture
def _compile_once(compiled, monkeypatch):
    monkeypatch.setattr(train, "compile_model", compiled.model)
    monkeypatch.setattr(train, "compile_method", compiled.method)


@pytest.fixture(scope="module")
def finished(compiled, tmp_path_factory):
    """The folder of a whole grid."""
    folder = tmp_path_factory.mktemp("grid") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_model", compiled.model)
        patch.setattr(train, "compile_method", compiled.method)
        assert run(folder) == 0
    return folder


def test_the_folder_has_everything(finished):
    names = {path.name for path in finished.iterdir()} - {".lock"}
    pictures = {"accuracy.png", "loss.png", "fan_in.png"}
    assert names == {"config.json", "metrics.jsonl", "result.json", "runs"} | pictures
    config = json.loads((finished / "config.json").read_text())
    assert config["steps"] == STEPS
    assert config["compare"] == list(METHODS)


def test_result_of_every_run(finished):
    result = json.loads((finished / "result.json").read_text())
    grid = [(run["method"], run["seed"]) for run in result["runs"]]
    assert grid == [(method, seed) for method in METHODS for seed in range(SEEDS)]
    assert len({run["state_sha256"] for run in result["runs"]}) == len(grid)
    assert len(result["state_sha256"]) == 64
    assert result["environment"]["versions"]["jax"]
    assert result["config"] == json.loads((finished / "config.json").read_text())
    for one in result["runs"]:
        assert one["steps"] == STEPS
        assert 0.2 < one["test_accuracy"] <= 1
        examples = one["test_accuracy"] * 355
        assert round(examples) == pytest.approx(examples)  # a count over all test images
    assert result["summary"]["methods"]["sgd"]["test_accuracy"]["n"] == SEEDS
    assert result["summary"]["paired"]["sparseopt - sgd"]["seeds"] == [0, 1]


def test_density_is_exact_at_the_end(finished):
    shapes = {"dense0/kernel": (64, 32), "dense1/kernel": (32, 32), "head/kernel": (32, 10)}
    counts = sx.ERK(0.9).layer_counts(shapes)
    maskable = sum(np.prod(shape) for shape in shapes.values())
    for one in report.load_runs(finished):
        dense = one.result["method"] == "dense"
        active = maskable if dense else sum(counts.values())
        assert one.result["active_weights"] == active
        assert one.result["maskable_weights"] == maskable
        assert one.result["density"] == active / maskable
        if dense:
            assert one.fan_in == {}
        for path, count in () if dense else counts.items():
            assert one.fan_in[f"before/{path}"].sum() == count
            assert one.fan_in[f"after/{path}"].sum() == count
            assert one.fan_in[f"size/{path}"] == shapes[path][0]
            assert one.fan_in[f"after/{path}"].shape == shapes[path][1:]


def test_topology_has_moved(finished):
    for one in report.load_runs(finished):
        churn = [line["mask_churn"] for line in one.metrics if line["kind"] == "train"]
        if one.result["method"] == "dense":
            assert churn == [None] * 3
        else:
            assert all(0 < value < 1 for value in churn)


def test_metrics_have_a_line_per_log_and_evaluation(finished):
    lines = read_lines(finished / "metrics.jsonl")
    for method in METHODS:
        for seed in range(SEEDS):
            mine = [line for line in lines if (line["method"], line["seed"]) == (method, seed)]
            steps = {kind: [x["step"] for x in mine if x["kind"] == kind] for kind in
                     ("train", "eval", "diagnostics")}  # fmt: skip
            epochs = [11, 22, 25]
            assert steps == {"train": [10, 20, 25], "eval": epochs, "diagnostics": epochs}
            rates = [line["learning_rate"] for line in mine if line["kind"] == "train"]
            expected = [0.05 * (1 + np.cos(np.pi * step / 33)) for step in (9, 19, 24)]
            np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert len(lines) == len(METHODS) * SEEDS * 9
    names = {"loss", "train_accuracy", "gradient_norm", "density", "itop_rate", "epoch"}
    timing = {"examples_per_second", "step_seconds", "data_wait_seconds"}
    assert names | timing <= set(lines[0])
    for line in lines:
        if line["kind"] == "train":
            assert 0 <= line["data_wait_seconds"] < line["step_seconds"]
            per_second = 128 / line["step_seconds"]
            assert line["examples_per_second"] == pytest.approx(per_second)


def test_diagnostics_lines_agree_with_what_the_run_left(finished):
    for one in report.load_runs(finished):
        found = [line for line in one.metrics if line["kind"] == "diagnostics"]
        assert all(line["gradient_norm"] > 0 for line in found)
        if one.result["method"] == "dense":
            assert not {"fan_in", "gradient_skew", "itop_rate"} & set(found[-1])
            assert one.result["itop_rate"] is None
            continue
        last = found[-1]
        assert last["step"] == STEPS
        for path, statistics in last["fan_in"].items():
            fan_in = one.fan_in[f"after/{path}"]
            np.testing.assert_allclose(statistics["mean"], fan_in.mean(), rtol=1e-6)
            np.testing.assert_allclose(statistics["std"], fan_in.std(), rtol=1e-5)
            assert (statistics["min"], statistics["max"]) == (fan_in.min(), fan_in.max())
            assert statistics["dead"] == (fan_in == 0).sum()
            assert 0 < last["gradient_skew"][path]["angle"] < np.pi / 2
        rates = [line["itop_rate"] for line in found]
        assert one.result["density"] < rates[0] < rates[1] < 1
        assert rates[-1] == one.result["itop_rate"]


def test_the_same_seed_twice_is_the_same_bit_for_bit(finished, tmp_path):
    """A single method and seed gives what it gave within the grid."""
    alone = dataclasses.replace(CONFIG, compare=(), optimizer="sparseopt")
    assert run(tmp_path / "alone", alone, "--config.seed=1", "--config.seeds=1") == 0
    (mine,) = report.load_runs(tmp_path / "alone")
    theirs = report.load_run(workdir.run_folder(finished, "sparseopt", 1))
    assert mine.result["state_sha256"] == theirs.result["state_sha256"]
    assert [without_timing(x) for x in mine.metrics] == [without_timing(x) for x in theirs.metrics]


@pytest.mark.usefixtures("_compile_once")
def test_an_interrupted_grid_goes_on_where_it_was(finished, tmp_path, monkeypatch, capsys):
    """A second Ctrl-C within the second evaluation of the fourth run; then the same command again.

    It goes on with that run, from the checkpoint of its first evaluation.
    """
    folder, calls, evaluate = tmp_path / "run", [], experiments.run.evaluate

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3 * 3 + 2:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(experiments.run, "evaluate", interrupted)
    assert run(folder) == 130
    said = capsys.readouterr().err
    assert "interrupted; to continue: python -m experiments.train --config=" in said
    assert f"--workdir={folder}" in said
    assert not (folder / "result.json").exists()
    assert len(read_lines(folder / "metrics.jsonl")) == 3 * 9  # finished runs only
    written = read_lines(folder / "runs/sgd-seed1/metrics.jsonl")
    assert [line["step"] for line in written] == [10, 11, 11, 20]
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/result.json")}
    assert len(before) == 3

    calls.clear()
    monkeypatch.setattr(experiments.run, "evaluate", lambda *a: calls.append(a) or evaluate(*a))
    assert run(folder) == 0
    said = capsys.readouterr().out
    assert "3 of 6 runs are done" in said
    assert "[4/6] sgd seed 1: continuing from step 11" in said
    assert len(calls) == 2 + 2 * 3
    assert (
        before.items()
        <= {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/result.json")}.items()
    )
    once, again = (json.loads((f / "result.json").read_text()) for f in (finished, folder))
    assert [without_timing(x) for x in once["runs"]] == [without_timing(x) for x in again["runs"]]
    assert once["summary"] == again["summary"]
    assert once["state_sha256"] == again["state_sha256"]
    lines = [[without_timing(x) for x in read_lines(f / "metrics.jsonl")] for f in
             (finished, folder)]  # fmt: skip
    assert lines[0] == lines[1]


def test_a_finished_grid_is_only_reported_again(finished, capsys):
    """Also where it was stopped before its last run's metrics were among the others."""
    names = ("result.json", "metrics.jsonl")
    before = [(finished / name).read_text() for name in names]
    (finished / "metrics.jsonl").unlink()
    assert run(finished) == 0
    assert "6 of 6 runs are done" in capsys.readouterr().out
    assert [(finished / name).read_text() for name in names] == before


def test_another_config_in_the_same_folder_is_refused(finished, capsys):
    assert run(finished, CONFIG, "--config.weight_decay=0.25") == 2
    said = capsys.readouterr().err
    assert "weight_decay=0.0005, not 0.25" in said


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    assert run(tmp_path / "run") == 2
    assert f"--workdir={tmp_path / 'run'}" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    config = Config(
        mesh_data=1,
        model="mlp",
        hidden=8,
        topology="dense",
        optimizer="sgd",
        epochs=1,
        learning_rate=1e38,
    )
    assert run(tmp_path / "run", config) == 1
    said = capsys.readouterr().err
    assert "sgd" not in said
    assert "dense seed 0: the loss is nan at step " in said
    assert not (tmp_path / "run/result.json").exists()


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["--config.update_interval=50"], "update_interval=50 must be at most 24"),
        (["--config.warmup_epochs=3"], "warmup_epochs=3 must be below epochs=3"),
        (["--config.batch_size=5000"], "batch_size=5000 must be at most 14"),
    ],
)
def test_a_config_that_does_not_fit_its_run_is_refused(overrides, named, tmp_path, capsys):
    assert run(tmp_path / "run", CONFIG, *overrides) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_methods_start_from_the_same_weights_and_masks(compiled):
    model = compiled.model(CONFIG, compiled.dataset)
    seed = jnp.int32(5)
    weights = model.init(seed)
    states = {
        method: compiled.method(CONFIG.for_method(method), compiled.dataset, model).start(
            *weights, seed
        )
        for method in METHODS
    }
    dense = metrics.path_leaves(states["dense"].params)
    masks = metrics.path_leaves(sx.get_masks(states["sgd"].opt_state))
    others = metrics.path_leaves(sx.get_masks(states["sparseopt"].opt_state))
    for path, leaf in dense.items():
        np.testing.assert_array_equal(masks[path], others[path])
        masked = np.where(masks[path], leaf, 0)
        for method in ("sgd", "sparseopt"):
            got = metrics.path_leaves(states[method].params)[path]
            np.testing.assert_array_equal(got, masked)


def test_sparse_he_normal_scales_each_neuron_by_its_fan_in(compiled):
    """Also: static masks stay as they are."""
    digits = compiled.dataset
    config = Config(
        mesh_data=1, model="mlp", hidden=8, sparsity=0.8, topology="static", init="sparse_he_normal"
    )
    model = programs.compile_model(config, digits)
    params, batch_stats = model.init(jnp.int32(0))
    method = programs.compile_method(config, digits, model)
    state = method.start(params, batch_stats, jnp.int32(0))
    mask = np.asarray(sx.get_masks(state.opt_state)["dense0"]["kernel"])
    scaled = np.where(mask, params["dense0"]["kernel"], 0) * np.sqrt(
        64 / np.maximum(mask.sum(0), 1)
    )
    np.testing.assert_allclose(state.params["dense0"]["kernel"], scaled, rtol=1e-5)
    state, _ = method.step(state, *next(digits.train_batches(seed=0, first_step=0)))
    np.testing.assert_array_equal(sx.get_masks(state.opt_state)["dense0"]["kernel"], mask)


def test_other_settings_run(tmp_path):
    config = Config(
        mesh_data=1, model="mlp", hidden=8, topology="set", distribution="uniform", sparsity=0.8,
        update_interval=2, epochs=1, steps=6, log_every=6, nesterov=True, schedule="linear",
        warmup_epochs=0.5, label_smoothing=0.1, average_over="network",
    )  # fmt: skip
    assert run(tmp_path / "run", config) == 0
    (one,) = report.load_runs(tmp_path / "run")
    (line,) = [line for line in one.metrics if line["kind"] == "train"]
    assert line["mask_churn"] > 0
    # Uniform leaves the first layer, 64x8, dense.
    assert one.fan_in["after/dense0/kernel"].tolist() == [64] * 8


def test_a_compiled_loop_of_steps_is_the_same_as_single_steps(tmp_path, monkeypatch):
    """Two loops of two steps a line; the odd step of an epoch alone; the same batches and masks."""
    looped = dataclasses.replace(
        CONFIG,
        compare=(),
        optimizer="sparseopt",
        log_every=4,
        steps_per_call=2,
        augmentation="crop",
    )
    alone = dataclasses.replace(looped, steps_per_call=1)
    runs, loops, loop = [], [], stepping.Stepper._loop
    monkeypatch.setattr(
        stepping.Stepper, "_loop", lambda *arguments: loops.append(1) or loop(*arguments)
    )
    for name, config in (("looped", looped), ("alone", alone)):
        assert run(tmp_path / name, config) == 0
        # A seed has 11 + 11 + 3 steps: lines after 4, 8, the epoch's 11, 12, 16, 20, 22, 24, 25.
        assert len(loops) == SEEDS * (2 + 2 + 1 + 0 + 2 + 2 + 1 + 1 + 0)
        runs.append(report.load_run(workdir.run_folder(tmp_path / name, "sparseopt", 1)))
    lines = [[line for line in one.metrics if line["kind"] == "train"] for one in runs]
    assert [line["step"] for line in lines[0]] == [4, 8, 12, 16, 20, 24, 25]
    for ours, theirs in zip(*lines, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["mask_churn"] == theirs["mask_churn"]
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)
        np.testing.assert_allclose(ours["gradient_norm"], theirs["gradient_norm"], rtol=1e-3)
    for path, fan_in in runs[0].fan_in.items():
        np.testing.assert_array_equal(fan_in, runs[1].fan_in[path])


@pytest.mark.parametrize("optimizer", ["ham", "sparseopt_ham"])
def test_ham_and_the_hessian(optimizer, tmp_path):
    config = Config(
        mesh_data=1, model="mlp", hidden=8, sparsity=0.8, optimizer=optimizer, ham_alpha=10.0,
        topology="static", epochs=2, steps=22, log_every=11, diagnostics_every=0, hessian_every=2,
    )  # fmt: skip
    assert run(tmp_path / "run", config) == 0
    (one,) = report.load_runs(tmp_path / "run")
    assert one.result["method"] == optimizer
    (line,) = [line for line in one.metrics if line["kind"] == "diagnostics"]
    assert line["step"] == 22
    assert line["hessian_top_eigenvalue"] > 0
    assert line["hessian_residual"] < 0.01 * line["hessian_top_eigenvalue"]
    first, last = (line["loss"] for line in one.metrics if line["kind"] == "train")
    assert last < first
