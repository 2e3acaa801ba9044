"""Tests how a process finds the others and recognises their loss, without starting anything."""

import argparse
import socket

import jax
import pytest

from moe.errors import UsageError
from moe.hosts.cluster import Start, add_flags, detect, listening_address
from moe.hosts.faults import is_lost_peer
from tests.moe.launch import free_port

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "4"}
SLURM |= {"SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}


def flags(*argv):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("environ", "tpu", "expected"),
    [
        ({}, False, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False, None),
        (SLURM, False, Start(None, 4, 3, "slurm")),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False, None),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, False, None),  # no srun
        (MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1"}, False, Start(None, 2, 1, "ompi")),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, False, None),
        ({}, True, Start(None, None, None, "gcetpu")),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
        ({"JAX_PLATFORMS": "cpu"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, Start(None, None, None, "gketpu")),
        (
            {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
            True,
            Start(None, None, None, "gketpu"),
        ),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, None),
    ],
)
def test_from_the_environment(environ, tpu, expected):
    assert detect(flags(), environ, tpu) == expected


@pytest.mark.parametrize(
    ("argv", "environ", "expected"),
    [
        (("--coordinator=h:1234", "--num_processes=2", "--process_id=1"), {}, ("h:1234", 2, 1)),
        (
            ("--coordinator=[::1]:1234", "--num_processes=2", "--process_id=0"),
            {},
            ("[::1]:1234", 2, 0),
        ),
        (("--coordinator=h:1234",), SLURM, ("h:1234", 4, 3)),
        (("--coordinator=h:1234",), MPI, ("h:1234", 2, 1)),
        (("--coordinator=h:1234", "--num_processes=3", "--process_id=2"), MPI, ("h:1234", 3, 2)),
        (("--coordinator=h:1234", "--num_processes=1", "--process_id=0"), {}, None),
    ],
)
def test_from_flags(argv, environ, expected):
    start = detect(flags(*argv), environ, tpu=False)
    assert (start and start[:3]) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--num_processes=2",), "several processes need all of --coordinator=HOST:PORT"),
        (("--process_id=0",), "several processes need all of"),
        (("--coordinator=h:1", "--num_processes=2"), "several processes need all of"),
        (("--coordinator=h", "--num_processes=2", "--process_id=0"), "not of the form HOST:PORT"),
        (("--coordinator=h:x", "--num_processes=2", "--process_id=0"), "not of the form HOST:PORT"),
        (("--coordinator=h:1", "--num_processes=2", "--process_id=2"), "must be from 0 to"),
        (("--coordinator=h:1", "--num_processes=0", "--process_id=0"), "must be from 0 to"),
        (
            ("--coordinator=h:\uff14\uff12", "--num_processes=2", "--process_id=0"),
            "not of the form",
        ),
        (("--start_timeout=0",), "--start_timeout=0 must be 1 to 604800 seconds"),
        (("--heartbeat_timeout=99999999999",), "--heartbeat_timeout=99999999999 must be 1 to"),
    ],
)
def test_flags_that_cannot_be(argv, message):
    with pytest.raises(UsageError, match=message):
        detect(flags(*argv), {}, tpu=False)


def test_an_mpi_that_does_not_tell():
    with pytest.raises(UsageError, match="add --coordinator=HOST:PORT"):
        detect(flags(), MPI, tpu=False)


def test_a_number_is_listened_to_as_it_is_given_and_a_name_on_every_interface():
    port = free_port()
    for given in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::]:{port}"):
        assert listening_address(given) == given
    assert listening_address(f"{socket.gethostname()}:{port}") == f"[::]:{port}"


def test_an_address_that_cannot_be_listened_to():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for host in ("127.0.0.1", "a-name"):
            with pytest.raises(UsageError, match=f"port {port} of this machine is in use"):
                listening_address(f"{host}:{port}")
    with pytest.raises(
        UsageError, match=r"cannot listen at 192\.0\.2\.1:.* an address of its machi"
    ):
        listening_address(f"192.0.2.1:{port}")


def test_the_environment_says_where_to_listen(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", f"0.0.0.0:{(port := free_port())}")
    assert listening_address("192.0.2.1:1") == f"0.0.0.0:{port}"


GLOO = "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:547] "
CLOSED = GLOO + "Connection closed by peer [127.0.0.1]:1"
Fault = jax.errors.JaxRuntimeError


def caused(cause, error):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        ValueError(CLOSED),  # so dispatch raises it
        Fault(CLOSED),
        Fault(f"INTERNAL: Error dispatching computation: {CLOSED}"),
        Fault(GLOO + "Read timeout [::1]:38624"),
        Fault("INTERNAL: NCCL operation ncclAllReduce(a, b) failed: remote process exited"),
        Fault("DEADLINE_EXCEEDED: Barrier timed out. Id: save_start::0"),
        Fault("UNAVAILABLE: failed to connect to all addresses"),
        Fault("INTERNAL: /job:jax_worker/replica:0/task:1 heartbeat timeout"),
        caused(Fault("ABORTED: another task died"), TimeoutError("waiting for a barrier")),
    ],
)
def test_what_a_lost_process_looks_like(error):
    assert is_lost_peer(error)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("/data/barrier_reef: UNAVAILABLE: not found"),
        ConnectionResetError("Connection reset by peer"),  # of a file system
        NotImplementedError("Differentiation rule for 'optimization_barrier' not implemented"),
        ValueError("connection of shapes (2,) and (3,)"),
        ValueError("no file gloo/nccl.py: connection closed by peer, heartbeat, barrier"),
        ValueError("INVALID_ARGUMENT: operand of optimization_barrier: UNAVAILABLE"),
        ValueError("config.nccl: UNAVAILABLE: aborted"),
        RuntimeError(CLOSED),  # whoever says so, it is not JAX
        Fault("INTERNAL: cannot open /data/gloo/barrier.npz: Connection timed out"),
        Fault("RESOURCE_EXHAUSTED: out of memory in NCCL operation, barrier, connection"),
        Fault("INTERNAL: NCCL operation ncclInit() failed: unhandled cuda error"),
        Fault(GLOO + "Received data size doesn't match expected size."),
        caused(KeyError("gloo"), ValueError("barrier: Gloo connection closed by peer")),
    ],
)
def test_what_a_lost_process_does_not_look_like(error):
    assert not is_lost_peer(error)
