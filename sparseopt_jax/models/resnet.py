"""Residual networks of any depth and width, of basic blocks or bottlenecks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer

from sparseopt_jax.dead_neurons import Chain, Layer
from sparseopt_jax.models import layers
from sparseopt_jax.models.convolution import convolution
from sparseopt_jax.settings import as_bool, as_int

_SHORTCUTS = ("conv3x3", "conv1x1", "identity")
_STEMS = ("conv3x3", "conv7x7_pool")
_EXPANSION = 4  # output channels of a bottleneck block per channel of its 3x3 convolution


def _conv(module: Any, channels: int, kernel: int, stride: int, name: str) -> nn.Conv:
    """A square convolution without bias, of the dtypes and the initializer of ``module``."""
    return nn.Conv(
        channels,
        (kernel, kernel),
        strides=(stride, stride),
        # The same on both sides. "SAME" would put the odd row of an even-sized input at the end
        # where the stride is 2, and weights trained elsewhere would see shifted images.
        padding=kernel // 2,
        use_bias=False,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=module.kernel_init,
        conv_general_dilated_cls=_fast_convolution if module.fast_cpu_convolutions else None,
        name=name,
    )


def _fast_convolution() -> Any:
    """What Flax calls for the function that it then calls."""
    return convolution


class ResidualBlock(nn.Module):
    """A basic or bottleneck block: relu(shortcut(x) + convolutions(x)).

    Parameters are ``conv1/kernel``, ``bn1/scale``, ``bn1/bias``, ``conv2/kernel``, and so on, and
    ``conv_shortcut/kernel``, ``bn_shortcut/scale``, ``bn_shortcut/bias`` where the block changes
    the shape and the shortcut is a convolution.

    Attributes:
      channels: channels of the inner convolutions; a bottleneck block returns four times as many.
      stride: stride of the first 3x3 convolution.
      bottleneck: 1x1, 3x3 and 1x1 convolutions instead of two of 3x3.
      shortcut: see `ResNet`.
      zero_init_residual: see `ResNet`.
      dtype: see `ResNet`.
      param_dtype: see `ResNet`.
      kernel_init: see `ResNet`.
      bn_groups: see `ResNet`.
      inner_channels: outputs of all convolutions but the last; None: ``channels`` each.
      fast_cpu_convolutions: see `ResNet`.
    """

    channels: int
    stride: int = 1
    bottleneck: bool = False
    shortcut: str = "conv1x1"
    zero_init_residual: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = layers.he_normal
    bn_groups: int = 1
    inner_channels: Sequence[int] | None = None
    fast_cpu_convolutions: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (batch, h, w, c) to (batch, ceil(h / stride), ceil(w / stride), c_out)."""
        options: dict[str, Any] = {
            "train": train,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "groups": self.bn_groups,
        }
        inner = self.inner_channels or (self.channels,) * (1 + self.bottleneck)
        if self.bottleneck:
            c_out = _EXPANSION * self.channels
            convs = [(inner[0], 1, 1), (inner[1], 3, self.stride), (c_out, 1, 1)]
        else:
            c_out = self.channels
            convs = [(inner[0], 3, self.stride), (c_out, 3, 1)]

        y = x
        for i, (channels, kernel, stride) in enumerate(convs, start=1):
            last = i == len(convs)
            y = _conv(self, channels, kernel, stride, f"conv{i}")(y)
            zero_scale = last and self.zero_init_residual
            y = layers.batch_norm(y, name=f"bn{i}", zero_scale=zero_scale, **options)
            if not last:
                y = nn.relu(y)

        if self.stride != 1 or x.shape[-1] != c_out:
            if self.shortcut == "identity":
                x = _subsample_and_pad(x, self.stride, c_out)
            else:
                kernel = 3 if self.shortcut == "conv3x3" else 1
                x = _conv(self, c_out, kernel, self.stride, "conv_shortcut")(x)
                x = layers.batch_norm(x, name="bn_shortcut", **options)
        return nn.relu(x + y)


def _subsample_and_pad(x: jax.Array, stride: int, channels: int) -> jax.Array:
    """Every stride-th pixel, with channels of zeros appended; a narrowing drops the last ones."""
    x = x[:, ::stride, ::stride, :channels]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, channels - x.shape[-1])))


