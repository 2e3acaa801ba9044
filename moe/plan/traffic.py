"""Counts bytes that an instruction reads from and writes to a chip's main memory."""

from moe.plan.hlo import Instruction, Module

# They name, regroup or order arrays, or run computations whose own instructions count.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "while",
    "call",
    "conditional",
    "opt-barrier",
    "custom-call",  # a kernel's own traffic is not in the text
}


def main_memory_bytes(
    module: Module, instructions: dict[str, Instruction], instruction: Instruction
) -> float:
    """Counts the bytes of one execution, which reads its operands and writes its results.

    Not counted are arrays that the compiler keeps in the memory on the chip, and the padding to
    the tiles of the main memory. What a fusion slices it reads in part, and what it updates in
    place it writes in part.

    Args:
      instructions: of the same computation, which must not be the inside of a fusion.
    """
    if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
        return 0
    operands = [instructions[name] for name in instruction.operands if name in instructions]
    if instruction.opcode in ("dynamic-slice", "gather"):
        return 2 * _main(instruction)
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _main(operands[-1 if instruction.opcode == "scatter" else 1])
    inner = module.computations.get(instruction.attribute(r"calls=%?([\w.\-]+)") or "")
    if inner is None:
        if instruction.opcode.endswith("-start"):  # its results list what goes in, too
            return _main(instruction)
        return _main(instruction) + sum(map(_main, operands))
    return _fusion_bytes(module, inner, instruction, operands)


def _fusion_bytes(module: Module, inner: dict, instruction: Instruction, operands) -> float:
    parameters = _parameters(inner)
    read = 0.0
    for number, operand in enumerate(operands):
        share = _read(module, inner, parameters[number]) if number in parameters else None
        whole = _main(operand)
        read += whole if share is None else min(share, whole)
    root = list(inner.values())[-1]
    results = root.operands if root.opcode == "tuple" else (root.name,)
    if len(results) != len(instruction.arrays):
        return read + _main(instruction)
    for name, array in zip(results, instruction.arrays, strict=True):
        share = _written(module, inner, name)
        whole = array.bytes if array.space == 0 else 0.0
        read += whole if share is None else min(share, whole)
    return read


def _parameters(inner: dict[str, Instruction]) -> dict[int, str]:
    arguments = (instruction for instruction in inner.values() if instruction.opcode == "parameter")
    return {
        int(instruction.attribute(r"^(\d+)") or 0): instruction.name for instruction in arguments
    }


def _read(module: Module, inner: dict[str, Instruction], name: str) -> float | None:
    """Counts the bytes that a computation reads of a value in it; None for all of it."""
    total = 0.0
    for instruction in inner.values():
        if name not in instruction.operands:
            continue
        if instruction.opcode == "bitcast":
            share = _read(module, inner, instruction.name)
        elif instruction.opcode in ("dynamic-slice", "gather") and instruction.operands[0] == name:
            share = instruction.bytes
        elif instruction.opcode == "tuple" or (
            instruction.opcode == "dynamic-update-slice" and name not in instruction.operands[1:]
        ):
            share = 0.0  # handed on, or written to in place
        elif instruction.opcode == "fusion":
            share = _read_inside(module, instruction, name)
        else:
            share = None
        if share is None:
            return None
        total += share
    return total


def _read_inside(module: Module, fusion: Instruction, name: str) -> float | None:
    inner = module.computations.get(fusion.attribute(r"calls=%?([\w.\-]+)") or "", {})
    parameters = _parameters(inner)
    numbers = [number for number, operand in enumerate(fusion.operands) if operand == name]
    shares = [_read(module, inner, parameters[n]) if n in parameters else None for n in numbers]
    return None if None in shares else sum(shares)


def _written(module: Module, inner: dict[str, Instruction], name: str) -> float | None:
    """Counts the bytes that a computation writes of one of its results; None for all of it."""
    instruction = inner.get(name)
    if instruction is None:
        return None
    if instruction.opcode == "bitcast":
        return _written(module, inner, instruction.operands[0])
    if instruction.opcode == "dynamic-update-slice":
        return inner[instruction.operands[1]].bytes
    if instruction.opcode == "fusion":
        nested = module.computations.get(instruction.attribute(r"calls=%?([\w.\-]+)") or "", {})
        root = list(nested)[-1:]
        return _written(module, nested, root[0]) if root else None
    return 0.0 if instruction.opcode == "parameter" else None


def _main(instruction: Instruction) -> float:
    return sum(array.bytes for array in instruction.arrays if array.space == 0)
