"""How many weights each layer is to have at each step, and in which pattern."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt_jax.axes import AxesByPath, kernel_axes, to_layers
from sparseopt_jax.by_path import ByPath, grouped, layer_counts
from sparseopt_jax.distributions import Global
from sparseopt_jax.explicit import in_auto_mode
from sparseopt_jax.layers import Layer, structure_of
from sparseopt_jax.layout import out_axes_of
from sparseopt_jax.masks import Distribution, Layers, maskable_layers, shapes_by_name
from sparseopt_jax.prunable import Prunable
from sparseopt_jax.schedules import Schedule
from sparseopt_jax.structures import NM, Structure, layer_axes, named
from sparseopt_jax.topology import Static, Topology
from sparseopt_jax.trees import named_leaves

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


@dataclass(frozen=True)
class Plan:
    """What is to become of the maskable leaves of one tree of parameters.

    Attributes:
      layers: the layers of each leaf, by path.
      shapes: of the leaves, by path.
      axes: which axes index neurons.
      batch_axes: which index the layers of a stack.
      distribution: what gives the counts; None where the user gave masks.
      structures: by path, of the leaves that have one.
      schedules: by path, of the leaves that have one.
      window_in_out: by name of the layer, its sizes in Flax's order, as distributions see them.
      initial: by name of the layer, how many weights it has before the first update.
      final: likewise, what its distribution gives it; where the user gave masks, what these have in
        leaves with a structure.
    """

    layers: Mapping[str, Layers]
    shapes: Mapping[str, tuple[int, ...]]
    axes: AxesByPath
    batch_axes: AxesByPath
    distribution: ByPath[Distribution] | None
    structures: Mapping[str, Structure]
    schedules: Mapping[str, Schedule]
    window_in_out: Mapping[str, tuple[int, ...]]
    initial: Mapping[str, int]
    final: Mapping[str, int]

    def described(
        self, paths: Sequence[str], step: Any, masks: Sequence[Array], weights: Sequence[Array]
    ) -> list[Layer]:
        """What a topology is told of these leaves at a step."""
        # No layer counts on weights that it does not have: these come after active ones that are 0.
        sizes = {
            path: jnp.where(mask, jnp.abs(weight), -1)
            for path, mask, weight in zip(paths, masks, weights, strict=True)
        }
        by_score = self._counts_by_score(sizes, step)
        return [self.layer(path, self._planned(path, step, by_score)) for path in paths]

    def layer(self, path: str, planned: Array | None = None) -> Layer:
        """What there is to say of a leaf, with how many weights it is to have."""
        axes = kernel_axes(path, len(self.shapes[path]), self.axes, self.batch_axes)
        return Layer(path, axes, self.structures.get(path), planned)

    def counts_of_scores(self, scores: Mapping[str, Array]) -> dict[str, Array]:
        """By path, how many weights its layers keep that have these scores, int32 (layers,)."""
        assert self.distribution is not None
        by_name: dict[str, Any] = {}
        for path, own in self.layers.items():
            by_name |= zip(own.names, to_layers(scores[path], own.batch), strict=True)
        counts = layer_counts(self.distribution, self.window_in_out, by_name)
        return {
            path: jnp.stack([jnp.asarray(counts[name], jnp.int32) for name in own.names])
            for path, own in self.layers.items()
        }

    def counts_at(self, path: str, step: Any) -> Array:
        """How many weights each layer of a leaf has at a step by its schedule, int32 (layers,)."""
        names = self.layers[path].names
        initial, final = (np.array([of[n] for n in names]) for of in (self.initial, self.final))
        schedule = self.schedules.get(path)
        if schedule is None:
            return jnp.asarray(final, jnp.int32)
        return schedule.count_at(step, initial, final)

    def _planned(self, path: str, step: Any, by_score: Mapping[str, Array]) -> Array | None:
        names = self.layers[path].names
        has_count = path in self.structures and names[0] in self.final
        if path not in self.schedules and not has_count:
            return None
        counts = self.counts_at(path, step)
        counts = jnp.stack([by_score.get(name, counts[i]) for i, name in enumerate(names)])
        shape = self.shapes[path]
        return counts.reshape([shape[axis] for axis in self.layers[path].batch])

    def _counts_by_score(self, sizes: Mapping[str, Array], step: Any) -> dict[str, Array]:
        """By name, of the layers of a ``Global``: by magnitude, as the schedule goes on."""
        if not self.schedules or self.distribution is None:
            return {}
        counts: dict[str, Array] = {}
        paths = list(self.layers)
        names = [name for path in paths for name in self.layers[path].names]
        path_of = {name: path for path in paths for name in self.layers[path].names}
        for one, numbers in grouped("distribution", self.distribution, names):
            if not isinstance(one, Global):
                continue
            own = [names[i] for i in numbers]
            outside = one.outside(own)
            inside = [
                name
                for name in own
                if name not in outside and path_of[name] in self.schedules.keys() & sizes.keys()
            ]
            if not inside:
                continue
            schedule = self.schedules[path_of[inside[0]]]
            total = schedule.count_at(
                step, sum(self.initial[n] for n in inside), sum(self.final[n] for n in inside)
            )
            own_sizes = {path: sizes[path] for path in dict.fromkeys(path_of[n] for n in inside)}
            count = in_auto_mode(
                partial(self._counted, one, inside),
                like={name: sizes[path_of[name]] for name in inside},
                result=dict.fromkeys(inside, jnp.int32(0)),
            )
            counts |= count(own_sizes, total)
        return counts

    def _counted(
        self, one: Global, names: Sequence[str], sizes: Mapping[str, Array], total: Array
    ) -> dict[str, Array]:
        scores: dict[str, Array] = {}
        for path, leaf in sizes.items():
            layers = to_layers(leaf, self.layers[path].batch)
            scores |= zip(self.layers[path].names, layers, strict=True)
        return one.counts_from_scores({name: scores[name] for name in names}, total)


def plan_of(
    params: PyTree,
    distribution: ByPath[Distribution] | None,
    *,
    prunable: Prunable,
    out_axes: AxesByPath | None,
    batch_axes: AxesByPath,
    structure: ByPath[Structure] | None = None,
    topology: ByPath[Topology] | None = None,
    schedule: Schedule | None = None,
    given: Mapping[str, np.ndarray] | None = None,
    argument: str = "params",
    of_neurons: bool = False,
    warn: bool = True,
) -> Plan:
    """The plan of a tree without boxes.

    Args:
      params: the tree; only shapes matter.
      distribution: what gives the counts; None where the user gave masks.
      prunable: ``(path, leaf) -> bool``, which leaves may be sparse.
      out_axes: which axes index neurons, as users give it.
      batch_axes: which index the layers of a stack.
      structure: the layers' patterns.
      topology: of the layers, whose schedules count; None: ``schedule`` counts for all of them.
      schedule: the density's.
      given: how many weights the user's masks have in each layer of a leaf, by path.
      argument: what errors call the tree.
      of_neurons: whether the neurons' axes matter where nothing here asks for them: distributions
        ask for those of convolutions, structures for all.
      warn: whether to warn of kernels that matter and whose axes nothing tells.

    Raises:
      TypeError: ``prunable`` chooses a leaf that is not floating.
      ValueError: nothing is prunable, or something does not fit the layers.
    """
    layers = maskable_layers(params, prunable, batch_axes, argument)
    of_all = of_neurons or structure is not None
    axes = out_axes_of(
        params,
        out_axes,
        batch_axes,
        concerns=lambda path, leaf: warn and path in layers and (of_all or leaf.ndim > 2),
    )
    shapes = {path: leaf.shape for path, leaf in named_leaves(params).items() if path in layers}
    schedules = _schedules(list(layers), topology, schedule)
    structures = structure_of("structure", structure, list(layers))
    of_names: Mapping[str, tuple[int, ...]] = {}
    final: dict[str, int] = {}
    if distribution is None:
        for path in structures:
            if given is not None and path in given:
                final |= zip(layers[path].names, given[path].tolist(), strict=True)
    else:
        of_names = shapes_by_name(params, layers, axes, batch_axes)
        final = layer_counts(distribution, of_names)
    for path, own in layers.items():
        if path not in structures or own.names[0] not in final:
            continue
        if all(final[name] == math.prod(own.shape) for name in own.names):
            del structures[path]
            continue
        kernel = kernel_axes(path, len(shapes[path]), axes, batch_axes)
        for name in own.names:
            with named(name):
                final[name] = structures[path].rounded(final[name], own.shape, layer_axes(kernel))
    if distribution is None:
        return Plan(layers, shapes, axes, batch_axes, None, structures, schedules, {}, final, final)
    _check_fixed(distribution, structures, layers)
    initial = dict(final)
    for path, one in schedules.items():
        names = layers[path].names
        initial |= _initial(distribution, one, of_names, final, names)
    return Plan(
        layers,
        shapes,
        axes,
        batch_axes,
        distribution,
        structures,
        schedules,
        of_names,
        initial,
        final,
    )


def _outside(distribution: Any, names: Sequence[str]) -> set[str]:
    """The layers that a distribution leaves out of its budget; one of the user's own has all in."""
    outside = getattr(distribution, "outside", None)
    return set() if outside is None else set(outside(names))


