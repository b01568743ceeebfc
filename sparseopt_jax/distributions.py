"""How many weights each layer keeps: Uniform, ER, ERK, PerLayer and Global.

A distribution is a frozen value. It sees the layers' shapes only and answers with integers, so the
kept weights hit the target sparsity over the layers in its budget up to half a weight a layer.
Layers without weights are left out of the answer. ``Global`` sees scores as well, where there are
any.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from sparseopt_jax.bins import end_to_end
from sparseopt_jax.patterns import matching
from sparseopt_jax.selection import INT32_MAX, top_k_mask, top_k_masks
from sparseopt_jax.settings import as_int, as_number, keep, kind_of

Array: TypeAlias = jax.Array
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Overrides: TypeAlias = Mapping[str, float]


@dataclass(frozen=True)
class Uniform:
    """The same sparsity in every layer, the first one dense.

    The dense first layer is not compensated by the others, as in RigL, so the model as a whole
    keeps a little more than ``1 - sparsity`` of its weights.

    Attributes:
      sparsity: share of weights that a layer gives up, in [0, 1).
      dense_first: True keeps the first layer dense: the only convolution with the fewest input
        channels (its second to last axis), or the lowest number where all paths are alike but for
        numbers (``Dense_0``, ``Dense_1``; ``layers/0``, ``layers/1``). Where neither tells which
        layer is the first, name it by its path. False makes it sparse like the others.
      overrides: sparsity by glob pattern over the path (``"head/*"``; ``*`` matches ``/`` too),
        for layers that stand outside the rule; the first pattern that matches counts. Brackets
        match themselves too: ``"h[0]/w"`` is the layer of that name.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: a sparsity outside [0, 1); from ``layer_counts``: a pattern or path that matches
        no layer, a layer that would keep no weight, or no telling which layer is the first.

    Source: RigL (arXiv 1911.11134), section 3, "Uniform".

    Example:
      >>> import sparseopt_jax as sx
      >>> layers = {"stem/kernel": (3, 3, 3, 16), "conv/kernel": (3, 3, 16, 16)}
      >>> sx.Uniform(0.9).layer_counts(layers)
      {'stem/kernel': 432, 'conv/kernel': 230}
      >>> layers = {"encoder/kernel": (20, 10), "decoder/kernel": (10, 20)}
      >>> sx.Uniform(0.9, dense_first="encoder/kernel").layer_counts(layers)
      {'encoder/kernel': 200, 'decoder/kernel': 20}
    """

    sparsity: float
    dense_first: bool | str = True
    overrides: Overrides | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        keep(
            self,
            sparsity=_as_sparsity("sparsity", self.sparsity),
            overrides=_as_overrides("overrides", self.overrides),
        )
        if not isinstance(self.dense_first, str):
            if kind_of("dense_first", self.dense_first) is not bool:
                raise TypeError(
                    f"dense_first must be True, False or a layer's path, got {self.dense_first!r}"
                )
            keep(self, dense_first=bool(self.dense_first))

    def layer_counts(self, layers: Shapes) -> dict[str, int]:
        """Number of weights that each layer keeps, from the layers' shapes by path."""
        layers = _not_empty(layers)
        sparsities = dict.fromkeys(layers, self.sparsity)
        if isinstance(self.dense_first, str):
            if self.dense_first not in layers:
                raise ValueError(
                    f"dense_first={self.dense_first!r} is none of the layers: {', '.join(layers)}"
                )
            sparsities[self.dense_first] = 0.0
        elif self.dense_first and layers:
            sparsities[_first_layer(layers)] = 0.0
        sparsities |= _overridden(layers, self.overrides)
        return _counts(layers, {path: 1.0 - s for path, s in sparsities.items()})


@dataclass(frozen=True)
class ER:
    """Erdős-Rényi: density in proportion to (n_in + n_out) / (n_in * n_out).

    ``n_in`` and ``n_out`` are the last two axes; the size of a convolution's window does not count
    (see ``ERK``). Layers that would be over-full become dense and the rest is solved again.

    Attributes:
      sparsity: share of weights that the layers give up together, in [0, 1).
      overrides: sparsity by glob pattern over the path, for layers that stand outside the budget;
        the first pattern that matches counts.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: a sparsity outside [0, 1); from ``layer_counts``: a pattern that matches no
        layer, or a layer that would keep no weight.

    Source: Mocanu et al., SET (arXiv 1707.04780), equation 1; RigL (arXiv 1911.11134), section 3.

    Example:
      >>> import sparseopt_jax as sx
      >>> sx.ER(0.9).layer_counts({"a/kernel": (100, 100), "b/kernel": (100, 10)})
      {'a/kernel': 710, 'b/kernel': 390}
    """

    sparsity: float
    overrides: Overrides | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        keep(
            self,
            sparsity=_as_sparsity("sparsity", self.sparsity),
            overrides=_as_overrides("overrides", self.overrides),
        )

    def layer_counts(self, layers: Shapes) -> dict[str, int]:
        """Number of weights that each layer keeps, from the layers' shapes by path."""
        layers = _not_empty(layers)
        raw = {path: _raw_density(shape[-2:]) for path, shape in layers.items()}
        return _budgeted(layers, raw, self.sparsity, self.overrides)


