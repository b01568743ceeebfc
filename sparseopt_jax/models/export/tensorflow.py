"""TensorFlow: a model as a SavedModel, or for LiteRT with its encoding of sparse kernels."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparseopt_jax.models.export import checked
from sparseopt_jax.models.export.folded import apply_folded
from sparseopt_jax.settings import as_bool


def to_saved_model(
    folder: str | os.PathLike[str],
    model: checked.Model,
    variables: Mapping[str, Any],
    input_shape: Sequence[int],
) -> None:
    """Write the model's inference as a SavedModel of TensorFlow, for batches of any size.

    ``tf.saved_model.load(folder)`` has the function ``predict`` and the same as its default
    signature. It computes in float32, with batch normalisation folded into kernels and biases, and
    stores zeros as all other weights. Needs TensorFlow.

    Args:
      folder: to write; what else is in it stays there.
      model: an `MLP` or `ResNet`; with another ``dtype`` than float32, results differ by that.
      variables: ``params`` and ``batch_stats``, as ``model.init`` returns them.
      input_shape: of one example, without the batch, such as ``(224, 224, 3)``. The function takes
        ``x``, float32 of shape ``(batch, *input_shape)``, and gives ``(batch, num_classes)``.

    Raises:
      ModuleNotFoundError: TensorFlow is not installed.
      TypeError: ``model`` is not of this library, or ``input_shape`` is no shape.
      ValueError: ``variables`` are not those of the model for such examples.
      OSError: the folder cannot be written.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparseopt_jax import models
      >>> from sparseopt_jax.models import export
      >>> model = models.MLP(features=(8,), num_classes=3)
      >>> variables = jax.jit(model.init)(jax.random.key(0), jnp.ones((2, 4)))
      >>> export.to_saved_model("served", model, variables, (4,))  # doctest: +SKIP
      >>> served = tf.saved_model.load("served")  # doctest: +SKIP
      >>> logits = served.predict(tf.ones((2, 4)))  # doctest: +SKIP
    """
    module = _module("to_saved_model", model, variables, input_shape)
    tf = importlib.import_module("tensorflow")
    try:
        tf.saved_model.save(module, os.fspath(folder), module.predict.get_concrete_function())
    except tf.errors.OpError as error:  # what TensorFlow has in the place of OSError
        raise OSError(f"folder {os.fspath(folder)!r} cannot be written: {error.message}") from error


def to_tflite(
    model: checked.Model,
    variables: Mapping[str, Any],
    input_shape: Sequence[int],
    *,
    sparse: bool = True,
) -> bytes:
    """The model's inference for LiteRT, which was TensorFlow Lite, in float32.

    Batch normalisation is folded into kernels and biases. Sparse kernels are encoded by their
    active weights: ResNet-50 takes 7.4 MB at ERK 0.95, 102.1 dense, with the same results.
    On x86 LiteRT computes with dense ones, so its speed is the same. Needs TensorFlow.

    Args:
      model: an `MLP` or `ResNet`; with another ``dtype`` than float32, results differ by that.
      variables: ``params`` and ``batch_stats``, as ``model.init`` returns them.
      input_shape: of one example, without the batch, such as ``(224, 224, 3)``.
      sparse: whether to encode kernels so; LiteRT's converter chooses which.

    Returns:
      The file. Its input is float32 of shape ``(1, *input_shape)``, for other batches after
      ``resize_tensor_input``, its output ``(batch, num_classes)``.

    Raises:
      ModuleNotFoundError: TensorFlow is not installed.
      TypeError: ``model`` is not of this library, ``input_shape`` is no shape, ``sparse`` no bool.
      ValueError: ``variables`` are not those of the model for such examples.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparseopt_jax import models
      >>> from sparseopt_jax.models import export
      >>> model = models.MLP(features=(8,), num_classes=3)
      >>> variables = jax.jit(model.init)(jax.random.key(0), jnp.ones((2, 4)))
      >>> content = export.to_tflite(model, variables, (4,))  # doctest: +SKIP
    """
    encoded = as_bool("sparse", sparse)
    module = _module("to_tflite", model, variables, input_shape)
    lite = importlib.import_module("tensorflow").lite
    function = module.predict.get_concrete_function()
    converter = lite.TFLiteConverter.from_concrete_functions([function], module)
    if encoded:
        converter.optimizations = [lite.Optimize.EXPERIMENTAL_SPARSITY]
    return bytes(converter.convert())


def _module(
    caller: str, model: checked.Model, variables: Mapping[str, Any], input_shape: Sequence[int]
) -> Any:
    """A ``tf.Module`` with the model's inference as its function ``predict``."""
    checked.check_model(model)
    shape = checked.checked_shape(input_shape)
    leaves = checked.as_float32(checked.checked_variables(model, variables, shape))
    try:
        tf = importlib.import_module("tensorflow")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{caller} needs TensorFlow, which is not installed; pip install"
            " 'tensorflow>=2.18,<3' brings it",
            name="tensorflow",
        ) from error

    operations, module = _Operations(tf), tf.Module()

    def predict(x: Any) -> Any:
        return apply_folded(model, leaves, x, operations)

    signature = [tf.TensorSpec((None, *shape), tf.float32, name="x")]
    module.predict = tf.function(predict, input_signature=signature, autograph=False)
    module.predict.get_concrete_function()  # makes the arrays
    module.arrays = [*operations.arrays.values()]  # what a module has is saved with it
    return module


