"""Defines the layer of experts behind a router, which stands where a block else has its `Mlp`.

Both map [B, T, D] to ([B, T, D], LayerReport | None), so that a block need not know which it has.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe.nn.dispatch import DISPATCHES, Limits, slots_per_expert, unbound
from moe.nn.draws import aside
from moe.nn.experts import Experts
from moe.nn.mlp import Mlp
from routers import Router, Tokens


class LayerReport(NamedTuple):
    """Says what a layer of experts did with a batch; all float32. Sums are over real tokens, so
    that those of micro-batches add up."""

    aux_loss: jax.Array  # scalar
    load_E: jax.Array  # tokens processed by each expert
    dropped: jax.Array  # share of the routing weight without a slot
    weights_BTE: jax.Array  # weight of each token's experts, before anything is dropped
    tokens: jax.Array  # number of real tokens
    chosen: jax.Array  # sum of the number of experts of a token, before anything is dropped
    margin: jax.Array | None  # sum of `Routing.margin`; None where the router has none
    statistics: Any = None  # sums for `Router.advance`
    share: jax.Array | None = None  # what the layer has of a shared budget, times the tokens


class MoE(nnx.Module):
    """Routes tokens to experts, in groups of `group_size` whole examples of the batch.

    `shared` is the hidden width of one more network that every token passes (0: none), as in
    DeepSeekMoE (Dai et al. 2024); `gated`, `bias`, `exact` and `out_scale` are those of `Mlp` and
    `Experts`.
    `mask`, [B] or [B, T], is False on padding, which gets no slot and enters no loss and no report.

    A `causal` layer's output at position t depends on its row's tokens up to t, and on no other row
    of the batch: the router may not look ahead, a group is one row, and what binds keeps the
    first by position (`Limits.in_order`). In evaluation nothing binds: it is dropless whatever the
    training's dispatch (`dense` stays itself), at any length of a row, with memory for all rows
    (`dispatch.unbound`). On accelerators that add in no fixed order this holds to rounding.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        tokens: int,
        *,
        router: type[Router],
        settings: dict,
        num_experts: int,
        group_size: int,
        capacity_factor: float,
        eval_capacity_factor: float,
        dispatch: str,
        dropless_bound: float = 2.0,
        dropless_receive: float = 2.0,
        causal: bool = False,
        dropout: float,
        gated: bool = False,
        bias: bool = True,
        exact: bool = False,
        shared: int = 0,
        out_scale: float = 1.0,
        dtype,
        rngs: nnx.Rngs,
    ):
        if causal and (why := router.why_not_causal(settings)):
            raise ValueError(f"a causal model needs a router that is causal: {why}")
        if causal and group_size != 1:
            raise ValueError(f"a causal model needs group_size=1, a row; got {group_size}")
        k, group = settings["k"], group_size * tokens
        rows = math.ceil(dropless_bound * k * group)
        self.limits, self.eval_limits = (
            Limits(slots_per_expert(group, k, num_experts, factor), rows, dropless_receive, causal)
            for factor in (capacity_factor, eval_capacity_factor)
        )
        own = aside(rngs, 1)  # routers draw as they like: the experts begin equal under all
        self.router = router(dim, num_experts, self.limits.capacity, rngs=own, **settings)
        kind = {"gated": gated, "bias": bias, "exact": exact, "out_scale": out_scale}
        kind |= {"dtype": dtype, "rngs": rngs}
        self.experts = Experts(num_experts, dim, hidden, dropout=dropout, **kind)
        self.shared = Mlp(dim, shared, **kind) if shared else None
        self.num_experts, self.group_size = num_experts, group_size
        self.dispatch, self.causal = dispatch, causal

    def __call__(self, x_BTD, *, mask=None, train=False, key=None, tokens=None, share=None):
        """Returns [B, T, D] and the report.

        `tokens`, of `routers.Tokens` [B, T], and `share` are for routers that ask for them.
        """
        batch, length, dim = x_BTD.shape
        if batch % self.group_size:
            raise ValueError(f"a batch of {batch} does not divide into groups of {self.group_size}")
        x_GTD = x_BTD.reshape(batch // self.group_size, self.group_size * length, dim)
        if mask is not None:
            mask = jnp.repeat(mask, length) if mask.ndim == 1 else mask
            mask = mask.reshape(x_GTD.shape[:2])
        noise, drop = (None, None) if key is None else jax.random.split(key)
        told = {} if share is None else {"share": share}
        if self.router.reads_tokens:
            tokens = tokens or _by_position(batch, length)
            told["tokens"] = Tokens(*(a.reshape(x_GTD.shape[:2]) for a in tokens))
        routing = self.router(x_GTD, mask=mask, key=noise, **told)
        dispatch, limits = self._dispatch(x_GTD.shape[1], train)
        out = DISPATCHES[dispatch](x_GTD, routing, self.experts.network(drop), limits)
        weights = routing.weights if routing.mix is None else routing.weights.sum(-1)
        real = _sum(jnp.ones(x_GTD.shape[:2]), mask)
        report = LayerReport(
            aux_loss=jnp.float32(routing.aux_loss),
            load_E=out.load_E,
            dropped=out.dropped,
            weights_BTE=weights.reshape(batch, length, -1),
            tokens=real,
            chosen=_sum((weights > 0).sum(-1), mask),
            margin=None if routing.margin is None else _sum(routing.margin, mask),
            statistics=jax.lax.stop_gradient(routing.statistics),
            share=None if share is None else jax.lax.stop_gradient(share) * real,
        )
        y_BTD = out.y_GTD.reshape(x_BTD.shape)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)[0], report

    def _dispatch(self, tokens: int, train: bool) -> tuple[str, Limits]:
        """Returns the name of the dispatch of groups of so many tokens, and its limits."""
        if train or not self.causal:
            return self.dispatch, self.limits if train else self.eval_limits
        dispatch = "dense" if self.dispatch == "dense" else "dropless"
        return dispatch, unbound(tokens, self.num_experts)


def _by_position(batch: int, length: int) -> Tokens:
    """Returns what is known of tokens that are no words: where they stand."""
    position_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return Tokens(position_BT, position_BT)


def _sum(a_GT, mask):
    """Returns the sum over real tokens, float32."""
    return jnp.float32(a_GT.sum() if mask is None else jnp.where(mask, a_GT, 0).sum())
