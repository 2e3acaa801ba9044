"""The two feed-forward layers of a block: one MLP, or experts behind a router.

Both map [B, T, D] to ([B, T, D], LayerReport | None), so that a block need not know which it has.
Parameters are float32; `dtype` is that of the computation.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe import mesh
from moe.dispatch import DISPATCHES, slots_per_expert
from routers import Router


class LayerReport(NamedTuple):
    """What a layer of experts did with a batch; all float32."""

    aux_loss: jax.Array  # scalar
    load_E: jax.Array  # tokens processed by each expert
    dropped: jax.Array  # share of the routing weight without a slot
    weights_BTE: jax.Array  # weight of each token's experts, before anything is dropped


class Mlp(nnx.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int, *, dtype, rngs: nnx.Rngs):
        wide = {"kernel_metadata": {"axes": ("embed", "mlp")}, "bias_metadata": {"axes": ("mlp",)}}
        narrow = {"kernel_metadata": {"axes": ("mlp", "embed")}}
        self.wide = nnx.Linear(dim, hidden, dtype=dtype, rngs=rngs, **wide)
        self.narrow = nnx.Linear(hidden, dim, dtype=dtype, rngs=rngs, **narrow)

    def __call__(self, x, *, mask=None, train=False, key=None):
        return self.narrow(jax.nn.gelu(self.wide(x))), None


class Experts(nnx.Module):
    """E independent MLPs as batched matmuls, [E, G, C, D] -> [E, G, C, D].

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


class MoE(nnx.Module):
    """Experts behind a router. Routing groups are `group_size` whole examples of the batch."""

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
        dropout: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        k, group = settings["k"], group_size * tokens
        self.capacity = slots_per_expert(group, k, num_experts, capacity_factor)
        self.eval_capacity = slots_per_expert(group, k, num_experts, eval_capacity_factor)
        self.router = router(dim, num_experts, self.capacity, rngs=rngs, **settings)
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
        experts = functools.partial(self.experts, key=drop)
        capacity = self.capacity if train else self.eval_capacity
        out = DISPATCHES[self.dispatch](x_GTD, routing, experts, capacity)
        weights = routing.weights if routing.mix is None else routing.weights.sum(-1)
        report = LayerReport(
            aux_loss=jnp.float32(routing.aux_loss),
            load_E=out.load_E,
            dropped=out.dropped,
            weights_BTE=weights.reshape(batch, tokens, -1),
        )
        return out.y_GTD.reshape(x_BTD.shape), report
