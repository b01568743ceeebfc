"""Why a correction for fan-in may or may not matter: the steps that neurons take, by their fan-in.

Behind a batch normalisation, w_i, the incoming weights of neuron i, matter by their direction
alone. So the gradient is orthogonal to w_i and goes with 1/|w_i|; a step of plain SGD makes w_i
longer, and what moves the function is the relative step |change of w_i| / |w_i|. A neuron whose
gradient is too large thus lengthens its weights until its relative steps are small; weight decay
and momentum, which are part of the steps here, work against that or blur it.

What is measured is the slope of the logs of three quantities over the log of the fan-in f_i (active
incoming weights), over the neurons of the sparse layers that a normalisation follows:

  relative_step          |change of w_i| / |w_i| in one training step, momentum and decay included
  gradient_per_weight    root mean square of the loss's gradient over the neuron's active weights,
                         before any correction
  squared_weight         |w_i|^2 / f_i: mean square of the neuron's active weights

At initialisation all active weights are of one variance, whatever the fan-in, so theory gives 0 for
the third; a pre-activation's standard deviation goes with sqrt(f), by which the normalisation
divides gradients, so -1/2 for the second; then |gradient| has slope 0 and |w_i| has 1/2, so the
first is -1/2 with SGD, and 0 with SparseOpt, which multiplies by sqrt(f_i / mean f). (The effective
learning rate, rate / |w_i|^2, has -1.) That is of averages; the log of a mean of f squares of
normal numbers lies on average below the mean's log, by 0.58 at f = 2, 0.27 at 4 and 0.06 at 16, so
where fan-ins are small these slopes begin higher. `min_fan_in` leaves such neurons out.

A topology update adds weights of value 0 to some neurons, which makes them move far for their
length; with `topology="static"` the slopes are free of that.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import sparseopt_jax as sx
from experiments import data, metrics
from experiments.build import is_normalised
from experiments.config import Config, ConfigError
from experiments.paper.kept import Kept
from experiments.programs import MethodPrograms, ModelPrograms, compile_method, compile_model
from experiments.reporting import plots, seed_statistics, tables
from experiments.reporting.drawing import drawn, layers, library
from experiments.run import total_steps
from experiments.stepping import Stepper

if TYPE_CHECKING:
    import matplotlib.figure

STEPS = (0, 10, 30, 90, 190, 390)
"""Steps done before the one that is measured; with an update every 100 steps, none is an update."""

QUANTITIES: Mapping[str, str] = {
    "relative_step": "relative step of a neuron, |change of w| / |w|",
    "gradient_per_weight": "gradient of a neuron's active weights, root mean square",
    "squared_weight": "mean square of a neuron's active weights, |w|^2 / fan-in",
}
"""What slopes are measured of, and what that is in words."""

Groups = Sequence[tuple[np.ndarray, np.ndarray]]
"""For each layer x and y of its neurons, (neurons,) each."""


def measure(
    config: Config,
    steps: Sequence[int] | None = None,
    say: Callable[[str], object] = print,
    min_fan_in: int = 2,
    keep: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Trains every method and seed of a config up to the last of `steps`, measuring at each.

    Weights, masks, batches and steps are those of `experiments.train` for the same config, and so
    are the schedules: of the whole run, which is not trained to its end. Layers whose neurons all
    have the same fan-in have no slope, and add nothing to that of the others. Where the measured
    step changes the topology, only weights that are active before and after it
    are looked at.

    Args:
      config: of sparse methods, e.g. `compare=("sgd", "sparseopt")`.
      steps: after how many training steps the next one is measured, ascending; None: those of
        `STEPS` that the run has.
      say: called with a line of text for each run that is done.
      min_fan_in: neurons with fewer active weights are left out; at least 1.
      keep: a file for the runs that are done, which are not trained again; None: none.

    Returns:
      What can be written as JSON: `setting`, `steps`, `seeds`, `min_fan_in`, `layers` (that are
      sparse and normalised), `commits` (of the code that measured), and `slopes`: by method and
      quantity (see `QUANTITIES`), for every step in order `step`, `n`, `mean` and `std` over seeds
      (None where there is no slope, or no second seed) and `values`, by seed; and `neurons`, by
      method, for every step how many there were in the first seed.

    Raises:
      ConfigError: `steps` does not fit the run, `min_fan_in` is below 1, a method is dense, or
        `keep` is of another measurement; or as `data.load`.
      DataError: a file of the dataset is damaged.
    """
    if "dense" in config.methods():
        raise ConfigError(
            f"compare={','.join(config.compare)} and topology={config.topology!r}: without masks"
            " all neurons of a layer have one fan-in; take sparse methods alone, e.g."
            " compare=sgd,sparseopt"
        )
    if isinstance(min_fan_in, bool) or not isinstance(min_fan_in, int) or min_fan_in < 1:
        raise ConfigError(f"min_fan_in={min_fan_in!r} must be an integer of at least 1")
    dataset = data.load(config, say)
    total = total_steps(config, dataset)
    steps = [step for step in STEPS if step < total] if steps is None else steps
    _check_steps(steps, total)
    kept = Kept(keep, config, {"steps": steps, "min_fan_in": min_fan_in})
    model = compile_model(config, dataset)
    layers = [path for path in model.layers if is_normalised(path)]
    seeds = range(config.seed, config.seed + config.seeds)
    slopes: dict[str, Any] = {}
    neurons: dict[str, Any] = {}
    gradients: list[Callable[..., Any]] = []  # one: all methods have the same loss

    @functools.cache
    def compiled(method: str) -> MethodPrograms:
        return compile_method(config.for_method(method), dataset, model)

    def train(method: str, seed: int) -> list[dict[str, Any]]:
        programs = compiled(method)
        if not gradients:
            gradients.append(jax.jit(jax.grad(programs.functions.loss, has_aux=True)))
        return _run(model, programs, gradients[0], dataset, seed, steps, layers, min_fan_in)

    for method in config.methods():
        runs = []
        for seed in seeds:
            of_run = functools.partial(train, method, seed)
            runs.append(kept.part(f"{method} seed {seed}", of_run))
            say(f"steps by fan-in: {method} seed {seed}, {steps[-1] + 1} steps, done")
        slopes[method] = {
            name: [
                {"step": step} | seed_statistics.describe_given([run[i][name] for run in runs])
                for i, step in enumerate(steps)
            ]
            for name in QUANTITIES
        }
        neurons[method] = [int(at["neurons"]) for at in runs[0]]
    return {
        "setting": {
            name: getattr(config, name)
            for name in (
                "dataset", "pool", "model", "sparsity", "distribution", "topology", "init",
                "update_interval", "learning_rate", "momentum", "weight_decay", "batch_size",
            )
        },
        "steps": list(steps),
        "seeds": list(seeds),
        "min_fan_in": min_fan_in,
        "layers": layers,
        "slopes": slopes,
        "neurons": neurons,
        "commits": kept.commits,
    }  # fmt: skip


