"""From a config to a model, a learning-rate schedule and an optimizer."""

from __future__ import annotations

from typing import Any

import jax
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
            f"warmup_epochs={config.warmup_epochs:g} must be below epochs={config.epochs}"
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
    kinds = {"uniform": sx.Uniform, "er": sx.ER, "erk": sx.ERK}
    return kinds[config.distribution](config.sparsity)


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
            " without any, set topology=static"
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
    config: Config, steps_per_epoch: int, seed: int | jax.Array = 0
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of one method, masks and topology included unless `topology` is dense.

    Args:
      config: a config of a single method (`Config.for_method`).
      steps_per_epoch: training steps in an epoch.
      seed: an int or a key, possibly traced, that `init` draws the masks from. It is then kept in
        the state, so an optimizer made with another seed updates that state just the same.

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
    )


def _inner_optimizer(config: Config, rate: optax.Schedule) -> optax.GradientTransformation:
    sgd: dict[str, Any] = {"momentum": config.momentum, "nesterov": config.nesterov}
    sparseopt = {"weight_decay": config.weight_decay, "average_over": average_over(config)} | sgd
    ham: dict[str, Any] = {"alpha": config.ham_alpha, "beta": config.ham_beta}
    if config.optimizer == "sparseopt":
        return sx.sparseopt(rate, **sparseopt)
    if config.optimizer == "sparseopt_ham":
        return sx.sparseopt_ham(rate, **sparseopt, **ham)
    baseline = optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=_is_kernel), optax.sgd(rate, **sgd)
    )
    return sx.ham(baseline, rate, **ham) if config.optimizer == "ham" else baseline


def average_over(config: Config) -> str | None:
    """What SparseOpt averages over, as the library names it."""
    return None if config.average_over == "none" else config.average_over


def _is_kernel(params: optax.Params) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
