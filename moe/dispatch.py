"""Tokens to experts and back. Knows nothing of routers: it reads a `Routing`.

`experts` maps [E, N, D] to [E, N, D], row by row: each expert's own network on its N rows.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from routers import Routing


class Dispatched(NamedTuple):
    """What came back, and what the experts got."""

    y_GTD: jax.Array
    load_E: jax.Array  # tokens processed by each expert (Soft MoE: its share of the outputs)
    dropped: jax.Array  # share of the routing weight that found no slot, in [0, 1]


def slots_per_expert(tokens: int, k: float, num_experts: int, capacity_factor: float) -> int:
    """Capacity C = ceil(capacity_factor * T K / E), at least 1 and at most T."""
    if not capacity_factor > 0:
        raise ValueError(f"capacity_factor must be above 0; got {capacity_factor}")
    exact = capacity_factor * tokens * k / num_experts
    return max(1, min(tokens, math.ceil(round(exact, 6))))  # 1.1 * 10 is 11.000000000000002


def by_capacity(x_GTD, routing: Routing, experts: Callable, capacity: int) -> Dispatched:
    """Gather each expert's C tokens, run the experts as batched matmuls, scatter back.

    An expert keeps, of the tokens routed to it, the C of highest priority; the rest is dropped and
    counted. Cost: 2 G E C D elements moved, and E matmuls of G C rows; no one-hot matrices.
    """
    if routing.mix is not None:
        return _by_mixing(x_GTD, routing, experts)
    weights_GET = routing.weights.swapaxes(1, 2)
    priority = weights_GET if routing.priority is None else routing.priority.swapaxes(1, 2)
    wanted = jnp.where(weights_GET > 0, priority.astype(jnp.float32), -jnp.inf)
    token_GEC = jax.lax.top_k(jax.lax.stop_gradient(wanted), capacity)[1]
    weight_GEC = jnp.take_along_axis(weights_GET, token_GEC, 2)

    groups, experts_, slots = token_GEC.shape
    row = jnp.arange(groups)[:, None, None]
    x_EGCD = x_GTD[row, token_GEC].swapaxes(0, 1)
    out = experts(x_EGCD.reshape(experts_, groups * slots, -1))
    out_GECD = out.reshape(x_EGCD.shape).swapaxes(0, 1)
    out_GECD *= weight_GEC[..., None].astype(out.dtype)
    y_GTD = jnp.zeros_like(x_GTD, dtype=out.dtype).at[row, token_GEC].add(out_GECD)

    overflows = (weights_GET > 0).sum(-1) > capacity
    lost_GE = jnp.where(overflows, jnp.maximum(weights_GET.sum(-1) - weight_GEC.sum(-1), 0), 0)
    dropped = lost_GE.sum() / jnp.maximum(weights_GET.sum(), jnp.finfo(weights_GET.dtype).tiny)
    return Dispatched(y_GTD, (weight_GEC > 0).sum((0, 2)).astype(jnp.float32), dropped)


def dense(x_GTD, routing: Routing, experts: Callable, capacity: int) -> Dispatched:
    """Every expert on every token, weighted: the reference, E/K times the work, drops nothing."""
    if routing.mix is not None:
        return _by_mixing(x_GTD, routing, experts)
    weights = routing.weights
    groups, tokens, num_experts = weights.shape
    x = jnp.broadcast_to(
        x_GTD.reshape(1, groups * tokens, -1), (num_experts, groups * tokens, x_GTD.shape[-1])
    )
    out = experts(x).reshape(num_experts, groups, tokens, -1)
    y_GTD = jnp.einsum("gte,egtd->gtd", weights.astype(out.dtype), out)
    return Dispatched(y_GTD, (weights > 0).sum((0, 1)).astype(jnp.float32), jnp.zeros(()))


def _by_mixing(x_GTD, routing: Routing, experts: Callable) -> Dispatched:
    """Soft slots: each reads a mixture of its group's tokens; nothing is dropped."""
    mix, weights = (a.astype(x_GTD.dtype) for a in (routing.mix, routing.weights))
    slots = jnp.einsum("gtd,gtec->egcd", x_GTD, mix)
    out = experts(slots.reshape(slots.shape[0], -1, slots.shape[-1])).reshape(slots.shape)
    y_GTD = jnp.einsum("egcd,gtec->gtd", out, weights)
    return Dispatched(y_GTD, routing.weights.sum((0, 1, 3)), jnp.zeros(()))


DISPATCHES: dict[str, Callable[..., Dispatched]] = {"capacity": by_capacity, "dense": dense}
