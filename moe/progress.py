"""The progress line of a run: one that moves on a terminal, one a log entry elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar


class Progress:
    """Shows step, loss, accuracy, images per second and the time left."""

    def __init__(self, start: int, last: int, batch_size: int):
        self._last, self._batch_size = last, batch_size
        self._console = Console(highlight=False)
        columns = (
            TextColumn("{task.fields[head]}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._bar = Bar(*columns, console=self._console) if self._console.is_terminal else None
        if self._bar:
            self._task = self._bar.add_task("", total=last, completed=start, head="", text="")
        self._step, self._time = start, time.perf_counter()

    def __enter__(self):
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_):
        if self._bar:
            self._bar.stop()

    def restart(self, step: int) -> None:
        """Measures from here on: what came before does not count as training."""
        self._step, self._time = step, time.perf_counter()

    def update(self, step: int, row: dict[str, float]) -> float:
        """Shows a row of training scalars; returns the images per second since the last one."""
        now = time.perf_counter()
        per_step = (now - self._time) / max(step - self._step, 1)
        self._step, self._time = step, now
        minutes, seconds = divmod(round(per_step * (self._last - step)), 60)
        head = f"step {step:>5}/{self._last}"
        shown = "every step skipped"
        if "train/loss" in row:
            shown = f"loss {row['train/loss']:.4f}  accuracy {row['train/accuracy']:7.2%}"
        rate = self._batch_size / per_step
        text = f"{shown}  {rate:,.0f} images/s  {minutes}:{seconds:02d} left"
        if self._bar:
            self._bar.update(self._task, completed=step, head=head, text=text)
        else:
            print(head, text, sep="  ", flush=True)
        return rate

    def note(self, step: int, results: dict[str, float]) -> None:
        """Prints an evaluation; its time does not count as training."""
        self._console.print(
            f"step {step:>5}  evaluation: accuracy {results['eval/accuracy']:.2%}, "
            f"loss {results['eval/loss']:.4f}"
        )
        self._time = time.perf_counter()
