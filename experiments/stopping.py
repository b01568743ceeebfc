"""Requests to stop: SIGTERM, a platform's preemption notice, Ctrl-C.

A run that is asked to stop saves a checkpoint and ends. SIGTERM is how SLURM, GKE, Cloud TPU and
spot machines announce that they will take a machine back.
"""

from __future__ import annotations

import contextlib
import signal
import types
from collections.abc import Iterator
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from experiments.terminal import swallowed_interrupts_unprinted


class StopRequests:
    """Hears of requests to stop while it is entered.

    In a single process the first SIGTERM or Ctrl-C is noted while there is something to save
    (`deferred`), and raises KeyboardInterrupt at once elsewhere, as a second Ctrl-C does. Of
    several processes any one may get SIGTERM or a preemption notice: JAX tells the others, and they
    agree on where to stop.
    """

    def __init__(self) -> None:
        """Hears nothing yet."""
        self._signal: int | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}
        self._entered = contextlib.ExitStack()
        self._asked = 0
        self._agreed = False

    def __enter__(self) -> Self:
        """Installs handlers of signals, where this process is alone."""
        if jax.process_count() == 1:
            self._entered.enter_context(swallowed_interrupts_unprinted())
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        """Puts back the handlers that were there."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        self._entered.close()

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        again = self._signal is not None and number == signal.SIGINT
        self._signal = number
        if again or not self._deferred:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """While the body runs, requests are noted; the body asks for them, and saves its state."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def noted(self) -> bool:
        """Whether this process has been asked to stop, in the middle of anything."""
        return self._signal is not None

    def agreed(self) -> bool:
        """Whether to stop now. All processes have to ask equally often, and get the same answer."""
        if jax.process_count() > 1 and not self._agreed:
            self._asked += 1
            self._agreed = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._agreed or self.noted()

    def exit_code(self, unknown: int = signal.SIGTERM) -> int:
        """128 plus the signal's number, as shells have it; `unknown` where there was none.

        A preemption notice is the latter.
        """
        return 128 + (unknown if self._signal is None else self._signal)
