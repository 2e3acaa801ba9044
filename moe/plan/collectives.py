"""Reads the collectives of a compiled program: how many, over which devices, how many bytes."""

import collections
import math
import re
from typing import NamedTuple

import numpy as np

from moe.plan.hlo import Array, Executions, Instruction, Module, fused, source

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Collective(NamedTuple):
    """Describes one instruction of the program that exchanges arrays.

    Attributes:
      kind: one of `KINDS`.
      count: executions in a step.
      payload: bytes of a chip's array, the larger of before and after, in one execution.
      sent: bytes that a chip sends in one execution, by the algorithm that sends least.
      members: partitions that exchange with each other, [groups, n]; of a permute, its pairs.
      axes: mesh axes along which the members differ.
      network: "links" inside a slice or a GPU host, else "network".
      shapes: of its results.
      name, source: what it was in the program: JAX's name and "file.py:line".
    """

    kind: str
    count: float
    payload: float
    sent: float
    members: np.ndarray
    axes: tuple[str, ...]
    network: str
    shapes: tuple[tuple[int, ...], ...]
    name: str
    source: str


def find(
    module: Module, executions: Executions, mesh_shape: dict[str, int], slices: int = 1
) -> list[Collective]:
    """Returns every collective that moves something, in the order of the text.

    Partition i of the program is device i of the mesh, read row by row; a program for several
    slices numbers those of one slice, and crosses slices by sends to the network's own runtime.
    Two habits of the TPU's compiler are seen through: a collective that goes on in the background
    is written into each of the fusions that it runs beside, under one channel; and a
    reduce-scatter is a fusion of that name around an all-reduce.
    """
    inside = dict(mesh_shape)
    first = next(iter(inside))
    inside[first] //= slices
    collectives, in_fusions, channels = [], fused(module), set()
    for computation, instructions in module.computations.items():
        count = executions.times[computation]
        for instruction in instructions.values() if count else ():
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                channel = instruction.attribute(r"channel_id=(\d+)")
                if computation in in_fusions and channel:
                    if channel in channels:
                        continue
                    channels.add(channel)
                if computation.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                members = _members(instruction, math.prod(inside.values()))
                collective = _inside(instruction, kind, members, inside)
            elif kind == "send" and "megascale" in instruction.attributes:
                collective = _across(instruction, slices, first)
            else:
                continue
            if collective.sent:
                name = instruction.attribute(r'op_name="([^"]*)"') or instruction.name
                where = source(module, instruction)
                collectives.append(collective._replace(count=count, name=name, source=where))
    return collectives


def _inside(instruction: Instruction, kind: str, members, mesh_shape) -> Collective:
    """Reads a collective among the chips of a slice."""
    result = _results(instruction, kind)
    size = sum(array.bytes for array in result)
    if kind == "collective-permute":
        moving = members[members[:, 0] != members[:, 1]]
        payload, sent = size, size if len(moving) else 0.0
        members = moving
    else:
        n = members.shape[1]
        payload = size * (n if instruction.opcode.startswith("reduce-scatter") else 1)
        sent = payload * (n - 1) / n * (2 if kind == "all-reduce" else 1)
    axes = _axes(members, mesh_shape)
    shapes = tuple(array.shape for array in result)
    return Collective(kind, 0, payload, sent, members, axes, "links", shapes, "", "")


def _across(instruction: Instruction, slices: int, axis: str) -> Collective:
    """Reads what a chip hands to the network's runtime, which does the collective over slices."""
    kind = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"') or "SEND"
    kind = kind.lower().replace("_", "-")
    size = instruction.arrays[0].bytes
    both = 2 if kind == "all-reduce" else 1
    sent = size * (slices - 1) / slices * both
    members, shapes = np.arange(slices)[None], (instruction.arrays[0].shape,)
    return Collective(kind, 0, size, sent, members, (axis,), "network", shapes, "", "")


