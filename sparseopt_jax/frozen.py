"""Which leaves an optimizer never moves by their gradient, found by tracing it.

``optax.set_to_zero`` in a partition, ``optax.freeze`` and the like give some leaves updates of
zero, whatever the gradient is. A topology update would take weights from such a layer and give it
ones that stay at 0, so these layers keep their topology. The optimizer is not run for it: its
``update`` is traced, and each value in the trace is known to be zero, or to derive from the
gradients of some leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from sparseopt_jax.trees import path_str

PyTree: TypeAlias = Any
_Jaxpr: TypeAlias = Any  # jax.extend.core.Jaxpr; importing that would import Pallas too.

# What a value derives from: the numbers of the leaves whose gradients it reads, or None for zeros.
_Origin: TypeAlias = frozenset[int] | None

_NOTHING: frozenset[int] = frozenset()
# Calls of a function on their operands, in their order.
_CALLS = {
    "jit", "pjit", "closed_call", "core_call", "remat", "checkpoint", "custom_jvp_call",
    "custom_vjp_call",
}  # fmt: skip
# Zero where any operand is; where the first one is; where all are.
_ZERO_IF_ANY = {"mul", "and", "dot_general", "conv_general_dilated"}
_ZERO_IF_FIRST = {
    "neg", "sign", "abs", "sqrt", "square", "tanh", "integer_pow", "div", "convert_element_type",
    "reduce_precision", "broadcast_in_dim", "reshape", "squeeze", "transpose", "slice", "rev",
    "dynamic_slice", "reduce_sum", "reduce_max", "reduce_min", "copy", "real", "imag",
    "sharding_constraint", "reshard",
}  # fmt: skip
_ZERO_IF_ALL = {"add", "add_any", "sub", "max", "min", "concatenate", "or"}


def frozen_leaves(update: Callable[[PyTree], PyTree], grads: PyTree) -> frozenset[str]:
    """Paths of the leaves whose updates are zero, or do not derive from their own gradient.

    Args:
      update: from gradients to updates of the same structure; it is traced, not run.
      grads: arrays or shapes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    traced = jax.make_jaxpr(update)(grads)
    origins = _origins(traced.jaxpr, traced.consts, [frozenset({i}) for i in range(len(leaves))])
    return frozenset(
        path_str(path)
        for i, ((path, _), origin) in enumerate(zip(leaves, origins, strict=True))
        if origin is None or i not in origin
    )


def _origins(jaxpr: _Jaxpr, consts: Sequence[Any], inputs: Sequence[_Origin]) -> list[_Origin]:
    known: dict[Any, _Origin] = dict(zip(jaxpr.invars, inputs, strict=True))
    known.update((var, _of_constant(c)) for var, c in zip(jaxpr.constvars, consts, strict=True))

    def read(atom: Any) -> _Origin:
        return _of_constant(atom.val) if hasattr(atom, "val") else known[atom]

    for equation in jaxpr.eqns:
        found = _of_equation(equation, [read(atom) for atom in equation.invars])
        known.update(zip(equation.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _of_constant(value: Any) -> _Origin:
    if isinstance(value, jax.core.Tracer) or np.size(value) != 1:
        return _NOTHING
    return None if np.all(np.asarray(value) == 0) else _NOTHING


def _of_equation(equation: Any, operands: list[_Origin]) -> list[_Origin]:
    name, options = equation.primitive.name, equation.params
    if name == "cond":
        predicate, *rest = operands
        ways = [_origins(branch.jaxpr, branch.consts, rest) for branch in options["branches"]]
        return [_joined([predicate], list(way)) for way in zip(*ways, strict=True)]
    body = options.get("jaxpr", options.get("call_jaxpr"))
    if name in _CALLS and body is not None:
        inner, consts = (body.jaxpr, body.consts) if hasattr(body, "consts") else (body, ())
        if len(inner.invars) == len(operands):
            return _origins(inner, consts, operands)
    if name == "select_n":
        return [_joined(operands[:1], operands[1:])]
    is_zero = (
        (name in _ZERO_IF_ANY and any(o is None for o in operands))
        or (name in _ZERO_IF_FIRST and operands[0] is None)
        or (name in _ZERO_IF_ALL and all(o is None for o in operands))
    )
    return [None if is_zero else _joined(operands, [_NOTHING])] * len(equation.outvars)


def _joined(choosers: list[_Origin], values: list[_Origin]) -> _Origin:
    """Zero where all ``values`` are; else what they and what chooses among them derive from."""
    if all(origin is None for origin in values):
        return None
    return _NOTHING.union(*(origin for origin in [*choosers, *values] if origin is not None))
