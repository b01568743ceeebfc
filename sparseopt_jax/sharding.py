"""Shardings of an optimizer's state that follow those of the parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sparseopt_jax.explicit import following
from sparseopt_jax.slots import owners
from sparseopt_jax.trees import boxed_like, named_leaves, unboxed

PyTree: TypeAlias = Any


def state_shardings(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
    """Shardings for ``tx.init(params)``: whatever is kept per weight is sharded as its weight.

    Masks, per-weight optimizer slots and accumulators take their parameter's sharding; fan-in
    counts and the explored set take it on the axes that they share with it; memories that stack
    copies of a parameter (L-BFGS) on their last axes. All else is replicated.

    Args:
      tx: ``sparse_training(...)``, whatever is wrapped around it, or any optax transformation.
      params: the parameters, or a ``jax.ShapeDtypeStruct`` of each, with a ``NamedSharding``, all
        of one mesh; leaves without one count as replicated.

    Returns:
      A ``NamedSharding`` a leaf, in the structure of ``tx.init(params)``, for ``out_shardings`` of
      ``jax.jit``, ``jax.device_put`` and restoring checkpoints.

    Raises:
      ValueError: no leaf of ``params`` has a ``NamedSharding``, or they have several meshes.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import sparseopt_jax as sx
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> rows = jax.NamedSharding(mesh, jax.P("data"))
      >>> params = {"kernel": jax.device_put(jnp.ones((8, 4)), rows)}
      >>> tx = sx.sparse_training(
      ...     optax.adam(1e-3), distribution=sx.ERK(0.5), topology=sx.Static())
      >>> shardings = sx.state_shardings(tx, params)
      >>> opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
      >>> sx.get_masks(opt_state)["kernel"].sharding.spec
      P('data',)
    """
    mesh = _mesh_of(params)
    state = jax.eval_shape(tx.init, params)

    weights = params.fast if isinstance(params, optax.LookaheadParams) else params
    weight_at = owners(unboxed(weights))

    def sharding(path: tuple[Any, ...], slot: Any) -> NamedSharding:
        weight = weight_at(path)
        given = getattr(weight, "sharding", None)
        if not isinstance(given, NamedSharding):
            return _on(mesh, slot.ndim, ())
        return _on(mesh, slot.ndim, following(slot.shape, weight.shape, given.spec, mesh))

    return boxed_like(jax.tree_util.tree_map_with_path(sharding, unboxed(state)), state)


def _mesh_of(params: PyTree) -> Mesh:
    meshes: dict[Any, str] = {}
    for path, leaf in named_leaves(params).items():
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            meshes.setdefault(sharding.mesh, path)
    if len(meshes) != 1:
        found = ", ".join(f"{path!r} on {mesh}" for mesh, path in meshes.items()) or "none"
        raise ValueError(
            f"params must be arrays with NamedShardings of one mesh, found {found}. Put them on a "
            "mesh with jax.device_put(params, shardings), or give their jax.ShapeDtypeStructs one"
        )
    return next(iter(meshes))


def _on(mesh: Mesh, ndim: int, spec: Iterable[Any]) -> NamedSharding:
    spec = tuple(spec)
    if AxisType.Explicit in mesh.axis_types:
        # A type names every axis. A shorter spec means the same, but a jitted step would be
        # compiled again for the state that its own first call returned.
        spec += (None,) * (ndim - len(spec))
    return NamedSharding(mesh, PartitionSpec(*spec))  # type: ignore[no-untyped-call]
