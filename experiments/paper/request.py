"""The command line of `experiments.reproduce`: which table or figure, and cut to what."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import command_line
from experiments.config import SPECS, Config, ConfigError
from experiments.paper.catalogue import BY_NAME
from experiments.paper.reproductions import Reproduction, Setting, settings_of
from experiments.paper.side_by_side import QUANTITIES
from experiments.paths import work_folder

_SHORT = ("dataset", "data_dir", "seeds")
"""Fields that have an argument of their own name as well."""

_ARGUMENTS = ("--workdir", "--epochs", "--settings", *(f"--{name}" for name in _SHORT))

_FOLDERS = ("--workdir=", "--data_dir=", "--config.data_dir=")

_DATA = ("dataset", "data_dir", "train_split", "test_split", "label", "pool", "batch_size", "seed",
         "seeds")  # fmt: skip
_TAKES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "gradient_ratio": ("is measured before any training", ("hidden", *_DATA)),
    "cold_start": (
        "trains an MLP of its own by AdamW",
        (
            *_DATA, "sparsity", "distribution", "update_interval", "drop_fraction", "update_end",
            "learning_rate", "schedule", "warmup_epochs", "weight_decay", "epochs",
        ),
    ),
}  # fmt: skip
"""Why a reproduction has no use for most fields, and those that mean something to it."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
      reproduction: the table or figure.
      settings: what it trains, by name; one without a name where it is no sweep.
      overrides: the fields that the command line gave, and its epochs.
      workdir: the folder of all of it.
      words: arguments that ask for the same again.
    """

    reproduction: Reproduction
    settings: Mapping[str, Setting]
    overrides: Mapping[str, Any]
    workdir: pathlib.Path
    words: tuple[str, ...]

    def command(self) -> str:
        """The command that asks for the same."""
        return f"python -m experiments.reproduce {shlex.join(self.words)}"

    def published_command(self) -> str:
        """The same for a reader elsewhere: without this machine's folders."""
        words = [word for word in self.words if not word.startswith(_FOLDERS)]
        return f"python -m experiments.reproduce {shlex.join(words)}"


def _parser(argv: Sequence[str]) -> command_line.Parser:
    width = max(map(len, BY_NAME))
    names = "\n".join(f"  {name:<{width}}  {one.summary}" for name, one in BY_NAME.items())
    parser = command_line.Parser(
        prog="python -m experiments.reproduce",
        usage="%(prog)s NAME [--workdir=DIR] [--dataset=NAME] [--data_dir=DIR] [--epochs=N[,N...]]"
        " [--seeds=N] [--settings=PATTERN[,...]] [--config.FIELD=VALUE ...]",
        description="Trains what a table or figure of the paper shows, and puts the paper's numbers"
        " beside ours.\nStarted again with the same folder, it continues.\n\n"
        f"NAME is one of\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the table or figure, see above")
    parser.add_argument("--workdir", metavar="DIR", help="folder of it all (default: runs/NAME)")
    parser.add_argument(
        "--epochs", metavar="N[,N...]", help="lengths of training instead of the paper's"
    )
    parser.add_argument(
        "--settings",
        metavar="PATTERN[,...]",
        help="only the settings with such names, * and ? as in a shell, e.g. 'rigl-*'",
    )
    for name in _SHORT:
        parser.add_argument(f"--{name}", metavar="VALUE", help=f"the same as --config.{name}")
    config, whose, varied = _shown(argv)
    command_line.add_overrides(parser, config, whose, varied)
    return parser


def _shown(argv: Sequence[str]) -> tuple[Config, str, Mapping[str, Sequence[Any]]]:
    """Whose values `--help` shows: those of the NAME that is given, on its dataset."""
    parser = command_line.Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("name", nargs="?")
    parser.add_argument("--dataset")
    given = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0]
    if given.name not in BY_NAME or not command_line.asks_for_help(argv):
        return Config(), "Config", {}
    one = BY_NAME[given.name]
    one = one.on(given.dataset or one.base.dataset)
    settings = settings_of(one, {}).values()
    values = {
        field: list(dict.fromkeys(getattr(setting.config, field) for setting in settings))
        for field in SPECS
    }
    return one.base, one.name, values


