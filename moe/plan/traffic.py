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
    return _fusion_bytes(inner, one, operands)


def _fusion_bytes(inner: dict[str, Instruction], one: Instruction, operands) -> float:
    parameters = {int(p.attributes.split(")")[0].split(",")[0] or 0): p
                  for p in inner.values() if p.opcode == "parameter"}  # fmt: skip
    read = 0.0
    for number, operand in enumerate(operands):
        parameter = parameters.get(number)
        uses = [i for i in inner.values() if parameter and parameter.name in i.operands]
        kinds = {i.opcode for i in uses}
        if uses and kinds == {"dynamic-slice"}:
            share = sum(i.bytes for i in uses) / max(operand.bytes, 1)
        elif uses and kinds == {"dynamic-update-slice"} and uses[0].operands[0] == parameter.name:
            share = 0.0
        else:
            share = 1.0
        read += min(share, 1.0) * _main(operand)
    root = list(inner.values())[-1]
    written = _main(one)
    if root.opcode == "dynamic-update-slice":
        written *= min(1.0, inner[root.operands[1]].bytes / max(root.bytes, 1))
    return read + written


def _main(instruction: Instruction) -> float:
    return sum(array.bytes for array in instruction.arrays if array.space == 0)
