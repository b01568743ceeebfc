"""In which pattern: N:M, blocks, whole neurons, and the same fan-in for all neurons of a layer.

A structure says how the weights of a layer fall into groups, each of which keeps the same number
of members, and of which weights a member consists: those of a member are active together. All that
it has to know is which axes of the kernel, once some of them are split in two, are groups, members
and weights of a member.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from sparseopt_jax.axes import KernelAxes
from sparseopt_jax.schedules import MILLION, millionths_of
from sparseopt_jax.settings import as_bool, as_int, as_number, keep

Array: TypeAlias = jax.Array


class Split(NamedTuple):
    """Where groups, members and the weights of a member lie in a layer's kernel.

    Attributes:
      shape: the kernel's, in which an axis may be split in two: (8, 4) as (2, 4, 4).
      groups: the axes of ``shape`` that index groups. None of them: the layer is one group.
      members: the axes that index the members of a group.
      weights: the axes that index the weights of a member. None of them: it is a single weight.

    Example:
      >>> Split((2, 4, 4), groups=(0, 2), members=(1,), weights=()).sizes
      (8, 4, 1)
    """

    shape: tuple[int, ...]
    groups: tuple[int, ...]
    members: tuple[int, ...]
    weights: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many groups there are, members in one, and weights in one of those."""
        of = [
            math.prod(self.shape[axis] for axis in axes)
            for axes in (self.groups, self.members, self.weights)
        ]
        return of[0], of[1], of[2]

    def members_of(self, count: Any) -> Any:
        """How many members each group keeps, where the layer is to keep ``count`` weights.

        The number whose weights come closest where the layer is one group, and else the largest
        number that is not too many; at least one.

        Args:
          count: an int, or an integer array, from 1 to the size of the layer.
        """
        n_groups, n_members, n_weights = self.sizes
        members, rest = count // (n_groups * n_weights), count % n_weights
        if n_groups == 1 and n_weights > 1:
            members = members + (rest + n_weights // 2) // n_weights
        if isinstance(members, int):
            return min(max(members, 1), n_members)
        return jnp.clip(members, 1, n_members)

    @property
    def _order(self) -> tuple[int, ...]:
        return self.groups + self.members + self.weights

    def arranged(self, layers: Array) -> Array:
        """Layers ``(n, *kernel)`` as (n, groups, members, weights of a member)."""
        n = layers.shape[0]
        parts = layers.reshape(n, *self.shape).transpose(0, *(axis + 1 for axis in self._order))
        return parts.reshape(n, *self.sizes)

    def restored(self, arranged: Array, kernel: Sequence[int]) -> Array:
        """The inverse of ``arranged``; members may be given without their weights, (n, g, m)."""
        n, of = arranged.shape[0], self.sizes
        full = jnp.broadcast_to(arranged.reshape(*arranged.shape[:3], -1), (n, *of))
        parts = full.reshape(n, *(self.shape[axis] for axis in self._order))
        back = sorted(range(len(self._order)), key=self._order.__getitem__)
        return parts.transpose(0, *(axis + 1 for axis in back)).reshape(n, *kernel)


class Structure(ABC):
    """The pattern of a layer's mask; ``NM``, ``Blocks``, ``Neurons``, ``ConstantFanIn`` are some.

    Layers that the distribution keeps dense stay dense, and need not fit the pattern.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> class Rows(sx.Structure):
      ...     def split(self, shape, axes):
      ...         return sx.Split(shape, groups=(), members=(0,), weights=(1,))
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> distribution = sx.Uniform(2 / 3, dense_first=False)
      >>> masks = sx.init_masks(jax.random.key(0), params, distribution, structure=Rows())
      >>> sorted(masks["kernel"].tolist())
      [[False, False], [False, False], [True, True]]
    """

    @abstractmethod
    def split(self, shape: tuple[int, ...], axes: KernelAxes) -> Split:
        """Which axes are groups, members, and weights of a member.

        Args:
          shape: of a single layer's kernel.
          axes: of this kernel, its incoming axes and those of its neurons.

        Raises:
          ValueError: the pattern does not fit the kernel; of the form "... must ...", to which the
            layer's path is added.
        """

    def rounded(self, count: int, shape: tuple[int, ...], axes: KernelAxes) -> int:
        """How many weights a layer keeps in this pattern where its distribution gives ``count``.

        Raises:
          ValueError: the pattern does not fit the kernel, or not that number.
        """
        if count == math.prod(shape):
            return count
        split = self.split(shape, axes)
        n_groups, _, n_weights = split.sizes
        return int(split.members_of(count)) * n_groups * n_weights


@dataclass(frozen=True)
class NM(Structure):
    """N of M: of each ``m`` weights in a row along the fan-in, ``n`` are active.

    The row runs along the last incoming axis of the kernel, within one neuron: along the inputs of
    a dense kernel, or along the channels at one place of a convolution's window.

    The distribution must give each layer n / m of its weights, or all of them:
    ``Uniform(1 - n / m)``. On the way there from a lower sparsity, each m weights keep the largest
    number that is not too many.

    Attributes:
      n: how many are active, 1 <= n <= m.
      m: of how many; it must divide the axis.

    Raises:
      TypeError: an argument that is no int.
      ValueError: n < 1 or n > m; from ``init``: an axis that m does not divide, or another number
        of weights than n / m.

    Source: Mishra et al. (arXiv 2104.08378), section 3; SR-STE (arXiv 2102.04010).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> params = {"kernel": jnp.ones((8, 3))}
      >>> half = sx.Uniform(0.5, dense_first=False)
      >>> masks = sx.init_masks(jax.random.key(0), params, half, structure=sx.NM(2, 4))
      >>> masks["kernel"].reshape(2, 4, 3).sum(axis=1).tolist()
      [[2, 2, 2], [2, 2, 2]]
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        keep(self, n=as_int("n", self.n, at_least=1), m=as_int("m", self.m, at_least=1))
        if self.n > self.m:
            raise ValueError(f"n must be at most m={self.m}, got {self.n}")

    def split(self, shape: tuple[int, ...], axes: KernelAxes) -> Split:
        """Members are the m of a row; there is a group for each row."""
        if not axes.incoming:
            raise ValueError(f"{self} needs an incoming axis, and there is none in {shape}")
        axis = axes.incoming[-1]
        if min(axes.out) < axes.incoming[0]:  # (out, in, window)
            axis = axes.incoming[0]
        _check_divides(shape, axis, self.m, f"m={self.m}", "that of the inputs")
        parts = _split_axis(shape, axis, self.m)
        others = tuple(a for a in range(len(parts)) if a != axis + 1)
        return Split(parts, others, (axis + 1,), ())

    def rounded(self, count: int, shape: tuple[int, ...], axes: KernelAxes) -> int:
        """That is n / m of the weights."""
        size = math.prod(shape)
        if count == size:
            return count
        self.split(shape, axes)
        kept = size * self.n // self.m
        if count != kept:
            raise ValueError(
                f"{self} must keep {self.n / self.m:.4g} of the weights, {kept} of {size}, got "
                f"{count}; Uniform(1 - {self.n} / {self.m}) fits"
            )
        return kept


@dataclass(frozen=True)
class Blocks(Structure):
    """Blocks of neighbouring inputs and neurons, whose weights are active together.

    A block reaches over the last incoming and the last out axis; each place of a convolution's
    window has blocks of its own. They are ranked by the sum of their weights' scores.

    Attributes:
      shape: (inputs, neurons) of a block; each must divide its axis.

    The layer's number of weights is rounded to the nearest whole number of blocks, at least one.

    Raises:
      TypeError: ``shape`` is no pair of ints.
      ValueError: a size below 1; from ``init``: an axis that the block does not divide.

    Source: Narang et al., Block-Sparse Recurrent Neural Networks (arXiv 1711.02782), section 3.1;
    there by the largest weight of a block.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> half = sx.Uniform(0.75, dense_first=False)
      >>> masks = sx.init_masks(jax.random.key(0), params, half, structure=sx.Blocks((2, 2)))
      >>> int(masks["kernel"].sum()), int(masks["kernel"].any(axis=0).sum())
      (4, 2)
    """

    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if not isinstance(self.shape, Sequence) or len(self.shape) != 2:
            raise TypeError(f"shape must be a pair (inputs, neurons), got {self.shape!r}")
        keep(self, shape=tuple(as_int("shape", size, at_least=1) for size in self.shape))

    def split(self, shape: tuple[int, ...], axes: KernelAxes) -> Split:
        """Members are the blocks of the layer, which is one group."""
        if not axes.incoming:
            raise ValueError(f"{self} needs an incoming axis, and there is none in {shape}")
        first, last = axes.incoming[-1], axes.out[-1]
        if min(axes.out) < axes.incoming[0]:  # (out, in, window)
            first = axes.incoming[0]
        sizes = {first: self.shape[0], last: self.shape[1]}
        _check_divides(shape, first, self.shape[0], str(self), "that of the inputs")
        _check_divides(shape, last, self.shape[1], str(self), "that of the neurons")
        parts = shape
        weights: list[int] = []
        for axis in sorted(sizes, reverse=True):
            parts = _split_axis(parts, axis, sizes[axis])
            weights = [axis + 1, *(a + 1 for a in weights)]
        members = tuple(a for a in range(len(parts)) if a not in weights)
        return Split(parts, (), members, tuple(weights))


@dataclass(frozen=True)
class Neurons(Structure):
    """Whole neurons, of a convolution whole output channels: all incoming weights or none.

    Neurons are ranked by the sum of their weights' scores. The layer's number of weights is rounded
    to the nearest whole number of neurons, at least one. ``remove_dead_neurons`` makes a smaller
    dense network of what is left.

    Source: Li et al., Pruning Filters for Efficient ConvNets (arXiv 1608.08710), section 3.1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> params = {"kernel": jnp.ones((5, 4))}
      >>> half = sx.Uniform(0.5, dense_first=False)
      >>> masks = sx.init_masks(jax.random.key(0), params, half, structure=sx.Neurons())
      >>> sorted(masks["kernel"].sum(axis=0).tolist())
      [0, 0, 5, 5]
    """

    def split(self, shape: tuple[int, ...], axes: KernelAxes) -> Split:
        """Members are the neurons of the layer, which is one group."""
        return Split(shape, (), axes.out, axes.incoming)


@dataclass(frozen=True)
class ConstantFanIn(Structure):
    """The same number of incoming weights for all neurons of a layer, as SRigL has it.

    Each neuron keeps the layer's number of weights over the number of neurons, rounded down, at
    least one. With ``ablate`` a topology update leaves out neurons that are not salient, and shares
    their weights among the others. Salient weights are those that stay when the smallest of the
    layer are dropped, and those of the largest gradients, as many as were dropped.

    Attributes:
      ablate: None; or how many salient weights a neuron needs not to be left out: a number below 1
        is a share of the fan-in that all neurons would have, to six decimals, at least one weight;
        1 and more is the number itself.
        Where too few neurons would be left to hold the weights, as many as it takes are kept, those
        with the most salient weights first. The last layer of a network should not be ablated:
        ``structure={"head/*": ConstantFanIn(), "*": ConstantFanIn(ablate=0.3)}``.
      of_dense: whether ``ablate`` is a share of the dense fan-in instead.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: ``ablate`` is not positive.

    Source: Lasby et al., SRigL (arXiv 2305.02299), section 3.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> params = {"kernel": jnp.ones((10, 4))}
      >>> sparse = sx.Uniform(0.7, dense_first=False)
      >>> masks = sx.init_masks(jax.random.key(0), params, sparse, structure=sx.ConstantFanIn())
      >>> sx.fan_in(masks["kernel"]).tolist()
      [3, 3, 3, 3]
    """

    ablate: float | None = None
    of_dense: bool = False

    def __post_init__(self) -> None:
        keep(self, of_dense=as_bool("of_dense", self.of_dense))
        if self.ablate is not None:
            keep(self, ablate=as_number("ablate", self.ablate, "a number, or None"))
            if not 0 < self.ablate < math.inf:
                raise ValueError(f"ablate must be positive and finite, or None, got {self.ablate}")

    def split(self, shape: tuple[int, ...], axes: KernelAxes) -> Split:
        """Groups are the neurons, members their incoming weights."""
        return Split(shape, axes.out, axes.incoming, ())

    def rounded(self, count: int, shape: tuple[int, ...], axes: KernelAxes) -> int:
        """Without ``ablate`` a multiple of the neurons; with it all, for the neurons that stay."""
        return super().rounded(count, shape, axes) if self.ablate is None else count

    def salient_needed(self, members: Array, n_members: int) -> Array:
        """How many salient weights a neuron needs, where it has ``members`` of ``n_members``."""
        assert self.ablate is not None
        if self.ablate >= 1:
            return jnp.full_like(members, min(math.ceil(self.ablate), n_members + 1))
        fan_in = jnp.full_like(members, n_members) if self.of_dense else members
        # In integers: 0.29 of 100 are 29, which they are not in every floating-point arithmetic.
        return jnp.maximum(millionths_of(jnp.int32(round(self.ablate * MILLION)), fan_in), 1)


def check_is_structure(structure: Any) -> None:
    """Raise unless ``structure`` is one, several by pattern, or None."""
    if structure is None:
        return
    for one in structure.values() if isinstance(structure, Mapping) else (structure,):
        if not isinstance(one, Structure):
            raise TypeError(f"structure must be a value such as NM(2, 4), or None, got {one!r}")
    for pattern in structure if isinstance(structure, Mapping) else ():
        if not isinstance(pattern, str):
            raise TypeError(f"structure patterns must be strings, got {pattern!r}")


def layer_axes(axes: KernelAxes) -> KernelAxes:
    """The axes of a single layer of a stack, counted without those of the stack."""

    def without(of: Sequence[int]) -> tuple[int, ...]:
        return tuple(axis - sum(b < axis for b in axes.batch) for axis in of)

    return KernelAxes(without(axes.incoming), without(axes.out), ())


@contextlib.contextmanager
def named(path: str) -> Iterator[None]:
    """Adds a layer's path to what a structure says of its kernel."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"structure of {path!r}: {error}") from None


def _check_divides(shape: tuple[int, ...], axis: int, size: int, what: str, which: str) -> None:
    if shape[axis] % size:
        raise ValueError(
            f"{what} must divide axis {axis}, {which}, of a kernel {shape}: {shape[axis]} is no "
            f"multiple of {size}. Name the layers that it is for, structure={{'conv*': ...}}"
        )


def _split_axis(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    """``shape`` with an axis in two, the second of ``size``."""
    return (*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])
