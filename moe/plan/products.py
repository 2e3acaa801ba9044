"""Counts FLOPs of a compiled program's matrix products; all else counts as bytes (`traffic`)."""

import math
import re

from moe.plan.hlo import Instruction, Module


def flops(module: Module, instructions: dict[str, Instruction], instruction: Instruction) -> float:
    """Counts the FLOPs of one execution, 2 a multiplication, with those inside a fusion."""
    if instruction.opcode == "dot":
        return _dot(instructions, instruction)
    if instruction.opcode == "convolution":
        return _convolution(instructions, instruction)
    if instruction.opcode != "fusion":
        return 0.0
    inner = module.computations.get(instruction.attribute(r"calls=%?([\w.\-]+)") or "", {})
    return sum(flops(module, inner, each) for each in inner.values())


def _dot(instructions: dict[str, Instruction], instruction: Instruction) -> float:
    left = instructions[instruction.operands[0]].arrays[0].shape
    contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    terms = math.prod(left[int(i)] for i in contracted.split(",") if i)
    return 2.0 * math.prod(instruction.arrays[0].shape) * terms


def _convolution(instructions: dict[str, Instruction], instruction: Instruction) -> float:
    """Counts only multiplications with entries, not with what padding and dilation put in.

    A TPU's batched products are convolutions in which a batch axis is such a window.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    image, kernel, result = (
        dict(zip(text, shape, strict=True))
        for text, shape in zip(
            labels.groups(),
            (*(instructions[name].arrays[0].shape for name in instruction.operands[:2]),
             instruction.arrays[0].shape),
            strict=True,
        )
    )  # fmt: skip
    terms = result["b"] * result["f"] * kernel["i"]
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    fields = dict(field.split("=") for field in window.split())
    for axis in range(sum(label.isdigit() for label in kernel)):
        label = str(axis)
        low = _side(fields, "pad", axis, "0_0").split("_")[0]
        terms *= _pairs(
            image[label],
            kernel[label],
            result[label],
            int(_side(fields, "stride", axis, "1")),
            int(low),
            int(_side(fields, "lhs_dilate", axis, "1")),
            int(_side(fields, "rhs_dilate", axis, "1")),
        )
    return 2.0 * terms


def _side(fields: dict[str, str], key: str, axis: int, default: str) -> str:
    return fields[key].split("x")[axis] if key in fields else default


def _pairs(size, window, out, stride, low, spread, gap) -> int:
    """Counts pairs of an output and a place of the window that fall on an entry of the image."""
    last = (size - 1) * spread
    count = 0
    for place in range(window):
        for position in range(out):
            at = position * stride + place * gap - low
            count += 0 <= at <= last and at % spread == 0
    return count
