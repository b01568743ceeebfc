"""How much a layer's sparsity enlarges its gradient, by normalisation: sparse over dense.

The net is an MLP of two layers: inputs, one sparse hidden layer (uniform sparsity, random mask),
normalisation, ReLU, a dense head. All is measured at initialisation: the sparse net has the dense
one's weights, with those that are not active set to 0. The ratio is

    |gradient of the sparse net| / |gradient of the dense net|

of the mean loss over a batch with respect to the hidden layer's kernel, both norms taken over the
same weights: the active ones.

What theory gives, for independent weights of mean 0 and a density d = 1 - s: a pre-activation's
variance shrinks by d. Batch and layer normalisation divide by its root, so behind them the net
sees what it saw before; on the way back they divide the gradient by it, and each active weight's
grows by 1/sqrt(d). Without normalisation there is no such factor, and 1 remains, as long as what
comes back from the head does not change: the head sees smaller activations, and where its logits
are large the softmax's errors change with them. (`norm_ratio`, the sparse net's norm over the
active weights by the dense net's over all of them, is sqrt(d) times the ratio: 1 with and sqrt(d)
without normalisation.)

The paper gives neither norm nor layers. Its numbers, 1/sqrt(d) with and 1.00 to 1.08 without
normalisation, fit the first ratio and a sparse hidden layer with a dense head: were more layers
sparse, the ratio without normalisation would fall with d. That choice is ours, and so is that of
the initial weights. `uniform`, within 1/sqrt(fan-in) as PyTorch's linear layers have them, makes
logits small, and is the protocol; with `he_normal` they are of size 1, and shrink, which lowers the
ratio without normalisation. Both are measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparseopt_jax as sx
from experiments import data
from experiments.config import Config, ConfigError
from experiments.paper import reported
from experiments.paper.kept import Kept
from experiments.reporting import plots, seed_statistics, tables
from experiments.reporting.drawing import drawn, layers, library
from sparseopt_jax import models

if TYPE_CHECKING:
    import matplotlib.figure

SPARSITIES = tuple(round(0.1 * i, 1) for i in range(10))
NORMS = ("batch", "layer", "none")

INITS: Mapping[str, Callable[..., jax.Array]] = {
    # Uniform on (-1, 1) / sqrt(fan-in) has a variance of 1 / (3 fan-in).
    "uniform": jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
    "he_normal": models.he_normal,
}
"""Initial weights, by name; the first are the protocol's."""

_SHORT = {"batch": "BN", "layer": "LN", "none": "none"}
_LABELS = {
    "batch": "batch normalisation",
    "layer": "layer normalisation",
    "none": "no normalisation",
}
# Those that `plots.styles` gives to new names first are pale for bands.
_STYLES = {
    norm: (plots.COLOURS[color], line)
    for norm, color, line in (
        ("batch", "blue", "-"),
        ("layer", "orange", "--"),
        ("none", "vermilion", "-."),
    )
}
_LAYER = "dense0"


