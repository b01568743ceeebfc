"""How far a grid of runs is: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import rich.console
import rich.progress
import rich.text

_SECONDS_BETWEEN_LINES = 5.0
_FORMS = {
    "loss": "  loss {:.3f}",
    "test_accuracy": "  accuracy {:.1%}",
    "density": "  density {:.3f}",
}


class _LineAndBar(rich.progress.Progress):
    """A progress bar below a line of text, which has more room there than beside it."""

    line = ""

    def get_renderables(self) -> Iterator[rich.console.RenderableType]:
        yield rich.text.Text(self.line, no_wrap=True, overflow="ellipsis")
        yield self.make_tasks_table(self.tasks)


class Progress:
    """Shows method, seed, epoch, loss, accuracy, density, and the time left for the whole grid.

    Loss is that of the training batches, accuracy that of the test images. The time left counts
    the steps that remain at the speed of the steps done. On a terminal all of it is a live line
    above a bar, within 80 columns; elsewhere it is a printed line every few seconds, and one at
    the end of each run.
    """

    def __init__(
        self,
        runs: int,
        steps: int,
        finished: int = 0,
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepares to show a grid.

        Args:
          runs: how many runs there are to do.
          steps: training steps of all of them together.
          finished: runs of the grid that were done before.
          console: where to write; by default standard output.
          clock: gives the time in seconds.
        """
        self.console = console or rich.console.Console(highlight=False, soft_wrap=True)
        self._clock = clock
        self._runs, self._all_steps, self._finished = runs, steps, finished
        self._begun = 0  # runs of this process that are done or under way
        self._together = 1  # runs that are under way
        self._steps_of_run = self._epochs = 0
        self._before = self._steps = 0  # steps of the runs that are over; and with those under way
        self._title = self._numbers = self._doing = ""
        self._seconds = 0.0  # of the runs that are over
        self._done_before = 0  # steps that this process did not take
        self._resumed_at: float | None = None
        self._printed, self._printed_at = "", -float("inf")
        self._bar: _LineAndBar | None = None
        self._task = rich.progress.TaskID(0)

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Draws the bar while the body runs, where there is a terminal."""
        if not self.console.is_terminal:
            yield
            return
        bar = _LineAndBar(
            rich.progress.BarColumn(bar_width=None),
            rich.progress.TextColumn("{task.percentage:3.0f}%  {task.fields[left]}"),
            console=self.console,
            expand=True,
        )
        with bar:
            self._bar = bar
            self._task = bar.add_task("", total=self._all_steps, left="")
            try:
                yield
            finally:
                self._bar = None

    @contextlib.contextmanager
    def running(self, title: str, steps: int, epochs: int, together: int = 1) -> Iterator[None]:
        """Marks the steps of the body as those of one run, or of several that train together.

        Args:
          title: says which.
          steps: training steps of each.
          epochs: epochs of each.
          together: how many runs.
        """
        first, total = self._finished + self._begun + 1, self._finished + self._runs
        self._begun += together
        self._steps_of_run, self._epochs, self._together = steps, epochs, together
        numbers = f"{first}" if together == 1 else f"{first}-{first + together - 1}"
        self._title = f"[{numbers}/{total}] {title}"
        self._numbers = ""
        self._resumed_at = self._clock()
        try:
            yield
        except BaseException:
            self._begun -= together  # they are not done
            self._steps = self._before
            raise
        finally:
            self._seconds += self._clock() - self._resumed_at
            self._resumed_at = None
        self._before += steps * together
        self._steps = self._before
        self._show(force=True)

    @contextlib.contextmanager
    def doing(self, what: str, printed: bool = False) -> Iterator[None]:
        """Says on the bar why it stands still while the body runs.

        Args:
          what: is done meanwhile, e.g. "saving".
          printed: whether it is said in a line of its own where there is no bar.
        """
        before, self._doing = self._doing, f"{what} ..."
        if self._bar is not None:
            self._draw()
            self._bar.refresh()
        elif printed and not self.console.is_terminal:
            self.console.print(f"{what} ...", markup=False)
        try:
            yield
        finally:
            self._doing = before
            if self._bar is not None:
                self._draw()

    def skipped(self, runs: int, steps: int) -> None:
        """`runs` runs of `steps` steps in all need not be done: others did them, or they failed."""
        self._runs -= runs
        self._finished += runs
        self._all_steps -= steps

    def resumed(self, step: int) -> None:
        """The current run goes on from `step`, which an earlier process took."""
        self._done_before += step * self._together
        self._steps = self._before + step * self._together
        self.console.print(f"{self._title}: continuing from step {step}", markup=False)

    def update(self, step: int, epoch: int, shown: Mapping[str, float]) -> None:
        """Shows where the current run is.

        Args:
          step: steps done.
          epoch: the epoch they are in, from 1.
          shown: `loss`, `test_accuracy` and `density`, those of them that are known by now.
        """
        self._steps = self._before + step * self._together
        self._numbers = f"  epoch {epoch}/{self._epochs}"
        for name, form in _FORMS.items():
            if name in shown:
                self._numbers += form.format(shown[name])
        self._show(force=False)

    def time_left(self) -> float | None:
        """Seconds until the grid is done; None before the first step."""
        taken = self._steps - self._done_before
        if taken <= 0:
            return None
        spent = self._seconds
        if self._resumed_at is not None:
            spent += self._clock() - self._resumed_at
        return spent / taken * (self._all_steps - self._steps)

    def _left(self) -> str:
        seconds = self.time_left()
        return "" if seconds is None else "{}:{:02} left".format(*divmod(round(seconds), 60))

    def _draw(self) -> None:
        assert self._bar is not None
        self._bar.line = self._title + self._numbers
        if self._doing:  # beside the numbers there may be no room
            under_way = self._resumed_at is not None
            self._bar.line = f"{self._title}  {self._doing}" if under_way else self._doing
        self._bar.update(
            self._task, completed=self._steps, total=self._all_steps, left=self._left()
        )

    def _show(self, force: bool) -> None:
        if self._bar is not None:
            self._draw()
            return
        line = self._title + self._numbers
        due = force or self._clock() - self._printed_at >= _SECONDS_BETWEEN_LINES
        if not self.console.is_terminal and due and line != self._printed:
            self.console.print(f"{line}  {self._left()}", markup=False)
            self._printed, self._printed_at = line, self._clock()