class ResNet(nn.Module):
    """A residual network of any depth (He et al., 2016); see the functions below for known ones.

    A stem, stages of residual blocks, global average pooling, and a linear head. Each stage after
    the first halves height and width, by the 3x3 convolution of its first block (ResNet "v1.5"),
    and doubles the channels. Convolutions have no bias and are padded by the same amount on all
    sides; each is followed by batch normalisation with epsilon 1e-5, whose running statistics keep
    0.9 of their value at each step.

    Parameters are ``conv_stem/kernel``, ``bn_stem/scale``, ``bn_stem/bias``, those of the blocks
    as in ``stage1_block0/conv1/kernel`` (see `ResidualBlock`; stages count from 1, blocks from 0),
    ``head/kernel`` and ``head/bias``. The head is the one kernel that no normalisation follows.

    Call it with ``x``, an array of shape ``(batch, height, width, channels)``, and ``train``, a
    Python bool: whether to normalise by the statistics of the batch and to update ``batch_stats``,
    which must then be mutable. The result is a float32 array of logits of shape
    ``(batch, num_classes)``. An ``x`` of another rank raises ValueError, and so does a training
    batch that ``bn_groups`` does not divide.

    Attributes:
      stage_sizes: number of blocks of each stage.
      bottleneck: blocks of 1x1, 3x3 and 1x1 convolutions instead of two of 3x3.
      num_classes: number of logits.
      base_channels: inner channels of the blocks in the first stage, and channels of the stem.
      width: multiplies the channels of all convolutions.
      stem: ``"conv3x3"``, or ``"conv7x7_pool"``: a 7x7 convolution and a 3x3 max pooling, each with
        stride 2.
      shortcut: what a shortcut does where the block changes the shape. ``"conv3x3"`` or
        ``"conv1x1"``: a strided convolution and batch normalisation. ``"identity"``: takes every
        second pixel and appends channels of zeros, without parameters (option A in He et al.,
        2016, section 4.1). Other shortcuts are the input itself.
      zero_init_residual: start with scale 0 in the last batch normalisation of each block, so that
        blocks are their shortcuts at first (Goyal et al., 2017, section 5.1).
      dtype: dtype of the computation: float16, bfloat16 or float32. Statistics, pooling and the
        head are computed in float32 always.
      param_dtype: dtype of the parameters, one of the same three.
      kernel_init: initializer of all kernels, the head's included; He-normal by default.
      bn_groups: in training, batch normalisation cuts the batch into this many parts of consecutive
        examples and normalises each by its own mean and variance; running statistics move towards
        the means of these over the parts. It must divide the batch. 1 takes the whole batch
        together, however it is sharded. With as many parts as devices that share the batch, each
        device normalises its own examples: no pass over the network waits for statistics of other
        devices. One device computes the same with that many, so that a result published with
        statistics of each device can be reproduced on any mesh. The variables and evaluation are
        the same for all values.
      inner_channels: by block, outputs of its convolutions but the last, one in a basic block and
        two in a bottleneck: what ``sx.remove_dead_neurons`` leaves. None: those above.
      fast_cpu_convolutions: on CPUs compute the gradients of kernels, and convolutions whose window
        is larger than their result, as matrix products, which is faster than XLA's convolutions.
        Results are the same up to rounding, and programs for other platforms the same altogether.
        False: XLA's convolutions everywhere.

    Raises:
      TypeError: a number is not an integer, or ``kernel_init`` is not callable.
      ValueError: a number is below 1, or a choice or a dtype is not one of those above.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sparseopt_jax import models
      >>> model = models.ResNet(stage_sizes=(1, 1), num_classes=5, base_channels=4, stem="conv3x3")
      >>> x = jnp.ones((2, 8, 8, 3))
      >>> variables = jax.jit(model.init)(jax.random.key(0), x)
      >>> sorted(variables["params"])
      ['bn_stem', 'conv_stem', 'head', 'stage1_block0', 'stage2_block0']
      >>> variables["params"]["stage2_block0"]["conv1"]["kernel"].shape
      (3, 3, 4, 8)
      >>> @jax.jit
      ... def forward(variables, x):
      ...     return model.apply(variables, x, train=True, mutable=["batch_stats"])
      >>> logits, new = forward(variables, x)
      >>> logits.shape, list(new)
      ((2, 5), ['batch_stats'])
    """

    stage_sizes: Sequence[int]
    bottleneck: bool = False
    num_classes: int = 1000
    base_channels: int = 64
    width: int = 1
    stem: str = "conv7x7_pool"
    shortcut: str = "conv1x1"
    zero_init_residual: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = layers.he_normal
    bn_groups: int = 1
    inner_channels: Sequence[Sequence[int]] | None = None
    fast_cpu_convolutions: bool = True

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if not isinstance(self.stage_sizes, Sequence) or isinstance(self.stage_sizes, str):
            raise TypeError(f"stage_sizes must be a sequence of ints, got {self.stage_sizes!r}")
        if not self.stage_sizes:
            raise ValueError(f"stage_sizes must name at least one stage, got {self.stage_sizes!r}")
        # A list would make the module unhashable.
        self.stage_sizes = tuple(
            as_int(f"stage_sizes[{i}]", size, at_least=1) for i, size in enumerate(self.stage_sizes)
        )
        self.base_channels = as_int("base_channels", self.base_channels, at_least=1)
        self.width = as_int("width", self.width, at_least=1)
        self.bn_groups = as_int("bn_groups", self.bn_groups, at_least=1)
        as_bool("fast_cpu_convolutions", self.fast_cpu_convolutions)
        layers.check_choice("stem", self.stem, _STEMS)
        layers.check_choice("shortcut", self.shortcut, _SHORTCUTS)
        self.num_classes = as_int("num_classes", self.num_classes, at_least=1)
        layers.check_common(self.dtype, self.param_dtype, self.kernel_init)
        if self.inner_channels is not None:
            self.inner_channels = self._checked(self.inner_channels)
        super().__post_init__()

    def _checked(self, inner_channels: Any) -> tuple[tuple[int, ...], ...]:
        blocks, each = sum(self.stage_sizes), 1 + self.bottleneck
        widths = [tuple(block) for block in inner_channels]
        if len(widths) != blocks or any(len(block) != each for block in widths):
            raise ValueError(
                f"inner_channels must have {each} for each of {blocks} blocks, got {widths}"
            )
        return tuple(
            tuple(as_int(f"inner_channels[{i}]", width, at_least=1) for width in block)
            for i, block in enumerate(widths)
        )

    def _blocks(self) -> list[tuple[int, int]]:
        """Stage and block of each block."""
        return [(stage, i) for stage, size in enumerate(self.stage_sizes) for i in range(size)]

    def neuron_chains(self) -> tuple[Chain, ...]:
        """The convolutions of each block, for ``sx.remove_dead_neurons``."""
        names = [f"stage{stage + 1}_block{block}" for stage, block in self._blocks()]
        convs = range(1, 3 + self.bottleneck)
        return tuple(
            tuple(Layer(f"{name}/conv{i}", f"{name}/bn{i}") for i in convs) for name in names
        )

    def with_inner_widths(self, widths: Sequence[Sequence[int]]) -> ResNet:
        """The same model with ``inner_channels`` of ``widths``."""
        return self.clone(inner_channels=tuple(map(tuple, widths)))

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """The logits of a batch of images."""
        if x.ndim != 4:
            raise ValueError(f"x must have shape (batch, height, width, channels), got {x.shape}")
        x = jnp.asarray(x, self.dtype)
        channels = self.base_channels * self.width
        large = self.stem == "conv7x7_pool"
        x = _conv(self, channels, 7 if large else 3, 2 if large else 1, "conv_stem")(x)
        x = nn.relu(
            layers.batch_norm(
                x,
                train=train,
                name="bn_stem",
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                groups=self.bn_groups,
            )
        )
        if large:
            pad = ((1, 1), (1, 1))
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=pad)  # type: ignore[no-untyped-call]
        blocks = self._blocks()
        inner = self.inner_channels or (None,) * len(blocks)
        for (stage, block), inner_channels in zip(blocks, inner, strict=True):
            x = ResidualBlock(
                channels=channels * 2**stage,
                stride=2 if stage > 0 and block == 0 else 1,
                bottleneck=self.bottleneck,
                shortcut=self.shortcut,
                zero_init_residual=self.zero_init_residual,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                bn_groups=self.bn_groups,
                inner_channels=inner_channels,
                fast_cpu_convolutions=self.fast_cpu_convolutions,
                name=f"stage{stage + 1}_block{block}",
            )(x, train)
        x = x.astype(jnp.float32).mean((1, 2))
        return nn.Dense(
            self.num_classes,
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            name="head",
        )(x)