class _Operations:
    """See `folded.Operations`; images are (batch, height, width, channels)."""

    def __init__(self, tf: Any) -> None:
        self._tf = tf
        self.arrays: dict[str, Any] = {}

    def conv(self, x: Any, name: str, kernel: np.ndarray, bias: np.ndarray, stride: int) -> Any:
        padding = "SAME"  # which pads by half of the kernel where the stride is 1
        if stride != 1:
            x, padding = self._padded(x, kernel.shape[0] // 2), "VALID"
        y = self._tf.nn.conv2d(x, self._array(f"{name}/kernel", kernel), stride, padding)
        return y + self._array(f"{name}/bias", bias)

    def relu(self, x: Any) -> Any:
        return self._tf.nn.relu(x)

    def max_pool(self, x: Any) -> Any:
        return self._tf.nn.max_pool2d(self._padded(x, 1), 3, 2, "VALID")

    def subsample_and_pad(self, x: Any, stride: int, c_in: int, c_out: int) -> Any:
        x = x[:, ::stride, ::stride, :c_out]
        return self._tf.pad(x, [[0, 0], [0, 0], [0, 0], [0, max(c_out - c_in, 0)]])

    def add(self, x: Any, y: Any) -> Any:
        return x + y

    def mean(self, x: Any) -> Any:
        return self._tf.reduce_mean(x, (1, 2))

    def flatten(self, x: Any) -> Any:
        return self._tf.reshape(x, (-1, int(np.prod(x.shape[1:]))))

    def dense(self, x: Any, name: str, kernel: np.ndarray, bias: np.ndarray) -> Any:
        y = self._tf.matmul(x, self._array(f"{name}/kernel", kernel))
        return y + self._array(f"{name}/bias", bias)

    def layer_norm(
        self, x: Any, name: str, scale: np.ndarray, bias: np.ndarray, epsilon: float
    ) -> Any:
        mean, var = self._tf.nn.moments(x, [-1], keepdims=True)
        x = (x - mean) * self._tf.math.rsqrt(var + epsilon)
        return x * self._array(f"{name}/scale", scale) + self._array(f"{name}/bias", bias)

    def _array(self, name: str, array: np.ndarray) -> Any:
        """A variable: a constant would be stored once for each function that reads it."""
        if name not in self.arrays:
            with self._tf.init_scope():
                self.arrays[name] = self._tf.Variable(array, trainable=False, name=name)
        return self.arrays[name]

    def _padded(self, x: Any, size: int) -> Any:
        """By zeros on all sides."""
        return self._tf.pad(x, [[0, 0], [size, size], [size, size], [0, 0]])
