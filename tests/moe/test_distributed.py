"""How a process finds the others: from flags and the environment, without starting anything."""

import argparse

import pytest

from moe.distributed import Start, add_flags, detect
from moe.errors import UsageError
from moe.faults import is_lost_peer

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
    found = detect(flags(*argv), environ, tpu=False)
    assert (found and found[:3]) == expected


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
    ],
)
def test_flags_that_cannot_be(argv, message):
    with pytest.raises(UsageError, match=message):
        detect(flags(*argv), {}, tpu=False)


def test_an_mpi_that_does_not_tell():
    with pytest.raises(UsageError, match="add --coordinator=HOST:PORT"):
        detect(flags(), MPI, tpu=False)


def test_what_a_lost_process_looks_like():
    gloo = "UNKNOWN: Gloo AllGather failed: [pair.cc:538] Read error: Connection reset by peer"
    wrapped = RuntimeError("restoring")
    wrapped.__cause__ = ValueError(gloo)  # so dispatch raises it
    assert is_lost_peer(ValueError(gloo)) and is_lost_peer(wrapped)
    assert not is_lost_peer(ValueError("connection of shapes (2,) and (3,)"))
