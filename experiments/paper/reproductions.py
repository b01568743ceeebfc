"""What each table and figure of the paper trains: the settings behind every NAME of `reproduce`.

A setting is one config with its methods and seeds. A reproduction has a base config, axes that it
goes through in all combinations (such as sparsity), and variants that change something else.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from experiments import command_line
from experiments.config import Config, ConfigError
from experiments.paper import reported

Shows = Literal[
    "accuracy", "itop_rate", "sharpness", "factors", "gradient_ratio", "neuron_steps", "cold_start"
]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One of several ways in which a reproduction trains.

    Attributes:
      name: the first part of its settings' names; `{epochs}` in it stands for their number.
      changes: fields of the base config that it changes.
      epochs_times: how many times the epochs of the base it takes.
    """

    name: str = ""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    epochs_times: int = 1


@dataclasses.dataclass(frozen=True)
class Setting:
    """One config of a reproduction.

    Attributes:
      variant: which variant it belongs to.
      config: what to train.
      same: names of the settings that would train the same, and are left out.
    """

    variant: str
    config: Config
    same: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """A table or figure of the paper.

    Attributes:
      name: as the command line has it.
      summary: one line on what it trains and shows.
      shows: what is tabled and drawn.
      base: the config that all settings start from.
      left_open: where each hyperparameter comes from that the paper leaves open, by field.
      axes: values of the fields that it goes through in all combinations.
      variants: the further changes.
      published: the paper's numbers, if there are any.
      claims: what else the paper says of it; each goes on a sentence that begins so.
      notes: what we say of it.
      elsewhere: base and left_open on any other dataset than the paper's, where that needs others.
    """

    name: str
    summary: str
    shows: Shows
    base: Config
    left_open: Mapping[str, str]
    axes: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    variants: tuple[Variant, ...] = (Variant(),)
    published: reported.Table | None = None
    claims: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    elsewhere: tuple[Config, Mapping[str, str]] | None = None

    def on(self, dataset: str) -> Reproduction:
        """The same on a dataset, which may ask for another recipe."""
        if self.elsewhere is None or dataset.split("/")[0].split(":")[0] == self.base.dataset:
            return self
        base, left_open = self.elsewhere
        return dataclasses.replace(self, base=base, left_open=left_open)

    def varied(self) -> tuple[str, ...]:
        """Fields that differ between the settings."""
        changed = (name for variant in self.variants for name in variant.changes)
        return tuple(dict.fromkeys([*self.axes, *changed]))


def settings_of(
    reproduction: Reproduction,
    overrides: Mapping[str, Any],
    epochs: Sequence[int] | None = None,
    patterns: Sequence[str] = (),
) -> dict[str, Setting]:
    """The settings that a reproduction trains, by name, cut to what is asked for.

    Args:
      reproduction: which.
      overrides: values of config fields. One that the settings differ in keeps those that have the
        value; any other is that of all. Of `factors`, where each setting changes one field of a
        base, it changes the base.
      epochs: lengths of training instead of the paper's. Where they are shorter than all of
        these, the warm-up is shortened in proportion.
      patterns: names of settings to keep, with * and ? as in a shell; none: all.

    Returns:
      Settings by name. Dense training, which masks do not touch, is a setting of its own where the
      whole reproduction has several sparsities or topologies. Of settings that an override makes
      the same, the first is left, and the names of the others are its `same`.

    Raises:
      ConfigError: an override does not fit the reproduction or its other fields, or a pattern
        names no setting.
    """
    _check_overrides(reproduction, overrides)
    varied = () if reproduction.shows == "factors" else reproduction.varied()
    shared = {name: value for name, value in overrides.items() if name not in varied}
    base = dataclasses.replace(reproduction.base, **shared)
    axes = dict(reproduction.axes)
    if epochs is not None and "epochs" in axes:
        axes["epochs"] = tuple(epochs)
    elif epochs is not None:
        if len(epochs) > 1:
            given = ",".join(map(str, epochs))
            raise ConfigError(f"--epochs={given}: {reproduction.name} takes one number")
        base = dataclasses.replace(base, epochs=epochs[0])
    settings: dict[str, Setting] = {}
    for variant in reproduction.variants:
        for values in itertools.product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            changes = point | dict(variant.changes)
            config = dataclasses.replace(base, **changes)
            config = dataclasses.replace(config, epochs=config.epochs * variant.epochs_times)
            if "warmup_epochs" not in overrides:
                config = _with_shorter_warmup(reproduction, config)
            parts = [variant.name.format(epochs=config.epochs), *map(_part, point.items())]
            settings["-".join(filter(None, parts))] = Setting(parts[0], config)
    whole = tuple(settings.values())
    if varied:
        settings = _narrowed(reproduction, settings, overrides)
    if _has_several_masks(reproduction):
        settings = _dense_apart(settings, whole)
    return _matching(reproduction, _once(settings), patterns)


