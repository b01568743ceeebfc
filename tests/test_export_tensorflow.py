"""SavedModel and LiteRT, by TensorFlow itself, which nothing imports into this process."""

import importlib.util
import json
import subprocess
import sys

import pytest

from sparseopt_jax.models import export
from tests.export_cases import MODELS, sparse_model
from tests.test_docs import PROJECT, ROOT


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("TensorFlow is not installed")
    folder = tmp_path_factory.mktemp("tensorflow")
    done = subprocess.run(
        [sys.executable, "-m", "tests.tensorflow_runs", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", MODELS)
def test_tensorflow_computes_what_the_model_does(results, name):
    differences = results[name]["differences"]
    assert sorted(differences) == ["dense", "one", "saved", "served", "sparse"]
    assert max(differences.values()) < 1e-5
    assert results[name]["same"]


def test_sparse_kernels_make_a_file_for_litert_smaller(results):
    sparse, dense = results["conv3x3"]["sizes"]
    assert sparse < 0.6 * dense


def test_a_folder_that_cannot_be_written_is_named(results):
    assert "file' cannot be written" in results["error"]


@pytest.mark.parametrize("function", ["to_saved_model", "to_tflite"])
def test_without_tensorflow_the_way_to_get_it_is_said(function, monkeypatch, tmp_path):
    model, variables, x, _ = sparse_model("mlp")
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    (required,) = PROJECT["optional-dependencies"]["tensorflow"]
    folder = (tmp_path,) if function == "to_saved_model" else ()
    with pytest.raises(ModuleNotFoundError, match=f"{function} needs TensorFlow.*'{required}'"):
        getattr(export, function)(*folder, model, variables, x.shape[1:])
    with pytest.raises(TypeError, match="model must be an MLP or ResNet"):
        getattr(export, function)(*folder, None, variables, x.shape[1:])
