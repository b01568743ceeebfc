"""The command line: `--config=FILE`, `--workdir=DIR`, `--config.FIELD=VALUE` for every field.

Whatever is wrong is answered in one or two lines that name it, the closest right name, and the
values that are allowed; `main` functions print them and leave with exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.util
import pathlib
import time
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from experiments.config import SPECS, Config, ConfigError
from experiments.paths import local_path, work_folder

_CONFIGS = pathlib.Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """What was asked for.

    Attributes:
      config: the resolved config.
      workdir: the folder of the run.
      words: arguments that ask for the same again, the folder included.
    """

    config: Config
    workdir: pathlib.Path
    words: tuple[str, ...]


class Parser(argparse.ArgumentParser):
    """A parser that raises ConfigError where argparse would leave the program."""

    def error(self, message: str) -> NoReturn:
        """Raises `message` as a ConfigError."""
        raise ConfigError(message)


def closest(name: str, names: Iterable[str]) -> str:
    """`" Did you mean 'X'?"` where a name is close to `name`, else an empty string."""
    match = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {match[0]!r}?" if match else ""


def load_config(path: pathlib.Path) -> Config:
    """What `get_config()` of the file `path` returns; raises ConfigError."""
    if not path.is_file():
        known = sorted(str(_CONFIGS.relative_to(_CONFIGS.parents[1]) / p.name) for p in _files())
        raise ConfigError(
            f"--config={path}: no such file.{closest(str(path), known)}\n"
            f"Configs that come with the repository: {', '.join(known)}"
        )
    spec = importlib.util.spec_from_file_location(f"experiment_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={path} must be a Python file, its name ending in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config() if hasattr(module, "get_config") else None
    except Exception as error:  # whatever the user's file raises is the user's to read
        raise ConfigError(f"--config={path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"--config={path} must define a function get_config() -> Config")
    return config


def _files() -> list[pathlib.Path]:
    return [path for path in _CONFIGS.glob("*.py") if path.name != "__init__.py"]


def _parser(argv: Sequence[str], module: str) -> Parser:
    parser = Parser(
        prog=f"python -m {module}",
        description="Trains one experiment; started again with the same folder, it continues.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="file with get_config() -> Config")
    parser.add_argument(
        "--workdir", metavar="DIR", help="folder of the run (default: runs/<config>-<time>)"
    )
    add_overrides(parser, *(config_for_help(argv) or (Config(), "Config")))
    return parser


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether `--help` or `-h` is among the arguments."""
    return not {"-h", "--help"}.isdisjoint(argv)


def config_for_help(argv: Sequence[str]) -> tuple[Config, str] | None:
    """The config whose values `--help` is to show, and its file's name.

    Args:
      argv: the arguments; the last `--config` among them counts.

    Returns:
      None where help is not asked for, or no file is named.

    Raises:
      ConfigError: the file is not a config.
    """
    if not asks_for_help(argv):
        return None
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    file = parser.parse_known_args(list(argv))[0].config
    if file is None:
        return None
    path = local_path("--config", file)
    return load_config(path), path.name


def add_overrides(
    parser: argparse.ArgumentParser,
    config: Config,
    whose: str,
    others: Mapping[str, Sequence[Any]] = types.MappingProxyType({}),
) -> None:
    """Adds `--config.FIELD=VALUE` for every field of a config.

    Args:
      parser: to add them to.
      config: what the fields are where none is given.
      whose: what to call it in `--help`.
      others: fields that have several values there, and these.
    """
    fields = parser.add_argument_group("overrides")
    for name, spec in SPECS.items():
        values = " / ".join(map(typed, others.get(name, (getattr(config, name),))))
        text = f"{spec.help}: {spec.allowed()} (default in {whose}: {values})"
        fields.add_argument(f"--config.{name}", metavar="VALUE", help=text.replace("%", "%%"))


def typed(value: Any) -> str:
    """A field's value as a command line has it, or the word nothing.

    Example:
      >>> typed(True), typed(("dense", "sgd")), typed("")
      ('true', 'dense,sgd', 'nothing')
    """
    if isinstance(value, tuple):
        value = ",".join(value)
    return (str(value).lower() if isinstance(value, bool) else str(value)) or "nothing"


def overrides(given: argparse.Namespace) -> dict[str, Any]:
    """The values of the overrides on a command line, by field; raises ConfigError."""
    values: dict[str, Any] = {}
    for name, text in override_texts(given).items():
        try:
            values[name] = SPECS[name].parse(text)
        except ConfigError as error:
            hint = closest(text, SPECS[name].choices)
            raise ConfigError(f"--config.{error}.{hint}") from None
    return values


def override_texts(given: argparse.Namespace) -> dict[str, str]:
    """The overrides as they were typed, by field."""
    texts = {name: getattr(given, f"config.{name}") for name in SPECS}
    return {name: text for name, text in texts.items() if text is not None}


def parse(argv: Sequence[str], module: str = "experiments.train") -> CommandLine:
    """Reads the command line.

    Args:
      argv: the arguments, without the program's name.
      module: that of the command, for its help.

    Returns:
      The resolved config and its folder, which is not created yet.

    Raises:
      ConfigError: anything is unknown or wrong.

    Example:
      >>> parse(["--config=experiments/configs/digits.py", "--config.seeds=1"]).config.seeds
      1
    """
    given, unknown = _parser(argv, module).parse_known_args(list(argv))
    if unknown:
        raise ConfigError(unknown_argument(unknown[0], ("--config", "--workdir")))
    if given.config is None:
        raise ConfigError("--config is missing, e.g. --config=experiments/configs/digits.py")
    path = local_path("--config", given.config)
    config = dataclasses.replace(load_config(path), **overrides(given))
    texts = override_texts(given)
    words = (f"--config={path}", *(f"--config.{name}={text}" for name, text in texts.items()))
    default = f"runs/{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    workdir = work_folder(given.workdir or default)
    return CommandLine(config, workdir, (*words, f"--workdir={workdir}"))


def unknown_argument(argument: str, known: Sequence[str]) -> str:
    """What to say of an argument that is none of `known` and no field of a config."""
    option = argument.split("=", 1)[0]
    if option.startswith("--config."):
        name = option.removeprefix("--config.")
        return (
            f"{option}: no such field.{closest(name, SPECS)}\nFields: {', '.join(SPECS)}"
            if name
            else f"{argument}: name a field, e.g. --config.seeds=1\nFields: {', '.join(SPECS)}"
        )
    hint = closest(option, [*known, "--help"])
    return f"{argument}: no such argument.{hint}\nArguments: {', '.join(known)}, --config.FIELD"
