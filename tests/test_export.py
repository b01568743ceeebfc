"""`experiments.export`: what it says where there is nothing to export; test_batched.py has runs."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt_jax as sx
from experiments import export
from experiments.checkpoint import Checkpoints

MASK = np.arange(6).reshape(2, 3) % 2 == 1


def write_run(folder, name="sgd-seed0", *, finished=True):
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
