"""Glob patterns over the paths of leaves, in all settings that go by path.

``*`` matches any text, ``/`` too, and ``?`` any character. ``[01]`` matches one of the characters,
and itself as well: names like ``h[0]`` have brackets of their own. A pattern that is one of the
paths means that path alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase


def matches(path: str, pattern: str) -> bool:
    """Whether ``path`` is the pattern or matches it, its brackets read in either way."""
    literally = pattern.replace("[", "[[]")
    return path == pattern or fnmatchcase(path, pattern) or fnmatchcase(path, literally)


def matching(paths: Iterable[str], pattern: str) -> list[str]:
    """The paths that a pattern means, in their order."""
    paths = list(paths)
    return [pattern] if pattern in paths else [path for path in paths if matches(path, pattern)]
