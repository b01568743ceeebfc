"""The models of `sparseopt_jax.models` in the formats of others, for inference."""

from sparseopt_jax.models.export.onnx import to_onnx as to_onnx
from sparseopt_jax.models.export.pytorch import to_pytorch as to_pytorch
from sparseopt_jax.models.export.stablehlo import to_stablehlo as to_stablehlo
from sparseopt_jax.models.export.tensorflow import to_saved_model as to_saved_model
from sparseopt_jax.models.export.tensorflow import to_tflite as to_tflite
