"""Defines experts: E feed-forward networks of one shape, as a dispatch runs them.

Parameters are float32; `dtype` is that of the computation.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from moe.hosts import mesh
from moe.nn.dispatch import Network
from moe.nn.expert_rows import Parameters, mlp_rows
from moe.nn.grouped import grouped_matmul, grouped_rows
from moe.nn.mlp import activate, scaled_normal


class Experts(nnx.Module):
    """Applies E independent MLPs as batched matmuls, [E, G, C, D] -> [E, G, C, D].

    Where a mesh splits them, each device runs its experts on the slots that it received; the
    hidden width is split by `tensor`. `gated`, `bias`, `exact` and `out_scale` are as of
    `moe.nn.mlp.Mlp`.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        *,
        dropout,
        gated: bool = False,
        bias: bool = True,
        exact: bool = False,
        out_scale: float = 1.0,
        dtype,
        rngs: nnx.Rngs,
    ):
        init, out_init = (scaled_normal(scale, batch_axis=0) for scale in (1.0, out_scale))

        def parameter(value, *axes):
            return nnx.Param(value, axes=("expert", *axes))

        def zeros(width, axis):
            value = jnp.zeros((num_experts, 1, width))
            return parameter(value, None, axis) if bias else None

        wide, narrow = (num_experts, dim, hidden), (num_experts, hidden, dim)
        self.kernel_wide = parameter(init(rngs.params(), wide, jnp.float32), None, "mlp")
        self.bias_wide = zeros(hidden, "mlp")
        self.kernel_narrow = parameter(out_init(rngs.params(), narrow, jnp.float32), "mlp", None)
        self.bias_narrow = zeros(dim, None)
        value = init(rngs.params(), wide, jnp.float32) if gated else None
        self.kernel_gate = parameter(value, None, "mlp") if gated else None
        self.bias_gate = zeros(hidden, "mlp") if gated else None
        self.dropout = nnx.Dropout(dropout)
        self.dtype, self.exact = dtype, exact

    def __call__(self, x_EGCD, key=None):
        def linear(x, kernel, bias):
            out = jnp.einsum("egci,eio->egco", x, kernel[...].astype(self.dtype))
            return out if bias is None else out + bias[...].astype(self.dtype)[:, None]

        x_EGCD = x_EGCD.astype(self.dtype)
        hidden = linear(x_EGCD, self.kernel_wide, self.bias_wide)
        gate = self.kernel_gate
        if gate is not None:
            gate = linear(x_EGCD, gate, self.bias_gate)
        hidden = activate(hidden, gate, self.exact)
        hidden = mesh.constrain(hidden, "expert", "slots", None, "mlp")
        hidden = self.dropout(hidden, deterministic=key is None, rngs=key)
        out = linear(hidden, self.kernel_narrow, self.bias_narrow)
        return mesh.constrain(out, "expert", "slots", None, None)

    def network(self, key=None) -> Network:
        """Returns the experts as a dispatch sees them; `key` seeds their dropout."""
        names = ("kernel_wide", "bias_wide", "kernel_narrow", "bias_narrow")
        names += ("kernel_gate", "bias_gate")
        names = [name for name in names if getattr(self, name) is not None]
        parameters = [getattr(self, name) for name in names]
        return Network(
            on_slots=functools.partial(self, key=key),
            on_rows=functools.partial(_on_rows, tuple(names), key, self.dropout.rate, self.exact),
            parameters=tuple(p[...].astype(self.dtype) for p in parameters),
            # Inside a loop over stacked blocks the metadata still has the axis of the layers.
            axes=tuple(p.get_metadata()["axes"][-p[...].ndim :] for p in parameters),
        )


def _on_rows(names, key, rate, exact, parameters, x_ND, sizes_E, id_N):
    """Applies each device's experts, and its part of F, to rows that are sorted by expert."""
    of = dict(zip(names, parameters, strict=True))
    of = {name: a[:, 0] if name.startswith("bias") else a for name, a in of.items()}
    x_ND = x_ND.astype(of["kernel_wide"].dtype)
    if key is not None and rate > 0:
        out = _with_dropout(of, key, rate, exact, x_ND, sizes_E, id_N)
    else:
        fields = {name.removeprefix("kernel_"): a for name, a in of.items()}
        fields.pop("bias_narrow", None)
        out = mlp_rows(x_ND, Parameters(**fields), sizes_E, exact)
    out = mesh.total(out, "tensor")
    return _add(of, out, "bias_narrow", sizes_E)


def _with_dropout(of, key, rate: float, exact: bool, x_ND, sizes_E, id_N):
    """Returns the rows' outputs but for the last bias, with hidden units dropped."""
    names = ["wide", "gate"] if "kernel_gate" in of else ["wide"]
    hidden = [
        _add(of, grouped_matmul(x_ND, of[f"kernel_{name}"], sizes_E), f"bias_{name}", sizes_E)
        for name in names
    ]
    hidden = _drop(activate(*hidden, exact=exact), key, rate, id_N)
    return grouped_matmul(hidden, of["kernel_narrow"], sizes_E)


def _add(of, out, bias: str, sizes_E):
    """Returns the rows plus their experts' bias, if there is one."""
    return out if bias not in of else out + grouped_rows(of[bias], sizes_E, len(out))


def _drop(hidden_NF, key, rate: float, id_N):
    """Drops units at random by the row's number, and so the same ones on any mesh."""
    width = hidden_NF.shape[1]
    parts = mesh.axis_size("tensor")

    def keep(number):
        row = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, (width * parts,))
        first = jax.lax.axis_index("tensor") * width if parts > 1 else 0
        return jax.lax.dynamic_slice_in_dim(row, first, width)

    return jnp.where(jax.vmap(keep)(id_N), hidden_NF / (1 - rate), 0)
