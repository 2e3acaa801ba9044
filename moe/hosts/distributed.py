"""Runs several processes as one: starts them together, and has them agree.

A run on one machine starts nothing and waits for nobody. On several, every process runs the same
command. Process 0 alone writes and speaks; an error that any process finds before training is
raised by all, so that none waits for another.
"""

import argparse
import collections
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from moe.errors import UsageError
from moe.hosts import faults
from moe.hosts.cluster import Start, detect, listening_address, on_tpu

T = TypeVar("T")
BLOCK = 1024  # bytes; texts are padded to a multiple, so that few sizes are compiled


class AgreedError(UsageError):
    """Is raised by every process at the same place, so that all can end in good order."""


@contextlib.contextmanager
def processes(flags: argparse.Namespace):
    """Makes this process one of its run; to be entered before JAX computes anything.

    Whatever ends the block ends the process within a bounded time, whether the others still live
    or not: see `moe.hosts.faults`.

    Raises:
      UsageError: the flags are wrong, or the others cannot be reached.
    """
    start = detect(flags, os.environ, on_tpu())
    if start is None:
        yield
        return
    _initialize(start, flags.start_timeout, flags.heartbeat_timeout)
    import jax
    from jax._src.distributed import global_state  # what is known before there are devices

    with faults.ends_the_process(global_state.process_id, AgreedError):
        _compare_numbers(global_state, flags.start_timeout)
        _check_devices()
        if jax.process_index():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        yield


def _initialize(start: Start, start_timeout: int, heartbeat_timeout: int) -> None:
    listening = None
    if start.coordinator and start.process_id:
        _wait_for(start.coordinator, start_timeout)
    elif start.coordinator:
        listening = listening_address(start.coordinator)
    import jax

    # Signals are ours (moe.train.stopping): JAX's own service would swallow SIGTERM from here on.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Gloo matches the messages of two processes by their order alone. On CPUs each program ends
    # before the next begins, so that nothing can overtake; accelerators order their own queues.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    late = (
        f"error: not all processes came within --start_timeout={start_timeout} seconds: is the "
        "same command running on every host, with the same coordinator and number of processes?"
    )
    deaf = "error: process 0 cannot listen for the others: is the port of the run in use?"
    try:
        # JAX aborts the process, with a page of text, where the others do not come in time; where
        # the launcher's port is in use it ends by a segmentation fault.
        with (
            faults.last_words(late, 2, quiet=True),
            faults.last_words(deaf, 2, number=signal.SIGSEGV),
        ):
            jax.distributed.initialize(
                start.coordinator,
                start.num_processes,
                start.process_id,
                cluster_detection_method=start.method,
                initialization_timeout=start_timeout,
                heartbeat_timeout_seconds=heartbeat_timeout,
                shutdown_timeout_seconds=heartbeat_timeout,
                coordinator_bind_address=listening,
            )
    except Exception as error:  # of JAX, gRPC or the launcher's environment
        where = f" at {start.coordinator}" if start.coordinator else ""
        raise UsageError(
            f"cannot start jax.distributed{where}: {str(error)[:200]}; is the address free and "
            "that of process 0's machine?"
        ) from error


def _compare_numbers(state, seconds: int) -> None:
    """Compares how many processes each was told of: JAX would wait for the devices of all."""
    own, count, client = state.process_id, state.num_processes, state.client
    client.key_value_set(f"permoe/num_processes/{own}", str(count))
    for other in range(count) if own == 0 else (0,):
        key = f"permoe/num_processes/{other}"
        if (number := int(client.blocking_key_value_get(key, seconds * 1000))) != count:
            raise UsageError(
                f"this one was told --num_processes={count} and process {other} {number}; give "
                "all of them the same"
            )


def _wait_for(coordinator: str, seconds: int) -> None:
    """Waits until something listens there: process 0 may start later than this one."""
    host, _, port = coordinator.rpartition(":")
    end, reason = time.monotonic() + seconds, ""
    while time.monotonic() < end:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.2)
    raise UsageError(
        f"no process 0 at --coordinator={coordinator} within --start_timeout={seconds} seconds "
        f"({reason})"
    )


def _check_devices() -> None:
    import jax

    counts = collections.Counter(device.process_index for device in jax.devices())
    for own, count in sorted(counts.items()):
        if count != counts[0]:
            raise AgreedError(
                f"process {own} has {count} devices and process 0 has {counts[0]}: a run needs "
                "the same number in every process"
            )


def is_first() -> bool:
    """Tells whether this process is the one that writes and speaks."""
    import jax

    return jax.process_index() == 0


def together(f: Callable[[], T]) -> T:
    """Returns f(), called by every process; a `UsageError` of any is raised by all."""
    import jax

    if jax.process_count() == 1:
        return f()
    result, text = None, ""
    try:
        result = f()
    except UsageError as error:
        text = str(error) or type(error).__name__
    for own, first in enumerate(gather(text)):
        if first:
            raise AgreedError(f"process {own}: {first}" if own else first)
    return result


def by_first(f: Callable[[], None]) -> None:
    """Calls f on process 0 alone, while the others wait; its `UsageError` is raised by all."""
    together(f if is_first() else lambda: None)


def first_text(text: str) -> str:
    """Returns the first process's text that is not empty; every process must ask."""
    return next((text for text in gather(text) if text), "")


def gather(text: str) -> list[str]:
    """Returns every process's text, in their order; every process must ask."""
    import jax
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(process_allgather(np.int32(len(data)))).ravel()
    if not sizes.max():
        return [""] * len(sizes)
    row = np.zeros(-(-sizes.max() // BLOCK) * BLOCK, np.uint8)
    row[: len(data)] = data
    rows = np.asarray(process_allgather(row))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]
