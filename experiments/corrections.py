"""Settings that cannot work, found all at once, and a command that would.

Each check raises ConfigError at the first thing that it finds. If the error says what would be
right, the check is asked again with that, and so are the next ones.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from experiments.config import Config, ConfigError

T = TypeVar("T")


class Corrections:
    """What checks have found to be wrong with a config.

    Attributes:
      config: with what would be right where a check has said it.

    Example:
      >>> def even(config):
      ...     if config.batch_size % 2:
      ...         raise ConfigError("batch_size must be even", {"batch_size": 128})
      ...     return config.batch_size // 2
      >>> found = Corrections(Config(batch_size=3))
      >>> found.attempt(even)
      64
    """

    def __init__(self, config: Config) -> None:
        """Has found nothing yet."""
        self.config = config
        self._errors: list[ConfigError] = []

    def attempt(self, check: Callable[[Config], T]) -> T | None:
        """What a check returns, for the corrected config; None where it says not what is right."""
        while True:
            try:
                return check(self.config)
            except ConfigError as error:
                known = {str(other) for other in self._errors}
                if str(error) in known:
                    return None
                self._errors.append(error)
                if not error.changes:
                    return None
                self.config = dataclasses.replace(self.config, **error.changes)

    def raise_if_any(self) -> None:
        """Raises one ConfigError for all that was found."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            lines = [f"  {error}" for error in self._errors]
            changes: dict[str, Any] = {}
            stand_ins: dict[str, str] = {}
            for error in self._errors:
                changes |= error.changes
                stand_ins |= error.stand_ins
            raise ConfigError(
                f"{len(lines)} settings cannot work:\n" + "\n".join(lines), changes, stand_ins
            )


def with_command(error: ConfigError, module: str, words: Sequence[str]) -> ConfigError:
    """The same error, and below it the command that would work, where the error says what would.

    Args:
      error: what a command ended with.
      module: the command, e.g. "experiments.train".
      words: its arguments.
    """
    values: Mapping[str, Any] = {**error.stand_ins, **error.changes}
    if not values:
        return error
    kept = [word for word in words if word.split("=", 1)[0].removeprefix("--config.") not in values]
    new = [f"--config.{name}={_typed(value)}" for name, value in values.items()]
    place = next((i for i, word in enumerate(kept) if word.startswith("--workdir=")), len(kept))
    command = shlex.join(["python", "-m", module, *kept[:place], *new, *kept[place:]])
    what = ", ".join(f"your own {value}" for value in error.stand_ins.values())
    given = f" (with {what})" if what else ""
    return ConfigError(f"{error}\nwhat would work{given}:\n  {command}")


def _typed(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
