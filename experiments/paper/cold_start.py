"""Whether Adam's cold start of grown weights costs accuracy, and which cure helps: not the paper's.

A weight that grows starts with moments of zero, but Adam corrects their bias by a step count that
all weights share, so with b2 = 0.999 its first steps are several times the usual one. Compared are
three ways: `neither`; `ramp`, its updates scaled linearly from 0 over its first 100 (SMET, arXiv
2606.00888); and `correction`, Adam's bias correction by the weight's own age; each by RigL and SET,
with b2 0.999 and 0.95. An MLP with batch normalisation is trained by AdamW (b1 0.9, decay of
kernels alone), densely once as a reference. A seed has the same initial weights, masks and batches
in all arms, so that differences are paired. What is measured of a run:

  test_accuracy    after the last step, on all test images
  late_loss        training loss, mean over the last tenth of the steps
  jump             training loss, mean of the 20 steps that follow a topology update, minus that of
                   the 20 before; mean over the updates
  survival         of the weights that an update grew, the share that is active after the next one
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparseopt_jax as sx
from experiments import build, data
from experiments.config import Config, ConfigError
from experiments.divergence import DivergedError
from experiments.paper.kept import Kept
from experiments.reporting import plots, seed_statistics, tables
from experiments.stepping import bound_in_flight
from sparseopt_jax import models

if TYPE_CHECKING:
    import matplotlib.figure

FEATURES = (300, 100)
"""Hidden units, as in LeNet-300-100."""

CURES: Mapping[str, Callable[[float], Any]] = {
    "neither": lambda b2: None,
    "ramp": lambda b2: 100,
    "correction": lambda b2: sx.adam_bias_correction(b2=b2),
}
"""By name: from Adam's b2 to the `grown_warmup` of `sx.sparse_training`."""


class Arm(NamedTuple):
    """One way to train."""

    topology: str
    b2: float = 0.999
    cure: str = "neither"

    def __str__(self) -> str:
        """Its name."""
        return "dense" if self.topology == "dense" else f"{self.topology} {self.b2:g} {self.cure}"


ARMS = (
    Arm("dense"),
    *(Arm(topology, b2, cure) for topology in ("rigl", "set") for b2 in (0.999, 0.95)
      for cure in CURES),
)  # fmt: skip

QUANTITIES: Mapping[str, tuple[str, float, int]] = {
    "test_accuracy": ("test accuracy (%)", 100, 2),
    "late_loss": ("training loss, mean over the last tenth of the steps", 1, 4),
    "jump": ("training loss, 20 steps after a topology update minus 20 before", 1, 4),
    "survival": ("grown weights that outlive the next topology update (%)", 100, 1),
}
"""In words, the scale they are shown in, and digits behind the point."""

BEFORE, AFTER, SHOWN = 20, 20, 80
"""Steps around an update: those of the jump, and how many after it are drawn."""


