"""One byte a weight: whether it is active, whether it ever was, and since when.

Bit 0 is set while the weight is active, bit 1 once it has been. The six bits above count the
topology updates since the weight became active, up to 63; they are 0 in inactive weights, and 63
from the start in those that the initial masks make active. Topology updates write the byte, so the
steps between them read a byte a weight and write none.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Array: TypeAlias = jax.Array

OLDEST = 63
"""The largest age in updates that a byte holds; it stands for that many or more."""

_ACTIVE, _EXPLORED, _AGE_SHIFT = 1, 2, 2


def initial(mask: Array) -> Array:
    """The bytes, uint8, of initial masks."""
    return mask.astype(jnp.uint8) * jnp.uint8(_ACTIVE | _EXPLORED | OLDEST << _AGE_SHIFT)


def is_active(activity: Array) -> Array:
    return (activity & _ACTIVE) != 0


def is_explored(activity: Array) -> Array:
    return (activity & _EXPLORED) != 0


def age(activity: Array) -> Array:
    """How many topology updates ago the weight became active, uint8; of active weights."""
    return activity >> _AGE_SHIFT


def is_young(activity: Array) -> Array:
    """Whether the last topology update made the weight active; of active weights."""
    return activity < 1 << _AGE_SHIFT


@jax.jit
def changed(activity: Array, mask: Array, again: Any) -> Array:
    """The bytes after a change of the masks.

    Args:
      activity: uint8, before.
      mask: bool of its shape, the weights that are active now.
      again: bool scalar, whether the masks changed since the last step already. Ages stay then, so
        that what became active since that step is still told from what was active on it.
    """
    step = jnp.where(again, jnp.uint8(0), jnp.uint8(1 << _AGE_SHIFT))
    older = jnp.where(activity < OLDEST << _AGE_SHIFT, activity + step, activity)
    now = jnp.where(is_active(activity), older, jnp.uint8(_ACTIVE | _EXPLORED))
    return jnp.where(mask, now, activity & _EXPLORED)
