"""Gives routers that remember their first state, from one batch that no gradient sees."""

import jax
from flax import nnx

from moe.nn import memory as memories
from moe.tasks.task import Source
from moe.train.run import Run
from moe.train.step import State


def calibrate(run: Run, state: State, source: Source) -> State:
    """Returns the state of step 0 with routers that are calibrated on the batch of that step.

    What a layer sees depends on what the layers before it do, so the batch passes as often as there
    are layers with a router: after pass i the first i are right. Without dropout and noise.
    """
    batch = run.put(next(run.train_batches(source, 0)))
    variables = jax.eval_shape(lambda: memories.join(state["params"], state["routers"]))
    layers = sum(len(r.numbers) for r in memories.routers(nnx.merge(run.graphdef, variables)))

    def once(params, memory, batch):
        model = nnx.merge(run.graphdef, memories.join(params, memory))
        _, reports = run.task.sums(run.config, model, batch, train=True)
        sums = memories.statistics(reports)
        return memories.calibrate(run.graphdef, params, memory, sums)

    layout = jax.tree.map(lambda a: a.sharding, run.memory)
    compiled = run.jit(once, out_shardings=layout)
    memory = state["routers"]
    for _ in range(layers):
        memory = compiled(state["params"], memory, batch)
    return state | {"routers": memory}
