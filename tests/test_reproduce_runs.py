"""Every NAME of `reproduce` from end to end: a small MLP on digits, three steps."""

import dataclasses
import functools
import json
import re

import numpy as np
import pytest

from experiments import report, reproduce, train
from experiments.paper import gradient_ratio, neuron_steps
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


@pytest.fixture(scope="module")
def _few_programs():
    """One program for SGD and one for SparseOpt, which stand in for all their variants.

    What variants compute is tested with the optimizers; here it is how they are trained and shown.
    """
    cache = {}

    def compile_model(config, dataset):
        if "model" not in cache:
            cache["model"] = before[0](config, dataset)
        return cache["model"]

    def compile_method(config, dataset, model):
        (method,) = config.methods()
        kind = {"ham": "sgd", "sparseopt_ham": "sparseopt"}.get(method, method)
        if kind not in cache:
            plain = dataclasses.replace(config, optimizer=kind, hessian_every=1)
            cache[kind] = before[1](plain, dataset, model)
        return cache[kind]

    before = train.compile_model, train.compile_method
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, neuron_steps):
            patch.setattr(module, "compile_model", compile_model)
            patch.setattr(module, "compile_method", compile_method)
        yield


def read_record(folder, name):
    assert (folder / f"{name}-figure.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.usefixtures("_few_programs")
def test_a_table_in_parts_interrupted_and_finished(tmp_path, capsys):
    folder = tmp_path / "table"
    words = ["cifar100-table", f"--workdir={folder}", "--config.sparsity=0.9", *TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "report_sweep", lambda folder: "report")
        assert reproduce.main([*words, "--settings=rigl-*"]) == 0
    results = sorted(folder.glob("rigl-0.9-1epoch/runs/*/result.json"))
    assert len(results) == 4
    written = [path.read_bytes() for path in results]
    capsys.readouterr()

    with sigterm_in_step(2):
        assert reproduce.main(words) == 143
    shown = capsys.readouterr()
    assert "set-0.9-1epoch: 0 of 4" in shown.out
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
        ("ham-table", ["--config.compare=ham,sparseopt_ham"], 2),
        ("itop", ["--config.sparsity=0.9"], 3),
        ("direction-only", [], 5),
        ("normalisation", [], 4),
        ("hessian", ["--config.compare=sgd"], 1),
        ("factors", ["--settings=base,drop_fraction=0.5", "--config.eval_steps=0"], 4),
    ],
)
def test_every_sweep(name, words, cells, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "report_sweep", lambda folder: f"report of {folder}")
    assert reproduce.main([name, *TINY, "--seeds=1", *words, f"--workdir={tmp_path}"]) == 0
    record = read_record(tmp_path, name)
    filled = [row for row in record["rows"] if row["ours"] is not None]
    assert len(filled) == cells
    assert all(row["ours"]["mean"] >= 0 and row["seeds"] == [0] for row in filled)
    assert len(record["curves"]) == (1 if name == "hessian" else 0)
    assert f"report of {tmp_path}" in capsys.readouterr().out


@pytest.mark.usefixtures("_few_programs")
def test_the_two_that_are_no_sweeps(tmp_path, capsys, monkeypatch):
    smaller = functools.partial(
        gradient_ratio.measure, sparsities=(0.0, 0.5), batches=1, inits=("uniform",)
    )
    monkeypatch.setattr(gradient_ratio, "measure", smaller)
    words = ["--dataset=digits", "--seeds=1", "--config.hidden=8", f"--workdir={tmp_path}"]
    assert reproduce.main(["gradient-ratio", *words]) == 0
    found = read_record(tmp_path, "gradient-ratio")["found"]
    assert [case["ratio"][0]["mean"] for case in found["cases"]] == [1, 1, 1]
    assert gradient_ratio.table(found) in capsys.readouterr().out

    words = ["steps-by-fan-in", *TINY, "--seeds=1", "--config.compare=sgd"]
    assert reproduce.main([*words, f"--workdir={tmp_path}"]) == 0
    record = read_record(tmp_path, "steps-by-fan-in")
    assert record["found"]["steps"] == [0]
    assert set(record["found"]["slopes"]) == {"sgd"}
    assert neuron_steps.table(record["found"]) in capsys.readouterr().out
