"""Exports run by TensorFlow, in a process of its own: `python -m tests.tensorflow_runs FOLDER`."""

import json
import os
import pathlib
import sys

import numpy as np

from sparseopt_jax.models import export
from tests.export_cases import MODELS, sparse_model


def lite(content, x):
    """What LiteRT makes of x."""
    import tensorflow as tf

    interpreter = tf.lite.Interpreter(model_content=content, num_threads=1)
    (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(given["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], x)
    interpreter.invoke()
    return interpreter.get_tensor(result["index"])


def run(name, folder):
    """Sizes, and differences from the model."""
    import tensorflow as tf

    model, variables, x, expected = sparse_model(name)
    shape, scale = x.shape[1:], np.abs(expected).max()
    export.to_saved_model(folder, model, variables, shape)
    loaded = tf.saved_model.load(str(folder))
    sparse = export.to_tflite(model, variables, shape)
    dense = export.to_tflite(model, variables, shape, sparse=False)
    found = {
        "saved": loaded.predict(tf.constant(x)),
        "served": loaded.signatures["serving_default"](tf.constant(x))["output_0"],
        "one": loaded.predict(tf.constant(x[:1])),
        "sparse": lite(sparse, x),
        "dense": lite(dense, x),
    }
    differences = {
        each: float(np.abs(np.asarray(logits) - expected[: len(logits)]).max() / scale)
        for each, logits in found.items()
    }
    same = np.array_equal(found["sparse"], found["dense"])
    return {"differences": differences, "same": same, "sizes": [len(sparse), len(dense)]}


if __name__ == "__main__":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    target = pathlib.Path(sys.argv[1])
    results = {name: run(name, target / f"model{i}") for i, name in enumerate(MODELS)}
    try:
        (target / "file").touch()
        export.to_saved_model(target / "file", *sparse_model("mlp")[:2], (4, 3))
    except OSError as error:
        results["error"] = str(error)
    print(json.dumps(results))
