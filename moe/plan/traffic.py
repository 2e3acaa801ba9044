"""Bytes that an instruction reads from and writes to a chip's main memory."""

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
    module: Module, instructions: dict[str, Instruction], one: Instruction
) -> float:
    """Of one execution: it reads its operands and writes its results.

    Not counted are arrays that the compiler keeps in the memory on the chip, and the padding to
    the tiles of the main memory. What a fusion slices it reads in part, and what it updates in
    place it writes in part.

    Args:
      instructions: of the same computation, which must not be the inside of a fusion.
    """
    if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
        return 0
    operands = [instructions[name] for name in one.operands if name in instructions]
    if one.opcode in ("dynamic-slice", "gather"):
        return 2 * _main(one)
    if one.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _main(operands[-1 if one.opcode == "scatter" else 1])
    inner = module.computations.get(one.attribute(r"calls=%?([\w.\-]+)") or "")
    if inner is None:
        if one.opcode.endswith("-start"):  # its results list what goes in, too
            return _main(one)
        return _main(one) + sum(map(_main, operands))
    return _fusion_bytes(module, inner, one, operands)


def _fusion_bytes(module: Module, inner: dict, one: Instruction, operands) -> float:
    parameters = _parameters(inner)
    read = 0.0
    for number, operand in enumerate(operands):
        share = _read(module, inner, parameters[number]) if number in parameters else None
        whole = _main(operand)
        read += whole if share is None else min(share, whole)
    root = list(inner.values())[-1]
    results = root.operands if root.opcode == "tuple" else (root.name,)
    if len(results) != len(one.arrays):
        return read + _main(one)
    for name, array in zip(results, one.arrays, strict=True):
        share = _written(module, inner, name)
        whole = array.bytes if array.space == 0 else 0.0
        read += whole if share is None else min(share, whole)
    return read


def _parameters(inner: dict[str, Instruction]) -> dict[int, str]:
    found = (one for one in inner.values() if one.opcode == "parameter")
    return {int(one.attribute(r"^(\d+)") or 0): one.name for one in found}


def _read(module: Module, inner: dict[str, Instruction], name: str) -> float | None:
    """Bytes that a computation reads of a value in it; None for all of it."""
    total = 0.0
    for one in inner.values():
        if name not in one.operands:
            continue
        if one.opcode == "bitcast":
            share = _read(module, inner, one.name)
        elif one.opcode in ("dynamic-slice", "gather") and one.operands[0] == name:
            share = one.bytes
        elif one.opcode == "tuple" or (
            one.opcode == "dynamic-update-slice" and name not in one.operands[1:]
        ):
            share = 0.0  # handed on, or written to in place
        elif one.opcode == "fusion":
            share = _read_inside(module, one, name)
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
    """Bytes of a result of a computation that it writes; None for all of it."""
    one = inner.get(name)
    if one is None:
        return None
    if one.opcode == "bitcast":
        return _written(module, inner, one.operands[0])
    if one.opcode == "dynamic-update-slice":
        return inner[one.operands[1]].bytes
    if one.opcode == "fusion":
        nested = module.computations.get(one.attribute(r"calls=%?([\w.\-]+)") or "", {})
        root = list(nested)[-1:]
        return _written(module, nested, root[0]) if root else None
    return 0.0 if one.opcode == "parameter" else None


def _main(instruction: Instruction) -> float:
    return sum(array.bytes for array in instruction.arrays if array.space == 0)
