"""Signals that stop a run: a checkpoint is saved first, and all processes stop at one step."""

import collections
import signal
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moe.train.run import Run

LAG = 2  # steps
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TOGETHER = 1.0  # seconds in which signals count as one: shells and schedulers send several


class Signals:
    """Catches the signals of `STOPS`, from `listen` to the end of the block.

    The first one lets the step end and a checkpoint be saved; a later Ctrl-C or SIGTERM ends the
    process at once. Signals that the process was started to ignore (nohup) stay ignored.
    """

    def __init__(self):
        self.number = 0  # of the first signal that came
        self._first, self._old = 0.0, {}

    def listen(self) -> None:
        """Catches the signals from now on; until then there is nothing to save."""
        for number in STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._handle)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _handle(self, number, frame) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self._first = number, now
        elif number != signal.SIGHUP and now - self._first > TOGETHER:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


class Votes:
    """A signal may reach one process alone; all must stop, and at the same step.

    Each batch carries the number of the signal that its process got, or 0, and its step returns the
    maximum over all of them: one number in a collective, no clock and no scheduler's service, the
    same on every platform. In training it is read `LAG` steps later, when it is there already, so
    that the host does not wait for the device; an evaluation waits for each batch anyway.
    """

    def __init__(self, run: Run, signals: Signals):
        self._run, self._signals = run, signals
        self._several = jax.process_count() > 1
        self._shards = run.mesh.size // run.mesh.shape["tensor"]
        self._asked = collections.deque()

    def add(self, batch: dict) -> dict:
        """Returns the batch on its devices, and this process's vote with it."""
        if not self._several:
            return self._run.put(batch)
        vote = np.full(len(self._run.rows(self._shards)), self._signals.number, np.int32)
        return self._run.put(batch) | self._run.put({"vote": vote})

    def count(self, asked, lag: int = LAG) -> int:
        """Returns the signal to stop for now, the same on all processes, or 0.

        Args:
          asked: the maximum of the votes of this step, on the devices.
          lag: how many steps or batches later it is read.
        """
        if not self._several:
            return self._signals.number
        self._asked.append(asked)
        number = 0
        while len(self._asked) > lag:
            number = max(number, int(self._asked.popleft()))
        return number


def with_vote(step: Callable) -> Callable:
    """Returns `step`, whose last argument is a batch, with the largest vote of the batch beside its
    result; None where the batch has no votes."""

    def call(*arguments):
        *rest, batch = arguments
        batch = dict(batch)
        vote = batch.pop("vote", None)
        result = step(*rest, batch)
        return result, None if vote is None else _after(result, vote).max()

    return call


def _after(result, vote):
    """Returns the vote, as something that is known once the numbers of `result` are.

    XLA's CPU runtime starts the collectives of a program in order, but goes on while a loop that
    has some still runs. Gloo knows messages by their order alone: a collective that needs nothing
    of the loop could take the loop's messages, on one process and not on the other. The routers'
    searches are such loops, and the vote's would be the one collective that waits for none.
    """
    numbers = [leaf for leaf in jax.tree.leaves(result) if leaf.ndim == 0]
    never = sum(number.astype(jnp.float32) for number in numbers) < -jnp.inf
    return jnp.where(never, 0, vote)