def parse(argv: Sequence[str]) -> Request:
    """Reads the command line.

    Args:
      argv: the arguments, without the program's name.

    Returns:
      What is asked for; its folder is not created yet.

    Raises:
      ConfigError: anything is unknown or wrong.

    Example:
      >>> list(parse(["cifar100-table", "--epochs=2", "--config.sparsity=0.97"]).settings)
      ['rigl-0.97-2epochs', 'set-0.97-2epochs']
    """
    given, unknown = _parser(argv).parse_known_args(list(argv))
    if given.name is None:
        raise ConfigError(f"which table or figure? Names: {', '.join(BY_NAME)}")
    if given.name not in BY_NAME:
        hint = command_line.closest(given.name, BY_NAME)
        raise ConfigError(f"{given.name}: no such table or figure.{hint}\n{_names()}")
    if unknown:
        raise ConfigError(command_line.unknown_argument(unknown[0], _ARGUMENTS))
    reproduction = BY_NAME[given.name]
    typed = {name: getattr(given, name) for name in ("epochs", "settings", *_SHORT)}
    typed = {name: text for name, text in typed.items() if text is not None}
    texts = command_line.override_texts(given)
    for name in ("epochs", *_SHORT):
        if name in typed and name in texts:
            raise ConfigError(f"--{name} and --config.{name} mean the same; give one of them")
    overrides = command_line.overrides(given)
    for name in _SHORT:
        if name in typed:
            overrides[name] = _parsed(name, typed[name])
    epochs = None if "epochs" not in typed else _epochs(typed["epochs"])
    if "epochs" in overrides:
        epochs = (overrides.pop("epochs"),)
    reproduction = reproduction.on(overrides.get("dataset", reproduction.base.dataset))
    typed_words = {name: f"--{name}={text}" for name, text in typed.items()}
    typed_words |= {name: f"--config.{name}={text}" for name, text in texts.items()}
    if reproduction.shows in _TAKES:
        _check_taken(reproduction, typed_words)
    settings = _settings(reproduction, overrides, epochs, typed.get("settings"))
    workdir = work_folder(given.workdir or f"runs/{reproduction.name}")
    words = (reproduction.name, *typed_words.values(), f"--workdir={workdir}")
    if epochs is not None:
        overrides["epochs"] = epochs
    return Request(reproduction, settings, overrides, workdir, words)


def _names() -> str:
    return f"Names: {', '.join(BY_NAME)}"


def _parsed(name: str, text: str) -> Any:
    try:
        return SPECS[name].parse(text)
    except ConfigError as error:
        raise ConfigError(f"--{error}") from None


def _epochs(text: str) -> tuple[int, ...]:
    try:
        epochs = tuple(dict.fromkeys(map(int, text.split(","))))
    except ValueError:
        epochs = (0,)
    if min(epochs) < 1:
        raise ConfigError(
            f"--epochs={text} must be integers of at least 1, separated by commas, e.g. 2 or 30,100"
        )
    return epochs


def _settings(
    reproduction: Reproduction,
    overrides: Mapping[str, Any],
    epochs: Sequence[int] | None,
    patterns: str | None,
) -> dict[str, Setting]:
    name = reproduction.name
    if reproduction.shows not in QUANTITIES and patterns is not None:
        raise ConfigError(f"--settings={patterns}: {name} has one setting; leave it out")
    chosen = [] if patterns is None else [part for part in patterns.split(",") if part]
    return settings_of(reproduction, overrides, epochs, chosen)


def _check_taken(reproduction: Reproduction, typed: Mapping[str, str]) -> None:
    """Raises ConfigError where a field is given that the reproduction has no use for.

    Args:
      reproduction: one of `_TAKES`.
      typed: the words of the command line, by what they give.
    """
    reason, fields = _TAKES[reproduction.shows]
    for name, word in typed.items():
        if name not in fields and name != "settings":
            raise ConfigError(
                f"{word}: {reproduction.name} {reason}, and takes {', '.join(fields)} only"
            )
