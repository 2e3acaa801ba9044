"""Defines the layer of experts behind a router, which stands where a block else has its `Mlp`.

Both map [B, T, D] to ([B, T, D], LayerReport | None), so that a block need not know which it has.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe.nn.dispatch import DISPATCHES, Limits, slots_per_expert
from moe.nn.experts import Experts
from moe.nn.mlp import Mlp
from routers import Router


class LayerReport(NamedTuple):
    """Says what a layer of experts did with a batch; all float32."""

    aux_loss: jax.Array  # scalar
    load_E: jax.Array  # tokens processed by each expert
    dropped: jax.Array  # share of the routing weight without a slot
    weights_BTE: jax.Array  # weight of each token's experts, before anything is dropped


class MoE(nnx.Module):
    """Routes tokens to experts, in groups of `group_size` whole examples of the batch.

    `shared` is the hidden width of one more network that every token passes (0: none), as in
    DeepSeekMoE (Dai et al. 2024); `gated`, `bias` and `out_init` are those of `Mlp` and `Experts`.
    `mask`, [B] or [B, T], is False on padding.
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
        dropout: float,
        gated: bool = False,
        bias: bool = True,
        shared: int = 0,
        out_init=None,
        dtype,
        rngs: nnx.Rngs,
    ):
        k, group = settings["k"], group_size * tokens
        rows = math.ceil(dropless_bound * k * group)
        self.limits, self.eval_limits = (
            Limits(slots_per_expert(group, k, num_experts, factor), rows, dropless_receive)
            for factor in (capacity_factor, eval_capacity_factor)
        )
        self.router = router(dim, num_experts, self.limits.capacity, rngs=rngs, **settings)
        kind = {"gated": gated, "bias": bias, "out_init": out_init, "dtype": dtype, "rngs": rngs}
        self.experts = Experts(num_experts, dim, hidden, dropout=dropout, **kind)
        self.shared = Mlp(dim, shared, **kind) if shared else None
        self.group_size, self.dispatch = group_size, dispatch

    def __call__(self, x_BTD, *, mask=None, train=False, key=None):
        batch, tokens, dim = x_BTD.shape
        if batch % self.group_size:
            raise ValueError(f"a batch of {batch} does not divide into groups of {self.group_size}")
        x_GTD = x_BTD.reshape(batch // self.group_size, self.group_size * tokens, dim)
        if mask is not None:
            mask = jnp.repeat(mask, tokens) if mask.ndim == 1 else mask
            mask = mask.reshape(x_GTD.shape[:2])
        noise, drop = (None, None) if key is None else jax.random.split(key)
        routing = self.router(x_GTD, mask=mask, key=noise)
        limits = self.limits if train else self.eval_limits
        out = DISPATCHES[self.dispatch](x_GTD, routing, self.experts.network(drop), limits)
        weights = routing.weights if routing.mix is None else routing.weights.sum(-1)
        report = LayerReport(
            aux_loss=jnp.float32(routing.aux_loss),
            load_E=out.load_E,
            dropped=out.dropped,
            weights_BTE=weights.reshape(batch, tokens, -1),
        )
        y_BTD = out.y_GTD.reshape(x_BTD.shape)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)[0], report
