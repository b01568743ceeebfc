"""The models of `sparseopt_jax.models` in the formats of others, for inference."""

from sparseopt_jax.models.export.onnx import to_onnx as to_onnx
from sparseopt_jax.models.export.pytorch import to_pytorch as to_pytorch
from sparseopt_jax.models.export.stablehlo import to_stablehlo as to_stablehlo
