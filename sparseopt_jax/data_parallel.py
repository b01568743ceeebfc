"""Sums over devices of active gradients alone, for data parallel training under ``shard_map``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt_jax.explicit import varying_axes
from sparseopt_jax.masks import fitting
from sparseopt_jax.selection import checked_size
from sparseopt_jax.trees import boxed_like, listed, named_leaves, unboxed

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


def active_counts(masks: PyTree) -> dict[str, int]:
    """How many weights of each sparse leaf are active, for ``psum_active``.

    A layer keeps its number through all topology updates, so this is read once, before ``jit``; but
    along a density schedule (``Prune``, ``ACDC``) anew after each update, which compiles anew.

    Args:
      masks: concrete bool arrays; None for leaves without a mask.

    Returns:
      Ints by path. Leaves that are True everywhere, or have no mask, are left out.

    Raises:
      TypeError: a mask is not bool, or traced.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> sx.active_counts({"kernel": jnp.eye(3, dtype=bool), "bias": jnp.ones(3, bool)})
      {'kernel': 3}
    """
    counts = {}
    for path, mask in named_leaves(masks).items():
        if isinstance(mask, jax.core.Tracer):
            raise TypeError(
                f"masks leaf {path!r} is traced: active_counts reads the masks' values, so call it "
                "outside of jax.jit and other transformations"
            )
        if mask.dtype != np.bool_:
            raise TypeError(f"masks leaf {path!r} must be a bool array, got {mask.dtype}")
        active = int(np.count_nonzero(np.asarray(mask)))
        if active < mask.size:
            counts[path] = active
    return counts


def active_indices(masks: PyTree, counts: Mapping[str, int]) -> dict[str, Array]:
    """Where the active weights are, to be kept until masks move, for ``psum_active``.

    Args:
      masks: bool arrays, also traced ones.
      counts: what ``active_counts`` found; masks have those numbers still. Of traced ones that is
        not checked: with others, active weights would be missing.

    Returns:
      By path int32 arrays of ``counts[path]`` ascending places in the flattened leaf.

    Raises:
      TypeError: a mask is not bool.
      ValueError: ``counts`` has paths that ``masks`` have not, or a concrete mask another number;
        a leaf is too large for int32.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> masks = {"kernel": jnp.eye(3, dtype=bool)}
      >>> sx.active_indices(masks, sx.active_counts(masks))["kernel"].tolist()
      [0, 4, 8]
    """
    leaves = named_leaves(masks)
    indices = {}
    for path, count in counts.items():
        mask = leaves.get(path)
        if mask is None:
            raise ValueError(f"counts has {path!r}, masks have only {listed(leaves)}")
        if mask.dtype != np.bool_:
            raise TypeError(f"masks leaf {path!r} must be a bool array, got {mask.dtype}")
        if not isinstance(mask, jax.core.Tracer) and int(np.count_nonzero(mask)) != count:
            raise ValueError(
                f"masks leaf {path!r} has {int(np.count_nonzero(mask)):,} active weights, counts"
                f" says {count:,}: take active_counts of the masks that are trained with"
            )
        size = checked_size(mask.shape)
        (found,) = jnp.nonzero(jnp.ravel(mask), size=count, fill_value=size)
        indices[path] = found.astype(jnp.int32)
    return indices


def psum_active(
    grads: PyTree,
    masks: PyTree,
    counts: Mapping[str, int],
    axis_name: str | tuple[str, ...],
    *,
    indices: Mapping[str, Array] | None = None,
) -> PyTree:
    """``jax.lax.psum`` that sends the gradients of active weights alone.

    What goes over the wire falls to the density of the masks; leaves that are not in ``counts`` are
    summed whole, in the same operation. The optimizer needs no gradient of an inactive weight but
    where RigL grows: on the steps of ``topology.in_accumulation_window(opt_state.step)`` sum all of
    it, by ``jax.lax.cond`` or in a program of its own, and take the indices of the new masks then.

    Gradients must be each device's own. Where parameters are the same on all devices, ``jax.grad``
    inside ``shard_map`` adds a dense sum by itself; it does not where the parameters are cast
    first, by ``jax.lax.pcast(params, axis_name, to="varying")``, as in the example.

    It pays where the wire is slow beside the device (Ethernet, between slices of a TPU), and hardly
    on NVLink or within a slice, for gathering and scattering read and write the whole gradient: in
    20 ms for ResNet-50 at 0.95 on two CPU cores, which copy it in 9, and find the indices in 340.
    At 10 Gb/s the two ways of its 102 MB take 160 ms, those of the active weights 8.

    Args:
      grads: pytree of floating arrays, different on each device of the axis.
      masks: bool arrays of the same paths, the same on all devices. Only read without ``indices``.
      counts: Python's ints by path, ``active_counts(masks)``: they are part of the program.
      axis_name: of the mapped axis or axes.
      indices: ``active_indices(masks, counts)``, kept from when the masks last moved. Without, they
        are found here, on every step, which takes longer than all the rest.

    Returns:
      In the containers of ``grads`` the sums over the axis, and 0 for inactive weights. On CPUs
      equal to those of ``psum`` bit for bit; where the sum of an element depends on its place in
      the message, to rounding.

    Raises:
      TypeError: a mask is not bool.
      ValueError: paths or shapes differ; or gradients do not vary over the axis, since they are
        sums already.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> import sparseopt_jax as sx
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> masks = {"kernel": jnp.eye(4, dtype=bool)}
      >>> counts = sx.active_counts(masks)
      >>> indices = sx.active_indices(masks, counts)
      >>> def gradient(params, indices, x):
      ...     own = jax.lax.pcast(params, "data", to="varying")
      ...     grads = jax.grad(lambda p: jnp.sum(x @ p["kernel"]))(own)
      ...     return sx.psum_active(grads, masks, counts, "data", indices=indices)
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> mapped = jax.shard_map(
      ...     gradient, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
      >>> grads = jax.jit(mapped)(params, indices, jnp.ones((2, 4)))
      >>> grads["kernel"][0].tolist()
      [2.0, 0.0, 0.0, 0.0]
    """
    whole = unboxed(grads)
    leaves, structure = jax.tree.flatten(whole)
    paths = list(named_leaves(whole))
    unknown = [path for path in counts if path not in paths]
    if unknown:
        raise ValueError(f"counts has {listed(unknown)}, grads have only {listed(paths)}")
    _check_own(dict(zip(paths, leaves, strict=True)), axis_name)
    if indices is None:
        indices = active_indices(fitting(masks, whole), counts)
    sent = []
    for path, leaf in zip(paths, leaves, strict=True):
        if path in counts:
            if np.shape(indices[path]) != (counts[path],):
                raise ValueError(
                    f"indices of {path!r} have shape {np.shape(indices[path])}, counts says "
                    f"{counts[path]:,}"
                )
            places = jnp.ravel(leaf).at[indices[path]]
            leaf = places.get(
                mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True
            )
        sent.append(leaf)
    summed = jax.lax.psum(sent, axis_name)  # type: ignore[no-untyped-call]
    sums = []
    for path, leaf, total in zip(paths, leaves, summed, strict=True):
        if path in counts:
            zeros = jnp.zeros(leaf.size, leaf.dtype)
            total = (
                zeros.at[indices[path]]
                .set(total, mode="drop", indices_are_sorted=True, unique_indices=True)
                .reshape(leaf.shape)
            )
        sums.append(total)
    return boxed_like(jax.tree.unflatten(structure, sums), grads)


def _check_own(grads: Mapping[str, Any], axis_name: str | tuple[str, ...]) -> None:
    """Raises where a gradient has been summed over the axis by autodiff."""
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    # Without shard_map's checks, and under vmap, types tell nothing, not even of the index.
    told = frozenset().union(*(varying_axes(jax.lax.axis_index(name)) for name in names))
    for path, leaf in grads.items():
        missing = told.intersection(names) - varying_axes(leaf)
        if missing:
            raise ValueError(
                f"grads leaf {path!r} does not vary over {', '.join(sorted(missing))}: autodiff has"
                " summed it over the devices. Take gradients of"
                f" jax.lax.pcast(params, {axis_name!r}, to='varying')"
            )
