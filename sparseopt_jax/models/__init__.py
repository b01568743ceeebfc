"""Flax Linen models: residual networks and a multilayer perceptron. Needs ``flax``."""

import importlib.util

# Ahead of the imports below, whose own error would name flax and not the way to get it.
if importlib.util.find_spec("flax") is None:
    raise ModuleNotFoundError(
        "sparseopt_jax.models needs flax, which is not installed;"
        " pip install 'flax>=0.12.8,<0.13' brings it",
        name="flax",
    )

from sparseopt_jax.models.layers import he_normal as he_normal
from sparseopt_jax.models.mlp import MLP as MLP
from sparseopt_jax.models.named_resnets import ResNet8 as ResNet8
from sparseopt_jax.models.named_resnets import ResNet18 as ResNet18
from sparseopt_jax.models.named_resnets import ResNet20 as ResNet20
from sparseopt_jax.models.named_resnets import ResNet50 as ResNet50
from sparseopt_jax.models.named_resnets import SmallResNet as SmallResNet
from sparseopt_jax.models.resnet import ResNet as ResNet
