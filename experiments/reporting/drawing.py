"""Matplotlib for files alone: imported where the first picture is drawn, set up by nothing outside.

A notebook's MPLBACKEND names a backend for its own windows, which need not be installed here, and a
user's matplotlibrc is for other pictures. Ours look the same everywhere.

Lines that coincide are all to be seen, by what `layers` says of each.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

LineStyle = str | tuple[int, tuple[int, ...]]
"""A line style as Matplotlib takes it: its name, or an offset and lengths of dashes and gaps."""

Style = tuple[str, LineStyle]
"""A colour and a line style."""


@functools.cache
def library() -> Any:
    """The package matplotlib, with its modules figure, lines and ticker."""
    fresh = "matplotlib" not in sys.modules
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib.figure
        import matplotlib.lines
        import matplotlib.ticker
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if fresh and backend:
        # For whoever plots in a notebook after us; as matplotlib itself does it.
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    return matplotlib


def drawn(function: Callable[P, R]) -> Callable[P, R]:
    """Has `function` draw, or save, with Matplotlib's own settings."""

    @functools.wraps(function)
    def with_defaults(*arguments: P.args, **named: P.kwargs) -> R:
        with library().rc_context():
            library().rcdefaults()
            return function(*arguments, **named)

    return with_defaults


def plain(text: str) -> str:
    r"""A name of the user's as a picture shows it: no formula, and no bytes that are not UTF-8.

    Example:
      >>> print(plain("runs/$lr$"))
      runs/\$lr\$
    """
    return text.encode(errors="backslashreplace").decode().replace("$", r"\$")


class Layer(NamedTuple):
    """How high a line lies, its width, and the size of its markers."""

    zorder: float
    width: float
    marker: float


def layers(look: Mapping[str, Style], thinnest: float = 1.3) -> dict[str, Layer]:
    """What keeps lines apart that coincide.

    Args:
      look: colour and line style by name.
      thinnest: the width of the highest.

    Returns:
      By name; solid lines lie lowest, then those with gaps, each thinner than the one below it.
    """
    lowest_first = sorted(look, key=lambda name: -_covered(look[name][1]))
    by_name = {}
    for place, name in enumerate(lowest_first):
        wider = 1.2 * (len(look) - 1 - place) / max(len(look) - 1, 1)
        by_name[name] = Layer(2 + place / 100, thinnest + wider, 3 + 2 * wider)
    return by_name


def _covered(line: LineStyle) -> float:
    """The share of its path that a line covers, by Matplotlib's dashes."""
    if isinstance(line, str):
        return {"-": 1.0, "--": 0.7, "-.": 0.69, ":": 0.38}[line]
    return sum(line[1][::2]) / sum(line[1])
