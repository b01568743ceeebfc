"""What commands print, and what they do not, on any terminal and into any file."""

from __future__ import annotations

import codecs
import contextlib
import sys
from collections.abc import Iterator

_ERRORS = "experiments.in_ascii"
_ASCII = {"±": "+/-", "…": "..."}
"""What our own texts, and rich's, have beyond ASCII."""


@contextlib.contextmanager
def tolerant_output() -> Iterator[None]:
    r"""While the body runs, printing never fails for a character that the output cannot encode.

    Such a character comes out in ASCII: `+/-` for ±, an escape such as `\xe9` for others, among
    them the bytes of file names that are not UTF-8. What a user has chosen by PYTHONIOENCODING
    other than "strict" stays, and so does a stream that is not a text file, as a notebook's. The
    `main` of each command is decorated with it.

    Example:
      >>> with tolerant_output():
      ...     print("0.5")
      0.5
    """
    codecs.register_error(_ERRORS, _in_ascii)
    changed = []
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)
            changed.append(stream)
    try:
        yield
    finally:
        for stream in changed:
            stream.reconfigure(errors="strict")


@contextlib.contextmanager
def swallowed_interrupts_unprinted() -> Iterator[None]:
    """While the body runs, a KeyboardInterrupt that Python cannot hand on is not printed.

    A signal may arrive within a callback of the garbage collector, a weak reference's, or a
    `__del__`. What is raised there ends nothing: Python writes a traceback to stderr and goes on.
    This is for those who notice the request all the same, later or at its repetition.
    """
    before = sys.unraisablehook

    def report(unraisable: sys.UnraisableHookArgs) -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            before(unraisable)

    sys.unraisablehook = report
    try:
        yield
    finally:
        sys.unraisablehook = before


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    characters = (_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text)
    return "".join(characters), error.end
