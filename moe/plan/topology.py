"""The devices of a named topology, none of which need be there.

v5p:4x4x8      a TPU slice of 4 x 4 x 8 chips
2xv5e:16x16    two such slices, joined by the data centre's network
h100:4x8       4 hosts of 8 GPUs each
cpu:8          8 processes' worth of CPU devices
"""

import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from moe.errors import UsageError
from moe.plan.chips import Chip, find_chip


class Topology(NamedTuple):
    """`devices` are those to compile for: real descriptions for a TPU, CPU devices for others."""

    name: str
    chip: Chip
    slices: int
    shape: tuple[int, ...]  # of one slice; hosts x GPUs
    devices: Sequence[jax.Device]


def split_name(name: str) -> tuple[int, Chip, tuple[int, ...]]:
    """Slices, chip and shape that a name asks for."""
    found = re.fullmatch(r"(?:(\d+)x)?([a-z][a-z0-9]*):(\d+(?:x\d+)*)", name)
    if not found:
        raise UsageError(
            f"--topology={name!r} is not CHIP:SHAPE; expected for example v5p:4x4x8, 2xv5e:16x16, "
            "h100:4x8 (hosts x GPUs) or cpu:8"
        )
    chip = find_chip(found[2])
    shape = tuple(int(side) for side in found[3].split("x"))
    slices = int(found[1] or 1)
    if min(*shape, slices) < 1 or (chip.kind != "tpu" and (slices > 1 or len(shape) > 2)):
        form = {"tpu": "NxCHIP:AxBxC", "gpu": "CHIP:HOSTSxGPUS", "cpu": "cpu:N"}[chip.kind]
        raise UsageError(f"--topology={name!r}: expected {form} for a {chip.kind}, no size 0")
    if chip.largest and math.prod(shape) > chip.largest:
        raise UsageError(f"--topology={name!r}: a slice of {chip.name} has {chip.largest} at most")
    return slices, chip, shape


def open_topology(name: str) -> Topology:
    """The topology of a name.

    Raises:
      UsageError: there is none of that name, or what compiles for it is not installed.
    """
    slices, chip, shape = split_name(name)
    if chip.kind != "tpu":
        return Topology(name, chip, slices, shape, _fake_devices(math.prod(shape)))
    return Topology(name, chip, slices, shape, _described_devices(chip, shape, slices))


def _fake_devices(count: int) -> Sequence[jax.Device]:
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # JAX has started: its devices are what there is
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UsageError(f"a topology of {count} devices needs a process in which JAX is not used")
    return devices[:count]


def _described_devices(chip: Chip, shape: tuple[int, ...], slices: int) -> Sequence[jax.Device]:
    from jax.experimental import topologies

    # No metadata server, no chip and no lock are needed to compile; and no warnings of their lack.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    options = {"num_slices": slices} if slices > 1 else {}
    if chip.name == "v4":  # its two cores as one device, as on the other chips
        options["chip_config_name"] = "megacore"
    text = "x".join(map(str, shape))
    try:
        jax.config.update("jax_platforms", "cpu")
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip.name}:{text}", **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(f"--topology: {chip.name} has no slice {text} ({error})") from error
    except RuntimeError as error:
        raise UsageError(
            "planning for a TPU needs its compiler: pip install 'permoe[plan]' (libtpu, no TPU)"
        ) from error
    return topology.devices


def coordinates(topology: Topology, devices: Sequence[jax.Device]) -> np.ndarray | None:
    """Where each of the devices is in its slice, [N, dimensions]; of a GPU: host, place in it."""
    if topology.chip.kind == "tpu":
        return np.array([device.coords for device in devices])
    if topology.chip.kind == "gpu":
        number = np.array([topology.devices.index(device) for device in devices])
        return np.stack(np.divmod(number, topology.shape[-1]), -1)
    return None
