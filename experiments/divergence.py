"""Where a run that diverged first had a value that is not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments import metrics
from experiments.checkpoint import all_finite
from experiments.functions import State
from experiments.programs import MethodPrograms
from experiments.stepping import Stepper

_NAMED = 3
"""How many layers a message names."""


class DivergedError(RuntimeError):
    """The training loss, or a weight, is no longer a finite number."""


def locate(programs: MethodPrograms, stepper: Stepper, state: State, last_step: int) -> str:
    """Takes steps again, one by one, up to the first value that is not finite.

    Args:
      programs: the compiled programs of the method.
      stepper: where `state` is.
      state: one that is finite; its memory is used again.
      last_step: the step after which something is known not to be finite.

    Returns:
      What it was, of which layer, at which step; the rest of a sentence.
    """
    while stepper.step < last_step:
        # The step uses the state's memory again, and what led to it is to be looked at.
        before = jax.tree.map(jnp.copy, state)
        state, (measured,) = stepper.advance(state, 1, single=True)
        finite = all(jnp.isfinite(value).all() for value in measured.values())
        if not finite or not all_finite((state.params, state.batch_stats)):
            return _explain(programs, before, state, stepper)
    return (
        f"taken again, the steps up to {last_step} are finite: the cause is not in the run itself"
    )


def _explain(programs: MethodPrograms, before: State, after: State, stepper: Stepper) -> str:
    at = f"first at step {stepper.step}, in"
    images, labels = stepper.last_batch()
    outputs = _outputs_finite(programs, before, images, labels)
    bad = [name for name, finite in outputs.items() if not finite]
    if bad:
        return f"{at} the output of {bad[0]}"
    loss = programs.functions.loss
    arguments = before.params, before.batch_stats, images, labels
    if not jnp.isfinite(jax.jit(loss)(*arguments)[0]):
        return f"{at} the loss of finite outputs"
    gradient = jax.jit(jax.grad(loss, has_aux=True))(*arguments)[0]
    for what, tree in (
        ("the gradient of", gradient),
        ("the update of", after.params),
        ("the running statistics of", after.batch_stats),
    ):
        names = [name for name, leaf in metrics.path_leaves(tree).items() if not all_finite(leaf)]
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            return f"{at} {what} {', '.join(names[:_NAMED])}{more}"
    return f"{at} the gradient's norm, which overflows"


def _outputs_finite(
    programs: MethodPrograms, state: State, images: Any, labels: Any
) -> Mapping[str, bool]:
    """Whether each module's output is finite, in the order in which the model computes them."""
    order: list[str] = []

    def forward(*arguments: Any) -> list[jax.Array]:
        finite: list[jax.Array] = []
        order.clear()

        def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            output = call(*args, **kwargs)
            if context.method_name == "__call__":
                order.append("/".join(context.module.path) or "the model")
                finite.append(jnp.isfinite(output).all())
            return output

        with nn.intercept_methods(watch):
            programs.functions.loss(*arguments)
        return finite

    values = jax.device_get(jax.jit(forward)(state.params, state.batch_stats, images, labels))
    return {name: bool(value) for name, value in zip(order, values, strict=True)}
