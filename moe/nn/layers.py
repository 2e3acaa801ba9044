"""Defines the two feed-forward layers of a block: one MLP, or experts behind a router.

Both map [B, T, D] to ([B, T, D], LayerReport | None), so that a block need not know which it has.
Parameters are float32; `dtype` is that of the computation.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe.hosts import mesh
from moe.nn.dispatch import DISPATCHES, Limits, Network, slots_per_expert
from moe.nn.grouped import grouped_matmul, grouped_rows
from routers import Router


class LayerReport(NamedTuple):
    """Says what a layer of experts did with a batch; all float32."""

    aux_loss: jax.Array  # scalar
    load_E: jax.Array  # tokens processed by each expert
    dropped: jax.Array  # share of the routing weight without a slot
    weights_BTE: jax.Array  # weight of each token's experts, before anything is dropped


class Mlp(nnx.Module):
    """Applies a linear map, GELU, and another linear map."""

    def __init__(self, dim: int, hidden: int, *, dtype, rngs: nnx.Rngs):
        wide = {"kernel_metadata": {"axes": ("embed", "mlp")}, "bias_metadata": {"axes": ("mlp",)}}
        narrow = {"kernel_metadata": {"axes": ("mlp", "embed")}}
        self.wide = nnx.Linear(dim, hidden, dtype=dtype, rngs=rngs, **wide)
        self.narrow = nnx.Linear(hidden, dim, dtype=dtype, rngs=rngs, **narrow)

    def __call__(self, x, *, mask=None, train=False, key=None):
        return self.narrow(jax.nn.gelu(self.wide(x))), None


class Experts(nnx.Module):
    """Applies E independent MLPs as batched matmuls, [E, G, C, D] -> [E, G, C, D].

    Where a mesh splits them, each device runs its experts on the slots that it received; the
    hidden width is split by `tensor`.
    """

    def __init__(self, num_experts: int, dim: int, hidden: int, *, dropout, dtype, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(batch_axis=0)

        def parameter(value, *axes):
            return nnx.Param(value, axes=("expert", *axes))

        wide, narrow = (num_experts, dim, hidden), (num_experts, hidden, dim)
        self.kernel_wide = parameter(init(rngs.params(), wide, jnp.float32), None, "mlp")
        self.bias_wide = parameter(jnp.zeros((num_experts, 1, hidden)), None, "mlp")
        self.kernel_narrow = parameter(init(rngs.params(), narrow, jnp.float32), "mlp", None)
        self.bias_narrow = parameter(jnp.zeros((num_experts, 1, dim)), None, None)
        self.dropout = nnx.Dropout(dropout)
        self.dtype = dtype

    def __call__(self, x_EGCD, key=None):
        def linear(x, kernel, bias):
            out = jnp.einsum("egci,eio->egco", x, kernel[...].astype(self.dtype))
            return out + bias[...].astype(self.dtype)[:, None]

        hidden = jax.nn.gelu(linear(x_EGCD.astype(self.dtype), self.kernel_wide, self.bias_wide))
        hidden = mesh.constrain(hidden, "expert", "slots", None, "mlp")
        hidden = self.dropout(hidden, deterministic=key is None, rngs=key)
        out = linear(hidden, self.kernel_narrow, self.bias_narrow)
        return mesh.constrain(out, "expert", "slots", None, None)

    def network(self, key=None) -> Network:
        """Returns the experts as a dispatch sees them; `key` seeds their dropout."""
        parameters = self.kernel_wide, self.bias_wide, self.kernel_narrow, self.bias_narrow
        return Network(
            on_slots=functools.partial(self, key=key),
            on_rows=functools.partial(self._on_rows, key, self.dropout.rate),
            parameters=tuple(p[...].astype(self.dtype) for p in parameters),
            axes=tuple(p.get_metadata()["axes"] for p in parameters),
        )

    @staticmethod
    def _on_rows(key, rate, parameters, x_ND, sizes_E, id_N):
        """Applies each device's experts, and its part of F, to rows that are sorted by expert."""
        kernel_wide, bias_wide, kernel_narrow, bias_narrow = parameters
        hidden = grouped_matmul(x_ND.astype(kernel_wide.dtype), kernel_wide, sizes_E)
        hidden = jax.nn.gelu(hidden + grouped_rows(bias_wide[:, 0], sizes_E, len(x_ND)))
        if key is not None and rate > 0:
            hidden = _drop(hidden, key, rate, id_N)
        out = mesh.total(grouped_matmul(hidden, kernel_narrow, sizes_E), "tensor")
        return out + grouped_rows(bias_narrow[:, 0], sizes_E, len(x_ND))


def _drop(hidden_NF, key, rate: float, id_N):
    """Drops units at random by the row's number, and so the same ones on any mesh."""
    width = hidden_NF.shape[1]
    parts = mesh.axis_size("tensor")

    def keep(number):
        row = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, (width * parts,))
        first = jax.lax.axis_index("tensor") * width if parts > 1 else 0
        return jax.lax.dynamic_slice_in_dim(row, first, width)

    return jnp.where(jax.vmap(keep)(id_N), hidden_NF / (1 - rate), 0)


class MoE(nnx.Module):
    """Routes tokens to experts, in groups of `group_size` whole examples of the batch."""

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
        self.experts = Experts(num_experts, dim, hidden, dropout=dropout, dtype=dtype, rngs=rngs)
        self.group_size, self.dispatch = group_size, dispatch

    def __call__(self, x_BTD, *, mask=None, train=False, key=None):
        batch, tokens, dim = x_BTD.shape
        if batch % self.group_size:
            raise ValueError(f"a batch of {batch} does not divide into groups of {self.group_size}")
        x_GTD = x_BTD.reshape(batch // self.group_size, self.group_size * tokens, dim)
        if mask is not None:
            mask = jnp.repeat(mask, tokens).reshape(x_GTD.shape[:2])
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
        return out.y_GTD.reshape(x_BTD.shape), report