def neuron_values(
    before: np.ndarray,
    after: np.ndarray,
    gradient: np.ndarray,
    mask: np.ndarray,
    min_fan_in: int = 2,
) -> dict[str, np.ndarray]:
    """What is measured of each neuron of a layer.

    Args:
      before: kernel before a step, (..., neurons).
      after: the same after it.
      gradient: of the loss, before it.
      mask: bool, which weights to look at.
      min_fan_in: neurons with fewer of these are left out; at least 1.

    Returns:
      `fan_in` and the `QUANTITIES`, float64, (neurons that are left,) each.

    Example:
      >>> kernel = np.array([[3.0], [4.0]])
      >>> values = neuron_values(kernel, 1.1 * kernel, kernel, np.ones((2, 1), bool))
      >>> values["squared_weight"].tolist(), round(float(values["relative_step"][0]), 6)
      ([12.5], 0.1)
    """
    incoming = tuple(range(mask.ndim - 1))
    fan_in = mask.sum(axis=incoming)
    some = fan_in >= min_fan_in

    def square(values: np.ndarray) -> np.ndarray:
        squares: np.ndarray = np.where(mask, values, 0.0).astype(np.float64) ** 2
        return squares.sum(axis=incoming)[some]

    fan_in = fan_in[some].astype(np.float64)
    weight = square(before)
    with np.errstate(divide="ignore", invalid="ignore"):  # a neuron of zeros only: has no slope
        step = np.sqrt(square(after.astype(np.float64) - before) / weight)
    return {
        "fan_in": fan_in,
        "relative_step": step,
        "gradient_per_weight": np.sqrt(square(gradient) / fan_in),
        "squared_weight": weight / fan_in,
    }


def pooled_slope(groups: Groups) -> float | None:
    """The slope of y over x by least squares, one for all groups, each with a mean of its own.

    Args:
      groups: x and y of each group; points that are not finite do not count.

    Returns:
      The slope; None where x is the same throughout every group.

    Example:
      >>> pooled_slope([(np.array([0.0, 1.0]), np.array([5.0, 7.0]))])
      2.0
    """
    products = squares = 0.0
    for x, y in groups:
        finite = np.isfinite(x) & np.isfinite(y)
        x, y = x[finite], y[finite]
        if x.size == 0 or (x == x[0]).all():
            continue
        centred = x - x.mean()
        products += float(centred @ (y - y.mean()))
        squares += float(centred @ centred)
    return products / squares if squares > 0 else None


