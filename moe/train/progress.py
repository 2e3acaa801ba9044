"""The progress line of a run: one that moves on a terminal, one a log entry elsewhere."""

import contextlib
import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from moe.screen import say
from moe.tasks import Task
from moe.tasks.task import line


class Progress:
    """Shows the step, the task's scalars, units per second and the time left."""

    def __init__(self, start: int, last: int, task: Task, units: int):
        """`units` are those of a step, in the task's unit."""
        self._last, self._task, self._units = last, task, units
        console = Console(highlight=False)
        columns = (
            TextColumn("{task.fields[head]}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._bar = Bar(*columns, console=console) if console.is_terminal else None
        if self._bar:
            self._row = self._bar.add_task("", total=last, completed=start, head="", text="")
        self.restart(start)

    def __enter__(self):
        with contextlib.suppress(OSError):
            if self._bar:
                self._bar.start()
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            if self._bar:
                self._bar.stop()

    def restart(self, step: int) -> None:
        """Measures from here on: what came before does not count as training."""
        self._step, self._time = step, time.perf_counter()

    @contextlib.contextmanager
    def pause(self):
        """Leaves the time inside out of the clock; its steps are counted all the same."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._time += time.perf_counter() - begin

    def update(self, step: int, row: dict[str, float]) -> dict[str, float]:
        """Shows a row of training scalars; returns the units per second since the last one.

        They are left out where no step was timed, or by a clock that jumped.
        """
        units, seconds = (step - self._step) * self._units, time.perf_counter() - self._time
        self.restart(step)
        rate = units / seconds if seconds > 0 else 0.0
        timed = 0 < rate < float("inf")
        text = line(self._task, "train", row) or "every step skipped"
        if timed:
            left = (self._last - step) * self._units / rate
            minutes, seconds = divmod(round(min(left, 1e9)), 60)
            text += f"  {rate:,.0f} {self._task.unit}s/s  {minutes}:{seconds:02d} left"
        head = f"step {step:>5}/{self._last}"
        if self._bar:
            self._bar.update(self._row, completed=step, head=head, text=text)
        else:
            say(f"{head}  {text}")
        return {f"train/{self._task.unit}s_per_second": rate} if timed else {}

    def note(self, step: int, results: dict[str, float]) -> None:
        """Prints an evaluation."""
        text = f"step {step:>5}  evaluation: {line(self._task, 'eval', results)}"
        if hardened := line(self._task, "eval/hardened", results):  # of a pruned run
            text += f"; hardened: {hardened}"
        if not self._bar:
            return say(text)
        with contextlib.suppress(OSError):
            self._bar.console.print(text)
