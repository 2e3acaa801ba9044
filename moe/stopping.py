"""SIGTERM and SIGINT: the step ends, a checkpoint is saved, and all processes stop at one step."""

import collections
import contextlib
import signal

import jax
import numpy as np

from moe.run import Run

LAG = 2  # steps


class Votes:
    """A signal may reach one process alone; all must stop, and at the same step.

    Each step carries the number of the signal that its process got, or 0, and returns the maximum
    over all of them: one number in a collective, no clock and no scheduler's service, the same on
    every platform. It is read `LAG` steps later, when it is there already, so that the host does
    not wait for the device.
    """

    def __init__(self, run: Run):
        self._run = run
        self._several = jax.process_count() > 1
        self._shards = run.mesh.size // run.mesh.shape["tensor"]
        self._asked = collections.deque()

    def add(self, batch: dict, own: int) -> dict:
        """The batch on its devices, and this process's vote with it."""
        if not self._several:
            return self._run.put(batch)
        vote = np.full(len(self._run.rows(self._shards)), own, np.int32)
        return self._run.put(batch) | self._run.put({"vote": vote})

    def count(self, asked, own: int) -> int:
        """The signal to stop for now, the same on all processes, or 0.

        Args:
          asked: the maximum of the votes of this step, on the devices.
          own: the signal that this process got.
        """
        if not self._several:
            return own
        self._asked.append(asked)
        return int(self._asked.popleft()) if len(self._asked) > LAG else 0


@contextlib.contextmanager
def stop_signal():
    """Yields a function: the number of the SIGINT or SIGTERM that came, or 0.

    The first one lets the step end and a checkpoint be saved; a second one ends at once.
    """
    received = []

    def handle(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
