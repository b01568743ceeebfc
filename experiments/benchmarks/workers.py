"""Processes that measure one framework each, so that two of them can share a card in turns."""

from __future__ import annotations

import importlib
import multiprocessing
from typing import Any


class Side:
    """A framework's process: it makes a worker and answers calls of the worker's methods."""

    def __init__(self, framework: str, worker: str) -> None:
        """Starts it.

        Args:
          framework: a name for messages, e.g. "torch".
          worker: the class of the worker, which takes no arguments, e.g. "package.module:Class".
        """
        context = multiprocessing.get_context("spawn")
        self._framework = framework
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, worker), daemon=True)
        self._process.start()
        other.close()

    def __call__(self, name: str, *arguments: Any) -> Any:
        """What the worker's method returns; raises RuntimeError with what it raised."""
        try:
            self._connection.send((name, arguments))
            good, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            code = self._process.exitcode
            raise RuntimeError(f"the process of {self._framework} ended with {code}") from error
        if not good:
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        """Ends it."""
        self._connection.send(None)
        self._process.join()


def _serve(connection: Any, worker: str) -> None:
    """Answers calls until it is sent nothing; an exception is an answer too."""
    module, _, name = worker.partition(":")
    made = None
    while message := connection.recv():
        method, arguments = message
        try:
            if made is None:
                made = getattr(importlib.import_module(module), name)()
            connection.send((True, getattr(made, method)(*arguments)))
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            connection.send((False, f"{type(error).__name__}: {first}"))
