"""What the types of arrays say of a mesh, for functions that choose no shardings.

In Explicit mesh mode they carry shardings; inside ``shard_map`` the axes over which a value may
differ from device to device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

PyTree: TypeAlias = Any


def in_auto_mode(
    function: Callable[..., Any], like: PyTree, result: PyTree | None = None
) -> Callable[..., Any]:
    """``function`` with shardings left to the compiler, its result sharded as ``like``.

    Selection stacks, reshapes and compares arrays that are sharded in different ways. Explicit mode
    would ask for a sharding at each of these places; there is one that matters, that of the result.
    Outside Explicit mode this is ``function`` itself.

    Args:
      function: of arrays; it must not close over traced ones.
      like: arrays whose shardings the result takes.
      result: shapes of the result in the structure of ``like``; by default those of ``like``.

    Returns:
      A function of the same arguments.
    """
    explicit: tuple[str, ...] = ()
    for leaf in jax.tree.leaves(like):
        if isinstance(leaf, jax.Array):
            mesh = jax.typeof(leaf).sharding.mesh
            explicit = explicit or tuple(
                name
                for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
                if kind == AxisType.Explicit
            )
    if not explicit:
        return function

    def sharding(leaf: Any, out: Any) -> NamedSharding:
        given = jax.typeof(leaf).sharding
        return NamedSharding(given.mesh, following(out.shape, leaf.shape, given.spec, given.mesh))

    shardings = jax.tree.map(sharding, like, like if result is None else result)
    return jax.sharding.auto_axes(function, axes=explicit, out_sharding=shardings)


def varying_as(values: PyTree, *others: PyTree) -> PyTree:
    """``values`` with types that vary over all mesh axes that ``others`` vary over.

    ``shard_map`` wants what a loop starts with to vary as what its body returns.
    """
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves(others)))

    def vary(value: Any) -> Any:
        missing = tuple(sorted(axes - varying_axes(value)))
        return jax.lax.pcast(value, missing, to="varying") if missing else value

    return jax.tree.map(vary, values)


def varying_axes(value: Any) -> frozenset[str]:
    """The axes that a value varies over; ``value`` may be an abstract one."""
    kind = value if hasattr(value, "manual_axis_type") else jax.typeof(value)
    return frozenset(kind.manual_axis_type.varying)


def following(
    shape: tuple[int, ...], like: tuple[int, ...], spec: PartitionSpec, mesh: Any
) -> PartitionSpec:
    """A spec for an array of ``shape`` that keeps what it can of the ``spec`` of a parameter.

    The last axes of a stack of copies follow the parameter. An array of the same number of
    dimensions follows on the axes that the mesh divides evenly. Others are replicated.
    """
    stacked = len(shape) - len(like)
    if stacked >= 0 and shape[stacked:] == like:
        return _spec(*[None] * stacked, *spec)
    if stacked != 0:
        return _spec()
    sizes = dict(mesh.shape)
    return _spec(*(_if_even(n, names, sizes) for n, names in zip(shape, spec, strict=False)))


def _if_even(size: int, names: Any, sizes: Mapping[str, int]) -> Any:
    """A dimension's mesh axes if they divide it evenly, else None."""
    if names is None or names is PartitionSpec.UNCONSTRAINED:
        return None
    axes = (names,) if isinstance(names, str) else names
    return names if size % math.prod(sizes[axis] for axis in axes) == 0 else None


def _spec(*axes: Any) -> PartitionSpec:
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]
