"""Reads the text of a compiled XLA program: its instructions, and how often each of them runs."""

import math
import re
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(body|condition|calls|to_apply|\w+_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")


class Array(NamedTuple):
    """Describes one array of a result; `space` 0 is the main memory, 1 is on the chip."""

    dtype: str
    shape: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> float:
        bits = BITS.get(self.dtype) or int("0" + re.sub(r"^[a-z]+(\d+).*|.*", r"\1", self.dtype))
        return math.prod(self.shape) * bits / 8


class Instruction(NamedTuple):
    """Describes one line of a computation; `arrays` are its results, a tuple's leaves in order."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)

    def attribute(self, pattern: str) -> str | None:
        """Returns the first group of a pattern in the attributes."""
        match = re.search(pattern, self.attributes)
        return match and match[1]


class Module(NamedTuple):
    """Holds computations by name, in the text's order: what is called stands before its caller."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    frames: dict[int, str]  # "file.py:line" of a stack frame


class Executions(NamedTuple):
    """Holds how often each computation runs in a step, and the loops of unknown length."""

    times: dict[str, float]
    unknown_loops: list[str]


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line and not line.startswith((" ", "}")):
            head = _HEAD.match(line)
            if head:
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            if instruction:
                current[instruction.name] = instruction
    return Module(computations, entry, _frames(text))


def _instruction(line: str) -> Instruction | None:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    opcode = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if opcode is None:
        return None
    start = end + opcode.end() - 1
    stop = _closing(rest, start)
    arguments = rest[start + 1 : stop - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    attributes = rest[stop:]
    if opcode[1] in ("constant", "parameter"):
        attributes = arguments + attributes
    return Instruction(name.lstrip("%"), opcode[1], _arrays(rest[:end]), operands, attributes)


def _closing(text: str, start: int) -> int:
    """Returns the position after the bracket that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def _arrays(text: str) -> tuple[Array, ...]:
    def space(layout: str | None) -> int:
        number = re.search(r"S\((\d+)\)", layout or "")
        return int(number[1]) if number else 0

    return tuple(
        Array(dtype, tuple(int(n) for n in re.findall(r"\d+", shape)), space(layout))
        for dtype, shape, layout in _ARRAY.findall(text)
    )


def _frames(text: str) -> dict[int, str]:
    """Reads where in the source each stack frame is, from the tables at the head of the text."""

    def table(title: str) -> dict[int, str]:
        section = re.search(rf"^{title}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        rows = section[1].splitlines() if section else ()
        return {int(row.split(" ", 1)[0]): row.split(" ", 1)[1] for row in rows}

    files, frames = table("FileNames"), {}
    locations = table("FileLocations")
    for number, row in table("StackFrames").items():
        place = re.search(r"file_location_id=(\d+)", row)
        location = locations.get(int(place[1]), "") if place else ""
        position = re.search(r"file_name_id=(\d+).* line=(\d+)", location)
        if position:
            file = files.get(int(position[1]), "").strip('"')
            frames[number] = f"{'/'.join(file.split('/')[-2:])}:{position[2]}"
    return frames


def source(module: Module, instruction: Instruction) -> str:
    """Returns "file.py:line" of the Python that asked for an instruction, or ""."""
    frame = instruction.attribute(r"stack_frame_id=(\d+)")
    if frame:
        return module.frames.get(int(frame), "")
    file = instruction.attribute(r'source_file="([^"]*)"')
    return f"{file}:{instruction.attribute(r'source_line=([0-9]+)')}" if file else ""


def called(instruction: Instruction) -> list[tuple[str, str]]:
    """Returns (role, computation) for every computation that an instruction runs."""
    single = [(m[1], m[2]) for m in _CALLED.finditer(instruction.attributes)]
    branches = _BRANCHES.search(instruction.attributes)
    names = re.findall(r"[\w.\-]+", branches[1]) if branches else []
    return single + [("branch", name) for name in names]


def fused(module: Module) -> set[str]:
    """Returns computations that are inside one instruction: a fusion, a reduction's operator."""
    return {
        target
        for instructions in module.computations.values()
        for instruction in instructions.values()
        for role, target in called(instruction)
        if (role == "calls" and instruction.opcode != "async-start")
        or (role == "to_apply" and instruction.opcode != "call")
    }


def executions(module: Module) -> Executions:
    """Counts runs of each computation per run of the entry; a loop of unknown length is one turn.

    Every branch of a conditional counts as taken.
    """
    times = dict.fromkeys(module.computations, 0.0)
    times[module.entry] = 1.0
    unknown = []
    for name in reversed(module.computations):
        for instruction in module.computations[name].values():
            turns = 1
            if instruction.opcode == "while":
                length = trip_count(module, module.computations[name], instruction)
                if length is None and times[name]:
                    unknown.append(instruction.attribute(r'op_name="([^"]*)"') or instruction.name)
                turns = 1 if length is None else length
            for role, target in called(instruction):
                if target in times:
                    times[target] += times[name] * (turns if role == "body" else 1)
    return Executions(times, unknown)


def trip_count(module: Module, around: dict[str, Instruction], loop: Instruction) -> int | None:
    """Counts the turns of a `while`: XLA's own note, or its counter's limit less its start.

    The TPU's compiler notes nothing, and may have peeled turns off: a start above 0.
    """
    known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
    if known:
        return int(known)
    condition = module.computations.get(loop.attribute(r"condition=%?([\w.\-]+)") or "", {})
    last = list(condition.values())[-1:]
    if not last or not _counts_up(module, last[0]):
        return None
    compared = [condition[name] for name in last[0].operands if name in condition]
    limits = [c for c in compared if c.opcode == "constant"]
    if len(limits) != 1:
        return None
    counters = [c for c in compared if c.opcode == "get-tuple-element"]
    start = _initial(around, loop, counters[0]) if counters else 0
    return max(int(limits[0].attribute(r"(\d+)")) - start, 0)


def _initial(around: dict[str, Instruction], loop: Instruction, counter: Instruction) -> int:
    """Returns the constant that a loop's counter starts from; 0 where the text does not say."""
    index = int(counter.attribute(r"index=(\d+)") or 0)
    initial = around.get(loop.operands[0])
    if initial is None or initial.opcode != "tuple" or index >= len(initial.operands):
        return 0
    value = around.get(initial.operands[index])
    while value is not None and value.opcode in ("copy", "bitcast"):
        value = around.get(value.operands[0])
    is_constant = value is not None and value.opcode == "constant"
    return int(value.attribute(r"(\d+)") or 0) if is_constant else 0


def _counts_up(module: Module, root: Instruction) -> bool:
    """Returns whether a condition's root is `counter < limit`, bare or in a fusion of its own."""
    if root.opcode == "fusion":
        fused = module.computations.get(root.attribute(r"calls=%?([\w.\-]+)") or "", {})
        root = list(fused.values())[-1] if fused else root
    return root.opcode == "compare" and "direction=LT" in root.attributes
