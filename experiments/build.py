"""From a config to a model, a learning-rate schedule and an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sparseopt_jax as sx
from experiments.config import Config, ConfigError
from sparseopt_jax import models


def make_model(config: Config, num_classes: int) -> Any:
    """The Flax module that `config.model` names."""
    options: dict[str, Any] = {
        "num_classes": num_classes, "dtype": config.dtype, "bn_groups": config.bn_groups
    }  # fmt: skip
    if config.model == "mlp":
        return models.MLP(features=(config.hidden, config.hidden), **options)
    options["width"] = config.width
    if config.base_channels:
        options["base_channels"] = config.base_channels
    if config.model in ("resnet18", "resnet50"):
        large = {"resnet18": models.ResNet18, "resnet50": models.ResNet50}[config.model]
        return large(**options)
    small = {"resnet8": models.ResNet8, "resnet20": models.ResNet20}[config.model]
    return small(shortcut=config.shortcut, **options)


def learning_rate(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate of every step: warm-up, then the decay, which ends with the last epoch."""
    total = config.epochs * steps_per_epoch
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if warmup >= total:
        raise ConfigError(
            f"warmup_epochs={config.warmup_epochs:g} must be below epochs={config.epochs}",
            {"warmup_epochs": 0.0 if total == 1 else config.epochs / 10},
        )
    peak, decay_steps = config.learning_rate, total - warmup
    if config.schedule == "constant":
        decay = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(peak, 0.0, decay_steps)
    else:
        decay = optax.cosine_decay_schedule(peak, decay_steps)
    if warmup == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def make_distribution(config: Config) -> Any:
    """How many weights each layer keeps."""
    if config.distribution == "uniform":
        first = "dense0" if config.model == "mlp" else "conv_stem"
        return sx.Uniform(config.sparsity, dense_first=f"{first}/kernel")
    return {"er": sx.ER, "erk": sx.ERK}[config.distribution](config.sparsity)


def make_topology(config: Config, steps_per_epoch: int) -> Any:
    """How the masks change; raises ConfigError where they never would."""
    if config.topology == "static":
        return sx.Static()
    total = config.epochs * steps_per_epoch
    end_step = int(config.update_end * total)
    if end_step < config.update_interval:
        raise ConfigError(
            f"update_interval={config.update_interval} must be at most {end_step}, since the"
            f" updates end after {config.update_end:g} of the run's {total} steps;"
            " without any, set topology=static",
            {"update_interval": -(-end_step // 10)} if end_step else {"topology": "static"},
        )
    shared: dict[str, Any] = {
        "interval": config.update_interval,
        "drop_fraction": config.drop_fraction,
        "end_step": end_step,
    }
    if config.topology == "set":
        return sx.SET(**shared)
    return sx.RigL(**shared, grow_by=config.grow_by)


def check(config: Config, steps_per_epoch: int) -> None:
    """Raises ConfigError where a config does not fit the length of its own run."""
    learning_rate(config, steps_per_epoch)
    if config.topology != "dense":
        make_topology(config, steps_per_epoch)


def make_optimizer(
    config: Config, steps_per_epoch: int, seed: int | jax.Array = 0, automatic: bool = True
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of one method, masks and topology included unless `topology` is dense.

    Args:
      config: a config of a single method (`Config.for_method`).
      steps_per_epoch: training steps in an epoch.
      seed: an int or a key, possibly traced, that `init` draws the masks from. It is then kept in
        the state, so an optimizer made with another seed updates that state just the same.
      automatic: whether its update changes the topology when that is due.

    Returns:
      The gradient transformation.
    """
    inner = _inner_optimizer(config, learning_rate(config, steps_per_epoch))
    if config.topology == "dense":
        return optax.with_extra_args_support(inner)
    return sx.sparse_training(
        inner,
        distribution=make_distribution(config),
        topology=make_topology(config, steps_per_epoch),
        seed=seed,
        automatic=automatic,
    )


def _inner_optimizer(config: Config, rate: optax.Schedule) -> optax.GradientTransformation:
    # The recipes of the library, `sx.sparseopt` and `sx.sparseopt_ham`, link by link, so that the
    # study can put `rescale` in between.
    inner = optax.chain(
        _gradient_as_used(config),
        optax.add_decayed_weights(config.weight_decay, mask=_is_kernel),
        optax.sgd(rate, momentum=config.momentum, nesterov=config.nesterov),
    )
    if config.optimizer in ("ham", "sparseopt_ham"):
        return sx.ham(inner, rate, alpha=config.ham_alpha, beta=config.ham_beta)
    return inner


def _gradient_as_used(config: Config) -> optax.GradientTransformation:
    """The gradient, corrected and rescaled where the config says so."""
    corrected = optax.identity()
    if config.optimizer in ("sparseopt", "sparseopt_ham"):
        corrected = sx.scale_by_sparseopt(average_over(config), layers=corrected_layers(config))
        if config.rescale == "raw_norm":
            corrected = _keep_norm(corrected)
    if config.rescale == "unit_norm":
        return optax.chain(corrected, optax.normalize_by_update_norm())
    return corrected


def _keep_norm(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner`, with updates scaled to the norm, over all leaves, of what it was given."""
    inner = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        changed, state = inner.update(updates, state, params, **extra)
        before, after = optax.tree.norm(updates), optax.tree.norm(changed)
        scale = jnp.where(after > 0, before / jnp.where(after > 0, after, 1.0), 1.0)
        return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), changed), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def corrected_layers(config: Config) -> Callable[[str], bool] | None:
    """Which layers SparseOpt corrects, by path; None: all."""
    if config.correct == "all":
        return None
    return is_normalised


def is_normalised(path: str) -> bool:
    """Whether a normalisation follows the kernel at `path`: all of these models' but the head's."""
    return not path.startswith("head/")


def unequal_masks(masks: Any, spread: float, key: jax.Array) -> Any:
    """Masks that keep as many weights in each layer, shared out unequally among its neurons.

    The weights of a layer are drawn without replacement, each with a probability in proportion to
    its neuron's weight, whose log is normal with standard deviation `spread`.

    Args:
      masks: bool arrays; those that are True everywhere stay so.
      spread: of the logs, at least 0.
      key: a JAX random key.

    Returns:
      Bool arrays of the same structure, shapes and numbers of active weights.
    """
    leaves, structure = jax.tree.flatten(masks)

    def redraw(mask: jax.Array, key: jax.Array) -> jax.Array:
        neuron_key, weight_key = jax.random.split(key)
        log_weights = spread * jax.random.normal(neuron_key, mask.shape[-1:])
        # Gumbel noise on the logs: the largest k are such a draw.
        noise = jax.random.gumbel(weight_key, mask.shape)
        scores = noise + log_weights.reshape((1,) * (mask.ndim - 1) + (-1,))
        return sx.top_k_mask(scores, mask.sum(dtype=jnp.int32))

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, map(redraw, leaves, keys))


def average_over(config: Config) -> str | None:
    """What SparseOpt averages over, as the library names it."""
    return None if config.average_over == "none" else config.average_over


def _is_kernel(params: optax.Params) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
