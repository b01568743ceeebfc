"""StableHLO: the program of a model in bytes that JAX and other XLA runtimes load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export  # not brought in by jax itself

from sparseopt_jax.models.export import checked
from sparseopt_jax.settings import as_bool
from sparseopt_jax.trees import unboxed

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def to_stablehlo(
    model: checked.Model,
    variables: Mapping[str, Any],
    input_shape: Sequence[int],
    *,
    constants: bool = True,
    platforms: Sequence[str] = _PLATFORMS,
) -> bytes:
    """The model's inference as StableHLO, serialised by ``jax.export``, for batches of any size.

    Whoever runs it needs neither this library nor Flax:
    ``jax.export.deserialize(content).call(x)``. It computes what ``jax.jit(model.apply)`` does, bit
    for bit on the same device where the variables are constants of both or of neither.

    Zeros are stored as all other weights are. To keep the weights apart, in a file of
    ``sx.save_compact``, take ``constants=False``: the program alone takes 0.1 MB for
    a ResNet-50.

    Args:
      model: an `MLP` or `ResNet`.
      variables: ``params`` and ``batch_stats``, as ``model.init`` returns them.
      input_shape: of one example, without the batch, such as ``(224, 224, 3)``.
      constants: have the variables in the program; otherwise they are its first argument.
      platforms: on which the program is to run, of ``"cpu"``, ``"cuda"``, ``"rocm"`` and ``"tpu"``.

    Returns:
      The serialised program. Its last argument is ``x``, float32 of shape
      ``(batch, *input_shape)``, its result float32 logits of shape ``(batch, num_classes)``.

    Raises:
      TypeError: ``model`` is not of this library, or ``input_shape`` is no shape,
        ``constants`` no bool.
      ValueError: ``variables`` are not those of the model for such examples, or a
        platform is none of those.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparseopt_jax import models
      >>> from sparseopt_jax.models import export
      >>> model, x = models.MLP(features=(8,), num_classes=3), jnp.ones((2, 4))
      >>> variables = jax.jit(model.init)(jax.random.key(0), x)
      >>> content = export.to_stablehlo(model, variables, input_shape=(4,))
      >>> logits = jax.export.deserialize(content).call(x)
      >>> bool(jnp.allclose(logits, model.apply(variables, x), rtol=1e-5))
      True
    """
    checked.check_model(model)
    checked.checked_variables(model, variables, input_shape)
    arrays = unboxed(dict(variables))

    def forward(variables: Any, x: jax.Array) -> Any:
        return model.apply(variables, x)

    chosen = (platforms,) if isinstance(platforms, str) else tuple(platforms)
    if not chosen or not set(chosen) <= set(_PLATFORMS):
        raise ValueError(f"platforms must be some of {', '.join(_PLATFORMS)}, got {platforms!r}")
    (batch,) = jax.export.symbolic_shape("batch")
    x = checked.example(batch, input_shape)
    if as_bool("constants", constants):
        program = jax.jit(lambda x: forward(arrays, x))
        exported = jax.export.export(program, platforms=chosen)(x)
    else:
        like = jax.eval_shape(lambda leaves: leaves, arrays)
        exported = jax.export.export(jax.jit(forward), platforms=chosen)(like, x)
    return bytes(exported.serialize())
