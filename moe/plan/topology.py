"""Describes the devices of a named topology, none of which need be there.

v5p:4x4x8      a TPU slice of 4 x 4 x 8 chips
2xv5e:16x16    two slices of 16 x 16, joined by the data centre's network
h100:4x8       4 hosts of 8 GPUs each
cpu:8          8 CPU devices
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

# Devices that can be described in seconds.
MOST_DEVICES = {"tpu": 16_384, "gpu": 4096, "cpu": 4096}


class Topology(NamedTuple):
    """Holds `devices` to compile for: real descriptions for a TPU, CPU devices for others."""

    name: str
    chip: Chip
    slices: int
    shape: tuple[int, ...]  # of one slice; hosts x GPUs
    devices: Sequence[jax.Device]


def split_name(name: str) -> tuple[int, Chip, tuple[int, ...]]:
    """Returns the slices, the chip and the shape of a slice that a name asks for.

    Raises:
      UsageError: the name has another form, or asks for more than there can be.
    """
    match = re.fullmatch(r"(?:([0-9]{1,9})x)?([a-z][a-z0-9]*):([0-9]{1,9}(?:x[0-9]{1,9})*)", name)
    if not match:
        raise UsageError(
            f"--topology={name!r} is not CHIP:SHAPE; expected for example v5p:4x4x8, 2xv5e:16x16, "
            "h100:4x8 (hosts x GPUs) or cpu:8"
        )
    chip = find_chip(match[2])
    shape = tuple(int(side) for side in match[3].split("x"))
    slices, letters = int(match[1] or 1), "x".join("ABC"[: chip.links // 2])
    sides, form = {
        "tpu": ((chip.links // 2,), f"{chip.name}:{letters} or Nx{chip.name}:{letters}"),
        "gpu": ((1, 2), f"{chip.name}:HOSTSxGPUS"),
        "cpu": ((1,), "cpu:N"),
    }[chip.kind]
    if min(*shape, slices) < 1 or len(shape) not in sides or (slices > 1 and chip.kind != "tpu"):
        raise UsageError(f"--topology={name!r}: expected {form}, no size 0")
    _check_count(name, chip, slices, shape)
    return slices, chip, shape


def _check_count(name: str, chip: Chip, slices: int, shape: tuple[int, ...]) -> None:
    """Raises UsageError for more chips than their links join, or than can be compiled for."""
    joined = shape[-1] if chip.kind == "gpu" else math.prod(shape)
    if chip.largest and joined > chip.largest:
        what = "host" if chip.kind == "gpu" else "slice"
        raise UsageError(f"--topology={name!r}: a {what} of {chip.name} has {chip.largest} at most")
    count, most = slices * math.prod(shape), MOST_DEVICES[chip.kind]
    if count > most:
        raise UsageError(f"--topology={name!r} has {count} devices; expected {most} at most")


def open_topology(name: str) -> Topology:
    """Returns the topology of a name.

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
            "planning for a TPU needs its compiler, libtpu (no TPU): type "
            "pip install 'permoe[plan]'"
        ) from error
    return topology.devices


def coordinates(topology: Topology, devices: Sequence[jax.Device]) -> np.ndarray | None:
    """Returns each device's place in its slice, [N, dimensions]; of a GPU its host and place."""
    if topology.chip.kind == "tpu":
        return np.array([device.coords for device in devices])
    if topology.chip.kind == "gpu":
        number = np.array([topology.devices.index(device) for device in devices])
        return np.stack(np.divmod(number, topology.shape[-1]), -1)
    return None
