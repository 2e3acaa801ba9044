"""Compiles the run's own training step for devices that need not be there."""

import re
import time
from typing import Any, NamedTuple

import jax

from moe.errors import UsageError
from moe.train.run import Run


class Compiled(NamedTuple):
    """Holds a program for one chip, as its compiler gave it; sizes in bytes of one chip.

    Attributes:
      text: its HLO; "" where the compiler ran out of the chip's memory.
      arguments: what it is handed, the state and a batch.
      peak: all arrays at the worst moment, these included. Not the sum of what it is handed and
        its buffers: the state comes back in place, and some of its room may serve in between.
      code: the program itself, which the peak leaves out.
      xla_flops, xla_bytes: XLA's own counts, in which a loop is one turn.
      out_of_memory: the compiler's own words, "" where there was room.
      needed: bytes that it then asked for.
      seconds: from the Python function to the program.
    """

    text: str = ""
    arguments: float | None = None
    peak: float | None = None
    code: float | None = None
    xla_flops: float | None = None
    xla_bytes: float | None = None
    out_of_memory: str = ""
    needed: float | None = None
    seconds: float = 0.0


def compile_step(run: Run, options: dict[str, Any] | None = None) -> Compiled:
    """Lowers and compiles what the trainer runs: the state is given away and comes back in place.

    Only the trainer's sums since the last line of the log, some kilobytes, are left out.

    Args:
      options: of the compiler.

    Raises:
      UsageError: the compiler has no code for an operation of the step on these devices.
    """
    start = time.perf_counter()
    state, batch = run.abstract_state(), run.abstract_batch()
    layout = jax.tree.map(lambda a: a.sharding, state)
    with jax.set_mesh(run.mesh):
        step = jax.jit(run.train_step, donate_argnums=0, out_shardings=(layout, run.replicated))
        lowered = step.lower(state, batch)
        try:
            program = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            message = str(error)
            if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
                if "not supported" in message:
                    raise UsageError(refused(message)) from error
                raise
            words, needed = out_of_memory(message)
            seconds = time.perf_counter() - start
            return Compiled(out_of_memory=words, needed=needed, seconds=seconds)
    seconds = time.perf_counter() - start
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    return Compiled(
        program.as_text(),
        memory.argument_size_in_bytes,
        memory.peak_memory_in_bytes,
        memory.generated_code_size_in_bytes,
        cost.get("flops"),
        cost.get("bytes accessed"),
        seconds=seconds,
    )


def refused(message: str) -> str:
    """Returns what to say of a compiler's error about an operation that it has no code for."""
    said = message.strip().splitlines()[0]
    remedy = "another mesh or topology may do"
    if "agged all-to-all" in said:
        remedy += ", or --config.moe.dispatch=capacity, which has none"
    return f"the compiler cannot compile this step for these devices ({said}); {remedy}"


def out_of_memory(message: str) -> tuple[str, float | None]:
    """Returns the sentence of a compiler's error that says what was missing, and the bytes needed.

    The TPU's compiler has two: one on finding that no order of the program fits, an earlier one
    where its buffers alone are too many.
    """
    number = r"([\d.]+)([KMGT]?)"
    late = rf"Used {number} of [\d.]+[KMGT]? hbm[^\n]*"
    early = rf"the total memory required[^\n(]*\({number}\) exceeds available HBM \([\d.]+\w?\)"
    match = re.search(late, message) or re.search(early, message)
    if not match:
        return message.strip().splitlines()[0], None
    scale = 1024 ** " KMGT".index(match[2] or " ")
    return match[0].strip(), float(match[1]) * scale
