"""What a chip does in a step, instruction by instruction: FLOPs, bytes, and whose line it was."""

from typing import NamedTuple

from moe.plan import products, traffic
from moe.plan.hlo import Executions, Module, fused, source


class Work(NamedTuple):
    """One instruction outside of fusions; `flops` and `bytes` are of one execution."""

    name: str
    count: float
    flops: float
    bytes: float
    source: str

    def seconds(self, flops_rate: float, bandwidth: float) -> float:
        """Of all its executions: as fast as the slower of the two allows (Williams et al. 2009)."""
        return self.count * max(self.flops / flops_rate, self.bytes / bandwidth)


def read_work(module: Module, executions: Executions) -> list[Work]:
    """Every instruction that multiplies matrices or moves bytes, in the order of the text."""
    found, inside = [], fused(module)
    for name, instructions in module.computations.items():
        count = executions.times[name]
        if name in inside or not count:
            continue
        for one in instructions.values():
            flops = products.flops(module, instructions, one)
            moved = traffic.main_memory_bytes(module, instructions, one)
            if flops or moved:
                label = one.attribute(r'op_name="([^"]*)"') or one.name
                found.append(Work(label, count, flops, moved, source(module, one)))
    return found
