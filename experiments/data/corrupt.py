"""Images that cannot be decoded: how many may be left out, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from experiments.data.errors import CorruptImageError
from experiments.data.sources import Source


class CorruptExamples:
    """Counts the different examples that cannot be decoded, each once however often it is read.

    Args:
      allowed: how many there may be (`Config.max_corrupt`).
      say: called with a line of text for each one.
    """

    def __init__(self, allowed: int, say: Callable[[str], object] = print) -> None:
        self._allowed = allowed
        self._say = say
        self._names: set[str] = set()

    def __len__(self) -> int:
        """How many there are so far."""
        return len(self._names)

    def names(self) -> list[str]:
        """Their names, sorted."""
        return sorted(self._names)

    def restore(self, names: Iterable[str]) -> None:
        """Takes note of examples that were left out before, in an earlier part of a run."""
        self._names.update(names)

    def report(self, source: Source, index: int, reason: str) -> None:
        """Takes note of an example and what is wrong with it.

        Raises:
          CorruptImageError: there are more than allowed.
        """
        name = source.name(index)
        if name in self._names:
            return
        self._names.add(name)
        if len(self) > self._allowed:
            raise CorruptImageError(
                f"{name}: the image cannot be decoded ({reason}), and max_corrupt={self._allowed}"
                " images may be left out; repair it, or raise max_corrupt"
            )
        self._say(
            f"left out, since it cannot be decoded ({len(self)} of at most {self._allowed}):"
            f" {name}: {reason}"
        )
