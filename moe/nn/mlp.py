"""Defines the feed-forward network of a block: two linear maps, or three with a gate."""

import jax
from flax import nnx

from moe.hosts.mesh import constrain


class Mlp(nnx.Module):
    """Applies a linear map, GELU, and another; gated, silu(x G) * (x W) before the last (SwiGLU).

    Shazeer 2020, "GLU variants improve transformer". `out_scale` is that of the last kernel's
    initial values, `exact` of `activate`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        gated: bool = False,
        bias: bool = True,
        exact: bool = False,
        out_scale: float = 1.0,
        dtype,
        rngs: nnx.Rngs,
    ):
        wide = {"kernel_metadata": {"axes": ("embed", "mlp")}, "bias_metadata": {"axes": ("mlp",)}}
        narrow = {"kernel_metadata": {"axes": ("mlp", "embed")}}
        common = {"use_bias": bias, "dtype": dtype, "rngs": rngs}
        self.wide = nnx.Linear(dim, hidden, **common, **wide)
        init = scaled_normal(out_scale)
        self.narrow = nnx.Linear(hidden, dim, kernel_init=init, **common, **narrow)
        self.gate = nnx.Linear(dim, hidden, **common, **wide) if gated else None
        self.exact = exact

    def __call__(self, x, *, mask=None, train=False, key=None, tokens=None):
        gate = None if self.gate is None else self.gate(x)
        hidden = activate(self.wide(x), gate, self.exact)
        if self.gate is not None:
            hidden = constrain(hidden, "batch", None, "mlp")
        return self.narrow(hidden), None


def activate(wide, gate=None, exact: bool = False):
    """Returns the hidden units: GELU, or SwiGLU's where there is a gate.

    `exact` takes GELU's normal distribution itself, not its form by tanh (Hendrycks and Gimpel
    2016 have both): published models were trained with the one or the other.
    """
    return jax.nn.gelu(wide, approximate=not exact) if gate is None else jax.nn.silu(gate) * wide


def scaled_normal(scale: float, batch_axis=()):
    """Returns an initialiser of standard deviation scale / sqrt(inputs)."""
    distribution = {"mode": "fan_in", "distribution": "truncated_normal", "batch_axis": batch_axis}
    return nnx.initializers.variance_scaling(scale**2, **distribution)