def measure(
    config: Config, say: Callable[[str], object] = print, keep: pathlib.Path | None = None
) -> dict[str, Any]:
    """Trains all `ARMS`, the seeds of one together.

    Args:
      config: gives dataset, sparsity, distribution, topology updates, learning rate, schedule,
        weight decay, batch size, epochs, seeds. Images are as the dataset has them, neither cropped
        nor mirrored, and normalised per channel. Model, topology and optimizer are the arms'.
      say: called with a line of text for each arm that is done.
      keep: a file for the arms that are done, which are not trained again; None: none.

    Returns:
      What can be written as JSON: `setting`, `seeds`, `steps`, `updates` (on which steps),
      `commits`; `arms`: by name each of `QUANTITIES` (see `seed_statistics.describe_given`) and
      `around`, the loss by seed from `BEFORE` steps before to `SHOWN` after an update, minus the
      mean before it, mean over the updates; `differences`: for each quantity, of each cure
      minus `neither`, paired by seed.

    Raises:
      ConfigError: settings do not fit, or `keep` is of another measurement; or as `data.load`.
      DataError: a file of the dataset is damaged.
      DivergedError: a training loss is not finite.
    """
    config = dataclasses.replace(
        config, augmentation="none", storage="device", mesh_data=1, mesh_fsdp=1
    )
    dataset = data.load(config, say)
    assert isinstance(dataset, data.DeviceData)
    for arm in ARMS:
        _optimizer(arm, config, dataset)  # Says what does not fit before anything is trained.
    updates = _updates(config, dataset)
    kept = Kept(keep, config, {})
    seeds = range(config.seed, config.seed + config.seeds)
    arms: dict[str, Any] = {}
    for arm in ARMS:
        name = f"{arm}, seeds {seeds[0]} to {seeds[-1]}"
        part = kept.part(name, functools.partial(_train, arm, config, dataset, seeds, updates))
        arms[str(arm)] = {
            quantity: seed_statistics.describe_given(part[quantity])
            for quantity in QUANTITIES
            if quantity in part
        } | {"around": part.get("around")}
        accuracy = tables.plus_minus(arms[str(arm)]["test_accuracy"], 100, 2)
        say(f"grown warmup: {arm} ({len(arms)} of {len(ARMS)}), test accuracy {accuracy} %")
    shown = (
        "dataset", "sparsity", "distribution", "update_interval", "drop_fraction", "update_end",
        "learning_rate", "schedule", "weight_decay", "batch_size", "epochs",
    )  # fmt: skip
    return {
        "setting": {"features": list(FEATURES)} | {name: getattr(config, name) for name in shown},
        "seeds": list(seeds),
        "steps": config.epochs * dataset.steps_per_epoch,
        "updates": updates,
        "arms": arms,
        "differences": _differences(arms),
        "commits": kept.commits,
    }


def _optimizer(
    arm: Arm, config: Config, dataset: data.Shapes, seed: Any = 0
) -> optax.GradientTransformationExtraArgs:
    per_epoch = data.steps_per_epoch(config, dataset)
    inner = optax.adamw(
        build.learning_rate(config, per_epoch),
        b2=arm.b2,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params),
    )
    if arm.topology == "dense":
        return optax.with_extra_args_support(inner)
    config = dataclasses.replace(config, topology=arm.topology)  # type: ignore[arg-type]
    try:
        return sx.sparse_training(
            inner,
            distribution=build.make_distribution(config),
            topology=build.make_topology(config, per_epoch),
            seed=seed,
            grown_warmup=CURES[arm.cure](arm.b2),
        )
    except ValueError as error:
        raise ConfigError(f"update_interval={config.update_interval}: {error}") from error


def _updates(config: Config, dataset: data.DeviceData) -> list[int]:
    """The steps of topology updates."""
    topology = build.make_topology(
        dataclasses.replace(config, topology="set"), dataset.steps_per_epoch
    )
    steps = np.arange(config.epochs * dataset.steps_per_epoch)
    update_steps: list[int] = steps[np.asarray(topology.is_update_step(steps))].tolist()
    if len(update_steps) < 2 or update_steps[0] < BEFORE or update_steps[0] + SHOWN >= len(steps):
        raise ConfigError(
            f"epochs={config.epochs} has {len(steps)} steps, update_interval="
            f"{config.update_interval}: there must be at least two topology updates, with {BEFORE}"
            f" steps before and {SHOWN} after the first"
        )
    return update_steps


