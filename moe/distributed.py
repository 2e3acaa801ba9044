"""Several processes as one run: how they find each other, and how they agree.

A run on one machine starts nothing and waits for nobody. On several, every process runs the same
command; `jax.distributed` is told where process 0 is by the flags, or by the launcher's
environment. Process 0 alone writes and speaks; an error that any process finds before training is
raised by all, so that none waits for another.
"""

import argparse
import contextlib
import glob
import importlib.util
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from moe import faults
from moe.errors import UsageError

T = TypeVar("T")
LINE = 1024  # bytes of an error that the processes exchange


class AgreedError(UsageError):
    """An error that every process raises at the same place: they can end in good order."""


class Start(NamedTuple):
    """What `jax.distributed.initialize` is told; None is for JAX to find out by `method`."""

    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    method: str  # of jax's cluster detection; "deactivate" for none


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes (found by themselves under TPU, SLURM, MPI)"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num_processes", type=int, help="of the run")
    group.add_argument("--process_id", type=int, help="of this one, from 0")
    group.add_argument(
        "--start_timeout", type=int, default=300, help="seconds to wait for the others to start"
    )
    group.add_argument(
        "--heartbeat_timeout",
        type=int,
        default=60,
        help="seconds of silence after which a process counts as dead",
    )


def detect(flags: argparse.Namespace, environ: Mapping[str, str], tpu: bool) -> Start | None:
    """How to start, from the flags and the environment alone; None for a run of one process.

    Args:
      flags: of `add_flags`; --coordinator alone is enough where the launcher tells the rest.
      environ: the environment's variables.
      tpu: whether this is a TPU host.

    Raises:
      UsageError: the flags are half given, or contradict themselves.
    """
    launched = _launcher(environ, tpu)
    given = (flags.coordinator, flags.num_processes, flags.process_id)
    if all(value is None for value in given):
        if launched and launched.method == "ompi" and "OMPI_MCA_orte_hnp_uri" not in environ:
            raise UsageError(
                "this Open MPI does not tell its processes where the first one is: add "
                "--coordinator=HOST:PORT, a free port on the machine of rank 0"
            )
        return launched
    known = (launched.num_processes, launched.process_id) if launched else (None, None)
    count = flags.num_processes if flags.num_processes is not None else known[0]
    own = flags.process_id if flags.process_id is not None else known[1]
    if None in (flags.coordinator, count, own):
        raise UsageError(
            "several processes need all of --coordinator=HOST:PORT --num_processes=N "
            "--process_id=I (I from 0 to N-1)"
        )
    host, colon, port = flags.coordinator.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise UsageError(f"--coordinator={flags.coordinator} is not of the form HOST:PORT")
    if not 0 <= own < count:
        raise UsageError(f"--process_id={own} must be from 0 to --num_processes={count} minus 1")
    if count == 1:
        return None
    return Start(flags.coordinator, count, own, launched.method if launched else "deactivate")


def _launcher(environ: Mapping[str, str], tpu: bool) -> Start | None:
    """What the launcher's variables say: JAX reads the same ones, and the address with them."""
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environ for name in slurm):
        found = Start(None, int(environ["SLURM_NTASKS"]), int(environ["SLURM_PROCID"]), "slurm")
        return found if found.num_processes > 1 else None
    if "OMPI_COMM_WORLD_SIZE" in environ and "OMPI_COMM_WORLD_RANK" in environ:
        size, rank = int(environ["OMPI_COMM_WORLD_SIZE"]), int(environ["OMPI_COMM_WORLD_RANK"])
        return Start(None, size, rank, "ompi") if size > 1 else None
    if not tpu or environ.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("tpu", ""):
        return None
    slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    hosts = environ.get("TPU_WORKER_HOSTNAMES")
    if hosts is not None:  # GKE
        several = slices > 1 or len(hosts.split(",")) > 1
        return Start(None, None, None, "gketpu") if several else None
    if "TPU_SKIP_MDS_QUERY" in environ:
        return None
    return Start(None, None, None, "gcetpu")  # a TPU VM: its metadata server knows the others


def on_tpu() -> bool:
    """Whether this machine has TPU chips and their library, without starting JAX's backend."""
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


@contextlib.contextmanager
def processes(flags: argparse.Namespace):
    """The run of which this process is one; to be entered before JAX computes anything.

    Whatever ends the block ends the process within a bounded time, whether the others still live
    or not: see `moe.faults`.

    Raises:
      UsageError: the flags are wrong, or the others cannot be reached.
    """
    start = detect(flags, os.environ, on_tpu())
    if start is None:
        yield
        return
    _initialize(start, flags.start_timeout, flags.heartbeat_timeout)
    import jax

    own = jax.process_index()
    if own:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    with faults.ends_the_process(own, AgreedError):
        yield


def _initialize(start: Start, start_timeout: int, heartbeat_timeout: int) -> None:
    import jax

    # Signals are ours (moe.stopping): JAX's own service would swallow SIGTERM from here on.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    late = (
        f"not all processes came within --start_timeout={start_timeout} seconds: is the same "
        "command running on every host, with the same coordinator and number of processes?"
    )
    if start.coordinator and start.process_id:
        _wait_for(start.coordinator, start_timeout)
    try:
        # JAX aborts the process, with a page of text, where the others do not come in time.
        with faults.last_words(f"error: {late}", 2, quiet=True):
            jax.distributed.initialize(
                start.coordinator,
                start.num_processes,
                start.process_id,
                cluster_detection_method=start.method,
                initialization_timeout=start_timeout,
                heartbeat_timeout_seconds=heartbeat_timeout,
                shutdown_timeout_seconds=heartbeat_timeout,
            )
    except Exception as error:  # of JAX, gRPC or the launcher's environment
        where = f" at {start.coordinator}" if start.coordinator else ""
        raise UsageError(
            f"cannot start jax.distributed{where}: {str(error)[:200]}; is the address free and "
            "that of process 0's machine?"
        ) from error


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


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    import jax

    return jax.process_index() == 0


def together(f: Callable[[], T]) -> T:
    """f() on every process; where it is a `UsageError` on any, that is raised on all."""
    import jax

    if jax.process_count() == 1:
        return f()
    result, text = None, ""
    try:
        result = f()
    except UsageError as error:
        text = str(error)
    if first := first_text(text):
        raise AgreedError(first)
    return result


def by_first(f: Callable[[], None]) -> None:
    """f() on process 0 alone, while the others wait; its `UsageError` is raised on all."""
    together(f if is_first() else lambda: None)


def first_text(text: str) -> str:
    """The first process's text that is not empty; every process must ask."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return text
    row = np.zeros(LINE, np.uint8)
    data = np.frombuffer(text.encode()[:LINE], np.uint8)
    row[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(row))
    texts = (bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows)
    return next((text for text in texts if text), "")
