"""Lists what a chip does in a step: each instruction's FLOPs, bytes, and line of the source."""

from typing import NamedTuple

from moe.plan import products, traffic
from moe.plan.hlo import Executions, Module, fused, source


class Work(NamedTuple):
    """Describes an instruction outside of fusions; `flops` and `bytes` are of one execution."""

    name: str
    count: float
    flops: float
    bytes: float
    source: str

    def seconds(self, flops_rate: float, bandwidth: float) -> float:
        """Returns the time of all executions, each the longer of the two (Williams et al. 2009)."""
        return self.count * max(self.flops / flops_rate, self.bytes / bandwidth)


def read_work(module: Module, executions: Executions) -> list[Work]:
    """Returns every instruction that multiplies matrices or moves bytes, in the text's order."""
    works, inside = [], fused(module)
    for name, instructions in module.computations.items():
        count = executions.times[name]
        if name in inside or not count:
            continue
        for instruction in instructions.values():
            flops = products.flops(module, instructions, instruction)
            moved = traffic.main_memory_bytes(module, instructions, instruction)
            if flops or moved:
                label = instruction.attribute(r'op_name="([^"]*)"') or instruction.name
                works.append(Work(label, count, flops, moved, source(module, instruction)))
    return works
