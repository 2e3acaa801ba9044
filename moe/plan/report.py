"""Prints a plan as tables on the screen."""

import collections

from rich.console import Console
from rich.table import Table

from moe.plan.collectives import table as collective_table
from moe.plan.compression import Compression, verdict
from moe.plan.planner import Plan

PARTS = 8  # lines of the program that are shown


def print_plan(plan: Plan) -> None:
    console = Console(highlight=False, width=100, soft_wrap=True)
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    config = plan.config
    console.print(
        f"{plan.topology.name}: {plan.chips} chips of {plan.topology.chip.name}, mesh {mesh}; "
        f"batches of {config.batch_size}, {config.model.dtype}, remat {config.model.remat}; "
        f"compiled in {plan.program.seconds:.0f} s"
    )
    console.print(_model(plan))
    console.print(_memory(plan))
    verdict = {True: "fits", False: "does not fit", None: "not known whether it fits"}
    console.print(f"[bold]{verdict[plan.memory.fits]}[/bold]{_margin(plan)}")
    if plan.program.text:
        console.print(_collectives(plan))
        if plan.compression:
            console.print(_compression(plan.compression))
        moved = plan.moved_experts
        names = ", ".join(sorted({f"{each.kind} at {each.source}" for each in moved})) or "none"
        console.print(f"expert weights moved: {names}")
        if plan.time:
            console.print(_time(plan))
            _print_verdict(console, plan)
        if plan.time and plan.time.chip:
            console.print(_parts(plan))
    if plan.unknown_loops:
        console.print(
            f"{len(plan.unknown_loops)} loops whose length depends on the data count as one turn"
        )
    for line in plan.unknown:
        console.print(line)


def print_sweep(plans: list[Plan]) -> None:
    """Prints the plans of a sweep as rows, in their order."""
    rate = f"{plans[0].unit}s/s"
    table = _table("\nsweep", "mesh", "remat", "memory", "", "ms a step", "MFU", rate)
    for plan in plans:
        memory, time = plan.memory, plan.time
        row = [" ".join(f"{axis}={n}" for axis, n in plan.mesh.items() if n > 1)]
        row += [plan.config.model.remat, "> all" if memory.total is None else size(memory.total)]
        row += ["fits" if memory.fits else "does not fit"]
        if time:
            row += [f"{milliseconds(time.fastest)} to {milliseconds(time.slowest)}"]
            row += [f"{time.mfu[0]:.0%} to {time.mfu[1]:.0%}"]
            row += [f"{time.rate[0]:,.0f} to {time.rate[1]:,.0f}"]
        table.add_row(*row)
    Console(highlight=False, width=120).print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False, box=None)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _model(plan: Plan) -> Table:
    flops, examples = plan.flops, plan.config.batch_size
    table = _table("\nmodel", "", "")
    table.add_row("parameters", f"{plan.parameters:,}")
    table.add_row("of which a token uses", f"{plan.active:,}")
    article = "an" if plan.unit[0] in "aeio" else "a"
    table.add_row(
        f"FLOPs of {article} {plan.unit}, forward", amount(flops.model / plan.units, "FLOP")
    )
    table.add_row(
        "of a step, forward and backward", amount(flops.training(flops.model) * examples, "FLOP")
    )
    if plan.work:
        done = sum(work.count * work.flops for work in plan.work)
        once = sum(work.flops for work in plan.work)
        table.add_row("a chip's share of it", amount(plan.model_flops, "FLOP"))
        table.add_row("what its program does, counted in its HLO", amount(done, "FLOP"))
        if plan.program.xla_flops:
            table.add_row("  every loop as one turn", amount(once, "FLOP"))
            table.add_row("  XLA's own count of that", amount(plan.program.xla_flops, "FLOP"))
    return table


def _memory(plan: Plan) -> Table:
    table = _table("\nmemory of a chip", "", "")
    memory = plan.memory._asdict()
    limit, total = memory.pop("limit"), memory.pop("total")
    for name in ("average", "feedback"):
        if not memory[name]:
            del memory[name]
    for name, value in memory.items():
        table.add_row(name, "not known" if value is None else size(value))
    if total is not None:
        table.add_row("total", size(total))
    if limit is not None:
        table.add_row(f"what a {plan.topology.chip.name} grants a program", size(limit))
    return table


