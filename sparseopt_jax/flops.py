"""Floating point operations of a masked model, counted from the model's own jaxpr.

The function is traced, never run. Which operands of its products are kernels is followed through
the program, so that no list of layers is kept by hand.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import jax
import numpy as np

from sparseopt_jax.masks import fitting
from sparseopt_jax.model_flops import LayerFLOPs, ModelFLOPs
from sparseopt_jax.trees import is_array, named_leaves, unboxed

PyTree: TypeAlias = Any
_Equation: TypeAlias = Any  # jax.extend.core.JaxprEqn; importing that would import Pallas too.


def flops(
    function: Callable[..., Any], params: PyTree, masks: PyTree | None, /, *args: Any, **kwargs: Any
) -> ModelFLOPs:
    """Count the FLOPs of ``function(params, *args, **kwargs)``, dense and with masks.

    Conventions, after RigL, whose factors for ResNet-50 they reproduce:

    - A multiply-add is two FLOPs. Positions in a convolution's padding count, the zeros that a
      transposed convolution puts between its inputs do not.
    - Any other operation on floating point numbers is one FLOP an element: of its result, of its
      input where it reduces or accumulates, of the window for each result of a pooling. Moving,
      casting, comparing, selecting, sorting, random bits and operations on integers are free.
      Normalisation is what its operations are, a derivative or special function what this version
      of jax makes of it; all of these are dense whatever the masks.
    - A kernel costs its density wherever a product or convolution reads it: after casts, reshapes,
      transposes, slices, joins with other kernels, masking, and multiplication by what does not
      depend on ``args``. A part of one, such as a layer of a scanned stack, counts with the density
      of the whole. Used twice, it counts twice. Of two kernels multiplied, the sparser one counts.
    - A scan costs its length times its body; a ``cond`` its dearest branch. Results that nothing
      uses cost nothing.

    Args:
      function: maps ``params`` and the other arguments to arrays, for example
        ``lambda params, x: model.apply({"params": params}, x)``.
      params: pytree of arrays, or of their shapes and dtypes alone; an Equinox model as it is.
      masks: concrete bool arrays of the paths of ``params``; or densities in [0, 1] by path,
        ``{"Dense_0/kernel": 0.1}``, parameters without one being dense; or None, all dense.
      *args: arrays or ``jax.ShapeDtypeStruct`` in any pytree; other leaves are passed as they are.
        Give the batch an axis of 1 to count a single example.
      **kwargs: likewise.

    Returns:
      Dense and sparse counts, by layer; its method ``training`` gives those of a training step.

    Raises:
      TypeError: ``function`` is not callable, a mask is not a concrete bool array, or a density is
        not a number.
      ValueError: masks or densities do not fit ``params``; no product or convolution reads a sparse
        parameter with its zeros in place (not after a sum with other weights, for example), so that
        its mask would go uncounted; or a loop's number of iterations is not known.
      NotImplementedError: the function calls an operation without a count (FFT, decompositions,
        custom kernels, ``shard_map``).

    Source: RigL (arXiv 1911.11134), appendix on the FLOPs of its methods.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparseopt_jax.flops import flops
      >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}
      >>> def dense(params, x):
      ...     return x @ params["kernel"] + params["bias"][None]
      >>> count = flops(dense, params, {"kernel": 0.25}, jnp.ones((1, 8)))
      >>> count.dense, count.sparse  # 2 * 8 * 4 for the product, 4 for the bias
      (68, 20.0)
    """
    if not callable(function):
        raise TypeError(f"function must be callable as function(params, ...), got {function!r}")
    densities = _densities(params, masks)
    leaves, structure = jax.tree.flatten((params, args, kwargs))
    arrays = {i: x for i, x in enumerate(leaves) if is_array(x)}

    def traced(arrays: Mapping[int, Any]) -> Any:
        merged = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        params, args, kwargs = jax.tree.unflatten(structure, merged)
        return function(params, *args, **kwargs)

    jaxpr = jax.make_jaxpr(traced)(arrays)
    counter = _Counter()
    kernels = [_Kernel(density, ((path, Fraction(1)),)) for path, density in densities.items()]
    counter.walk(jaxpr, kernels + [_DATA] * (len(arrays) - len(kernels)), 1)

    uncounted = [path for path, d in densities.items() if d != 1 and path not in counter.read]
    if uncounted:
        raise ValueError(
            f"masks makes {', '.join(uncounted)} sparse, but no matrix product or convolution of "
            "function reads it with its zeros in place, so its mask would go uncounted. Make it "
            "dense in masks, or let a product read it as it is"
        )
    counts = counter.counts
    layers = {
        path: LayerFLOPs(round(counts[path]), float(counts[path] * density))
        for path, density in densities.items()
        if path in counts
    }
    return ModelFLOPs(layers, counts[_ACTIVATIONS], counts[_OTHER])


def _densities(params: PyTree, masks: PyTree | None) -> dict[str, Fraction]:
    """Exact share of active weights by path, of all arrays of ``params``."""
    arrays = [path for path, leaf in named_leaves(params).items() if is_array(leaf)]
    densities, given = dict.fromkeys(arrays, Fraction(1)), named_leaves(masks)
    if any(getattr(leaf, "dtype", None) == np.bool_ for leaf in given.values()):
        for path, mask in named_leaves(fitting(masks, unboxed(params))).items():
            if isinstance(mask, jax.core.Tracer | jax.ShapeDtypeStruct):
                raise TypeError(
                    f"masks leaf {path!r} must be a concrete array, whose active weights can be "
                    f"counted, got {type(mask).__name__}; pass densities by path instead"
                )
            if mask.size:
                densities[path] = Fraction(int(np.count_nonzero(mask)), mask.size)
        return densities
    for path, density in given.items():
        if path not in densities:
            raise ValueError(
                f"masks has {path!r}, which is none of the parameters: {', '.join(densities)}"
            )
        number = density.item() if getattr(density, "shape", None) == () else density
        wanted = "masks must be bool arrays like params, or densities in [0, 1] by path, got "
        if isinstance(number, bool) or not isinstance(number, int | float | Fraction):
            raise TypeError(wanted + f"{path!r}: {density!r}")
        if not 0 <= number <= 1:
            raise ValueError(wanted + f"{path!r}: {density!r}")
        densities[path] = Fraction(number)
    return densities


@dataclass(frozen=True)
class _Kernel:
    """A value that is zero wherever the parameters it is made of are masked."""

    density: Fraction
    parts: tuple[tuple[str, Fraction], ...]  # Paths of the parameters, and their shares in it.


# What is known of a value: the above, or whether it depends on the function's other arguments.
_CONSTANT, _DATA = "constant", "data"
_Value: TypeAlias = _Kernel | str
_Sized: TypeAlias = tuple[_Kernel, int]
_ACTIVATIONS, _OTHER = object(), object()


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MOVED = _names("""reshape transpose broadcast_in_dim squeeze expand_dims rev slice dynamic_slice
    gather split unstack tile convert_element_type reduce_precision copy copy_p stop_gradient name
    optimization_barrier device_put sharding_constraint reshard layout_constraint""")
_KEEPS_ZEROS = _MOVED | _names("neg abs sign tanh square")
_FREE = _MOVED | _names("""concatenate stack pad select_n dynamic_update_slice scatter iota
    bitcast_convert_type real imag complex sort top_k approx_top_k rng_uniform empty empty2""")
_CALLS = _names("""jit pjit closed_call core_call call remat remat2 checkpoint custom_jvp_call
    custom_vjp_call custom_vjp_call_jaxpr custom_vmap_call custom_partitioning composite""")
_WITHOUT_COUNT = _names("""fft cholesky eig eigh lu qr svd schur hessenberg householder_product
    tridiagonal tridiagonal_solve triangular_solve ragged_dot_general scaled_dot ffi_call""")


class _Counter:
    """Walks a jaxpr and sums up what its operations cost."""

    def __init__(self) -> None:
        # By the path of the parameter that a product reads, or under one of the two keys above.
        self.counts: collections.Counter[Any] = collections.Counter()
        self.read: set[str] = set()

    def walk(self, jaxpr: Any, values: Iterable[_Value], times: int) -> list[_Value]:
        """Count a jaxpr that runs ``times`` times; returns what is known of its results."""
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        known: dict[Any, _Value] = dict(zip(jaxpr.invars, values, strict=True))
        known |= dict.fromkeys(jaxpr.constvars, _CONSTANT)

        def read(atom: Any) -> _Value:
            return _CONSTANT if _is_literal(atom) else known[atom]

        for equation in _needed(jaxpr):
            found = self.visit(equation, [read(atom) for atom in equation.invars], times)
            known |= zip(equation.outvars, found, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def visit(self, equation: _Equation, values: list[_Value], times: int) -> list[_Value]:
        """Count one operation; returns what is known of its results."""
        name, options = equation.primitive.name, equation.params
        if name in _PRODUCTS:
            count, kernels = times * _PRODUCTS[name](equation), _kernels(equation, values)
            for key, share in _sparsest(kernels).parts if kernels else ((_ACTIVATIONS, 1),):
                self.counts[key] += count * share  # type: ignore[assignment]
            self.read |= {path for kernel, _ in kernels for path, _ in kernel.parts}
            return [_DATA if _DATA in values else _CONSTANT]
        if name == "scan":
            return self.scan(equation, values, times)
        if name == "while":
            return self.while_loop(options, values)
        if name == "cond":
            return self.cond(options, values[1:], times)
        inner = [option for option in jax.tree.leaves(dict(options)) if hasattr(option, "eqns")]
        if name in _CALLS and len(inner) == 1:
            return self.walk(inner[0], values, times)
        if name in _WITHOUT_COUNT or (inner and not name.startswith(("reduce", "scatter"))):
            raise NotImplementedError(f"FLOPs of {name!r} are not known; count function without it")
        self.counts[_OTHER] += times * _elementwise(equation)
        return _followed(equation, values)

    def scan(self, equation: _Equation, values: list[_Value], times: int) -> list[_Value]:
        body = equation.params["jaxpr"]
        # Constants and the carry enter the body as they are, slices with one dimension less; the
        # carry comes first among the results. How many there are stands under names that change.
        last = _unsliced(equation.invars, body.in_avals)
        first = last - _unsliced(equation.outvars, body.out_avals)
        consts, slices = values[:first], values[last:]
        carry = self.settled(body, consts, values[first:last], slices)
        found = self.walk(body, [*consts, *carry, *slices], times * equation.params["length"])
        return [*carry, *found[len(carry) :]]

    def while_loop(self, options: Mapping[str, Any], values: list[_Value]) -> list[_Value]:
        first, last = options["cond_nconsts"], options["cond_nconsts"] + options["body_nconsts"]
        consts = values[first:last]
        carry = self.settled(options["body_jaxpr"], consts, values[last:], [])
        once = _Counter()
        once.walk(options["body_jaxpr"], [*consts, *carry], 1)
        once.walk(options["cond_jaxpr"], [*values[:first], *carry], 1)
        if once.counts.total():
            raise ValueError(
                "function has a while loop, whose number of iterations is not known before it "
                "runs. Use jax.lax.scan, or jax.lax.fori_loop with Python ints as bounds"
            )
        return carry

    def settled(
        self, body: Any, consts: list[_Value], carry: list[_Value], slices: list[_Value]
    ) -> list[_Value]:
        """What is known of a loop's carry in every iteration."""
        while True:
            found = _Counter().walk(body, [*consts, *carry, *slices], 1)
            joined = [_join(pair) for pair in zip(carry, found, strict=False)]
            if joined == carry:
                return carry
            carry = joined

    def cond(self, options: Mapping[str, Any], values: list[_Value], times: int) -> list[_Value]:
        jaxprs, branches = options["branches"], [_Counter() for _ in options["branches"]]
        results = [b.walk(jaxpr, values, times) for b, jaxpr in zip(branches, jaxprs, strict=True)]
        self.counts.update(max(branches, key=lambda branch: branch.counts.total()).counts)
        self.read = self.read.union(*(branch.read for branch in branches))
        return [_join(result) for result in zip(*results, strict=True)]


