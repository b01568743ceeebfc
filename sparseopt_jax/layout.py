"""Which axes of a tree's kernels index neurons, where the user does not say.

Flax and Haiku keep a kernel as (in, out), Equinox and PyTorch as (out, in). A bias has one entry
for each neuron, so the axes of a kernel that its bias fits are its out axes; this goes for the
usual names (kernel, weight or w, with bias or b) and for pairs (kernel, bias). Where there is no
bias, or it fits several axes, kernels of the same name elsewhere in the tree tell, and then
Equinox's modules. The last axis is what remains.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax

from sparseopt_jax.axes import Axes, AxesByPath, AxesOfTree, axes_of_stack, is_given, layer_shape
from sparseopt_jax.trees import listed, named_leaves, path_str, unboxed

PyTree: TypeAlias = Any

# The last part of a path, and what is before it; in PyTorch's own names parts are joined by dots.
_LAST_PART = re.compile(r"(.*?)[/.]?([^/.]*)")
# "weight", "weight_hh", "in_proj_weight"; but not "weights", and not Flax's or Haiku's names.
_WEIGHT = re.compile(r"(^|_)weight($|_)")


class _Kernel(NamedTuple):
    """What is known of one kernel: shapes are those of a layer, without the axes of a stack."""

    path: str
    module: str
    name: str
    shape: tuple[int, ...]
    bias: tuple[int, ...] | None
    axes: tuple[int, ...]  # Of the leaf, those of a layer.


def out_axes_of(
    tree: PyTree,
    out_axes: AxesByPath | None,
    batch_axes: AxesByPath = (),
    *,
    concerns: Callable[[str, Any], bool],
) -> AxesByPath:
    """The setting ``out_axes``, with what ``tree`` tells of the kernels of which it says nothing.

    Args:
      tree: parameters or their masks; only shapes matter.
      out_axes: as users give it: None, or a mapping whose patterns match some of the paths.
      batch_axes: as users give it.
      concerns: ``(path, leaf) -> bool``, the kernels whose axes matter; of these there is a warning
        where nothing tells whether they are (out, in).
    """
    if out_axes is not None and not isinstance(out_axes, Mapping):
        return out_axes
    tree = unboxed(tree)
    leaves = named_leaves(tree)
    kernels = [k for k in _kernels(leaves, batch_axes) if not is_given(k.path, out_axes)]
    told = {kernel.path: _fitting_bias(kernel) for kernel in kernels}
    by_name = defaultdict(set)
    for kernel in kernels:
        by_name[kernel.name].add(_first_or_last(told[kernel.path], len(kernel.shape)))
    found: dict[str, Axes] = {}
    unclear = []
    equinox: frozenset[str] | None = None
    for kernel in kernels:
        out = told[kernel.path]
        alike = by_name[kernel.name] - {None}
        if out is None and len(alike) == 1:
            out = (0,) if alike == {"first"} else None
        elif out is None and _WEIGHT.search(kernel.name):
            equinox = _equinox_modules(tree) if equinox is None else equinox
            if kernel.module in equinox:
                out = (0,)
            elif concerns(kernel.path, leaves[kernel.path]):
                unclear.append(f"{kernel.path!r} ({'x'.join(map(str, kernel.shape))})")
        if out is not None:
            found[kernel.path] = tuple(kernel.axes[i] for i in out)
    if unclear:
        warnings.warn(
            f"out_axes: nothing tells which axis indexes the neurons of {listed(unclear)}. Equinox "
            "and PyTorch keep kernels of this name as (out, in), out_axes=0; others as (in, out), "
            "out_axes=-1, which is assumed. Say which",
            stacklevel=2,
        )
    return AxesOfTree(out_axes or {}, found)


def _kernels(leaves: Mapping[str, Any], batch_axes: AxesByPath) -> list[_Kernel]:
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    axes, shapes = {}, {}
    for path, leaf in leaves.items():
        match = _LAST_PART.fullmatch(path)
        assert match is not None  # It matches any string.
        modules[match[1]][match[2]] = path
        shape = getattr(leaf, "shape", ())  # An Equinox model has other leaves than arrays.
        batch = axes_of_stack(path, len(shape), batch_axes)
        axes[path] = tuple(axis for axis in range(len(shape)) if axis not in batch)
        shapes[path] = layer_shape(shape, batch)
    kernels = []
    for module, paths in modules.items():
        own = {n: path for n, path in paths.items() if len(shapes[path]) >= 2 and n != "bias"}
        for name, path in own.items():
            # The bias of several kernels tells of the layer's neurons, but not of each kernel's.
            bias = _bias_of(name, paths, shapes) if len(own) == 1 else None
            kernels.append(_Kernel(path, module, name, shapes[path], bias, axes[path]))
    return kernels


def _bias_of(
    kernel: str, paths: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...] | None:
    """The shape of the kernel's bias, by the names of both or as the pair (kernel, bias)."""
    if kernel.lower() in ("kernel", "w") or _WEIGHT.search(kernel):
        bias = paths.get("bias", paths.get("b"))
    else:
        bias = paths["1"] if set(paths) == {"0", "1"} and kernel == "0" else None
    return None if bias is None else shapes[bias]


def _fitting_bias(kernel: _Kernel) -> tuple[int, ...] | None:
    """The axes, next to each other, that have the bias's shape; None unless it fits just once."""
    if kernel.bias is None:
        return None
    # An Equinox convolution's is (out, 1, 1).
    bias = tuple(size for size in kernel.bias if size != 1) or (1,)
    starts = range(len(kernel.shape) - len(bias) + 1)
    fits = [i for i in starts if kernel.shape[i : i + len(bias)] == bias]
    if len(fits) != 1 or len(bias) == len(kernel.shape):
        return None
    return tuple(range(fits[0], fits[0] + len(bias)))


def _first_or_last(out: tuple[int, ...] | None, ndim: int) -> str | None:
    if out == (0,):
        return "first"
    return "last" if out == (ndim - 1,) else None


def _equinox_modules(tree: PyTree) -> frozenset[str]:
    """The paths of Equinox's modules in a tree."""
    paths = set()

    def visit(path: tuple[Any, ...], node: Any) -> bool:
        if any(kind.__module__.partition(".")[0] == "equinox" for kind in type(node).__mro__):
            paths.add(path_str(path))
        return False

    jax.tree_util.tree_leaves_with_path(tree, is_leaf=visit, is_leaf_takes_path=True)
    return frozenset(paths)