@dataclass(frozen=True)
class ERK:
    """Erdős-Rényi-Kernel: density in proportion to sum(shape) / prod(shape).

    Small layers keep more than large ones. Layers that would be over-full become dense and the
    rest is solved again, so that the kept weights still add up to the target.

    Attributes:
      sparsity: share of weights that the layers give up together, in [0, 1).
      overrides: sparsity by glob pattern over the path, for layers that stand outside the budget;
        the first pattern that matches counts.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: a sparsity outside [0, 1); from ``layer_counts``: a pattern that matches no
        layer, or a layer that would keep no weight.

    Source: RigL (arXiv 1911.11134), section 3, "Erdős-Rényi-Kernel (ERK)".

    Example:
      >>> import sparseopt_jax as sx
      >>> sx.ERK(0.9).layer_counts({"conv": (3, 3, 64, 64), "head": (64, 10)})
      {'conv': 3110, 'head': 640}
    """

    sparsity: float
    overrides: Overrides | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        keep(
            self,
            sparsity=_as_sparsity("sparsity", self.sparsity),
            overrides=_as_overrides("overrides", self.overrides),
        )

    def layer_counts(self, layers: Shapes) -> dict[str, int]:
        """Number of weights that each layer keeps, from the layers' shapes by path."""
        layers = _not_empty(layers)
        raw = {path: _raw_density(shape) for path, shape in layers.items()}
        return _budgeted(layers, raw, self.sparsity, self.overrides)


@dataclass(frozen=True)
class PerLayer:
    """A sparsity for each layer by pattern; layers that no pattern matches stay dense.

    Attributes:
      sparsities: sparsity in [0, 1) by glob pattern over the path; the first match counts.

    Raises:
      TypeError: ``sparsities`` is no mapping of numbers.
      ValueError: it is empty, or a sparsity lies outside [0, 1); from ``layer_counts``: a pattern
        that matches no layer, or a layer that would keep no weight.

    Example:
      >>> import sparseopt_jax as sx
      >>> sx.PerLayer({"conv*": 0.75}).layer_counts({"conv1": (4, 4), "head": (4, 2)})
      {'conv1': 4, 'head': 8}
    """

    sparsities: Overrides = field(hash=False)

    def __post_init__(self) -> None:
        keep(self, sparsities=_as_overrides("sparsities", self.sparsities))
        if not self.sparsities:
            raise ValueError("sparsities must name at least one layer, got an empty mapping")

    def layer_counts(self, layers: Shapes) -> dict[str, int]:
        """Number of weights that each layer keeps, from the layers' shapes by path."""
        layers = _not_empty(layers)
        chosen = _overridden(layers, self.sparsities, name="sparsities")
        return _counts(layers, {path: 1.0 - chosen.get(path, 0.0) for path in layers})


