"""Trains the runs of a comparison that are not complete: here, or several side by side."""

import contextlib
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

import moe
from moe.errors import UsageError
from moe.screen import say

# Folders beside those of the rows: what runs side by side say, and runs that choose settings.
LOGS, TUNING = "logs", "tuning"
_POLL = 0.1  # seconds


class Job(NamedTuple):
    """Names a run: the row and seed it is of, where it lives, and what makes its config."""

    row: str
    seed: int
    workdir: pathlib.Path
    file: str
    overrides: dict[str, str]
    config: ConfigDict

    @property
    def command(self) -> list[str]:
        """Returns the arguments of this program's own `train` command."""
        settings = (f"--config.{key}={value}" for key, value in self.overrides.items())
        return ["train", f"--config={self.file}", f"--workdir={self.workdir}", *settings]


def run_here(
    jobs: Sequence[Job],
    train: Callable[[ConfigDict, pathlib.Path], object],
    done: Callable[[Job, str], None],
) -> None:
    """Trains one after the other in this process; `done` is told each job and what went wrong.

    A run that fails ends nothing but itself. A signal ends all, with the current one saved.
    """
    for number, job in enumerate(jobs, 1):
        say(f"[{number}/{len(jobs)}] {job.row}, seed {job.seed}")
        wrong = ""
        try:
            train(job.config, job.workdir)
        except UsageError as error:
            wrong = str(error)
        except Exception as error:
            traceback.print_exc()
            wrong = f"{type(error).__name__}: {error}"
        done(job, wrong)


def run_side_by_side(
    jobs: Sequence[Job], number: int, logs: pathlib.Path, done: Callable[[Job, str], None]
) -> None:
    """Trains up to `number` at once, each in a process with its share of the cores.

    A signal is passed on: every run saves a checkpoint, then this program exits with 128 + its
    number. What a run says is in `logs`.

    Args:
      done: is told each job that ended and what went wrong, "" for nothing.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, running, ended = list(jobs), {}, 0
    with _Caught() as caught:
        while running or (waiting and not caught.number):
            free = [place for place in range(number) if place not in running]
            while waiting and free and not caught.number:
                place, job = free.pop(0), waiting.pop(0)
                log = logs / f"{job.workdir.parent.name}.{job.workdir.name}.txt"
                running[place] = job, log, _start(job, log, place, number)
            for place, (job, log, process) in list(running.items()):
                caught.pass_on(process)
                if process.poll() is None:
                    continue
                del running[place]
                if not (caught.number and process.returncode):  # else it was stopped, as asked
                    ended += 1
                    wrong = "" if process.returncode == 0 else _last_words(log, process.returncode)
                    say(f"[{ended}/{len(jobs)}] {job.row}, seed {job.seed}: {wrong or 'complete'}")
                    done(job, wrong)
            time.sleep(_POLL)
    if caught.number:
        say("stopped; the same command continues")
        sys.exit(128 + caught.number)


class _Caught:
    """Catches the signals that end a program, and passes them on to its runs, each once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self):
        self.number, self._told = 0, {}

    def __enter__(self):
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        self.number = number

    def pass_on(self, process: subprocess.Popen) -> None:
        if self.number and process.pid not in self._told:
            self._told[process.pid] = self.number
            process.send_signal(self.number)


def _start(job: Job, log: pathlib.Path, place: int, number: int) -> subprocess.Popen:
    """Starts a run as a process of a session of its own, so that the terminal's Ctrl-C comes from
    us alone; its threads are as many as its cores."""
    root = str(pathlib.Path(moe.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))
    # Several processes of one accelerator share its memory.
    share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / number:.3f}"}
    environment = share | os.environ | {"PYTHONPATH": path}
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "moe", *job.command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    if cores := shares(_cores(), number)[place]:
        with contextlib.suppress(OSError):  # it ended already, or the system forbids it
            os.sched_setaffinity(process.pid, cores)
    return process


def _cores() -> list[int]:
    """Returns the cores that this process may use, [] where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def shares(cores: Sequence[int], number: int) -> list[list[int]]:
    """Divides cores into `number` shares; with fewer cores than shares, several have the same."""
    if not cores:
        return [[] for _ in range(number)]
    if number >= len(cores):
        return [[cores[place % len(cores)]] for place in range(number)]
    edges = [place * len(cores) // number for place in range(number + 1)]
    return [list(cores[a:b]) for a, b in itertools.pairwise(edges)]


def _last_words(log: pathlib.Path, code: int) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), "")
    said = said.removeprefix("error: ") or (lines[-1] if lines else "it said nothing")
    return f"{said} (exit code {code}; all it said is in {log})"


def complain(failed: Iterable[tuple[str, int, str]]) -> None:
    """Raises UsageError that says which runs failed and why; nothing where none did."""
    told = [f"{row}, seed {seed}: {wrong}" for row, seed, wrong in failed]
    if told:
        more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
        raise UsageError(
            f"{len(told)} of the runs failed, the table is of the others ({'; '.join(told[:3])}"
            f"{more}); the same command tries them again"
        )
