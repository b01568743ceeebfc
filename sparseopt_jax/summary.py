"""The sparse layers of a model in numbers: fan-in statistics, and a table to read."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt_jax.axes import AxesByPath, axes_of_stack
from sparseopt_jax.masks import fitting
from sparseopt_jax.preconditioner import neuron_fan_in
from sparseopt_jax.trees import named_leaves, unboxed

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any

_HEADER = ("leaf", "shape", "kept", "density", "fan-in ± std", "min..max", "dead")
_NO_BREAK = "\N{NO-BREAK SPACE}"


class FanInStatistics(NamedTuple):
    """Active incoming weights per neuron, over the neurons of a layer.

    Attributes:
      mean: float32.
      std: float32, the population's standard deviation (divided by the number of neurons).
      min: int32.
      max: int32.
      dead: int32, number of neurons with no active incoming weight.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> found = sx.fan_in_statistics({"w": jnp.array([[True, False], [True, False]])})["w"]
      >>> float(found.mean), int(found.max), int(found.dead)
      (1.0, 2, 1)
    """

    mean: Array
    std: Array
    min: Array
    max: Array
    dead: Array


def fan_in_statistics(
    masks: PyTree, out_axes: AxesByPath | None = None, batch_axes: AxesByPath = ()
) -> dict[str, FanInStatistics]:
    """Mean, spread and extremes of the neurons' active fan-in, and how many neurons are dead.

    The ratio std / mean is what SparseOpt reacts to: where it is 0 the correction does nothing.

    Args:
      masks: bool arrays.
      out_axes: see ``scale_by_sparseopt``.
      batch_axes: see ``scale_by_sparseopt``.

    Returns:
      By path, for the leaves of two and more dimensions (for a stack: whose layers have as many)
      that are not empty: scalars, or for a stack arrays of the shape of its batch axes.

    Raises:
      TypeError: a mask is not bool.
      ValueError: the axes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> masks = {"kernel": jnp.array([[True, True, False], [True, False, False]])}
      >>> statistics = sx.fan_in_statistics(masks)["kernel"]
      >>> float(statistics.mean), int(statistics.max), int(statistics.dead)
      (1.0, 2, 1)
    """
    counts = neuron_fan_in(masks, unboxed(masks), out_axes, batch_axes)
    statistics = {}
    for path, count in named_leaves(counts).items():
        if not count.size:
            continue
        batch = axes_of_stack(path, count.ndim, batch_axes)
        over = tuple(axis for axis in range(count.ndim) if axis not in batch)
        neurons = math.prod(count.shape[axis] for axis in over)
        total = jnp.sum(count, axis=over, keepdims=True)
        # Quotient, remainder and differences in integers (the latter at most the leaf's size), so
        # that equal fan-in has exactly its mean and a spread of 0: a compiled division by a
        # constant multiplies by its rounded reciprocal.
        whole, rest = jnp.squeeze(total // neurons, over), jnp.squeeze(total % neurons, over)
        spread = (count * neurons - total).astype(jnp.float32) / neurons
        statistics[path] = FanInStatistics(
            mean=whole.astype(jnp.float32) + rest.astype(jnp.float32) / neurons,
            std=jnp.sqrt(jnp.mean(jnp.square(spread), axis=over)),
            min=jnp.min(count, axis=over),
            max=jnp.max(count, axis=over),
            dead=jnp.sum(count == 0, axis=over, dtype=jnp.int32),
        )
    return statistics


def summary(
    params: PyTree,
    masks: PyTree,
    *,
    out_axes: AxesByPath | None = None,
    batch_axes: AxesByPath = (),
) -> str:
    """A table of the sparse layers, for people: print it after ``init``.

    A line for each leaf that has inactive weights: its path and shape, the number and share of the
    weights it keeps, mean and standard deviation, minimum and maximum of its neurons' active
    fan-in, and how many of the neurons are dead (have no active incoming weight). The layers of a
    stack share a line. Then, in lines of their own:

    - the sparse leaves together;
    - where ``params`` are arrays, and others of their weights are not zero than the active ones,
      how many are. Weights outside the masks that are not zero are named with their leaves: the
      model then computes with other weights than the masks say;
    - all other leaves, and which of them have two and more dimensions (for a stack: its layers),
      as kernels have: embeddings, but also what ``prunable`` did not take for a kernel;
    - the density over all parameters.

    Args:
      params: pytree of arrays or of anything with shapes, or a whole Equinox model.
      masks: bool arrays of the same paths and shapes, held in any way, not traced.
      out_axes: see ``scale_by_sparseopt``.
      batch_axes: see ``scale_by_sparseopt``.

    Returns:
      The lines, without a newline at the end.

    Raises:
      TypeError: a mask is not bool, or traced: call it outside of ``jax.jit``.
      ValueError: structure or shapes differ, or the axes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> masks = {"kernel": jnp.eye(4, 3, dtype=bool), "bias": jnp.ones(3, bool)}
      >>> params = {"kernel": 0.5 * jnp.eye(4, 3), "bias": jnp.zeros(3)}
      >>> print(sx.summary(params, masks))
      leaf    shape  kept  density  fan-in ± std  min..max  dead
      kernel    4x3     3   0.2500     1.0 ± 0.0      1..1     0
      1 sparse leaf: 3 of 12 weights active, density 0.2500; 0 dead neurons
      1 dense leaf: 3 parameters, all active
      all parameters: 6 of 15 active, density 0.4000
    """
    masks = fitting(masks, unboxed(params))
    leaves, values = named_leaves(masks), named_leaves(params)
    for path, mask in leaves.items():
        if isinstance(mask, jax.core.Tracer):
            raise TypeError(
                f"masks leaf {path!r} is traced: summary reads the masks' values, so call it "
                "outside of jax.jit and other transformations"
            )
    counts = named_leaves(neuron_fan_in(masks, masks, out_axes, batch_axes))
    rows: list[Sequence[str]] = [_HEADER]
    sparse: list[str] = []
    kept = size = dead = dense = 0
    for path, mask in leaves.items():
        active = int(np.count_nonzero(np.asarray(mask)))
        if active == mask.size:
            dense += mask.size
            continue
        sparse.append(path)
        kept, size = kept + active, size + mask.size
        cells = [path, _shape(mask), f"{active:,}", f"{active / mask.size:.4f}"]
        if path in counts:
            fan_in = np.asarray(counts[path])
            own_dead = int(np.sum(fan_in == 0))
            dead += own_dead
            cells += [
                f"{fan_in.mean():,.1f} ± {fan_in.std():,.1f}",
                f"{fan_in.min():,}..{fan_in.max():,}",
                f"{own_dead:,}",
            ]
        rows.append(cells + ["-"] * (len(_HEADER) - len(cells)))
    lines = ["no sparse leaves"]
    if sparse:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        lines.append(
            f"{_leaves(len(sparse), 'sparse')}: {kept:,} of {size:,} weights active, density "
            f"{kept / size:.4f}; {dead:,} dead neuron{'s' * (dead != 1)}"
        )
        if all(_is_concrete(values[path]) for path in sparse):
            lines += _not_zero({path: (values[path], leaves[path]) for path in sparse}, kept, size)
    if len(sparse) < len(leaves):
        number = _leaves(len(leaves) - len(sparse), "dense")
        lines.append(f"{number}: {dense:,} parameters, all active")
        # What is left of a stack without its batch axes tells a kernel from stacked biases.
        matrices = [
            f"{path}{_NO_BREAK}{_shape(leaves[path])}"
            for path in counts
            if path not in sparse and leaves[path].size
        ]
        if matrices:
            lines += _wrapped(f"dense of two and more dimensions: {', '.join(matrices)}")
        if sparse:
            active, total = kept + dense, size + dense
            lines.append(
                f"all parameters: {active:,} of {total:,} active, density {active / total:.4f}"
            )
    return "\n".join(lines)


def _not_zero(leaves: Mapping[str, tuple[Any, Any]], kept: int, size: int) -> list[str]:
    """How many weights of the sparse leaves are not zero, unless they are the active ones."""
    number, outside = 0, {}
    for path, (value, mask) in leaves.items():
        not_zero = np.asarray(value) != 0
        number += int(np.count_nonzero(not_zero))
        if broken := int(np.count_nonzero(not_zero & ~np.asarray(mask))):
            outside[path] = broken
    if outside:
        named = ", ".join(f"{path}{_NO_BREAK}{count:,}" for path, count in outside.items())
        return _wrapped(
            f"{sum(outside.values()):,} weights outside the masks are not zero ({named}): in params"
            f" {number:,} of the {size:,} are not, density {number / size:.4f}. The model does not"
            " compute with these masks; apply_masks sets such weights to zero, and so does each"
            " update where sparse_training is the outermost transformation"
        )
    if number < kept:
        return [f"in params {number:,} of the {kept:,} active weights are not zero"]
    return []


def _is_concrete(value: Any) -> bool:
    is_array = isinstance(value, np.ndarray | np.generic | jax.Array)
    return is_array and not isinstance(value, jax.core.Tracer)


def _shape(array: Any) -> str:
    return "x".join(map(str, array.shape))


def _wrapped(text: str) -> list[str]:
    lines = textwrap.wrap(
        text, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(_NO_BREAK, " ") for line in lines]


def _leaves(number: int, kind: str) -> str:
    return f"{number:,} {kind} {'leaf' if number == 1 else 'leaves'}"