@dataclass(frozen=True)
class Global:
    """One threshold over all layers: each keeps what its scores make it keep, but for a floor.

    It is for ``masks_from_scores``. The largest ``floor`` scores of each layer are kept, and of all
    others the largest of the whole network, so that exactly ``round((1 - sparsity) * n)`` of ``n``
    weights are. Scores that are NaN come last; among equal ones at the threshold the layers that
    come first in the tree win.

    Where there are no scores (``init_masks``, ``keep_top_k``, the start of ``sparse_training``)
    layers keep weights in proportion to their sizes, and none less than its floor; the total is the
    same. With a density schedule topologies count by magnitude, else they keep what a run begins
    with: for counts by score, pass ``sparse_training(masks=masks_from_scores(...))``.

    Attributes:
      sparsity: share of weights that the layers give up together, in [0, 1).
      floor: what each layer keeps at least: a number of weights, where it is an int, or a density
        in [0, 1], where it is a float (rounded down to a whole weight). A layer that has fewer
        weights stays dense. Each keeps one weight in any case.
      overrides: sparsity by glob pattern over the path, for layers that stand outside the budget;
        the first pattern that matches counts.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: a sparsity or floor out of range; from its methods: a pattern that matches no
        layer, or floors that add up to more than the weights that are left.

    Source: Lee et al., SNIP (arXiv 1810.02340), algorithm 1; without floors whole layers can
    vanish (Tanaka et al., arXiv 2006.05467).

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> scores = {"a": jnp.array([9.0, 8.0, 7.0, 6.0]), "b": jnp.array([5.0, 4.0])}
      >>> {k: int(n) for k, n in sx.Global(0.5).counts_from_scores(scores).items()}
      {'a': 2, 'b': 1}
      >>> sx.Global(0.5).layer_counts({"a": (30, 4), "b": (4, 2)})
      {'a': 60, 'b': 4}
    """

    sparsity: float
    floor: float = 1
    overrides: Overrides | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        floor = as_number("floor", self.floor, "a number of weights (int) or a density (float)")
        if isinstance(floor, int):
            as_int("floor", floor, at_least=0)
        elif not 0.0 <= floor <= 1.0:
            raise ValueError(
                f"floor must be a density in [0, 1], or an int of weights, got {floor}"
            )
        keep(
            self,
            sparsity=_as_sparsity("sparsity", self.sparsity),
            floor=floor,
            overrides=_as_overrides("overrides", self.overrides),
        )

    def layer_counts(self, layers: Shapes) -> dict[str, int]:
        """Number of weights that each layer keeps where there are no scores."""
        layers = _not_empty(layers)
        outside, floors, budget = self._budget(layers)
        sizes = {path: math.prod(layers[path]) for path in floors}
        counts = dict(floors)
        while sizes:
            total = sum(sizes.values())
            full = [path for path, size in sizes.items() if floors[path] * total > budget * size]
            if not full:
                break
            budget -= sum(floors[path] for path in full)
            sizes = {path: size for path, size in sizes.items() if path not in full}
        # In whole numbers; what rounding down leaves goes to the largest remainders.
        counts |= {path: budget * size // total for path, size in sizes.items()}
        left = budget - sum(counts[path] for path in sizes)
        for path in sorted(sizes, key=lambda path: -(budget * sizes[path] % total))[:left]:
            counts[path] += 1
        return {path: (outside | counts)[path] for path in layers}

    def outside(self, layers: Collection[str]) -> dict[str, float]:
        """The layers that ``overrides`` takes out of the budget, with their sparsities."""
        return _overridden(layers, self.overrides)

    def counts_from_scores(
        self, scores: Mapping[str, Array], budget: Array | None = None
    ) -> dict[str, Array]:
        """Number of weights that each layer keeps, int32 scalars, from floating scores by path.

        Args:
          scores: of the layers.
          budget: how many they keep together, at least their floors; None: as the settings say.
        """
        shapes = {path: a.shape for path, a in scores.items() if a.size}
        outside, floors, total = self._budget(shapes, budget)
        found = {path: jnp.int32(count) for path, count in outside.items()}
        if not floors:
            return found
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(jnp.float32, *(scores[path] for path in floors))
        together, layout = end_to_end([scores[path].astype(dtype)[None] for path in floors])
        if together.size > INT32_MAX:
            raise ValueError(
                f"Global counts in int32, over at most {INT32_MAX} weights, got {together.size}: "
                "give parts of the network one each, distribution={pattern: Global(...), ...}"
            )
        least = jnp.array(list(floors.values()), jnp.int32)
        (kept,) = top_k_masks([together], least, None, layout=layout)
        (within,) = layout.within()
        assert within is not None  # Rows have padding.
        kept |= top_k_mask(together, total - sum(floors.values()), where=within & ~kept)
        counts = layout.total([jnp.sum(kept, axis=1, dtype=jnp.int32)])
        return found | dict(zip(floors, counts, strict=True))

    def _budget(
        self, layers: Shapes, budget: Any = None
    ) -> tuple[dict[str, int], dict[str, int], Any]:
        """Counts of the layers outside the budget, floors of those inside, and the budget."""
        outside = self.outside(layers) if budget is None else {}
        sizes = {path: math.prod(shape) for path, shape in layers.items() if path not in outside}
        if isinstance(self.floor, int):
            floors = {path: max(1, min(size, self.floor)) for path, size in sizes.items()}
        else:
            floors = {path: max(1, math.floor(size * self.floor)) for path, size in sizes.items()}
        own = round((1.0 - self.sparsity) * sum(sizes.values()))
        if budget is None and sum(floors.values()) > own:
            raise ValueError(
                f"floor={self.floor} asks for {sum(floors.values())} weights of {len(floors)} "
                f"layers, of which sparsity={self.sparsity} leaves {own}: lower either"
            )
        kept = _counts({p: layers[p] for p in outside}, {p: 1.0 - s for p, s in outside.items()})
        return kept, floors, own if budget is None else budget


def _first_layer(layers: Shapes) -> str:
    """The layer that channels or numbers tell to be the first; ValueError where nothing does."""
    kernels = {path: shape for path, shape in layers.items() if len(shape) > 2}
    channels = {path: shape[-2] for path, shape in kernels.items()}
    first = [path for path, number in channels.items() if number == min(channels.values())]
    if len(kernels) > 1 and all(shape[-2] == shape[-1] for shape in kernels.values()):
        first = list(kernels)  # The last axes are windows then, as in Equinox, and no channels.
    if len(first) == 1:
        return first[0]
    if len({re.sub(r"\d+", "0", path) for path in layers}) == 1:
        return min(layers, key=_natural_order)
    unclear = first or list(layers)
    raise ValueError(
        f"dense_first=True cannot tell which layer is the first: {', '.join(unclear)}. Name the "
        f"one that stays dense, for example dense_first={unclear[0]!r}, or pass dense_first=False"
    )


def _budgeted(
    layers: Shapes, raw: Mapping[str, float], sparsity: float, overrides: Overrides | None
) -> dict[str, int]:
    """Densities ``min(1, eps * raw)`` with ``eps`` such that the kept weights meet the budget."""
    densities = {path: 1.0 - s for path, s in _overridden(layers, overrides).items()}
    sizes = {path: math.prod(shape) for path, shape in layers.items() if path not in densities}
    budget = (1.0 - sparsity) * sum(sizes.values())
    # The layers with the largest raw density fill up first.
    open_paths = sorted(sizes, key=lambda path: raw[path])
    while open_paths:
        eps = budget / sum(raw[path] * sizes[path] for path in open_paths)
        if eps * raw[open_paths[-1]] <= 1.0:
            densities |= {path: eps * raw[path] for path in open_paths}
            break
        full = open_paths.pop()
        densities[full] = 1.0
        budget -= sizes[full]
    return _counts(layers, densities)


def _counts(layers: Shapes, densities: Mapping[str, float]) -> dict[str, int]:
    counts = {path: round(densities[path] * math.prod(shape)) for path, shape in layers.items()}
    for path, count in counts.items():
        if count == 0:
            raise ValueError(
                f"layer {path!r} of shape {layers[path]} would keep no weight at a density of "
                f"{densities[path]:.3g}; lower the sparsity or give it its own in overrides, "
                f"for example {{{path!r}: 0.5}}"
            )
    return counts


def _overridden(
    layers: Collection[str], overrides: Overrides | None, name: str = "overrides"
) -> dict[str, float]:
    chosen: dict[str, float] = {}
    for pattern, sparsity in (overrides or {}).items():
        meant = matching(layers, pattern)
        if not meant:
            raise ValueError(
                f"{name} pattern {pattern!r} matches none of the layers: {', '.join(layers)}"
            )
        chosen = dict.fromkeys(meant, sparsity) | chosen
    return chosen


def _not_empty(layers: Shapes) -> Shapes:
    return {path: shape for path, shape in layers.items() if math.prod(shape)}


def _raw_density(shape: tuple[int, ...]) -> float:
    """Erdős-Rényi's density up to a factor; that of a vector is 1, and so is a scalar's."""
    return sum(shape) / math.prod(shape) if shape else 1.0


def _as_sparsity(name: str, value: object) -> float:
    sparsity = as_number(name, value, "a number in [0, 1)")
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"{name} must lie in [0, 1): the share of weights removed, got {sparsity}")
    return sparsity


def _as_overrides(name: str, overrides: object) -> dict[str, float] | None:
    if overrides is None:
        return None
    if not isinstance(overrides, Mapping):
        raise TypeError(f"{name} must map path patterns to sparsities, got {overrides!r}")
    for pattern in overrides:
        if not isinstance(pattern, str):
            raise TypeError(f"{name} patterns must be strings, got {pattern!r}")
    return {
        pattern: _as_sparsity(f"{name}[{pattern!r}]", sparsity)
        for pattern, sparsity in overrides.items()
    }


def _natural_order(path: str) -> list[tuple[int, str]]:
    """Sort key under which ``Dense_2`` comes before ``Dense_10``."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path)
    ]