def _results(instruction: Instruction, kind: str) -> tuple[Array, ...]:
    """Returns the arrays that come out, also where an asynchronous pair lists what goes in."""
    arrays = instruction.arrays
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        contexts = [a for a in arrays if a.dtype in ("u32", "s32") and not a.shape]
        arrays = tuple(a for a in arrays if a not in contexts)
        arrays = arrays[len(arrays) // 2 :]
    return arrays


def _members(instruction: Instruction, partitions: int) -> np.ndarray:
    """Reads an instruction's groups, in any of XLA's notations, as rows of partition numbers."""
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
    if pairs:
        return np.array(re.findall(r"\d+", pairs[1]), int).reshape(-1, 2)
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", text)
    if mesh:
        return _mesh_groups(mesh[1], mesh[2], mesh[3])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, sizes = (np.fromstring(g, int, sep=",") for g in iota.groups()[:2])
        ids = np.arange(sizes.prod()).reshape(sizes)
        ids = ids.transpose([int(i) for i in iota[3].split(",")]) if iota[3] else ids
        return ids.reshape(shape).reshape(shape[0], -1)
    groups = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text)
    rows = re.findall(r"\{([\d,]+)\}", groups[1]) if groups else []
    if not rows:
        return np.arange(partitions)[None]
    return np.array([[int(i) for i in row.split(",")] for row in rows])


def _mesh_groups(sizes: str, order: str, along: str) -> np.ndarray:
    """Reads groups written as axes of a mesh, `'a'=2,'b'=4` along `'b'`, or a part `'b':(2)2`."""
    names = re.findall(r"'([^']+)'=(\d+)", sizes)
    shape = [int(size) for _, size in names]
    listed = re.findall(r"\d+", order)
    ids = np.array(listed, int) if len(listed) == math.prod(shape) else np.arange(math.prod(shape))
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along)
    split, grouped = [], []
    for name, size in ((name, int(size)) for name, size in names):
        spans = [(int(b or 1), int(s or size)) for n, b, s in parts if n == name]
        before = 1
        for start, length in sorted(spans):
            split += [start // before, length]
            grouped.append(len(split) - 1)
            before = start * length
        split.append(size // before)
    rest = [axis for axis in range(len(split)) if axis not in grouped]
    ids = ids.reshape(split).transpose(rest + grouped)
    return ids.reshape(-1, math.prod(split[axis] for axis in grouped))


def _axes(members: np.ndarray, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    place = np.stack(np.unravel_index(members, tuple(mesh_shape.values())), -1)
    differs = (place != place[:, :1]).any((0, 1))
    return tuple(axis for axis, along in zip(mesh_shape, differs, strict=True) if along)


class Row(NamedTuple):
    """Sums the collectives of one kind along the same axes, in one step; bytes of one chip."""

    kind: str
    axes: tuple[str, ...]
    network: str
    count: float
    payload: float
    sent: float


def table(collectives: list[Collective]) -> list[Row]:
    """Sums collectives by kind and axes; the most bytes come first."""
    groups = collections.defaultdict(list)
    for collective in collectives:
        groups[collective.kind, collective.axes, collective.network].append(collective)
    rows = [
        Row(
            *key,
            sum(c.count for c in group),
            sum(c.count * c.payload for c in group),
            sum(c.count * c.sent for c in group),
        )
        for key, group in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.sent)


def expert_weights_moved(
    collectives: list[Collective], kernels: set[tuple[int, int, int]], mesh_shape: dict[str, int]
) -> list[Collective]:
    """Returns those that bring experts' weights to a chip where the experts do not live.

    They are known by their shapes: more than a chip's own part of a layer's [E, D, F], of which E
    is split by the mesh axis `expert` and F by `tensor`; or any such part that changes place.

    Args:
      kernels: (E, D, F) of the layers of experts.
    """
    own, other = set(), set()
    for experts, dim, hidden in kernels:
        local = max(1, experts // mesh_shape["expert"])
        for e in range(local, experts + 1, local):
            for f in {hidden, hidden // mesh_shape["tensor"]}:
                is_own = (e, f) == (local, hidden // mesh_shape["tensor"])
                (own if is_own else other).add(_sides((e, dim, f)))

    def moved(collective: Collective) -> bool:
        wrong = {"all-gather": other, "collective-permute": own | other}.get(collective.kind, ())
        shapes = [
            s for shape in collective.shapes for s in (shape, shape[1:])
        ]  # of all layers, or one
        return any(_sides(shape) in wrong for shape in shapes)

    return [collective for collective in collectives if moved(collective)]


def _sides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns an array's sides, sorted, without those of length 1."""
    return tuple(sorted(n for n in shape if n > 1))