def measure(
    config: Config,
    sparsities: Sequence[float] = SPARSITIES,
    batches: int = 4,
    inits: Sequence[str] = tuple(INITS),
    say: Callable[[str], object] = print,
    keep: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Measures the ratio on the training images of a dataset, for each normalisation.

    Args:
      config: gives the dataset, `hidden`, `batch_size`, and `seed` and `seeds`; a seed draws
        weights, mask and batches. Images are as the dataset has them, neither cropped nor
        mirrored, and normalised per channel. Model, sparsity and optimizer are not used.
      sparsities: of the hidden layer, each in [0, 1).
      batches: batches of a seed; its ratio is the mean over them.
      inits: names of `INITS`; `table` and `figure` put the first one forward.
      say: called with a line of text for each case that is done.
      keep: a file for the seeds of cases that are done, which are not measured again; None: none.

    Returns:
      What can be written as JSON: `protocol`, `sparsities`, `theory` (1 / sqrt(1 - s)), `commits`
      (of the code that measured), and `cases`, one for each initialisation and normalisation, with
      `init`, `norm`, and for every sparsity in `ratio` and `norm_ratio`: `n`, `mean`, `std` (over
      seeds; None for one) and `values` (by seed).

    Raises:
      ConfigError: an argument is wrong, or the dataset cannot be loaded, or `keep` is of another
        measurement.
      DataError: a file of the dataset is damaged.
    """
    _check(sparsities, batches, inits)
    plain = dataclasses.replace(config, augmentation="none", mesh_data=1, mesh_fsdp=1)
    kept = Kept(keep, plain, {"sparsities": sparsities, "batches": batches})
    return measure_on(data.load(plain, say), plain, sparsities, batches, inits, say, kept)


def measure_on(
    dataset: data.Data,
    config: Config,
    sparsities: Sequence[float] = SPARSITIES,
    batches: int = 4,
    inits: Sequence[str] = tuple(INITS),
    say: Callable[[str], object] = print,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """As `measure`, on data that is loaded already."""
    _check(sparsities, batches, inits)
    kept = Kept(None, config, {}) if kept is None else kept
    inputs = int(np.prod(dataset.image_shape))
    counts = [_active(inputs, config.hidden, sparsity) for sparsity in sparsities]
    seeds = range(config.seed, config.seed + config.seeds)
    cases: list[dict[str, Any]] = []
    programs = {norm: make_ratios(dataset, config.hidden, norm) for norm in NORMS}
    masks = jax.jit(functools.partial(_masks, shape=(inputs, config.hidden)))

    def of_seed(init: str, norm: str, seed: int) -> list[list[float]]:
        weights_key, mask_key = jax.random.split(jax.random.key(seed))
        model = _model(dataset, config.hidden, norm, init)
        variables = model.init(weights_key, jnp.zeros((1, inputs)), train=False)
        nets = variables, masks(mask_key, np.array(counts, np.int32))
        return _over_batches(programs[norm], nets, dataset, seed, batches).tolist()

    for init, norm in itertools.product(inits, NORMS):
        by_seed = [
            kept.part(f"{init} {norm} seed {seed}", functools.partial(of_seed, init, norm, seed))
            for seed in seeds
        ]
        same, whole = np.array(by_seed, np.float64).swapaxes(0, 1)
        case = {
            "init": init,
            "norm": norm,
            "ratio": _describe(same),
            "norm_ratio": _describe(whole),
        }
        cases.append(case)
        done = f"{len(cases)} of {len(inits) * len(NORMS)}"
        say(
            f"gradient ratio, {init} weights, normalisation {norm}: {same[:, -1].mean():.3f}"
            f" at sparsity {sparsities[-1]:g} ({done})"
        )
    return {
        "protocol": {
            "dataset": config.dataset,
            "images": "training images, not augmented, normalised per channel",
            "image_shape": list(dataset.image_shape),
            "network": f"MLP: {inputs} inputs, {config.hidden} hidden units, dense head",
            "sparse_layer": f"{_LAYER}/kernel",
            "masks": "uniform sparsity at random, same weights as the dense net's",
            "measured": "at initialisation; norm over the active weights, in both nets",
            "inits": list(inits),
            "batch_size": config.batch_size,
            "batches": batches,
            "seeds": list(seeds),
        },
        "sparsities": [float(sparsity) for sparsity in sparsities],
        "theory": [float(1 / np.sqrt(1 - sparsity)) for sparsity in sparsities],
        "commits": kept.commits,
        "cases": cases,
    }


def make_ratios(dataset: data.Shapes, hidden: int, norm: str) -> Callable[..., Any]:
    """The measurement of one batch, compiled once for all initial weights, seeds and batches.

    Args:
      dataset: gives shapes, number of classes, mean and standard deviation.
      hidden: units of the hidden layer.
      norm: one of `NORMS`.

    Returns:
      A function of the dense net's variables, masks of the hidden layer (bool, (sparsities, inputs,
      hidden)), images (batch, height, width, channels) and labels (batch,). It returns the ratio
      and the ratio of the layers' whole norms, float32, each (sparsities,).
    """
    model = _model(dataset, hidden, norm, next(iter(INITS)))  # applied only, not initialised
    shape = (1, 1, 1, -1)
    mean, std = dataset.mean.reshape(shape), dataset.std.reshape(shape)

    @jax.jit
    def ratios(
        variables: Any, masks: jax.Array, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        inputs = (images.astype(jnp.float32) - mean) / std
        params = variables["params"]
        kernel = params[_LAYER]["kernel"]

        def loss(kernel: jax.Array) -> jax.Array:
            changed = params | {_LAYER: params[_LAYER] | {"kernel": kernel}}
            logits, _ = model.apply(
                variables | {"params": changed}, inputs, train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        def at(dense: jax.Array, item: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
            first, mask = item
            gradient = jax.grad(loss)(jnp.where(mask, kernel, 0.0))
            dense = jnp.where(first, gradient, dense)
            # Side by side, so that they are summed in the same order.
            active = mask.astype(jnp.float32)
            compared = jnp.stack([gradient * active, dense * active, dense])
            sparse, same, whole = jnp.sqrt(jnp.sum(compared**2, axis=(1, 2)))
            return dense, (sparse / same, sparse / whole)

        # The dense net goes through the same compiled loop as the sparse ones, so that at sparsity
        # 0 the ratio is 1 to the last bit.
        all_masks = jnp.concatenate([jnp.ones_like(masks[:1]), masks])
        first = jnp.arange(len(all_masks)) == 0
        _, (same, whole) = jax.lax.scan(at, jnp.zeros_like(kernel), (first, all_masks))
        return same[1:], whole[1:]

    return ratios


def table(results: Mapping[str, Any]) -> str:
    """The ratios as text: a block for each initialisation, with the paper's numbers beside ours.

    Args:
      results: what `measure` returned.

    Returns:
      Lines of at most 100 columns.
    """
    protocol = results["protocol"]
    low, high = reported.GRADIENT_RATIO_WITHOUT_NORM
    lines = [
        f"Gradient, sparse over dense; {protocol['dataset']};",
        f"{protocol['network']}; {protocol['sparse_layer']} is sparse;",
        f"{protocol['measured']}.",
        f"Mean ± standard deviation over {len(protocol['seeds'])} seeds of"
        f" {protocol['batches']} batches of {protocol['batch_size']}.",
    ]
    for init in protocol["inits"]:
        cases = _cases(results, init)
        lines += [
            "",
            f"Initial weights: {init}"
            + (" (the protocol)" if init == protocol["inits"][0] else ""),
            f"{'sparsity':>8}  {'1/sqrt(1-s)':>11}"
            + "".join(f"  {_SHORT[norm]:>15}" for norm in cases)
            + f"  {'paper, BN':>9}",
        ]
        for i, (sparsity, theory) in enumerate(
            zip(results["sparsities"], results["theory"], strict=True)
        ):
            published = reported.GRADIENT_RATIO.get(sparsity)
            lines.append(
                f"{sparsity:8.2f}  {theory:11.3f}"
                + "".join(
                    f"  {tables.plus_minus(case['ratio'][i], 1, 3):>15}" for case in cases.values()
                )
                + f"  {f'{published:.2f}' if published else '':>9}".rstrip()
            )
        lines.append(_farthest(results, cases))
    lines += [
        "",
        "The paper's are of a two-layer MLP on MNIST, read off a figure (none:"
        f" {low:.2f} to {high:.2f}).",
    ]
    return "\n".join(line.rstrip() for line in lines)


@drawn
def figure(results: Mapping[str, Any]) -> matplotlib.figure.Figure:
    """Draws the ratio against sparsity: mean and standard deviation over seeds, a panel per init.

    Args:
      results: what `measure` returned.
    """
    protocol, sparsities = results["protocol"], np.array(results["sparsities"])
    inits = protocol["inits"]
    picture = library().figure.Figure(
        figsize=(1.6 + 3.9 * len(inits), 4.6), dpi=150, layout="constrained"
    )
    panels = picture.subplots(1, len(inits), sharey=True, squeeze=False)[0]
    curve = np.linspace(0, max(sparsities.max(), 0.01), 200)
    lies = layers(_STYLES)
    for axes, init in zip(panels, inits, strict=True):
        theory = 1 / np.sqrt(1 - curve)
        axes.plot(curve, theory, color="#000000", lw=1, zorder=2.9, label="1 / sqrt(1 - s)")
        for norm, case in _cases(results, init).items():
            color, line = _STYLES[norm]
            mean = np.array([cell["mean"] for cell in case["ratio"]])
            spread = np.array([cell["std"] or 0.0 for cell in case["ratio"]])
            axes.plot(
                sparsities,
                mean,
                color=color,
                ls=line,
                marker="o",
                ms=lies[norm].marker,
                lw=lies[norm].width,
                zorder=lies[norm].zorder,
                label=_LABELS[norm],
            )
            axes.fill_between(
                sparsities, mean - spread, mean + spread, color=color, alpha=0.2, lw=0
            )
        published = reported.GRADIENT_RATIO
        axes.plot(
            list(published), list(published.values()), "D", color="#000000", mfc="none", ms=6,
            label="the paper, BN, MNIST (read off its figure)",
        )  # fmt: skip
        axes.axhspan(
            *reported.GRADIENT_RATIO_WITHOUT_NORM, color="#000000", alpha=0.12, lw=0,
            label="the paper, no normalisation, MNIST (range)",
        )  # fmt: skip
        weights = "uniform, ± 1 / sqrt(fan-in)" if init == "uniform" else "He-normal"
        axes.set_title(f"initial weights: {weights}", fontsize=9)
        axes.set_xlabel("sparsity s of the hidden layer")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("gradient, sparse over dense")
    picture.suptitle(
        f"Gradient of the active weights at initialisation, two-layer MLP, {protocol['dataset']}",
        fontsize=11,
    )
    handles, labels = panels[0].get_legend_handles_labels()
    picture.legend(
        handles, labels, loc="outside lower center", ncols=2 if len(inits) == 1 else 3,
        frameon=False, fontsize=8, title_fontsize=8,
        title=f"line: mean; band: ± 1 standard deviation over {len(protocol['seeds'])} seeds",
    )  # fmt: skip
    return picture


def _model(dataset: data.Shapes, hidden: int, norm: str, init: str) -> Any:
    return models.MLP(
        (hidden,), num_classes=dataset.num_classes, norm=norm, kernel_init=INITS[init]
    )


def _masks(key: jax.Array, counts: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A random mask for each number of active weights; the larger ones contain the smaller."""
    return jax.lax.map(lambda count: sx.random_mask(key, shape, count), counts)


