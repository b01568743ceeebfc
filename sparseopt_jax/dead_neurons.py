"""A smaller model with the same outputs: neurons without active inputs or outputs leave it.

The model says which of its neurons are read by one layer alone (``neuron_chains``) and makes one of
other widths (``with_inner_widths``); nothing else of a model is known here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from sparseopt_jax.flops import flops
from sparseopt_jax.trees import unboxed

PyTree: TypeAlias = Any

_EPSILON = 1e-5  # of the models' batch normalisation


class Layer(NamedTuple):
    """A convolution or dense layer and what follows it.

    Attributes:
      module: its path, ``"stage1_block0/conv1"``; it has a ``kernel`` whose last two axes are
        inputs and outputs, and may have a ``bias``. A window of more than one place is padded.
      norm: the path of the batch normalisation behind it; None where there is none.
    """

    module: str
    norm: str | None


Chain: TypeAlias = tuple[Layer, ...]


class Shrinkable(Protocol):
    """A model whose neurons can be removed; those of ``sparseopt_jax.models`` are."""

    def neuron_chains(self) -> tuple[Chain, ...]:
        """Layers in a row, with nothing but normalisation and ReLU between them.

        The outputs of each but the last one are read by the next one alone.
        """

    def with_inner_widths(self, widths: Sequence[Sequence[int]]) -> Any:
        """The model with these numbers of outputs, by chain, of each layer but the last."""

    def apply(self, variables: PyTree, x: Any) -> Any:
        """The outputs of a batch, in evaluation."""


class RemovedLayer(NamedTuple):
    """What became of one layer.

    Attributes:
      path: of its kernel.
      neurons: outputs, before and after.
      weights: elements of the kernel, before and after.
      flops: of its products for the batch, every weight counted, before and after; None where no
        batch was given.
    """

    path: str
    neurons: tuple[int, int]
    weights: tuple[int, int]
    flops: tuple[int, int] | None


class Removal(NamedTuple):
    """A smaller model, and what was removed; ``print`` shows the latter as a table.

    Attributes:
      model: of the new widths.
      variables: its ``params`` and ``batch_stats``.
      widths: by chain, the outputs of each layer but the last.
      layers: the layers of the chains.

    Example:
      >>> import sparseopt_jax as sx
      >>> layer = RemovedLayer("kernel", neurons=(8, 5), weights=(32, 20), flops=(64, 40))
      >>> print(sx.Removal(None, {}, ((5,),), (layer,)))
      layer     neurons   weights     FLOPs
      kernel     8 -> 5  32 -> 20  64 -> 40
      together   8 -> 5  32 -> 20  64 -> 40
    """

    model: Any
    variables: dict[str, Any]
    widths: tuple[tuple[int, ...], ...]
    layers: tuple[RemovedLayer, ...]

    def __str__(self) -> str:
        """A table: neurons, weights and FLOPs of each layer that has changed, and of all."""
        header = ["layer", "neurons", "weights"]
        tables = [[layer.neurons, layer.weights] for layer in self.layers]
        counted = [layer.flops for layer in self.layers if layer.flops is not None]
        if counted:
            header.append("FLOPs")
            tables = [[*row, flops] for row, flops in zip(tables, counted, strict=True)]
        together = [(sum(a for a, _ in c), sum(b for _, b in c)) for c in zip(*tables, strict=True)]
        named = zip([layer.path for layer in self.layers], tables, strict=True)
        changed = [(path, row) for path, row in named if row[1][0] != row[1][1]]
        rows = [header] + [
            [path, *(f"{a:,} -> {b:,}" for a, b in row)]
            for path, row in [*changed, ("together", together)]
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        )


def remove_dead_neurons(
    model: Shrinkable, variables: Mapping[str, PyTree], x: Any | None = None
) -> Removal:
    """Remove the neurons that have no active inputs or no active outputs, to a fixed point.

    What is removed depends on which weights are zero, and the outputs stay as they were in
    evaluation, with the running statistics, to rounding:

    - A neuron of which the next layer reads nothing always goes.
    - A neuron without inputs is a constant, ReLU of its bias, or of its normalised zero. It goes
      where that is 0. Otherwise what it adds to the next layer moves into the mean of that layer's
      batch normalisation, or into its bias, unless the next convolution is padded: there the
      constant is missing at the border, and the neuron stays.
    - Channels of a residual stream stay, since every block reads them and adds to them; within a
      block the convolutions lose their inner channels. The last neuron of a layer stays.

    Either removal may leave others without inputs or outputs, which go too. Where only neurons
    without outputs go, the smaller model also trains as the larger one would; a constant that has
    moved is one of the running statistics and not of a batch's.

    Args:
      model: an ``MLP`` or ``ResNet`` of ``sparseopt_jax.models``, the latter of any kind; or
        anything with the methods of ``dead_neurons.Shrinkable``. Layer normalisation computes with
        all neurons, so an MLP with it is refused.
      variables: ``params`` and, with batch normalisation, ``batch_stats``. Inactive weights are 0.
      x: a batch, or its ``jax.ShapeDtypeStruct``, for which to count FLOPs.

    Returns:
      The smaller model, its variables (NumPy's arrays), widths, and a report.

    Raises:
      TypeError: ``model`` has no such methods.
      ValueError: the model has layer normalisation, or ``variables`` are not its.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> from sparseopt_jax import models
      >>> model, x = models.MLP(features=(8,), num_classes=2), jnp.ones((1, 4))
      >>> variables = jax.jit(model.init)(jax.random.key(0), x)
      >>> head = variables["params"]["head"]
      >>> head["kernel"] = head["kernel"].at[:3].set(0)  # nothing reads three of the neurons
      >>> removal = sx.remove_dead_neurons(model, variables)
      >>> print(removal)
      layer          neurons   weights
      dense0/kernel   8 -> 5  32 -> 20
      head/kernel     2 -> 2  16 -> 10
      together       10 -> 7  48 -> 30
      >>> removal.model.features
      (5,)
    """
    if not (hasattr(model, "neuron_chains") and hasattr(model, "with_inner_widths")):
        raise TypeError(
            "model must be an MLP or ResNet of sparseopt_jax.models, or have the methods"
            f" neuron_chains and with_inner_widths; got {type(model).__name__}"
        )
    chains = model.neuron_chains()
    net = _Net(variables)
    before = net.sizes(chains)
    for chain in chains:
        net.shrink(chain)
    after = net.sizes(chains)
    widths = tuple(tuple(net.kernel(layer).shape[-1] for layer in chain[:-1]) for chain in chains)
    smaller = model.with_inner_widths(widths)
    counts: list[Mapping[str, int]] = []
    if x is not None:
        counts = [_flops(model, variables, x), _flops(smaller, net.variables, x)]
    layers = tuple(
        RemovedLayer(
            path,
            (shape[-1], after[path][-1]),
            (int(np.prod(shape)), int(np.prod(after[path]))),
            (counts[0][path], counts[1][path]) if counts else None,
        )
        for path, shape in before.items()
    )
    return Removal(smaller, net.variables, widths, layers)


def _flops(model: Any, variables: Mapping[str, PyTree], x: Any) -> dict[str, int]:
    """Of the products of each layer, by the path of its kernel."""
    others = {name: tree for name, tree in variables.items() if name != "params"}

    def forward(params: PyTree, others: PyTree, x: Any) -> Any:
        return model.apply({"params": params, **others}, x)

    count = flops(forward, variables["params"], None, others, x)
    return {path: layer.dense for path, layer in count.layers.items()}


class _Net:
    """Variables that shrink; all arrays are NumPy's, and no one else's."""

    def __init__(self, variables: Mapping[str, PyTree]) -> None:
        if "params" not in variables:
            raise ValueError(
                f'variables must have "params", as model.init returns them; got {[*variables]}'
            )
        self.variables = {name: _copied(unboxed(tree)) for name, tree in variables.items()}

    def kernel(self, layer: Layer) -> np.ndarray:
        """The kernel of a layer."""
        return np.asarray(self._at("params", layer.module)["kernel"])

    def sizes(self, chains: Sequence[Chain]) -> dict[str, tuple[int, ...]]:
        """Shapes of the kernels by path."""
        layers = [layer for chain in chains for layer in chain]
        return {f"{layer.module}/kernel": self.kernel(layer).shape for layer in layers}

    def shrink(self, chain: Chain) -> None:
        """Removes what can be, until nothing can."""
        pairs = list(itertools.pairwise(chain))
        while any(self._remove(layer, following) for layer, following in pairs):
            pass

    def _remove(self, layer: Layer, following: Layer) -> bool:
        """Removes neurons of ``layer``; whether there were any."""
        kernel, reader = self.kernel(layer), self.kernel(following)
        has_inputs = (kernel != 0).any(axis=tuple(range(kernel.ndim - 1)))
        over = tuple(axis for axis in range(reader.ndim) if axis != reader.ndim - 2)
        is_read = (reader != 0).any(axis=over)
        constant = self._constant(layer)
        padded = reader.size > reader.shape[-1] * reader.shape[-2]
        moves = np.isfinite(constant) & (not padded)
        removed = ~is_read | (~has_inputs & ((constant == 0) | moves))
        if removed.all():
            removed[0] = False  # there is no layer of no neurons
        if not removed.any():
            return False
        moved = np.where(removed & ~has_inputs & is_read, constant, 0)
        if moved.any():
            over = tuple(range(reader.ndim - 1))
            self._add(following, (moved[:, None] * reader.astype(np.float64)).sum(over))
        self._take(layer, ~removed, axis=-1)
        self._take(following, ~removed, axis=-2)
        return True

    def _constant(self, layer: Layer) -> np.ndarray:
        """What comes out of each neuron where nothing comes in."""
        module = self._at("params", layer.module)
        out = np.asarray(module.get("bias", 0.0), np.float64)
        if layer.norm is not None:
            norm, stats = (self._at(kind, layer.norm) for kind in ("params", "batch_stats"))
            mean, var, scale, bias = (
                np.asarray(array, np.float64)
                for array in (stats["mean"], stats["var"], norm["scale"], norm["bias"])
            )
            out = (out - mean) / np.sqrt(var + _EPSILON) * scale + bias
        return np.maximum(out, 0)

    def _add(self, layer: Layer, constant: np.ndarray) -> None:
        """Adds a constant to what comes out of a layer."""
        if layer.norm is not None:
            tree, name, sign = self._at("batch_stats", layer.norm), "mean", -1
        else:
            tree, name, sign = self._at("params", layer.module), "bias", 1
        tree[name] = (tree[name].astype(np.float64) + sign * constant).astype(tree[name].dtype)

    def _take(self, layer: Layer, kept: np.ndarray, axis: int) -> None:
        """Keeps some of the outputs (axis -1) or inputs (-2) of a layer."""
        module = self._at("params", layer.module)
        module["kernel"] = np.compress(kept, module["kernel"], axis)
        if axis == -2:
            return
        of_neurons = [module] if "bias" in module else []
        if layer.norm is not None:
            of_neurons += [self._at(kind, layer.norm) for kind in ("params", "batch_stats")]
        for tree in of_neurons:
            tree |= {name: a[kept] for name, a in tree.items() if name != "kernel"}

    def _at(self, kind: str, path: str) -> dict[str, Any]:
        tree: Any = self.variables.get(kind)
        for part in path.split("/"):
            if not isinstance(tree, Mapping) or part not in tree:
                raise ValueError(
                    f"variables have no {path!r} in {kind!r}: they must be those of the model, as"
                    " model.init returns them"
                )
            tree = tree[part]
        found: dict[str, Any] = tree
        return found


def _copied(tree: PyTree) -> PyTree:
    """Nested dicts with copies of the arrays."""
    if isinstance(tree, Mapping):
        return {name: _copied(value) for name, value in tree.items()}
    return np.array(tree)