def _margin(plan: Plan) -> str:
    memory = plan.memory
    if plan.program.out_of_memory:
        return f"; the compiler: {plan.program.out_of_memory}"
    if memory.limit is None:
        return ""
    if memory.total is None:
        return f"; the state is {memory.state / memory.limit:.0%} of it"
    return f", {memory.total / memory.limit:.0%} used"


def _collectives(plan: Plan) -> Table:
    title = "\ncollectives of a chip in a step"
    table = _table(title, "", "along", "over", "count", "array", "sent")
    for row in collective_table(plan.collectives):
        along, count = " ".join(row.axes), f"{row.count:,.0f}"
        moved = (amount(row.payload, "B"), amount(row.sent, "B"))
        table.add_row(row.kind, along, row.network, count, *moved)
    sent = sum(each.count * each.sent for each in plan.collectives)
    table.add_row("all", "", "", "", "", amount(sent, "B"))
    return table


def _compression(found: Compression) -> Table:
    table = _table("\ngradients of a chip along data in a step, by their shapes", "", "")
    table.add_row("values and places, all-gathered", amount(found.sent, "B"))
    table.add_row("all of them, by a ring's all-reduce", amount(found.whole, "B"))
    table.caption, table.caption_justify = f"{verdict(found)}\n", "left"
    return table


def _time(plan: Plan) -> Table:
    time, table = plan.time, _table("\ntime of a step", "", "ms")
    arithmetic = plan.topology.chip.arithmetic(plan.config.model.dtype)
    moved = sum(work.count * work.bytes for work in plan.work)
    for name, value in (
        (f"compute, at the {arithmetic} peak", time.compute),
        ("main memory" + (f", {amount(moved, 'B')}" if time.memory else ""), time.memory),
        ("the chip: of each instruction the slower", time.chip),
        ("links between chips", time.links),
        ("network", time.network),
    ):
        table.add_row(name, "not known" if value is None else milliseconds(value))
    return table


def _print_verdict(console: Console, plan: Plan) -> None:
    time = plan.time

    def span(values, form) -> str:
        low, high = values
        return form(high) if low is None else f"{form(low)} to {form(high)}"

    slowest = (
        "" if time.slowest is None else f"{milliseconds(time.slowest)} ms if nothing overlaps, "
    )
    at_least = "at least " if time.slowest is None else ""
    at_most = "at most " if time.slowest is None else ""
    console.print(
        f"[bold]step[/bold] {slowest}{at_least}{milliseconds(time.fastest)} ms if all does: "
        f"MFU {at_most}{span(time.mfu, '{:.1%}'.format)}, "
        f"{at_most}{span(time.rate, '{:,.0f}'.format)} {plan.unit}s/s; waits for {time.bound}"
    )


def _parts(plan: Plan) -> Table:
    """Returns where the chip's own time goes: by phase and by line of the source."""
    chip, total = plan.topology.chip, plan.time.chip
    peak = chip.flops(plan.config.model.dtype)
    phases, lines = collections.Counter(), collections.Counter()
    for work in plan.work:
        spent = work.seconds(peak, chip.hbm_bandwidth)
        phases[phase(work.name)] += spent
        lines[work.source or "(the compiler's own)"] += spent
    table = _table("\nwhere the chip's time goes", "", "ms", "")
    for name, spent in (*phases.most_common(), ("", 0.0), *lines.most_common(PARTS)):
        row = (milliseconds(spent), f"{spent / total:.0%}") if name else ("", "")
        table.add_row(name, *row)
    return table


def phase(name: str) -> str:
    """Returns the part of a step that an instruction of this name belongs to."""
    if "rematted_computation" in name:
        return "forward, again"
    if "transpose(" in name:
        return "backward"
    return "forward" if "jvp(" in name else "update, copies"


def size(value: float) -> str:
    """Writes bytes of memory in powers of 1024."""
    for prefix, scale in (("G", 2**30), ("M", 2**20), ("K", 2**10)):
        if value >= scale:
            return f"{value / scale:,.2f} {prefix}iB"
    return f"{value:,.0f} B  "


def milliseconds(value: float) -> str:
    return f"{1e3 * value:,.1f}" if value >= 1e-2 else f"{1e3 * value:.2g}"


def amount(value: float, unit: str) -> str:
    """Writes a number with a prefix, to four figures."""
    for prefix, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= scale:
            return f"{value / scale:.4g} {prefix}{unit}"
    return f"{value / 1e3:.4g} k{unit}"