def _over_batches(
    ratios: Callable[..., Any],
    nets: tuple[Any, jax.Array],
    dataset: data.Data,
    seed: int,
    batches: int,
) -> np.ndarray:
    """Both ratios of a seed, (2, sparsities): means over its batches."""
    source: Any = dataset.train_batches(seed, 0)
    with contextlib.closing(source):
        measured = [ratios(*nets, *batch) for batch in itertools.islice(source, batches)]
    # (batches, 2, sparsities)
    means: np.ndarray = np.array(jax.device_get(measured), np.float64).mean(axis=0)
    return means


@functools.cache
def _active(inputs: int, hidden: int, sparsity: float) -> int:
    """Active weights of the hidden layer, as the library's uniform distribution counts them."""
    path = f"{_LAYER}/kernel"
    try:
        counts = sx.Uniform(sparsity, dense_first=False).layer_counts({path: (inputs, hidden)})
    except ValueError as error:
        raise ConfigError(f"sparsities: {error}") from error
    return counts[path]


def _describe(values: np.ndarray) -> list[dict[str, Any]]:
    """Statistics over seeds, for each sparsity, of an array (seeds, sparsities)."""
    return [seed_statistics.describe_given(column) for column in values.T.tolist()]


def _cases(results: Mapping[str, Any], init: str) -> dict[str, Any]:
    return {case["norm"]: case for case in results["cases"] if case["init"] == init}