def _unsliced(atoms: Sequence[Any], avals: Sequence[Any]) -> int:
    """How many of a scan's operands, or results, have the rank that they have in its body."""
    pairs = zip(atoms, avals, strict=True)
    return sum(len(atom.aval.shape) == len(aval.shape) for atom, aval in pairs)


def _needed(jaxpr: Any) -> list[_Equation]:
    """The equations whose results are used, in order; a compiler drops the others."""
    used = {atom for atom in jaxpr.outvars if not _is_literal(atom)}
    needed = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not used.isdisjoint(equation.outvars):
            needed.append(equation)
            used |= {atom for atom in equation.invars if not _is_literal(atom)}
    return needed[::-1]


def _is_literal(atom: Any) -> bool:
    return hasattr(atom, "val")


def _kernels(equation: _Equation, values: Sequence[_Value]) -> list[_Sized]:
    """The operands that are kernels, with their sizes."""
    pairs = zip(values, equation.invars, strict=False)
    return [(value, atom.aval.size) for value, atom in pairs if isinstance(value, _Kernel)]


def _sparsest(kernels: Iterable[_Sized]) -> _Kernel:
    """The sparsest of several kernels; of equally sparse ones the largest."""
    return min(kernels, key=lambda sized: (sized[0].density, -sized[1]))[0]


