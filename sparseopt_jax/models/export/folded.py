"""A model as a row of plain operations: what formats that are no programs of JAX are written from.

Batch normalisation is folded into the kernels and biases before it, which keeps zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import numpy as np

from sparseopt_jax.models.export.checked import Model
from sparseopt_jax.models.mlp import MLP
from sparseopt_jax.models.resnet import ResNet

_EPSILON = 1e-5  # of all normalisations of the models

T = TypeVar("T")


class Operations(Protocol[T]):
    """What a format has to offer; images are as its own operations have them.

    Kernels are float32 of shape (height, width, in, out) or (in, out), all other arrays of shape
    (channels,). Names are those of the model's modules.
    """

    def conv(self, x: T, name: str, kernel: np.ndarray, bias: np.ndarray, stride: int) -> T:
        """A convolution, padded by half of the kernel on all sides."""

    def relu(self, x: T) -> T:
        """What is positive."""

    def max_pool(self, x: T) -> T:
        """Of 3x3 with stride 2 and a padding of 1, of x that is nowhere negative."""

    def subsample_and_pad(self, x: T, stride: int, c_in: int, c_out: int) -> T:
        """Every stride-th pixel, with channels of zeros appended or the last ones dropped."""

    def add(self, x: T, y: T) -> T:
        """The sum."""

    def mean(self, x: T) -> T:
        """Over height and width."""

    def flatten(self, x: T) -> T:
        """All axes but the first as one."""

    def dense(self, x: T, name: str, kernel: np.ndarray, bias: np.ndarray) -> T:
        """The product with a kernel, and a bias."""

    def layer_norm(self, x: T, name: str, scale: np.ndarray, bias: np.ndarray, epsilon: float) -> T:
        """Layer normalisation over the last axis."""


def apply_folded(
    model: Model, leaves: Mapping[str, np.ndarray], x: T, operations: Operations[T]
) -> T:
    """The logits of x, in evaluation.

    Args:
      model: an MLP or ResNet.
      leaves: float32 by path, as `checked.checked_variables` has found them to fit.
      x: examples, (batch, ...) or (batch, height, width, channels).
      operations: what to compute or to write down.
    """
    if isinstance(model, MLP):
        return _mlp(model, leaves, x, operations)
    return _ResNet(leaves, operations).logits(model, x)


def _mlp(model: MLP, leaves: Mapping[str, np.ndarray], x: T, operations: Operations[T]) -> T:
    x = operations.flatten(x)
    for i in range(len(model.features)):
        norm = f"norm{i}" if model.norm == "batch" else None
        x = operations.dense(x, f"dense{i}", *_kernel_and_bias(leaves, f"dense{i}", norm))
        if model.norm == "layer":
            scale, bias = (leaves[f"params/norm{i}/{name}"] for name in ("scale", "bias"))
            x = operations.layer_norm(x, f"norm{i}", scale, bias, _EPSILON)
        x = operations.relu(x)
    return operations.dense(x, "head", *_kernel_and_bias(leaves, "head", None))


def _kernel_and_bias(
    leaves: Mapping[str, np.ndarray], layer: str, norm: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Of a layer with the batch normalisation that follows it."""
    kernel = leaves[f"params/{layer}/kernel"]
    bias = leaves.get(f"params/{layer}/bias", np.zeros(kernel.shape[-1:], np.float32))
    if norm is None:
        return kernel, bias
    scale, shift, mean, var = (
        leaves[f"{name}"].astype(np.float64)
        for name in (
            f"params/{norm}/scale",
            f"params/{norm}/bias",
            f"batch_stats/{norm}/mean",
            f"batch_stats/{norm}/var",
        )
    )
    factor = scale / np.sqrt(var + _EPSILON)
    return (kernel * factor).astype(np.float32), ((bias - mean) * factor + shift).astype(np.float32)


class _ResNet:
    def __init__(self, leaves: Mapping[str, np.ndarray], operations: Operations[Any]) -> None:
        self._leaves = leaves
        self._operations = operations

    def logits(self, model: ResNet, x: Any) -> Any:
        do, large = self._operations, model.stem == "conv7x7_pool"
        x, channels = self._conv_bn(x, "conv_stem", "bn_stem", 2 if large else 1)
        x = do.relu(x)
        if large:
            x = do.max_pool(x)
        for stage, blocks in enumerate(model.stage_sizes, start=1):
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                x, channels = self._block(model, f"stage{stage}_block{block}", x, channels, stride)
        return do.dense(do.mean(x), "head", *_kernel_and_bias(self._leaves, "head", None))

    def _block(self, model: ResNet, name: str, x: Any, c_in: int, stride: int) -> tuple[Any, int]:
        strides = [1, stride, 1] if model.bottleneck else [stride, 1]
        y, c_out = x, c_in
        for i, each in enumerate(strides, start=1):
            y, c_out = self._conv_bn(y, f"{name}/conv{i}", f"{name}/bn{i}", each)
            if i < len(strides):
                y = self._operations.relu(y)
        if f"params/{name}/conv_shortcut/kernel" in self._leaves:
            x, _ = self._conv_bn(x, f"{name}/conv_shortcut", f"{name}/bn_shortcut", stride)
        elif stride != 1 or c_in != c_out:
            x = self._operations.subsample_and_pad(x, stride, c_in, c_out)
        return self._operations.relu(self._operations.add(x, y)), c_out

    def _conv_bn(self, x: Any, conv: str, norm: str, stride: int) -> tuple[Any, int]:
        kernel, bias = _kernel_and_bias(self._leaves, conv, norm)
        return self._operations.conv(x, conv, kernel, bias, stride), kernel.shape[-1]
