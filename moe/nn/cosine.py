"""Defines a classifier by angles: neither features nor classes win by their length."""

import jax
import jax.numpy as jnp
from flax import nnx


class CosineHead(nnx.Module):
    """Maps features [B, D] to scale times their cosines with the classes' weights, [B, V].

    There is no bias. Classes with few examples have short weights and small biases in a linear
    head; here they cannot (Cao et al. 2019, LDAM; Garcin et al. 2022). Computed in float32.
    """

    def __init__(self, dim: int, num_classes: int, *, scale: float, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        kernel = init(rngs.params(), (dim, num_classes), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=("embed", "vocab"))
        self.scale = scale

    def __call__(self, x_BD):
        features, classes = _unit(x_BD, -1), _unit(self.kernel[...], 0)
        return self.scale * jnp.matmul(features, classes, precision="highest")


def _unit(x, axis: int):
    """Returns vectors of length 1, and of 0 where they are 0, with derivatives that are finite."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt((x * x).sum(axis, keepdims=True) + 1e-12)