def _farthest(results: Mapping[str, Any], cases: Mapping[str, Any]) -> str:
    """The line that says how far means are from what theory gives, up to sparsity 0.8."""
    upto = [i for i, sparsity in enumerate(results["sparsities"]) if sparsity <= 0.8]
    if not upto:
        return ""
    parts = []
    for norm, case in cases.items():
        expected = [1.0 if norm == "none" else results["theory"][i] for i in upto]
        off = [case["ratio"][i]["mean"] / e - 1 for i, e in zip(upto, expected, strict=True)]
        parts.append(f"{_SHORT[norm]} {100 * max(off, key=abs):+.1f} %")
    return f"farthest from 1/sqrt(1-s) (none: from 1), up to 0.8: {', '.join(parts)}"


def _check(sparsities: Sequence[float], batches: int, inits: Sequence[str]) -> None:
    if not sparsities:
        raise ConfigError("sparsities=() must have at least one number in [0, 1)")
    for sparsity in sparsities:
        if not 0 <= sparsity < 1:
            raise ConfigError(f"sparsities has {sparsity!r}; each must be a number in [0, 1)")
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise ConfigError(f"batches={batches!r} must be an integer of at least 1")
    for init in inits:
        if init not in INITS:
            raise ConfigError(f"inits has {init!r}; each must be one of {', '.join(INITS)}")
    if not inits or len(set(inits)) < len(inits):
        raise ConfigError(f"inits={tuple(inits)!r} must name at least one, and none of them twice")