def table(results: Mapping[str, Any]) -> str:
    """The slopes as text: a block for each quantity, a row for each step.

    Args:
      results: what `measure` returned.

    Returns:
      Lines of at most 100 columns, for up to five methods.
    """
    setting, slopes = results["setting"], results["slopes"]
    lines = [
        "Slope of the log of a quantity over the log of fan-in, over neurons with at least"
        f" {results['min_fan_in']},",
        f"in {len(results['layers'])} normalised layers ({setting['model']}, {setting['dataset']},"
        f" {setting['topology']}, sparsity {setting['sparsity']:g}); mean ± std over"
        f" {len(results['seeds'])} seed(s).",
    ]
    for name, words in QUANTITIES.items():
        lines += ["", words, f"{'after step':>10}" + "".join(f"  {m:>15}" for m in slopes)]
        for i, step in enumerate(results["steps"]):
            cells = (tables.plus_minus(slopes[method][name][i], 1, 3, "+") for method in slopes)
            lines.append(f"{step:10d}" + "".join(f"  {cell:>15}" for cell in cells))
    return "\n".join(lines)


@drawn
def figure(results: Mapping[str, Any]) -> matplotlib.figure.Figure:
    """Draws the slopes against the training step: a panel for each quantity, a line for a method.

    Args:
      results: what `measure` returned.
    """
    picture = library().figure.Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    panels = picture.subplots(1, len(QUANTITIES))
    look = plots.styles(results["slopes"])
    lies = layers(look)
    for axes, (name, words) in zip(panels, QUANTITIES.items(), strict=True):
        axes.axhline(0, color="#000000", lw=0.8)
        for method, quantities in results["slopes"].items():
            cells = [cell for cell in quantities[name] if cell["mean"] is not None]
            step = np.array([cell["step"] + 1 for cell in cells])
            mean = np.array([cell["mean"] for cell in cells])
            spread = np.array([cell["std"] or 0.0 for cell in cells])
            color, line = look[method]
            axes.plot(
                step, mean, color=color, ls=line, marker="o", ms=lies[method].marker,
                lw=lies[method].width, zorder=lies[method].zorder, label=method,
            )  # fmt: skip
            axes.fill_between(step, mean - spread, mean + spread, color=color, alpha=0.18, lw=0)
        axes.set_xlim(0.8, 1.25 * (results["steps"][-1] + 1))
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(library().ticker.FuncFormatter(lambda x, _: f"{x:g}"))
        axes.set_title(words.replace(", ", ",\n"), fontsize=9)
        axes.set_xlabel("training step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("slope of its log over log(fan-in)")
    setting = results["setting"]
    picture.suptitle(
        f"Neurons by fan-in: {setting['model']} on {setting['dataset']}, {setting['topology']},"
        f" sparsity {setting['sparsity']:g}",
        fontsize=11,
    )
    handles, labels = panels[0].get_legend_handles_labels()
    picture.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9,
        title=f"line: mean; band: ± 1 standard deviation over {len(results['seeds'])} seed(s)",
        title_fontsize=8,
    )  # fmt: skip
    return picture


def _run(
    model: ModelPrograms,
    programs: MethodPrograms,
    gradient: Callable[..., Any],
    dataset: data.Data,
    seed: int,
    steps: Sequence[int],
    layers: Sequence[str],
    min_fan_in: int,
) -> list[dict[str, Any]]:
    """Slopes, and how many neurons they are of, at every step of a run."""
    state = programs.start(*model.init(np.int32(seed)), np.int32(seed))
    measured = []
    with contextlib.closing(Stepper(programs, dataset, seed, 0)) as stepper:
        for step in steps:
            # Single steps: a compiled loop must not go beyond an epoch's end.
            state, _ = stepper.advance(state, step - stepper.step, single=True)
            masks = sx.get_masks(state.opt_state)
            # The step uses the state's memory again.
            earlier = jax.tree.map(jnp.copy, (state.params, state.batch_stats, masks))
            state, _ = stepper.advance(state, 1, single=True)
            params, batch_stats, masks = earlier
            slope, _ = gradient(params, batch_stats, *stepper.last_batch())
            now = state.params, sx.get_masks(state.opt_state)
            before, old, raw, after, new = (
                metrics.path_leaves(jax.device_get(tree)) for tree in (params, masks, slope, *now)
            )
            measured.append(
                _slopes(
                    neuron_values(
                        before[path], after[path], raw[path], old[path] & new[path], min_fan_in
                    )
                    for path in layers
                )
            )
    return measured


def _slopes(layers: Any) -> dict[str, Any]:
    measured = list(layers)
    slopes: dict[str, Any] = {"neurons": sum(values["fan_in"].size for values in measured)}
    with np.errstate(divide="ignore"):  # the log of 0 is not finite, and does not count
        for name in QUANTITIES:
            slopes[name] = pooled_slope(
                [(np.log(values["fan_in"]), np.log(values[name])) for values in measured]
            )
    return slopes


def _check_steps(steps: Sequence[int], total: int) -> None:
    shown = ",".join(map(str, steps))
    if not steps or list(steps) != sorted(set(steps)) or min(steps) < 0:
        raise ConfigError(f"steps={shown} must be ascending integers of at least 0")
    if steps[-1] >= total:
        raise ConfigError(
            f"steps={shown}: the last must be below {total}, the number of steps of the run"
        )
