"""Counts what a chip holds during a step, in bytes."""

import math
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from moe.nn.memory import join
from moe.plan.chips import Chip
from moe.plan.compiled import Compiled
from moe.train.run import Run


class Memory(NamedTuple):
    """Holds the bytes of one chip; None where only the chip's own compiler knows.

    Attributes:
      parameters, optimizer, average, batch: by their shapes and shardings; `average` is the moving
        average of the parameters, where the config asks for it.
      feedback: what workers keep of gradients that they send in part.
      padding: of those, to the tiles of the chip's memory.
      activations: what the backward pass reads of the forward pass, by its shapes, split like the
        examples. The compiler may choose to keep less or more.
      temporary: all else that the program needs at its worst moment: gradients, gathered
        parameters, buffers of the exchanges.
      code: the program.
      total: of all these; what the compiler asked for, where it is more than there is.
      limit: what the chip grants a program.
    """

    parameters: float
    optimizer: float
    average: float
    batch: float
    activations: float
    feedback: float = 0.0
    padding: float | None = None
    temporary: float | None = None
    code: float | None = None
    total: float | None = None
    limit: float | None = None

    @property
    def state(self) -> float:
        return self.parameters + self.optimizer + self.average + self.feedback

    @property
    def fits(self) -> bool | None:
        """Returns None where it is not known; that the state alone is too much always is."""
        if self.limit is None:
            return None
        if self.total is None:
            return False if self.state > self.limit else None
        return self.total <= self.limit


def chip_bytes(tree) -> float:
    """Returns the bytes that one chip holds of a tree of shapes with shardings."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def state_memory(run: Run) -> Memory:
    """Returns what is known without a compiler."""
    state = run.abstract_state()
    return Memory(
        parameters=chip_bytes(state["params"]),
        optimizer=chip_bytes(state["opt_state"]) + chip_bytes(state["step"]),
        average=chip_bytes(state.get("ema", ())),
        batch=chip_bytes(run.abstract_batch()),
        activations=activations(run),
        feedback=chip_bytes(state.get("compress", ())),
    )


def measure(run: Run, program: Compiled, chip: Chip) -> Memory:
    """Returns what is known with what the compiler of this chip says."""
    known = state_memory(run)._replace(limit=chip.hbm)
    if chip.kind != "tpu":  # compiled for a CPU, whose buffers say nothing about a GPU's
        return known
    return split_peak(known, program)


def split_peak(known: Memory, program: Compiled) -> Memory:
    """Splits what the compiler says into the parts that are known and the rest.

    Its peak is of arrays alone: the program's own code comes on top.
    """
    if program.out_of_memory:
        return known._replace(total=program.needed or math.inf)
    handed = known.state + known.batch
    padding = max(program.arguments - handed, 0.0)  # below 0 where an argument is not used
    rest = max(program.peak - program.arguments, 0.0)
    kept = min(known.activations, rest)
    return known._replace(
        padding=padding,
        activations=kept,
        temporary=rest - kept,
        code=program.code,
        total=handed + padding + rest + program.code,
    )


def activations(run: Run) -> float:
    """Returns the bytes of a chip that the backward pass reads, but for the parameters.

    They are the residuals of JAX's own derivative, after what `remat` forgets, of one micro-batch.
    """
    config = run.config
    batch = run.task.batch(config, config.batch_size // config.optimizer.accumulate)

    def residuals(params, memory, batch):
        def forward(params):
            model, key = nnx.merge(run.graphdef, join(params, memory)), jax.random.key(0)
            sums, reports = run.task.sums(config, model, batch, train=True, key=key)
            return sums["loss"], [report.aux_loss for report in reports.values()]

        return jax.tree.leaves(jax.vjp(forward, params)[1])

    with jax.set_mesh(run.mesh):
        kept = jax.eval_shape(residuals, run.params, run.memory, batch)
    parameters = [(p.shape, p.dtype) for p in jax.tree.leaves(run.variables)]
    total = 0.0
    for leaf in kept:
        if (leaf.shape, leaf.dtype) in parameters:
            parameters.remove((leaf.shape, leaf.dtype))
        elif leaf.dtype != jax.dtypes.float0:
            total += leaf.size * np.dtype(leaf.dtype).itemsize if _is_plain(leaf) else 0
    return total / (run.mesh.size // run.mesh.shape["tensor"])


def _is_plain(leaf) -> bool:
    return not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
