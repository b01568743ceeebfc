"""What SparseOpt corrects, in the network of a config's own runs: gradients by their fan-in.

Behind a batch normalisation a neuron's gradient goes with 1 / the standard deviation of its
pre-activation, which goes with sqrt(fan-in) where all active weights have one variance, as they do
before the first step. So the gradient's norm per active weight (root mean square over a neuron's
active weights) goes with fan-in to the power -1/2, and once SparseOpt has multiplied it by
sqrt(fan-in / the layer's mean) with the power 0. Later, other things decide: weights that have
grown are small, and neurons that are of use grow more of them (`reproduce neuron-steps`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import sparseopt_jax as sx
from experiments import data, distributed, metrics
from experiments.build import is_normalised
from experiments.config import Config
from experiments.functions import method_functions, model_functions
from experiments.paper.neuron_steps import pooled_slope
from experiments.programs import compile_init, compile_start
from experiments.reporting import plots, seed_statistics, tables
from experiments.reporting.drawing import drawn, library

if TYPE_CHECKING:
    import matplotlib.figure

THEORY = {"raw": -0.5, "corrected": 0.0}
"""The power of the fan-in that the gradient's norm per active weight goes with."""

_BINS = 8


@dataclasses.dataclass(frozen=True)
class Neurons:
    """Neurons of one layer, (neurons,) each.

    Attributes:
      fan_in: active incoming weights, at least one.
      raw: root mean square of the loss's gradient over them and over batches.
      corrected: the same of what SparseOpt makes of it.
    """

    fan_in: np.ndarray
    raw: np.ndarray
    corrected: np.ndarray


def measure(config: Config, dataset: data.Data) -> list[list[Neurons]]:
    """Takes the gradients of the first epoch's batches, all of them before the first step.

    Weights, masks and batches are those of the runs that `experiments.train` trains.

    Args:
      config: with a sparse method; before the first step all of them have the same gradient.
      dataset: what the config names.

    Returns:
      For each seed the sparse layers that a normalisation follows.
    """
    sparse = (c for c in map(config.for_method, config.methods()) if c.topology != "dense")
    model = model_functions(config, dataset)
    method = method_functions(next(sparse), dataset, model)
    init = compile_init(model, dataset.mesh)
    start = compile_start(model, method, dataset.mesh)

    @jax.jit
    def of_batch(params: Any, batch_stats: Any, masks: Any, *batch: Any) -> Any:
        gradient, _ = jax.grad(method.loss, has_aux=True)(params, batch_stats, *batch)
        return squares(gradient, masks)

    measured = []
    for seed in map(np.int32, range(config.seed, config.seed + config.seeds)):
        state = start(*init(seed), seed)
        masks = sx.get_masks(state.opt_state)
        batches = dataset.train_batches(int(seed), 0)
        each = [
            distributed.to_host(of_batch(state.params, state.batch_stats, masks, *next(batches)))
            for _ in range(data.steps_per_epoch(config, dataset))
        ]
        mean = jax.tree.map(lambda *of: np.mean(of, axis=0), *each)
        measured.append(by_neuron(mean, distributed.to_host(masks)))
    return measured