def _followed(equation: _Equation, values: list[_Value]) -> list[_Value]:
    """What is known of the results of an operation that is no product and has no body."""
    name, n_results = equation.primitive.name, len(equation.outvars)
    if name == "select_n":  # Which of the values is chosen may depend on anything.
        return [_join(set(values[1:]) - {_CONSTANT} or {_CONSTANT})]
    if name in _KEEPS_ZEROS and len(values) == n_results:
        return values
    if _DATA in values:  # Also where only an index is: an embedding's rows are no kernel.
        return [_DATA] * n_results
    if name in _KEEPS_ZEROS or (name == "div" and isinstance(values[0], _Kernel)):
        return [values[0]] * n_results
    kernels = _kernels(equation, values)
    if name == "mul" and kernels:
        return [_sparsest(kernels)]
    if name in ("concatenate", "stack") and len(kernels) == len(values):
        shares: dict[str, Fraction] = {}
        for kernel, size in kernels:
            for path, share in kernel.parts:
                shares[path] = shares.get(path, Fraction(0)) + share * size
        whole = max(equation.outvars[0].aval.size, 1)
        density = sum((kernel.density * size for kernel, size in kernels), Fraction(0)) / whole
        return [_Kernel(density, tuple((path, n / whole) for path, n in shares.items()))]
    return [_CONSTANT] * n_results


