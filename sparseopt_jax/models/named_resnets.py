"""Residual networks for small images (ResNet-8, 20, ...) and for ImageNet (ResNet-18 and 50)."""

from __future__ import annotations

from typing import Any

from sparseopt_jax.models.resnet import ResNet
from sparseopt_jax.settings import as_int


def SmallResNet(
    depth: int = 20,
    num_classes: int = 10,
    width: int = 1,
    shortcut: str = "conv3x3",
    *,
    base_channels: int = 16,
    **options: Any,
) -> ResNet:
    """The residual network for images of 8x8 to 64x64 pixels (He et al., 2016, section 4.2).

    A 3x3 convolution without pooling, then three stages of ``(depth - 2) / 6`` basic blocks each,
    of 16, 32 and 64 channels times ``width``.

    Args:
      depth: number of convolution and dense layers, those of the shortcuts not counted: 8, 14,
        20, and so on in steps of 6.
      num_classes: number of logits.
      width: multiplies the channels of all convolutions.
      shortcut: ``"conv3x3"``, ``"conv1x1"`` or ``"identity"``; see `ResNet`. He et al. take the
        identity; the usual ResNet-20 of sparse training takes a convolution.
      base_channels: channels of the first stage at width 1.
      **options: ``zero_init_residual``, ``dtype``, ``param_dtype``, ``kernel_init``,
        ``bn_groups`` and ``fast_cpu_convolutions`` of `ResNet`.

    Returns:
      A Flax module; `ResNet` documents its parameters and its call.

    Raises:
      TypeError: ``depth`` is not an integer, an option is unknown; or as `ResNet` does.
      ValueError: ``depth`` is not 6 n + 2 with n at least 1; or as `ResNet` does.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sparseopt_jax import models
      >>> model = models.SmallResNet(depth=14, num_classes=100, shortcut="identity")
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      178356
    """
    depth = as_int("depth", depth, at_least=1)
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth must be 6 n + 2 for n >= 1 (8, 14, 20, 26, ...), got {depth}")
    return ResNet(
        stage_sizes=((depth - 2) // 6,) * 3,
        num_classes=num_classes,
        base_channels=base_channels,
        width=width,
        stem="conv3x3",
        shortcut=shortcut,
        **options,
    )


def ResNet8(
    num_classes: int = 10, width: int = 1, shortcut: str = "conv3x3", **options: Any
) -> ResNet:
    """`SmallResNet` of depth 8, the smallest one; the arguments are the same.

    Example:
      >>> from sparseopt_jax import models
      >>> models.ResNet8(num_classes=10, width=2).stage_sizes
      (1, 1, 1)
    """
    return SmallResNet(8, num_classes, width, shortcut, **options)


def ResNet20(
    num_classes: int = 10, width: int = 1, shortcut: str = "conv3x3", **options: Any
) -> ResNet:
    """`SmallResNet` of depth 20; the arguments are the same.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sparseopt_jax import models
      >>> model = models.ResNet20(num_classes=100, width=4, dtype=jnp.bfloat16)
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
      >>> variables["params"]["stage3_block2"]["conv2"]["kernel"].shape
      (3, 3, 256, 256)
    """
    return SmallResNet(20, num_classes, width, shortcut, **options)


def ResNet18(num_classes: int = 1000, width: int = 1, **options: Any) -> ResNet:
    """ResNet-18 for images of about 224x224 pixels (He et al., 2016, table 1).

    The layers, their padding, and the 11,689,512 parameters at 1,000 classes are torchvision's.

    Args:
      num_classes: number of logits.
      width: multiplies the channels of all convolutions.
      **options: ``base_channels`` (64), ``shortcut`` (``"conv1x1"``), ``zero_init_residual``,
        ``dtype``, ``param_dtype``, ``kernel_init``, ``bn_groups`` and ``fast_cpu_convolutions`` of
        `ResNet`.

    Returns:
      A Flax module; `ResNet` documents its parameters and its call.

    Raises:
      TypeError: an option is unknown; or as `ResNet` does.
      ValueError: as `ResNet` does.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sparseopt_jax import models
      >>> model = models.ResNet18(num_classes=1000)
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 224, 224, 3)))
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      11689512
    """
    return ResNet((2, 2, 2, 2), num_classes=num_classes, width=width, **options)


def ResNet50(num_classes: int = 1000, width: int = 1, **options: Any) -> ResNet:
    """ResNet-50 v1.5 for images of about 224x224 pixels (He et al., 2016, table 1).

    "v1.5": a stage's first stride is that of a 3x3 convolution, not of the 1x1 before it. The
    layers, their padding, and the 25,557,032 parameters at 1,000 classes are torchvision's.

    Args:
      num_classes: number of logits.
      width: multiplies the channels of all convolutions.
      **options: ``base_channels`` (64), ``shortcut`` (``"conv1x1"``), ``zero_init_residual``,
        ``dtype``, ``param_dtype``, ``kernel_init``, ``bn_groups`` and ``fast_cpu_convolutions`` of
        `ResNet`.

    Returns:
      A Flax module; `ResNet` documents its parameters and its call.

    Raises:
      TypeError: an option is unknown; or as `ResNet` does.
      ValueError: as `ResNet` does.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sparseopt_jax import models
      >>> model = models.ResNet50(num_classes=1000)
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 224, 224, 3)))
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      25557032
    """
    return ResNet((3, 4, 6, 3), bottleneck=True, num_classes=num_classes, width=width, **options)
