"""`experiments.export`: its formats, and its errors; test_batched.py exports runs."""

import dataclasses
import importlib.util
import json
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest

import sparseopt_jax as sx
from experiments import build, export
from experiments.checkpoint import Checkpoints
from experiments.config import Config

MASK = np.arange(6).reshape(2, 3) % 2 == 1


def write_run(folder, name="sgd-seed0", *, finished=True, variables=None):
    """What a run leaves of which the command reads anything."""
    run = folder / "runs" / name
    run.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (run / "run.json").write_text(json.dumps({"group": None}))
    if finished:
        (run / "result.json").write_text(json.dumps({"steps": 7}))
    arrays = {
        "state": {"params": {"kernel": jnp.where(MASK, 1.1, 0)}, "opt_state": [jnp.ones(2)]},
        "logged_masks": {"kernel": jnp.asarray(MASK)},
    }
    if variables is not None:
        arrays = {"state": variables, "logged_masks": {}}
    with Checkpoints(run / "checkpoints", keep_last=1, keep_best=False) as checkpoints:
        checkpoints.save(7, arrays, {})
    return run


def test_a_folder_with_one_run_is_that_run(tmp_path, capsys):
    run = write_run(tmp_path / "work")
    for folder in (tmp_path / "work", run):
        assert export.main([str(folder), f"--to={tmp_path / 'f'}", "--values=bfloat16"]) == 0
        loaded = sx.load_compact(tmp_path / "f")["params"]["kernel"]
        np.testing.assert_array_equal(loaded, np.where(MASK, np.float32(1.1015625), 0))
        np.testing.assert_array_equal(
            sx.load_compact_masks(tmp_path / "f")["params"]["kernel"], MASK
        )
        assert "sgd-seed0, 3 of 6 parameters" in capsys.readouterr().out


CONFIG = Config(model="mlp", hidden=4)
IMAGES = {"shape": [2, 3, 1], "mean": [120.5], "std": [60.0]}


@pytest.fixture
def trained(tmp_path):
    """A run of which all formats can be written; its folder, model and variables."""
    model = build.make_model(CONFIG, 5)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2, 3, 1)))
    run = write_run(tmp_path / "work", variables=variables)
    origin = {"group": None, "config": dataclasses.asdict(CONFIG), "images": IMAGES}
    (run / "run.json").write_text(json.dumps(origin))
    return run, model, variables


def test_the_ending_chooses_the_format(trained, tmp_path, capsys):
    run, model, variables = trained
    x = np.random.default_rng(0).standard_normal((3, 2, 3, 1)).astype(np.float32)
    expected = model.apply(variables, x)
    for ending, name in (("stablehlo", "StableHLO"), ("onnx", "ONNX"), ("npz", "PyTorch's")):
        file = tmp_path / f"file.{ending}"
        assert export.main([str(run), f"--to={file}"]) == 0
        said = capsys.readouterr().out
        assert f"{file}: {name}" in said
        assert f"{file.stat().st_size:,} bytes" in said
        assert "(image - mean) / std, with images [2, 3, 1] of values from 0 to 255" in said
        assert "mean [120.5], std [60.0]" in said
    program = jax.export.deserialize(bytearray((tmp_path / "file.stablehlo").read_bytes()))
    np.testing.assert_allclose(program.call(x), expected, rtol=1e-5, atol=1e-5)
    (found,) = onnxruntime.InferenceSession(tmp_path / "file.onnx").run(None, {"x": x})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    kernel = variables["params"]["dense0"]["kernel"]
    with np.load(tmp_path / "file.npz") as state:
        np.testing.assert_array_equal(state["dense0.weight"], kernel.T)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_a_state_dict_that_torch_loads(trained, tmp_path):
    import torch

    run, _, variables = trained
    assert export.main([str(run), f"--to={tmp_path / 'file.pt'}"]) == 0
    state = torch.load(tmp_path / "file.pt")
    np.testing.assert_array_equal(state["head.bias"].numpy(), variables["params"]["head"]["bias"])


def test_what_a_format_lacks_is_said(trained, tmp_path, monkeypatch, capsys):
    run, _, _ = trained
    for package in ("onnx", "tensorflow", "torch"):
        monkeypatch.setitem(sys.modules, package, None)
    old = write_run(tmp_path / "old")
    for folder, file, more, message in (
        (run, "f.onnx", [], "to_onnx needs onnx, which is not installed; pip install"),
        (run, "f.tflite", [], "to_tflite needs TensorFlow, which is not installed"),
        (run, "f.pt", [], "needs PyTorch, which is not installed; FILE.npz has the same arrays"),
        (run, "f.pb", [], "must end in .compact or .stablehlo, .onnx, .tflite, .pt, .npz"),
        (run, "f.npz", ["--values=bfloat16"], "--values=bfloat16 is for compact files"),
        (old, "f.npz", [], "does not say what images it takes: it is of an older version"),
    ):
        assert export.main([str(folder), f"--to={tmp_path / file}", *more]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("error: ")
        assert not list(tmp_path.glob("f.*"))


def test_what_cannot_be_exported_is_named(tmp_path, capsys):
    to = f"--to={tmp_path / 'f'}"
    write_run(tmp_path / "two")
    write_run(tmp_path / "two", "sgd-seed1")
    unfinished = write_run(tmp_path / "unfinished", finished=False)
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([str(tmp_path / "empty"), to], "no config.json: it is not the folder of a run"),
        ([str(tmp_path / "none"), to], "no config.json: it is not the folder of a run"),
        ([str(tmp_path / "unfinished"), to], "has no finished run yet"),
        ([str(unfinished), to], "is not finished: it has no result.json"),
        ([str(tmp_path / "two"), to], "sgd-seed0, sgd-seed1"),
        ([str(tmp_path / "two")], "required: --to"),
        ([to], "required: RUN"),
        ([str(tmp_path / "two"), f"--to={tmp_path}"], "is a folder"),
        ([str(tmp_path / "two"), to, "--values=int8"], "invalid choice: 'int8'"),
    ):
        assert export.main(words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("error: ")
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("damage", ["missing", "a wrong bit"])
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path, capsys, damage):
    run = write_run(tmp_path / "work")
    checkpoint = run / "checkpoints" / "7"
    if damage == "missing":
        checkpoint.rename(run / "elsewhere")
    else:
        chunk = max(checkpoint.rglob("d/*"), key=lambda path: path.stat().st_size)
        content = bytearray(chunk.read_bytes())
        content[len(content) // 2] ^= 1
        chunk.write_bytes(content)
    assert export.main([str(run), f"--to={tmp_path / 'f'}"]) == 1
    assert "the checkpoint of step 7 in" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()
