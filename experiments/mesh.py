"""The mesh of devices, and how batches and parameters lie on it.

One mesh has the axes `data` and `fsdp`. A batch is shared out over both. Parameters, and with them
masks and optimizer state, are sharded over `fsdp` and replicated over `data`. XLA inserts whatever
communication that takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.config import Config, ConfigError

AXES = ("data", "fsdp")

_SMALLEST = 1024
"""Elements; smaller leaves stay whole: a message for each would cost more than their memory."""


def mesh_shape(config: Config, devices: int) -> tuple[int, int]:
    """Sizes of the axes `data` and `fsdp`, where -1 takes what is left of the devices.

    Raises:
      ConfigError: the sizes do not fit the number of devices.

    Example:
      >>> mesh_shape(Config(mesh_fsdp=2), 8)
      (4, 2)
    """
    data, fsdp = config.mesh_data, config.mesh_fsdp
    name, known = ("mesh_data", fsdp) if data == -1 else ("mesh_fsdp", data)
    if -1 in (data, fsdp):
        if devices % known:
            other = "mesh_fsdp" if name == "mesh_data" else "mesh_data"
            raise ConfigError(
                f"{other}={known} must divide {devices}, the number of devices, since {name}=-1"
                " takes the rest"
            )
        data, fsdp = (devices // known if size == -1 else size for size in (data, fsdp))
    if data * fsdp > devices:
        raise ConfigError(
            f"mesh_data={data} times mesh_fsdp={fsdp} must be at most {devices}, the number of"
            " devices"
        )
    return data, fsdp


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that a config asks for.

    Args:
      config: gives the sizes `mesh_data` and `mesh_fsdp`, `batch_size` and `bn_groups`.
      devices: what to make it of; by default the devices of all processes. A mesh that is smaller
        takes the first ones, which must leave no process without any.

    Raises:
      ConfigError: the sizes do not fit the devices, the batch does not divide by the mesh, or a
        process would have nothing to do.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    size = shape[0] * shape[1]
    processes = len({device.process_index for device in devices})
    if size < len(devices) and processes > 1:
        raise ConfigError(
            f"mesh_data={shape[0]} times mesh_fsdp={shape[1]} must be {len(devices)}, the number of"
            f" devices, since {processes} processes train together"
        )
    if config.batch_size % size:
        step = math.lcm(size, config.bn_groups)
        raise ConfigError(
            f"batch_size={config.batch_size} must be a multiple of {size}, the number of devices"
            f" that share a batch (mesh_data={shape[0]} times mesh_fsdp={shape[1]})",
            {"batch_size": max(step, config.batch_size // step * step)},
        )
    # Neighbours lie next to each other. `jax.make_mesh` takes many shapes on some TPUs only: those
    # that split no axis of the torus.
    try:
        placed = mesh_utils.create_device_mesh(
            shape, devices[:size], allow_split_physical_axes=True
        )
    except AssertionError:  # chips that form no rectangle
        raise ConfigError(
            f"mesh_data={shape[0]} times mesh_fsdp={shape[1]}: the first {size} of"
            f" {len(devices)} TPU chips form no rectangle; take another number, or all"
        ) from None
    # Auto: the compiler spreads shardings through the model.
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """That of an array which every device of `mesh` holds."""
    return _sharding(mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """That of a batch: its examples are shared out over all devices."""
    return _sharding(mesh, AXES)


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """Shardings of parameters: over `fsdp` on the largest dimension that it divides.

    Args:
      mesh: from `make_mesh`.
      params: pytree of arrays or of their shapes.

    Returns:
      `NamedSharding`s in the structure of `params`; of equal dimensions the last is taken, which
      are a kernel's outputs. Leaves below 1,024 elements, and those that have no such dimension,
      are replicated.
    """
    size = mesh.shape["fsdp"]

    def sharding(leaf: Any) -> NamedSharding:
        spec: list[str | None] = [None] * leaf.ndim
        fitting = [axis for axis in range(leaf.ndim) if leaf.shape[axis] % size == 0]
        if size > 1 and fitting and leaf.size >= _SMALLEST:
            spec[max(fitting, key=lambda axis: (leaf.shape[axis], axis))] = "fsdp"
        return _sharding(mesh, *spec)

    return jax.tree.map(sharding, params)


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of arrays, with shardings: a pytree of them, or one for all leaves."""
    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda a: struct(a.shape, a.dtype, shardings), tree)
    return jax.tree.map(lambda a, s: struct(a.shape, a.dtype, s), tree, shardings)


def struct(shape: Sequence[int], dtype: Any, sharding: NamedSharding | None = None) -> Any:
    """A `jax.ShapeDtypeStruct`, which stands for an array where only its shape matters."""
    make: Any = jax.ShapeDtypeStruct
    return make(shape, dtype, sharding=sharding)


def replicate(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """An array that every process holds, on all devices of the mesh."""
    make: Any = jax.make_array_from_process_local_data
    made: jax.Array = make(replicated(mesh), array, array.shape)
    return made


def _sharding(mesh: Mesh, *spec: Any) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*spec))  # type: ignore[no-untyped-call]