def squares(gradient: Any, masks: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Sums of squares over each neuron's active weights, of a gradient and of its correction.

    Args:
      gradient: of the loss; pytree of kernels (..., neurons) and other leaves.
      masks: bool arrays of the same paths and shapes.

    Returns:
      By path, for kernels that a normalisation follows: (neurons,) raw and corrected.
    """
    correction = sx.scale_by_sparseopt(layers=is_normalised)
    corrected, _ = correction.update(gradient, correction.init(gradient), masks=masks)
    raw, corrected, masks = map(metrics.path_leaves, (gradient, corrected, masks))

    def square(path: str, values: Any) -> jax.Array:
        active = jnp.where(masks[path], values[path], 0.0)
        return jnp.square(active).reshape(-1, active.shape[-1]).sum(axis=0)

    paths = [path for path, leaf in raw.items() if leaf.ndim > 1 and is_normalised(path)]
    return {path: (square(path, raw), square(path, corrected)) for path in paths}


def by_neuron(sums: Mapping[str, tuple[np.ndarray, np.ndarray]], masks: Any) -> list[Neurons]:
    """The neurons of each sparse layer.

    Args:
      sums: what `squares` returned, or its mean over batches, on the host.
      masks: bool arrays, on the host.

    Example:
      >>> sums = {"kernel": (np.array([4.0, 8.0]), np.array([1.0, 2.0]))}
      >>> (layer,) = by_neuron(sums, {"kernel": np.array([[True, True], [False, True]])})
      >>> layer.fan_in.tolist(), layer.raw.tolist(), layer.corrected.tolist()
      ([1, 2], [2.0, 2.0], [1.0, 1.0])
    """
    layers = []
    for path, mask in metrics.path_leaves(masks).items():
        if path not in sums or mask.all():
            continue
        fan_in = mask.reshape(-1, mask.shape[-1]).sum(axis=0)
        some = fan_in > 0
        raw, corrected = (np.sqrt(square[some] / fan_in[some]) for square in sums[path])
        layers.append(Neurons(fan_in[some], raw, corrected))
    return layers


def slopes(seeds: Sequence[Sequence[Neurons]]) -> dict[str, dict[str, Any]]:
    """The slope of the log of the gradient's norm per active weight over the log of fan-in.

    Args:
      seeds: what `measure` returned.

    Returns:
      For `raw` and `corrected` `n`, `mean`, `std` and `values` over seeds, each over the neurons of
      all layers, of which each has a mean of its own; and `theory`.
    """
    return {
        name: seed_statistics.describe_given([pooled_slope(_logs(of, name)) for of in seeds])
        | {"theory": theory}
        for name, theory in THEORY.items()
    }


def table(measured: Mapping[str, Mapping[str, Any]], neurons: int, layers: int) -> str:
    """The slopes as text.

    Args:
      measured: what `slopes` returned.
      neurons: how many, of one seed.
      layers: how many they are in.
    """
    words = {
        "raw": "batch norm divides by a spread ~ sqrt(fan-in)",
        "corrected": "SparseOpt multiplies by sqrt(fan-in / layer's mean)",
    }
    lines = [
        f"Gradient per active weight against fan-in, {neurons} neurons of {layers} sparse layers,",
        "before the first step; slope of log over log, mean ± std over"
        f" {measured['raw']['n']} seed(s):",
    ]
    for name, row in measured.items():
        slope = tables.plus_minus(row, 1, 2, "+")
        lines.append(f"  {name:<9}  {slope:>14}  theory {row['theory']:4g}: {words[name]}")
    return "\n".join(lines)


@drawn
def figure(seeds: Sequence[Sequence[Neurons]], title: str) -> matplotlib.figure.Figure:
    """Draws the gradient per active weight against fan-in, raw and corrected, and the theory.

    Args:
      seeds: what `measure` returned.
      title: of the whole figure.

    Returns:
      The figure; a dot is a neuron of a seed, in units of its layer's geometric mean.
    """
    picture = library().figure.Figure(figsize=(10, 5), dpi=150, layout="constrained")
    panels = picture.subplots(1, 2, sharex=True, sharey=True)
    measured = slopes(seeds)
    for axes, (name, theory) in zip(panels, THEORY.items(), strict=True):
        x, y = _centred([pair for of in seeds for pair in _logs(of, name)])
        axes.plot(
            np.exp(x), np.exp(y), ls="", marker="o", ms=2.5, mew=0, alpha=0.4,
            color=plots.COLOURS["sky"], label="a neuron",
        )  # fmt: skip
        ends = np.array([x.min(), x.max()])
        axes.plot(
            np.exp(ends), np.exp(theory * ends), color=plots.COLOURS["vermilion"], lw=1.8, ls="--",
            zorder=3, label=f"theory: fan-in to the power {theory:g}",
        )  # fmt: skip
        centre, mean, error = _binned(x, y)
        low, high = np.exp(mean) - np.exp(mean - error), np.exp(mean + error) - np.exp(mean)
        axes.errorbar(
            np.exp(centre), np.exp(mean), yerr=(low, high), color=plots.COLOURS["black"],
            marker="o", ms=4.5, lw=1.2, capsize=2.5, zorder=4,
            label=f"geometric mean of 1/{_BINS} of them, ± 2 standard errors",
        )  # fmt: skip
        slope = tables.plus_minus(measured[name], 1, 2, "+")
        axes.set_title(f"{name} gradient: slope {slope}, n = {len(seeds)}", fontsize=10)
        axes.set_xlabel("a neuron's fan-in, over its layer's geometric mean", fontsize=9)
        for axis, ticks in ((axes.xaxis, (0.25, 0.5, 1, 2)), (axes.yaxis, (0.25, 0.5, 1, 2, 4))):
            axis.axes.set(**{f"{axis.axis_name}scale": "log"})
            axis.set_major_locator(library().ticker.FixedLocator(ticks))
            axis.set_major_formatter(library().ticker.FormatStrFormatter("%g"))
            axis.set_minor_locator(library().ticker.NullLocator())
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower left", framealpha=0.9)
    most = max(np.quantile(np.abs(y), 0.998), 0.5)
    panels[0].set_ylim(np.exp(-1.6 * most), np.exp(most))  # room for the legend
    panels[0].set_ylabel(
        "gradient's norm per active weight,\nover its layer's geometric mean", fontsize=9
    )
    picture.suptitle(title, fontsize=11)
    return picture


def _logs(layers: Sequence[Neurons], name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each layer the logs of fan-in and gradient, where a neuron has one."""
    pairs = []
    for layer in layers:
        gradient = getattr(layer, name)
        some = gradient > 0
        pairs.append((np.log(layer.fan_in[some]), np.log(gradient[some])))
    return pairs


def _centred(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """All layers' neurons, each less its layer's mean."""
    x, y = (
        np.concatenate([part - part.mean() for part in parts if part.size])
        for parts in zip(*pairs, strict=True)
    )
    return x, y


def _binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of parts of equal size, by x: mean of x and of y, and two standard errors of the latter."""
    parts = np.array_split(np.argsort(x, kind="stable"), min(_BINS, x.size))
    means = [(x[part].mean(), y[part].mean()) for part in parts]
    errors = [2 * y[part].std() / np.sqrt(part.size) for part in parts]
    centre, mean = np.array(means).T
    return centre, mean, np.array(errors)