def _with_shorter_warmup(reproduction: Reproduction, config: Config) -> Config:
    """The warm-up as the same share of a training that is shorter than the paper's shortest."""
    shortest = min(reproduction.axes.get("epochs", (config.epochs,)))
    share = min(1.0, config.epochs / shortest)
    return dataclasses.replace(config, warmup_epochs=config.warmup_epochs * share)


def text_of(value: Any) -> str:
    """A value as a setting's name has it, e.g. `2` for 2.0."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _part(point: tuple[str, Any]) -> str:
    """What an axis adds to the name of a setting, e.g. `0.95` or `90epochs`."""
    field, value = point
    if field != "epochs":
        return text_of(value)
    return f"{value}epochs" if value > 1 else "1epoch"


def _check_overrides(reproduction: Reproduction, overrides: Mapping[str, Any]) -> None:
    name = reproduction.name
    if "optimizer" in overrides:
        raise ConfigError(
            f"--config.optimizer={overrides['optimizer']}: {name} trains the methods that compare"
            " names; leave it out, or give --config.compare"
        )
    if "compare" in overrides and "compare" in reproduction.varied():
        raise ConfigError(
            f"--config.compare={','.join(overrides['compare'])}: the settings of {name} say"
            " themselves which methods they train; leave it out, or pick some by --settings"
        )
    if overrides.get("compare") == ():
        raise ConfigError("--config.compare= names no method; name some, e.g. sgd,sparseopt")
    if reproduction.shows == "sharpness" and overrides.get("hessian_every") == 0:
        raise ConfigError(f"--config.hessian_every=0: {name} shows it; it must be at least 1")


def _narrowed(
    reproduction: Reproduction, settings: dict[str, Setting], overrides: Mapping[str, Any]
) -> dict[str, Setting]:
    """The settings with the values asked for, in fields that settings differ in."""
    for field in reproduction.varied():
        if field not in overrides or field == "epochs":
            continue
        values = dict.fromkeys(getattr(one.config, field) for one in settings.values())
        if overrides[field] not in values:
            raise ConfigError(
                f"--config.{field}={overrides[field]}: {reproduction.name} has settings of its own"
                f" with {field} {', '.join(map(str, values))}; give one of these, or leave it out"
            )
        settings = {
            name: one
            for name, one in settings.items()
            if getattr(one.config, field) == overrides[field]
        }
    return settings


def _has_several_masks(reproduction: Reproduction) -> bool:
    """Whether it has several sparsities or topologies, also where a command takes one of them."""
    return any(len(reproduction.axes.get(field, ())) > 1 for field in ("topology", "sparsity"))


def _dense_apart(settings: dict[str, Setting], whole: Sequence[Setting]) -> dict[str, Setting]:
    """Dense training once for each length, not once more for each topology and sparsity.

    Args:
      settings: those asked for.
      whole: those of the whole reproduction. Dense training has the config of the first of a
        length, so that it is the same whichever are asked for.

    Returns:
      Settings of dense training, and then the others.
    """
    if not all("dense" in one.config.compare for one in settings.values()):
        return settings
    lengths = {one.config.epochs for one in settings.values()}
    with_dense: dict[str, Setting] = {}
    for one in whole:
        if one.config.epochs in lengths:
            config = dataclasses.replace(one.config, compare=("dense",))
            name = f"dense-{_part(('epochs', config.epochs))}"
            with_dense.setdefault(name, Setting(one.variant, config))
    for name, one in settings.items():
        sparse = tuple(method for method in one.config.compare if method != "dense")
        if sparse:
            config = dataclasses.replace(one.config, compare=sparse)
            with_dense[name] = dataclasses.replace(one, config=config)
    return with_dense


def _once(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """Settings without those that have the config of an earlier one."""
    first: dict[Config, str] = {}
    different: dict[str, Setting] = {}
    for name, one in settings.items():
        kept = first.setdefault(one.config, name)
        if kept == name:
            different[name] = one
        else:
            different[kept] = dataclasses.replace(
                different[kept], same=(*different[kept].same, name)
            )
    return different


def _matching(
    reproduction: Reproduction, settings: dict[str, Setting], patterns: Sequence[str]
) -> dict[str, Setting]:
    def matches(name: str, pattern: str) -> bool:
        names = (name, *settings[name].same)
        return any(fnmatch.fnmatchcase(one, pattern) for one in names)

    for pattern in patterns:
        if not any(matches(name, pattern) for name in settings):
            raise ConfigError(
                f"--settings={pattern}: {reproduction.name} has no such setting."
                f"{command_line.closest(pattern, settings)}\nSettings: {', '.join(settings)}"
            )
    return {
        name: one
        for name, one in settings.items()
        if not patterns or any(matches(name, pattern) for pattern in patterns)
    }
