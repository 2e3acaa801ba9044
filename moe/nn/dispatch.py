"""Brings tokens to their experts and back, as a `Routing` says; knows nothing of routers.

`experts` maps [E, G, C, D] to [E, G, C, D], row by row: each expert's own network on its rows; for
`dropless` it is a `Network`, which also does so with rows that are sorted by expert.
Where a mesh is in context, tokens are split by groups and experts by the axis `expert`
(`moe.hosts.mesh`); which tokens go to which expert is computed on the device that holds the group.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe.hosts import mesh
from moe.nn import exchange as rows
from routers import Routing


class Dispatched(NamedTuple):
    """Holds the tokens' outputs and what the experts received."""

    y_GTD: jax.Array
    load_E: jax.Array  # tokens processed by each expert (Soft MoE: its share of the outputs)
    dropped: jax.Array  # share of the routing weight that found no slot, in [0, 1]


class Limits(NamedTuple):
    """Holds the static sizes within which a router's choices vary, and who is kept where they bind.

    `in_order` is for causal models: what is kept is then the first by position, each token's
    choices before any of the next token's, and every bound is a group's own. So a group's output
    at position t depends on its tokens up to t alone, whatever is dropped.
    """

    capacity: int  # slots C of an expert in a group, of `by_capacity`
    rows: int = 0  # of a group, of `dropless`, where the router does not bound them itself
    receive: float = 2.0  # of `dropless`: the most rows for one device, in fair shares
    in_order: bool = False


def unbound(tokens: int, num_experts: int) -> Limits:
    """Returns limits in which `dropless` drops nothing: every token may go to every expert, all to
    one device. Where the router bounds its rows (`topk`: T K), memory is for those; else it is for
    T E rows of a group; and each of P devices that share the experts has room for those of all P.
    """
    return Limits(tokens, tokens * num_experts, math.inf, in_order=True)


class Network(NamedTuple):
    """Holds the experts as two functions, on slots and on sorted rows, and their parameters."""

    on_slots: Callable  # [E, G, C, D] -> [E, G, C, D]
    on_rows: Callable  # parameters, x_ND sorted by expert, sizes_E, id_N -> [N, D]; see `exchange`
    parameters: tuple
    axes: tuple[tuple[str | None, ...], ...]  # of each parameter

    def __call__(self, x_EGCD):
        return self.on_slots(x_EGCD)


def slots_per_expert(tokens: int, k: float, num_experts: int, capacity_factor: float) -> int:
    """Returns the capacity C = ceil(capacity_factor * T K / E), at least 1 and at most T."""
    if not capacity_factor > 0:
        raise ValueError(f"capacity_factor must be above 0; got {capacity_factor}")
    exact = capacity_factor * tokens * k / num_experts
    return max(1, min(tokens, math.ceil(round(exact, 6))))  # 1.1 * 10 is 11.000000000000002


def by_capacity(x_GTD, routing: Routing, experts: Callable, limits: Limits) -> Dispatched:
    """Gathers each expert's C tokens, runs the experts as batched matmuls, scatters back.

    An expert keeps, of a group's tokens routed to it, the C of highest priority (the first, where
    `limits.in_order`); the rest is dropped and counted. Cost: 2 G E C D elements moved, and E
    matmuls of G C rows; no one-hot matrices. Between devices only the slots move, once each way.
    """
    if routing.mix is not None:
        return _by_mixing(x_GTD, routing, experts)
    weights = routing.weights
    priority = weights if routing.priority is None else routing.priority
    if limits.in_order:
        priority = jnp.broadcast_to(-jnp.arange(weights.shape[1])[None, :, None], weights.shape)
    pick = mesh.on_groups(functools.partial(_pick, limits.capacity))
    token_GEC, weight_GEC, lost_GE = pick(weights, jax.lax.stop_gradient(priority))
    x_GECD = mesh.on_groups(_rows)(x_GTD, token_GEC)
    out_GECD = _through_experts(x_GECD, experts)
    y_GTD = mesh.on_groups(_combine)(x_GTD, out_GECD, token_GEC, weight_GEC)
    load_E = (weight_GEC > 0).sum((0, 2)).astype(jnp.float32)
    return Dispatched(y_GTD, load_E, _share(lost_GE, weights))


def _pick(capacity: int, weights_GTE, priority_GTE):
    """Returns the tokens in the experts' slots, their weights [G, E, C], the lost weight [G, E]."""
    weights_GET = weights_GTE.swapaxes(1, 2)
    priority_GET = priority_GTE.swapaxes(1, 2).astype(jnp.float32)
    token_GEC = jax.lax.top_k(jnp.where(weights_GET > 0, priority_GET, -jnp.inf), capacity)[1]
    weight_GEC = jnp.take_along_axis(weights_GET, token_GEC, 2)
    overflows = (weights_GET > 0).sum(-1) > capacity
    lost_GE = jnp.where(overflows, jnp.maximum(weights_GET.sum(-1) - weight_GEC.sum(-1), 0), 0)
    return token_GEC, weight_GEC, lost_GE


