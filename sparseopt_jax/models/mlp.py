"""A multilayer perceptron with batch, layer or no normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer

from sparseopt_jax.dead_neurons import Chain, Layer
from sparseopt_jax.models import layers
from sparseopt_jax.settings import as_int

_NORMS = ("batch", "layer", "none")


class MLP(nn.Module):
    """Hidden layers of dense, normalisation and ReLU, and a dense head.

    Parameters are ``dense0/kernel``, ``norm0/scale``, ``norm0/bias``, ``dense1/kernel``, and so
    on, and ``head/kernel`` and ``head/bias``. A hidden layer that is normalised has no bias of its
    own, since the normalisation adds one; with ``norm="none"`` it has ``dense0/bias``.

    Call it with ``x``, an array of shape ``(batch, ...)`` whose other axes are flattened, and
    ``train``, a Python bool: with ``norm="batch"``, whether to normalise by the statistics of the
    batch and to update ``batch_stats``, which must then be mutable. The result is a float32 array
    of logits of shape ``(batch, num_classes)``. An ``x`` of rank below 2 raises ValueError, and so
    does a training batch that ``bn_groups`` does not divide.

    Attributes:
      features: number of units of each hidden layer; empty for a linear classifier.
      num_classes: number of logits.
      norm: ``"batch"``, ``"layer"`` or ``"none"``.
      dtype: dtype of the hidden layers' computation: float16, bfloat16 or float32. Statistics and
        the head are computed in float32 always.
      param_dtype: dtype of the parameters, one of the same three.
      kernel_init: initializer of all kernels, the head's included; He-normal by default.
      bn_groups: with ``norm="batch"``, number of parts of a training batch that are each normalised
        by their own statistics; see `ResNet`.

    Raises:
      TypeError: ``features``, ``num_classes`` or ``bn_groups`` are not integers, or
        ``kernel_init`` is not callable.
      ValueError: one of them is below 1, ``norm`` or a dtype is not one of those above, or
        ``bn_groups`` is not 1 without batch normalisation.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sparseopt_jax import models
      >>> model = models.MLP(features=(32,), num_classes=10)
      >>> x = jnp.ones((4, 8, 8, 1))
      >>> variables = jax.jit(model.init)(jax.random.key(0), x)
      >>> variables["params"]["dense0"]["kernel"].shape
      (64, 32)
      >>> logits, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
      >>> logits.shape, sorted(new["batch_stats"])
      ((4, 10), ['norm0'])
    """

    features: Sequence[int] = (512,)
    num_classes: int = 10
    norm: str = "batch"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = layers.he_normal
    bn_groups: int = 1

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if not isinstance(self.features, Sequence) or isinstance(self.features, str):
            raise TypeError(f"features must be a sequence of ints, got {self.features!r}")
        # A list would make the module unhashable.
        self.features = tuple(
            as_int(f"features[{i}]", units, at_least=1) for i, units in enumerate(self.features)
        )
        layers.check_choice("norm", self.norm, _NORMS)
        self.bn_groups = as_int("bn_groups", self.bn_groups, at_least=1)
        if self.bn_groups > 1 and self.norm != "batch":
            raise ValueError(
                f"bn_groups must be 1 where norm is not 'batch'; got bn_groups={self.bn_groups}"
                f" and norm={self.norm!r}"
            )
        self.num_classes = as_int("num_classes", self.num_classes, at_least=1)
        layers.check_common(self.dtype, self.param_dtype, self.kernel_init)
        super().__post_init__()

    def neuron_chains(self) -> tuple[Chain, ...]:
        """All layers in a row, for ``sx.remove_dead_neurons``.

        Raises:
          ValueError: layer normalisation computes with all neurons, so that none can go.
        """
        if self.norm == "layer":
            raise ValueError(
                "model has norm='layer', whose mean and variance are over all neurons of a layer:"
                " without one of them the others would have other outputs"
            )
        norms = [f"norm{i}" if self.norm == "batch" else None for i in range(len(self.features))]
        hidden = (Layer(f"dense{i}", norm) for i, norm in enumerate(norms))
        return ((*hidden, Layer("head", None)),)

    def with_inner_widths(self, widths: Sequence[Sequence[int]]) -> MLP:
        """The same model with other ``features``, the only item of ``widths``."""
        (features,) = widths
        return self.clone(features=tuple(features))

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """The logits of a batch."""
        if x.ndim < 2:
            raise ValueError(f"x must have shape (batch, ...), got {x.shape}")
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = jnp.asarray(x, self.dtype).reshape(x.shape[0], math.prod(x.shape[1:]))
        for i, units in enumerate(self.features):
            x = nn.Dense(
                units,
                use_bias=self.norm == "none",
                kernel_init=self.kernel_init,
                name=f"dense{i}",
                **dtypes,
            )(x)
            if self.norm == "batch":
                x = layers.batch_norm(
                    x, train=train, name=f"norm{i}", groups=self.bn_groups, **dtypes
                )
            elif self.norm == "layer":
                x = layers.layer_norm(x, name=f"norm{i}", **dtypes)
            x = nn.relu(x)
        return nn.Dense(
            self.num_classes,
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            name="head",
        )(x)
