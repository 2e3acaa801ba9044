"""Finds out how a process reaches the others: from flags, or from what its launcher tells.

Nothing here starts JAX or waits for anybody.
"""

import argparse
import errno
import glob
import importlib.util
import ipaddress
import os
import socket
from collections.abc import Mapping
from typing import NamedTuple

from moe.errors import UsageError

LONGEST = 7 * 24 * 3600  # seconds of a timeout


class Start(NamedTuple):
    """Holds what `jax.distributed.initialize` is told; JAX finds out what is None by `method`."""

    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    method: str  # of jax's cluster detection; "deactivate" for none


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that tell a process about the others."""
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
    """Returns how to start, from the flags and the environment; None for a run of one process.

    Args:
      flags: of `add_flags`; --coordinator alone is enough where the launcher tells the rest.
      environ: the environment's variables.
      tpu: whether this is a TPU host.

    Raises:
      UsageError: the flags are half given, out of range, or contradict themselves.
    """
    for name in ("start_timeout", "heartbeat_timeout"):
        if not 1 <= getattr(flags, name) <= LONGEST:
            raise UsageError(f"--{name}={getattr(flags, name)} must be 1 to {LONGEST} seconds")
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
    digits = port.isascii() and port.isdigit()
    if not (host and colon and digits and 0 < int(port) < 65536):
        raise UsageError(f"--coordinator={flags.coordinator} is not of the form HOST:PORT")
    if not 0 <= own < count:
        raise UsageError(f"--process_id={own} must be from 0 to --num_processes={count} minus 1")
    if count == 1:
        return None
    return Start(flags.coordinator, count, own, launched.method if launched else "deactivate")


def _launcher(environ: Mapping[str, str], tpu: bool) -> Start | None:
    """Reads the launcher's variables; JAX reads the same ones, and the address with them."""
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environ for name in slurm):
        size, rank = int(environ["SLURM_NTASKS"]), int(environ["SLURM_PROCID"])
        return Start(None, size, rank, "slurm") if size > 1 else None
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
    """Tells whether this machine has TPU chips and their library, without starting JAX."""
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def listening_address(coordinator: str) -> str:
    """Returns where process 0 listens for the others, once that is known to be free.

    A number is taken as it was given: 127.0.0.1 is heard by this machine alone. A name may mean
    another address here than on the other hosts (Debian's own is 127.0.1.1), so every interface
    listens.

    Raises:
      UsageError: the port is in use, or this machine has no such address. JAX would end by a
        segmentation fault.
    """
    address = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or coordinator
    host, _, port = address.rpartition(":")
    everywhere = not _is_number(host)
    places = socket.getaddrinfo(
        None if everywhere else host.strip("[]"),
        int(port),
        type=socket.SOCK_STREAM,
        flags=socket.AI_PASSIVE,
    )
    for family, kind, protocol, _, place in places:
        try:
            _try_to_bind(family, kind, protocol, place)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UsageError(
                    f"--coordinator={coordinator}: port {port} of this machine is in use; give "
                    "all processes another one, or stop what listens there"
                ) from error
            if not everywhere:
                raise UsageError(
                    f"process 0 cannot listen at {address} ({error.strerror}): --coordinator must "
                    "be an address of its machine; if a port is forwarded to it, set "
                    f"JAX_COORDINATOR_BIND_ADDRESS=[::]:{port}"
                ) from error
    return f"[::]:{port}" if everywhere else address


def _is_number(host: str) -> bool:
    try:
        return host == "localhost" or bool(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return False


def _try_to_bind(family: int, kind: int, protocol: int, place: tuple) -> None:
    with socket.socket(family, kind, protocol) as probe:
        # A port whose last connections still close is free, as it is for a server.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.bind(place)