def _rows(x_GTD, token_GEC):
    """Gathers the tokens into their slots, [G, E, C, D]."""
    return x_GTD[jnp.arange(len(x_GTD))[:, None, None], token_GEC]


def _combine(x_GTD, out_GECD, token_GEC, weight_GEC):
    """Returns each token's weighted sum of its experts' outputs, [G, T, D]."""
    out_GECD *= weight_GEC[..., None].astype(out_GECD.dtype)
    row = jnp.arange(len(x_GTD))[:, None, None]
    return jnp.zeros_like(x_GTD, dtype=out_GECD.dtype).at[row, token_GEC].add(out_GECD)


def _through_experts(x_GECD, experts: Callable):
    """Returns the experts' outputs, laid out as the slots were; costs two all-to-alls.

    Both exchanged tensors are named "exchange", so that a policy of rematerialisation can keep
    them rather than exchange again.
    """
    x_EGCD = checkpoint_name(mesh.to_experts(x_GECD), "exchange")
    return checkpoint_name(mesh.to_groups(experts(x_EGCD)), "exchange")


def _share(lost, weights):
    """Returns the lost weight as a share of all, scalar."""
    return lost.sum() / jnp.maximum(weights.sum(), jnp.finfo(weights.dtype).tiny)


def dense(x_GTD, routing: Routing, experts: Callable, limits: Limits) -> Dispatched:
    """Runs every expert on every token: the reference, E/K times the work, drops nothing."""
    if routing.mix is not None:
        return _by_mixing(x_GTD, routing, experts)
    weights = routing.weights
    x_EGTD = jnp.broadcast_to(x_GTD, (weights.shape[-1], *x_GTD.shape))
    out_EGTD = experts(mesh.constrain(x_EGTD, "expert", "slots", None, None))
    y_GTD = _weigh("gte,egtd->gtd", weights.astype(out_EGTD.dtype), out_EGTD)
    load_E = (weights > 0).sum((0, 1)).astype(jnp.float32)
    return Dispatched(mesh.constrain(y_GTD, "batch", None, None), load_E, jnp.zeros(()))


def dropless(x_GTD, routing: Routing, experts: Network, limits: Limits) -> Dispatched:
    """Sorts each device's rows (a token at one of its experts) by expert, runs each expert on its
    own as grouped matmuls, adds back: no slots, so nothing is dropped or computed in vain.

    Memory is static: a group has at most `routing.rows` rows or, of a router without such a number,
    `limits.rows`, the heaviest. Experts that are spread get their rows by an all-to-all of
    `limits.receive` times the fair share. What finds no room is dropped and counted. Where
    `limits.in_order` the first are kept, not the heaviest, and each group has a fair share of its
    own: groups that need less leave nothing to others, so that more is dropped than from one share
    for all groups of a device, and no row of a batch depends on another.
    """
    if routing.mix is not None:
        return _by_mixing(x_GTD, routing, experts)
    weights = routing.weights
    bound = limits.rows if routing.rows is None else routing.rows
    bound = min(bound, weights.shape[1] * weights.shape[2])

    def on_device(x_GTD, weights_GTE, parameters):
        share = rows.share(len(x_GTD), bound, limits.receive, limits.in_order)
        kept_GTE = rows.within(weights_GTE, bound, share, limits.in_order)
        y_GTD = rows.through_experts(experts.on_rows, bound, share, x_GTD, kept_GTE, parameters)
        return y_GTD, (kept_GTE > 0).sum(1), (weights_GTE - kept_GTE).sum((1, 2))

    batch = mesh.spec("batch")
    where = (batch, batch, tuple(mesh.spec(*axes) for axes in experts.axes))
    run = mesh.local(on_device, where, batch)
    y_GTD, load_GE, lost_G = run(x_GTD, weights, experts.parameters)
    return Dispatched(y_GTD, load_GE.sum(0).astype(jnp.float32), _share(lost_G, weights))


# Sums of tokens by routing weights, as exact as the gathers and additions of the other dispatches:
# without it TPUs and GPUs would round float32 first. It changes nothing for bfloat16.
_weigh = functools.partial(jnp.einsum, precision="highest")


def _by_mixing(x_GTD, routing: Routing, experts: Callable) -> Dispatched:
    """Gives each slot a mixture of its group's tokens; nothing is dropped."""
    mix, weights = (a.astype(x_GTD.dtype) for a in (routing.mix, routing.weights))
    read = mesh.on_groups(functools.partial(_weigh, "gtd,gtec->gecd"))
    write = mesh.on_groups(functools.partial(_weigh, "gecd,gtec->gtd"))
    y_GTD = write(_through_experts(read(x_GTD, mix), experts), weights)
    return Dispatched(y_GTD, routing.weights.sum((0, 1, 3)), jnp.zeros(()))


DISPATCHES: dict[str, Callable[..., Dispatched]] = {
    "capacity": by_capacity,
    "dropless": dropless,
    "dense": dense,
}