def _train(
    arm: Arm,
    config: Config,
    dataset: data.DeviceData,
    seeds: Sequence[int],
    updates: Sequence[int],
) -> dict[str, Any]:
    """The `QUANTITIES` and `around` of an arm, by seed."""
    start, step, count_correct = programs(arm, config, dataset)
    keys = jnp.array(seeds, jnp.int32)
    state = start(keys)
    losses: list[jax.Array] = []
    moves: list[tuple[np.ndarray, np.ndarray]] = []
    for number in range(config.epochs * dataset.steps_per_epoch):
        epoch, index = divmod(number, dataset.steps_per_epoch)
        if index == 0:
            orders = jnp.stack([dataset.epoch_order(seed, epoch) for seed in seeds])
        moving = arm.topology != "dense" and number in updates
        before = _masks(state) if moving else None
        state, loss = step(state, dataset.train, orders, keys, np.int32(epoch), np.int32(index))
        losses.append(loss)
        bound_in_flight(losses)
        if before is not None:
            moves.append((before, _masks(state)))
    correct = sum(np.asarray(count_correct(state, batch)) for batch in dataset.eval_batches())
    examples = sum(float(batch.weights.sum()) for batch in dataset.eval_batches())
    loss_of = np.stack(jax.device_get(losses), axis=1).astype(np.float64)
    if not np.isfinite(loss_of).all():
        raise DivergedError(f"{arm}: a training loss is not finite")
    measured = {
        "test_accuracy": correct / examples,
        "late_loss": loss_of[:, -(loss_of.shape[1] // 10) :].mean(axis=1),
    }
    if moves:
        around = loss_around(loss_of, updates)
        jump = around[:, BEFORE : BEFORE + AFTER].mean(axis=1)
        measured |= {"jump": jump, "survival": survival(moves), "around": around.round(5)}
    return {name: values.tolist() for name, values in measured.items()}


def programs(arm: Arm, config: Config, dataset: data.DeviceData) -> tuple[Callable[..., Any], ...]:
    """Compiled functions of all seeds together; a state is parameters, statistics, optimizer's.

    Returns:
      From seeds (n,) to a state; from a state, the training images, orders of the epoch, seeds,
      epoch and index to a state and losses (n,); from a state and a batch of the test images to how
      many are told right (n,).
    """
    model: Any = models.MLP(FEATURES, num_classes=dataset.num_classes)
    tx = _optimizer(arm, config, dataset)
    mean, std = (values.reshape(1, 1, 1, -1) for values in (dataset.mean, dataset.std))

    def normalised(images: jax.Array) -> jax.Array:
        return (images.astype(jnp.float32) - mean) / std

    def start(seed: jax.Array) -> tuple[Any, Any, Any]:
        weights_key, masks_key = jax.random.split(jax.random.key(seed))
        variables = model.init(weights_key, jnp.zeros((1, *dataset.image_shape)), train=False)
        params = variables["params"]
        opt_state = _optimizer(arm, config, dataset, masks_key).init(params)
        if arm.topology != "dense":
            params = sx.apply_masks(params, sx.get_masks(opt_state))
        return params, variables["batch_stats"], opt_state

    def step(
        state: Any, split: data.Split, order: jax.Array, seed: Any, epoch: Any, index: Any
    ) -> tuple[Any, jax.Array]:
        params, batch_stats, opt_state = state
        batch = dataset.take_batch(split, order, seed, epoch, index)

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            logits, changed = model.apply(
                {"params": params, "batch_stats": batch_stats},
                normalised(batch.images),
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            return losses.mean(), changed["batch_stats"]

        (loss, batch_stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        change, opt_state = tx.update(gradient, opt_state, params)
        return (optax.apply_updates(params, change), batch_stats, opt_state), loss

    def count_correct(state: Any, batch: data.EvalBatch) -> jax.Array:
        variables = {"params": state[0], "batch_stats": state[1]}
        logits = model.apply(variables, normalised(batch.images), train=False)
        return jnp.sum((logits.argmax(-1) == batch.labels) & (batch.weights > 0))

    return (
        jax.jit(jax.vmap(start)),
        jax.jit(jax.vmap(step, (0, None, 0, 0, None, None)), donate_argnums=0),
        jax.jit(jax.vmap(count_correct, (0, None))),
    )


def _masks(state: Any) -> np.ndarray:
    """All masks of a state on the host, bool, (seeds, weights)."""
    leaves = jax.tree.leaves(jax.device_get(jax.vmap(sx.get_masks)(state[2])))
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def survival(moves: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Of the weights that an update grew, the share that is active after the next one.

    Args:
      moves: masks before and after each update, bool, (seeds, weights) each; at least two.

    Returns:
      The share by seed, over all weights and updates but the last.

    Raises:
      ConfigError: no weight grew.

    Example:
      >>> masks = np.array([[1, 1, 0, 0]]), np.array([[0, 0, 1, 1]]), np.array([[1, 0, 0, 1]])
      >>> one, two, three = (mask.astype(bool) for mask in masks)
      >>> survival([(one, two), (two, three)]).tolist()
      [0.5]
    """
    grown = [after & ~before for before, after in moves[:-1]]
    kept = [g & after for g, (_, after) in zip(grown, moves[1:], strict=True)]
    count = np.sum(grown, axis=(0, 2))
    if not count.all():
        raise ConfigError("drop_fraction is so small that topology updates grow no weight")
    share: np.ndarray = np.sum(kept, axis=(0, 2)) / count
    return share


def loss_around(losses: np.ndarray, updates: Sequence[int]) -> np.ndarray:
    """The loss around topology updates, minus its mean over the `BEFORE` steps before each.

    Args:
      losses: by seed and step; that of an update's own step is the last one before it.
      updates: their steps; those without `SHOWN` steps behind them are left out.

    Returns:
      Means over the updates, (seeds, BEFORE + SHOWN).
    """
    windows = [
        losses[:, step + 1 - BEFORE : step + 1 + SHOWN]
        for step in updates
        if step + SHOWN < losses.shape[1]
    ]
    stacked = np.stack([w - w[:, :BEFORE].mean(axis=1, keepdims=True) for w in windows])
    mean: np.ndarray = stacked.mean(axis=0)
    return mean


def _differences(arms: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for quantity in QUANTITIES:
        for arm in ARMS:
            if arm.topology == "dense" or arm.cure == "neither":
                continue
            other = str(arm._replace(cure="neither"))
            values, base = (arms[name][quantity]["values"] for name in (str(arm), other))
            paired = [one - two for one, two in zip(values, base, strict=True)]
            row = {"quantity": quantity, "of": str(arm), "minus": other}
            rows.append(row | dataclasses.asdict(seed_statistics.describe_differences(paired)))
    return rows


def table(results: Mapping[str, Any]) -> str:
    """All arms, and the paired differences in each quantity, as text.

    Args:
      results: what `measure` returned.

    Returns:
      Lines of at most 100 columns.
    """
    setting, arms = results["setting"], results["arms"]
    rows = [
        (name, *(tables.plus_minus(one.get(q), *how[1:]) for q, how in QUANTITIES.items()))
        for name, one in arms.items()
    ]
    lines = [
        f"AdamW, MLP {'-'.join(map(str, setting['features']))}, {setting['dataset']}, sparsity"
        f" {setting['sparsity']:g}, {results['steps']} steps, {len(results['updates'])} topology"
        f" updates; {len(results['seeds'])} seed(s).",
        tables.columns(("arm", *QUANTITIES), rows),
    ]
    for quantity, (words, scale, digits) in QUANTITIES.items():
        of_quantity = [row for row in results["differences"] if row["quantity"] == quantity]
        body = [
            (
                f"{row['of']} - neither",
                tables.plus_minus(row, scale, digits, "+"),
                tables.interval(row, scale, digits),
                tables.p_value(row["p"]),
            )
            for row in of_quantity
        ]
        lines += ["", words, tables.columns(("", "difference", "95 % CI", "p"), body)]
        lines += tables.about_p(of_quantity)
    return "\n".join(lines)


def figure(results: Mapping[str, Any]) -> matplotlib.figure.Figure:
    """Draws how each cure changes the loss around topology updates: a panel a topology and b2.

    Args:
      results: what `measure` returned.
    """
    x = np.arange(-BEFORE, SHOWN) + 1
    panels: dict[str, dict[str, plots.Curve]] = {}
    for arm in ARMS:
        if arm.topology != "dense" and arm.cure != "neither":
            panel = panels.setdefault(f"{arm.topology}, b2 = {arm.b2:g}", {})
            cured, base = (
                np.array(results["arms"][str(one)]["around"])
                for one in (arm, arm._replace(cure="neither"))
            )
            panel[f"{arm.cure} - neither"] = plots.Curve(x, cured - base)
    setting = results["setting"]
    return plots.curves(
        panels,
        "training loss, difference",
        f"Loss around topology updates, minus that before: AdamW, MLP on {setting['dataset']},"
        f" sparsity {setting['sparsity']:g}",
        band="ci95",
        xlabel="steps since a topology update",
    )
