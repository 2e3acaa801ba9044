"""A block that tokens skip beside the whole block, forward and backward."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.report import Table
from benchmarks.timing import Candidate, device, measure, summary

SHOW = ("candidate", "device", "status", "slots", "ms", "ms_q1", "ratio", "flops", "error")
NOTE = (
    "{rows} rows of {tokens} tokens, D = {dim}, F = {hidden}, {heads} heads, {dtype}; the "
    "derivative by tokens and parameters. `ratio`: to the block without a skip; `flops`: the same "
    "of its matrix products by formula. `error`: the largest change of a token that was not "
    "chosen, which is 0."
)
SHARES = (0.5, 0.25, 0.125)


class Problem(NamedTuple):
    """Tokens `[rows, tokens, dim]` and sizes of the block."""

    rows: int
    tokens: int
    dim: int
    hidden: int
    heads: int
    dtype: str

    @property
    def inputs(self):
        """Tokens and a direction for the derivative."""
        shape = (2, self.rows, self.tokens, self.dim)
        return np.random.default_rng(0).standard_normal(shape, np.float32)

    def flops(self, tokens: int) -> float:
        """Returns those of a row of which so many tokens pass the block."""
        D, F = self.dim, self.hidden
        return 8 * tokens * D**2 + 4 * tokens**2 * D + 4 * tokens * D * F


def tables(quick: bool) -> list[Table]:
    on_gpu = jax.default_backend() == "gpu"
    sizes = (
        (2, 16, 16, 32, 2)
        if quick
        else (64, 256, 512, 2048, 8)
        if on_gpu
        else (16, 196, 384, 1536, 6)
    )
    problem = Problem(*sizes, "bfloat16" if on_gpu else "float32")
    rows = compare(problem, 0.3 if quick else 60.0)
    return [Table("depth", "Blocks that tokens skip", NOTE.format(**problem._asdict()), SHOW, rows)]


def compare(problem: Problem, budget: float) -> list[dict]:
    """Returns a row for the whole block and for each router and share of the tokens."""
    settings = {"whole": {}}
    for share in SHARES:
        for router in ("topk", "sparse"):
            settings[f"{router}, {share}"] = {"router": router, "capacity": share}
        # As many as find a slot are taken: about half have an open gate.
        settings[f"threshold, {share}"] = {"router": "threshold", "bound": share}
    found = [
        Candidate(name, functools.partial(_run, block_settings=own))
        for name, own in settings.items()
    ]
    timings, rows = measure(found, problem, budget), []
    for one in found:
        timing, own = timings[one.name], settings[one.name]
        slots = _slots(problem, own)
        row = {"candidate": one.name, "device": device(one.runs_on), "slots": slots}
        row |= summary(timing, timings["whole"])
        row["flops"] = problem.flops(slots) / problem.flops(problem.tokens)
        if timing.output is not None and own:
            (y, weights), _ = timing.output
            change = jnp.abs(y - problem.inputs[0]).max(-1)
            row["error"] = float(jnp.where(weights == 0, change, 0).max())
        rows.append(row)
        print(f"  {one.name}: {row.get('ms')} ms, {row['status']}")
    return rows


def _slots(problem: Problem, settings: dict) -> int:
    from moe.nn.skip import rows

    if not settings:
        return problem.tokens
    shares = {"capacity": 0.125, "bound": 0.0, "eval_bound": 1.0} | settings
    return rows(problem.tokens, **shares).train


def _run(problem: Problem, block_settings: dict):
    """Returns the compiled call that makes the output and the derivatives."""
    graphdef, params = nnx.split(_block(problem, block_settings))

    def loss(params, x, direction):
        y, report, _ = nnx.merge(graphdef, params)(x, mask=None, train=True, key=None)
        weights = jnp.ones(x.shape[:2]) if report is None else report.weights_BTE[..., 0]
        return (y * direction).sum(), (y, weights)

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    arguments = jax.device_put((params, *problem.inputs))
    program = step.lower(*arguments).compile()

    def call():
        (_, out), gradients = jax.block_until_ready(program(*arguments))
        return out, gradients

    return call


def _block(problem: Problem, settings: dict) -> nnx.Module:
    from moe.nn.blocks import Block
    from moe.nn.mlp import Mlp
    from moe.nn.skip import Skip

    kind = {"dtype": jnp.dtype(problem.dtype), "rngs": nnx.Rngs(0)}
    skip = functools.partial(Skip, problem.dim, problem.tokens, **settings) if settings else None
    mlp = Mlp(problem.dim, problem.hidden, **kind)
    block = Block(problem.dim, problem.heads, mlp, dropout=0.0, skip=skip, **kind)
    if settings.get("router") == "threshold":  # as trained: its gates tell tokens apart
        random = jax.random.normal(jax.random.key(0), (problem.dim, 1)) / problem.dim**0.5
        block.skip.router.kernel.set_value(random)
    return block