def _join(values: Iterable[_Value]) -> _Value:
    """What is known of a value that is one of several."""
    first, *others = set(values)
    return first if not others else _DATA if _DATA in (first, *others) else _CONSTANT


def _dot(equation: _Equation) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)


def _convolution(equation: _Equation) -> int:
    options, axes = equation.params, equation.params["dimension_numbers"]
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    # Batch, output channels, and the input channels of one group, over which an output sums.
    count = 2 * out[axes.out_spec[0]] * out[axes.out_spec[1]] * kernel[axes.rhs_spec[1]]
    for axis, (low, _) in enumerate(options["padding"]):
        outputs = np.arange(out[axes.out_spec[2 + axis]]) * options["window_strides"][axis]
        taps = np.arange(kernel[axes.rhs_spec[2 + axis]]) * options["rhs_dilation"][axis]
        positions = outputs[:, None] + taps[None, :] - low
        # Input elements lie lhs_dilation apart; nobody multiplies by the zeros between them.
        count *= int(np.count_nonzero(positions % options["lhs_dilation"][axis] == 0))
    return count


_PRODUCTS = {"dot_general": _dot, "conv_general_dilated": _convolution}


def _elementwise(equation: _Equation) -> int:
    name, results = equation.primitive.name, [atom.aval for atom in equation.outvars]
    if name in _FREE or not any(jax.numpy.issubdtype(a.dtype, np.inexact) for a in results):
        return 0
    if name.startswith("reduce_window"):
        return sum(a.size for a in results) * math.prod(equation.params["window_dimensions"])
    if name.startswith(("reduce", "cum")):
        return equation.invars[0].aval.size
    if name.startswith("scatter"):
        return equation.invars[2].aval.size
    if name == "polynomial":  # By Horner's rule, from a value and its coefficients.
        return 2 * (len(equation.invars) - 2) * results[0].size
    return sum(a.size for a in results)
