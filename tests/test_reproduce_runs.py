"""Every NAME of `reproduce` from end to end: a small MLP on digits, three steps."""

import dataclasses
import functools
import json
import re

import numpy as np
import pytest

from experiments import report, reproduce, train
from experiments.paper import gradient_ratio, neuron_steps
from experiments.paper.request import parse
from tests.train_runs import sigterm_in_step, standard_promotion

# Three steps of a small MLP on digits, with a topology update in the second.
TINY = (
    "--dataset=digits", "--epochs=1", "--seeds=2", "--config.model=mlp", "--config.hidden=8",
    "--config.steps=3", "--config.update_interval=2", "--config.log_every=1", "--config.pool=1",
    "--config.mesh_data=1", "--config.batch_size=128", "--config.learning_rate=0.1",
    "--config.augmentation=none", "--config.diagnostics_every=0",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _promotion():
    with standard_promotion():
        yield


PLAIN = (
    parse(["direction-only", *TINY, "--config.topology=static"])
    .settings["own_norm-0.95-1epoch"]
    .config
)


@pytest.fixture(scope="module")
def programs():
    """What `_few_programs` has compiled so far."""
    return {}


@pytest.fixture
def _few_programs(programs, monkeypatch):
    """One program for SGD and one for SparseOpt, which stand in for most of their variants.

    HAM and rescaled gradients have their own. Masks are static: what variants of the topology
    compute is tested with the optimizers, here it is how all of them are trained and shown.
    """
    before = train.compile_model, train.compile_method

    def compile_model(config, dataset):
        if "model" not in programs:
            programs["model"] = before[0](PLAIN, dataset)
        return programs["model"]

    def compile_method(config, dataset, model):
        (method,) = config.methods()
        own = dataclasses.replace(config, topology="static")
        if config.rescale == "none" and method in ("sgd", "sparseopt"):
            own = dataclasses.replace(PLAIN.for_method(method), hessian_every=1)
        key = json.dumps(dataclasses.asdict(own))
        if key not in programs:
            programs[key] = before[1](own, dataset, model)
        return programs[key]

    for module in (train, neuron_steps):
        monkeypatch.setattr(module, "compile_model", compile_model)
        monkeypatch.setattr(module, "compile_method", compile_method)


def read_record(folder, name):
    assert (folder / f"{name}-figure.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.usefixtures("_few_programs")
def test_a_table_in_parts_interrupted_and_finished(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "write_sweep_pictures", lambda *arguments: [])
    folder = tmp_path / "table"
    words = ["cifar100-table", f"--workdir={folder}", "--config.sparsity=0.9", *TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "report_sweep", lambda folder, names: "report")
        assert reproduce.main([*words, "--settings=rigl-*"]) == 0
        results = sorted(folder.glob("rigl-0.9-1epoch/runs/*/result.json"))
        assert len(results) == 4
        written = [path.read_bytes() for path in results]
        capsys.readouterr()
        with sigterm_in_step(2):
            assert reproduce.main(words) == 143
    shown = capsys.readouterr()
    assert "set-0.9-1epoch: 0 of 4" in shown.out
    assert read_record(folder, "cifar100-table")["missing"] == {
        "set-0.9-1epoch": {"finished": 0, "of": 4}
    }
    assert re.search(r"RigL 0.9 sgd +paper", shown.out)
    assert "to continue: python -m experiments.reproduce cifar100-table" in shown.err
    assert f"--workdir={folder}" in shown.err

    assert reproduce.main(words) == 0
    assert [path.read_bytes() for path in results] == written
    record = read_record(folder, "cifar100-table")
    assert record["missing"] == {}
    assert record["ours"] == {"task": "mlp on digits, steps=3", "same_task_as_paper": False}
    assert record["environment"]["versions"]["jax"]
    assert {row["field"] for row in record["hyperparameters"] if row["changed"]} == {
        "batch_size", "learning_rate", "update_interval", "augmentation", "seeds"
    }  # fmt: skip
    for row in record["rows"]:
        if row["setting"] is not None:
            paths = (folder / row["setting"]).glob(f"runs/{row['method']}-seed*/result.json")
            found = [json.loads(path.read_text())["test_accuracy"] for path in paths]
            assert len(found) == 2
            assert row["ours"]["mean"] == pytest.approx(100 * np.mean(found))
    shown = capsys.readouterr().out
    assert "Ours is another task" in shown
    assert "batch_size=128" in shown.split("given by this command")[0]
    assert str(folder / "summary.json") in shown  # the report follows


@pytest.mark.usefixtures("_few_programs")
@pytest.mark.parametrize(
    ("name", "words", "cells"),
    [
        ("imagenet-table", ["--settings=set-0.97-*", "--config.dtype=float32"], 2),
        ("itop", ["--config.sparsity=0.9"], 3),
        ("normalisation", [], 4),
        ("hessian", ["--config.compare=sgd"], 1),
        ("factors", ["--settings=base,drop_fraction=0.5", "--config.eval_steps=0"], 4),
    ],
)
def test_every_sweep(name, words, cells, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "report_sweep", lambda folder, names: f"report of {folder}")
    assert reproduce.main([name, *TINY, "--seeds=1", *words, f"--workdir={tmp_path}"]) == 0
    record = read_record(tmp_path, name)
    filled = [row for row in record["rows"] if row["ours"] is not None]
    assert len(filled) == cells
    assert all(row["ours"]["mean"] >= 0 and row["seeds"] == [0] for row in filled)
    assert len(record["curves"]) == (1 if name == "hessian" else 0)
    assert f"report of {tmp_path}" in capsys.readouterr().out


@pytest.mark.usefixtures("_few_programs")
@pytest.mark.parametrize(
    ("name", "words", "arms"),
    [
        (
            "direction-only",
            [],
            ["own_norm sgd", "own_norm sparseopt", "raw_norm sparseopt", "unit_norm sgd",
             "unit_norm sparseopt"],
        ),
        (
            "ham-table",
            ["--config.ham_alpha=0.5"],
            ["sgd", "sparseopt", "ham", "sparseopt_ham"],
        ),
    ],
)  # fmt: skip
def test_every_arm_trains_in_its_own_way(name, words, arms, tmp_path, monkeypatch):
    """From the same weights and batch, the steps of each program lead elsewhere."""
    monkeypatch.setattr(report, "report_sweep", lambda folder, names: "report")
    words = [*TINY, "--seeds=1", *words]
    assert reproduce.main([name, *words, f"--workdir={tmp_path}"]) == 0
    rows = [row for row in read_record(tmp_path, name)["rows"] if row["ours"] is not None]
    assert [" ".join(filter(None, (row["variant"], row["method"]))) for row in rows] == arms
    first, last = set(), set()
    for row in rows:
        folder = tmp_path / row["setting"] / "runs" / f"{row['method']}-seed0"
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if line["kind"] == "train"]
        assert [line["step"] for line in steps] == [1, 2, 3]
        first.add(round(steps[0]["loss"], 4))
        last.add(json.loads((folder / "result.json").read_text())["state_sha256"])
    assert len(first) == 1
    assert len(last) == len(arms)


@pytest.mark.usefixtures("_few_programs")
def test_the_two_that_are_no_sweeps(tmp_path, capsys, monkeypatch):
    smaller = functools.partial(
        gradient_ratio.measure, sparsities=(0.0, 0.5), batches=1, inits=("uniform",)
    )
    monkeypatch.setattr(gradient_ratio, "NORMS", ("batch",))
    monkeypatch.setattr(gradient_ratio, "measure", smaller)
    words = ["--dataset=digits", "--seeds=1", "--config.hidden=8", f"--workdir={tmp_path}"]
    assert reproduce.main(["gradient-ratio", *words]) == 0
    found = read_record(tmp_path, "gradient-ratio")["found"]
    assert [case["ratio"][0]["mean"] for case in found["cases"]] == [1]
    assert gradient_ratio.table(found) in capsys.readouterr().out
    assert (tmp_path / "gradient-ratio-parts.json").is_file()
    other = [word.replace("hidden=8", "hidden=9") for word in words]
    assert reproduce.main(["gradient-ratio", *other]) == 2
    assert "gradient-ratio-parts.json holds measurements with hidden=8" in capsys.readouterr().err

    words = ["steps-by-fan-in", *TINY, "--seeds=1", "--config.compare=sgd"]
    assert reproduce.main([*words, f"--workdir={tmp_path}"]) == 0
    record = read_record(tmp_path, "steps-by-fan-in")
    assert record["found"]["steps"] == [0]
    assert set(record["found"]["slopes"]) == {"sgd"}
    assert neuron_steps.table(record["found"]) in capsys.readouterr().out
