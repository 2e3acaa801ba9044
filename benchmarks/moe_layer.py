"""A layer of experts beside a dense layer of the same active FLOPs, forward and backward."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.report import Table
from benchmarks.timing import Candidate, device, measure, summary

SHOW = ("experts", "candidate", "device", "status", "ms", "ms_q1", "ratio", "error")
NOTE = (
    "{groups} groups of {tokens} tokens, D = {dim}, F = {hidden}, K = 2, {dtype}; the derivative "
    "by tokens and parameters. `ratio`: to a dense MLP of width K F. Capacity has a factor of 1, "
    "so that both compute as much. `error`: largest difference of the output to the dense "
    "dispatch, relative to the largest output; capacity drops tokens, so it has none. The router "
    "sparse_topk sends a token to more than K experts; `at 2 experts` has the k with which they "
    "are 2 on average, as those of topk."
)
DISPATCHES = [("topk", "capacity"), ("topk", "dropless")]
DISPATCHES += [("sparse_topk", "capacity"), ("sparse_topk", "dropless")]
DISPATCHES += [("sparse_topk at 2 experts", "dropless")]


class Problem(NamedTuple):
    """Tokens `[groups, tokens, dim]` and sizes of the layer."""

    groups: int
    tokens: int
    dim: int
    hidden: int
    experts: int
    dtype: str

    @property
    def inputs(self):
        """Tokens and a direction for the derivative."""
        shape = (2, self.groups, self.tokens, self.dim)
        return np.random.default_rng(0).standard_normal(shape, np.float32)


def tables(quick: bool) -> list[Table]:
    on_gpu = jax.default_backend() == "gpu"
    sizes = (16, 256, 2048, 4096) if on_gpu else (16, 256, 256, 1024)
    sizes, counts = ((2, 32, 16, 32), (4,)) if quick else (sizes, (8, 64))
    dtype = "bfloat16" if on_gpu else "float32"
    rows = []
    for experts in counts:
        rows += _compare(Problem(*sizes, experts, dtype), 0.3 if quick else 25.0)
    note = NOTE.format(**Problem(*sizes, 0, dtype)._asdict())
    return [Table("moe_layer", "A layer of experts", note, SHOW, rows)]


def _compare(problem: Problem, budget: float) -> list[dict]:
    found = [Candidate("dense MLP", lambda p: _run(_mlp(p), p))]
    for router, dispatch in DISPATCHES:
        make = lambda p, r=router, d=dispatch: _run(_moe(p, r, d), p)  # noqa: E731
        found.append(Candidate(f"{router}, {dispatch}", make))
    timings, rows = measure(found, problem, budget), []
    for one in found:
        timing = timings[one.name]
        row = {"experts": problem.experts, "candidate": one.name, "device": device(one.runs_on)}
        row |= summary(timing, timings[found[0].name])
        if timing.output is not None and one.name.endswith("dropless"):
            exact = _run(_moe(problem, one.name.split(",")[0], "dense"), problem)()[0]
            scale = jnp.abs(exact).max()
            row["error"] = float(jnp.abs(timing.output[0] - exact).max() / scale)
        rows.append(row)
        print(f"  {problem.experts} experts, {one.name}: {row.get('ms')} ms, {row['status']}")
    return rows


def _mlp(problem: Problem) -> nnx.Module:
    from moe.nn.mlp import Mlp

    dtype = jnp.dtype(problem.dtype)
    return Mlp(problem.dim, 2 * problem.hidden, dtype=dtype, rngs=nnx.Rngs(0))


def _moe(problem: Problem, router: str, dispatch: str) -> nnx.Module:
    from moe.nn.layer import MoE
    from routers import ROUTERS

    router, at, _ = router.partition(" at ")
    k = _k_of(problem, router, 2.0) if at else 2
    return MoE(
        problem.dim,
        problem.hidden,
        problem.tokens,
        router=ROUTERS[router],
        settings={"k": k},
        num_experts=problem.experts,
        group_size=1,
        capacity_factor=1.0,
        eval_capacity_factor=1.0,
        dispatch=dispatch,
        dropless_bound=4 / k,  # rows for four experts a token
        dropout=0.0,
        dtype=jnp.dtype(problem.dtype),
        rngs=nnx.Rngs(0),
    )


def _k_of(problem: Problem, name: str, chosen: float) -> float:
    """Returns the k with which the router, as it begins, chooses so many experts on average."""
    from routers import ROUTERS

    tokens, low, high = problem.inputs[0], 0.05, chosen
    while high - low > 1e-3:
        k = (low + high) / 2
        router = ROUTERS[name](problem.dim, problem.experts, 1, k=k, rngs=nnx.Rngs(0))
        more = float((router(tokens).weights > 0).sum(-1).mean()) > chosen
        low, high = (low, k) if more else (k, high)
    return low


def _run(layer: nnx.Module, problem: Problem):
    """Returns the compiled call that makes the output and the derivatives."""
    graphdef, params = nnx.split(layer)

    def loss(params, x, direction):
        y, _ = nnx.merge(graphdef, params)(x, train=True)
        return (y * direction).sum(), y

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    arguments = jax.device_put((params, *problem.inputs))
    program = step.lower(*arguments).compile()

    def call():
        (_, y), gradients = jax.block_until_ready(program(*arguments))
        return y, gradients

    return call
