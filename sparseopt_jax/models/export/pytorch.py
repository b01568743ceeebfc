"""PyTorch: the state dict of a model, as arrays of NumPy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparseopt_jax.models.export import checked
from sparseopt_jax.models.mlp import MLP
from sparseopt_jax.trees import named_leaves, unboxed

# Modules of our ResNets by the names of torchvision's, which count stages from 1 and blocks from 0
# as we do.
_TORCHVISION = (
    (r"conv_stem", r"conv1"),
    (r"bn_stem", r"bn1"),
    (r"head", r"fc"),
    (r"stage(\d+)_block(\d+)/conv_shortcut", r"layer\1.\2.downsample.0"),
    (r"stage(\d+)_block(\d+)/bn_shortcut", r"layer\1.\2.downsample.1"),
    (r"stage(\d+)_block(\d+)/(conv\d|bn\d)", r"layer\1.\2.\3"),
)
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def to_pytorch(model: checked.Model, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The model's variables under the names and in the layouts of PyTorch.

    Those of a `ResNet` have torchvision's names. ``ResNet50()`` and ``ResNet18()`` of width 1 are
    torchvision's ``resnet50`` and ``resnet18``, with strides and padding at the same places, and
    load as they are::

        state = {name: torch.from_numpy(array) for name, array in state_dict.items()}
        torchvision.models.resnet50().load_state_dict(state)

    Other ResNets need a module of their shape: the small ones have a 3x3 ``conv1`` of stride 1, no
    ``maxpool`` and three ``layer``s. PyTorch's images are (batch, channels, height, width).

    Modules of an `MLP` keep their names, as in ``dense0.weight``; its inputs are flattened in the
    order height, width, channels.

    Args:
      model: an `MLP` or `ResNet`.
      variables: ``params`` and ``batch_stats``, as ``model.init`` returns them.

    Returns:
      float32 arrays by name: kernels of convolutions (out, in, height, width), of dense layers
      (out, in); of batch normalisation ``weight``, ``bias``, ``running_mean``, ``running_var`` and
      ``num_batches_tracked``, an int64 0, which counts for nothing unless its momentum is None.
      Their running variance is the biased one, which PyTorch's training takes without bias.

    Raises:
      TypeError: ``model`` is not of this library.
      ValueError: ``variables`` are not those of the model.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparseopt_jax import models
      >>> from sparseopt_jax.models import export
      >>> model = models.ResNet8(num_classes=3, base_channels=2)
      >>> variables = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
      >>> state = export.to_pytorch(model, variables)
      >>> state["layer2.0.downsample.0.weight"].shape, state["fc.weight"].shape
      ((4, 2, 3, 3), (3, 8))
    """
    checked.check_model(model)
    shape = _input_shape(model, variables)
    leaves = checked.as_float32(checked.checked_variables(model, variables, shape))
    state: dict[str, np.ndarray] = {}
    for path, leaf in leaves.items():
        _, module, name = re.fullmatch(r"(\w+)/(.*)/(\w+)", path).groups()  # type: ignore[union-attr]
        named = module if isinstance(model, MLP) else _torchvision(module)
        if name == "kernel":
            # Output channels come first there, then input channels.
            leaf = np.ascontiguousarray(np.moveaxis(leaf, (-1, -2), (0, 1)))
        state[f"{named}.{_LEAVES.get(name, name)}"] = leaf
        if name == "var":
            state[f"{named}.num_batches_tracked"] = np.zeros((), np.int64)
    return state


def _torchvision(module: str) -> str:
    """The name of a module in torchvision's ResNets."""
    for pattern, name in _TORCHVISION:
        if found := re.fullmatch(pattern, module):
            return found.expand(name)
    raise AssertionError(module)


def _input_shape(model: checked.Model, variables: Any) -> tuple[int, ...]:
    """Of examples that the first kernel takes."""
    first = ("dense0" if model.features else "head") if isinstance(model, MLP) else "conv_stem"
    leaves = named_leaves(unboxed(dict(variables))) if isinstance(variables, Mapping) else {}
    kernel = np.shape(leaves.get(f"params/{first}/kernel", np.zeros((1, 1))))
    channels = kernel[-2:-1] or (1,)
    return channels if isinstance(model, MLP) else (32, 32, *channels)
