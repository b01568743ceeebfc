"""What all exports check of their arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt_jax.models.mlp import MLP
from sparseopt_jax.models.resnet import ResNet
from sparseopt_jax.settings import as_int
from sparseopt_jax.trees import named_leaves, unboxed

Model: TypeAlias = MLP | ResNet


def checked_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one example; raises TypeError or ValueError."""
    if isinstance(input_shape, str) or not isinstance(input_shape, Sequence):
        raise TypeError(
            "input_shape must be the shape of one example, such as (224, 224, 3), got"
            f" {input_shape!r}"
        )
    return tuple(
        as_int(f"input_shape[{i}]", size, at_least=1) for i, size in enumerate(input_shape)
    )


def check_model(model: Any) -> None:
    """Raises TypeError unless it is one of this library."""
    if not isinstance(model, Model):
        raise TypeError(
            "model must be an MLP or ResNet of sparseopt_jax.models, got"
            f" {type(model).__module__}.{type(model).__name__}"
        )


def example(batch: Any, input_shape: Sequence[int]) -> jax.ShapeDtypeStruct:
    """What stands for a batch of examples; its size may be symbolic."""
    shape = (batch, *checked_shape(input_shape))
    return jax.ShapeDtypeStruct(shape, jnp.float32)  # type: ignore[no-untyped-call]


def checked_variables(
    model: Model, variables: Mapping[str, Any], input_shape: Sequence[int]
) -> dict[str, Any]:
    """The leaves by path, once they are found to be those of the model for such examples.

    Raises:
      TypeError: they are no mapping, or traced.
      ValueError: paths or shapes are others, or the model takes no examples of that shape.
    """
    shape = checked_shape(input_shape)
    if isinstance(model, ResNet) and len(shape) != 3:
        raise ValueError(f"input_shape must be (height, width, channels), got {shape}")
    if not shape:
        raise ValueError("input_shape must have at least one axis, got ()")
    expected = named_leaves(jax.eval_shape(model.init, jax.random.key(0), example(1, shape)))
    if not isinstance(variables, Mapping):
        raise TypeError(
            "variables must be what model.init returns, a mapping with 'params', got"
            f" {type(variables).__name__}"
        )
    found = named_leaves(unboxed(dict(variables)))
    for path in (*expected, *found):
        if path not in found:
            raise ValueError(f"variables have no {path!r}, which the model has")
        if path not in expected:
            raise ValueError(f"variables have {path!r}, which the model does not have")
        if np.shape(found[path]) != expected[path].shape:
            raise ValueError(
                f"variables have {path!r} of shape {np.shape(found[path])}; the model has"
                f" {expected[path].shape} there, for input_shape={shape}"
            )
        if isinstance(found[path], jax.core.Tracer):
            raise TypeError(
                f"variables have {path!r} traced, and an export writes their values: call it"
                " outside of jax.jit and other transformations"
            )
    return found


def as_float32(leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays of NumPy; half precision is exact in float32."""
    return {path: np.asarray(leaf).astype(np.float32) for path, leaf in leaves.items()}