def _check_fixed(
    distribution: ByPath[Distribution],
    structures: Mapping[str, Structure],
    layers: Mapping[str, Layers],
) -> None:
    """Raise where a layer's count goes by scores, and its structure allows one count alone."""
    path_of = {name: path for path, own in layers.items() for name in own.names}
    distributions: list[tuple[Any, tuple[int, ...]]] = grouped(
        "distribution", distribution, list(path_of)
    )
    for one, numbers in distributions:
        names = [name for i, name in enumerate(path_of) if i in numbers]
        if not hasattr(one, "counts_from_scores"):
            continue
        for name in sorted(set(names) - _outside(one, names)):
            structure = structures.get(path_of[name])
            if isinstance(structure, NM):
                raise ValueError(
                    f"structure of {name!r}: {structure} must keep {structure.n} of each "
                    f"{structure.m} weights of a layer, and {one} counts by scores; "
                    f"Uniform(1 - {structure.n} / {structure.m}) fits"
                )


def _schedules(
    paths: list[str], topology: ByPath[Topology] | None, schedule: Schedule | None
) -> dict[str, Schedule]:
    """The schedule of each leaf that has one."""
    if topology is None:
        return {} if schedule is None else dict.fromkeys(paths, schedule)
    found: dict[str, Schedule] = {}
    for one, numbers in grouped("topology", topology, paths):
        own = one.own_schedule or schedule
        if own is not None and not isinstance(one, Static):
            found |= {paths[i]: own for i in numbers}
    return found


def _initial(
    distribution: ByPath[Distribution],
    schedule: Schedule,
    shapes: Mapping[str, tuple[int, ...]],
    final: Mapping[str, int],
    names: Sequence[str],
) -> dict[str, int]:
    """How many weights these layers have at the schedule's initial sparsity."""
    sparsity = schedule.initial_sparsity
    sizes = {name: math.prod(shapes[name]) for name in names}
    if sparsity == 0.0:
        return sizes
    counts: dict[str, int] = {}
    for one, numbers in grouped("distribution", distribution, list(shapes)):
        own = {name: shapes[name] for i, name in enumerate(shapes) if i in numbers}
        if not own:
            continue
        if dataclasses.is_dataclass(one) and hasattr(one, "sparsity"):
            counts |= dataclasses.replace(one, sparsity=sparsity).layer_counts(own)
        else:
            counts |= {n: max(final[n], round((1 - sparsity) * math.prod(own[n]))) for n in own}
    return {name: counts.get(name, sizes[name]) for name in names}
