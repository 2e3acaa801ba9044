"""Defines Soft MoE (Puigcerver et al. 2023): slots read mixtures of all tokens, none is dropped."""

from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from routers.routing import Router, Routing


class SoftMoE(Router):
    """Makes slots weighted means of tokens, and tokens weighted means of slots.

    With unit-length tokens x and slot parameters phi (the paper's normalisation, so that the
    scores do not grow with the width), logits = scale * x phi; `mix` is their softmax
    over the tokens and `weights` their softmax over all slots of all experts.

    Settings:
      k: slots per token; the layer derives the number of slots per expert from it.
    """

    causal: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity: int,
        *,
        k: Annotated[float, "(0, 1e5]"] = 2.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_experts, k=k, rngs=rngs, slots=capacity)
        self.num_experts = num_experts
        self.scale = nnx.Param(jnp.ones((), jnp.float32))

    def logits(self, x_GTD):
        x, phi = x_GTD.astype(jnp.float32), self.kernel[...]
        tokens, slots = self.scale[...] * _unit(x, axis=-1), _unit(phi, axis=0)
        return jnp.matmul(tokens, slots, precision="highest")

    def __call__(self, x_GTD, *, mask=None, key=None) -> Routing:
        logits = self.logits(x_GTD)
        weights = jax.nn.softmax(logits, axis=-1)
        if mask is not None:
            real = mask[..., None]
            weights = jnp.where(real, weights, 0)
            logits = jnp.where(
                real, logits, jnp.finfo(logits.dtype).min
            )  # a row may be all padding
        mix = jax.nn.softmax(logits, axis=1)
        slots = (*x_GTD.shape[:2], self.num_experts, -1)
        return Routing(weights=weights.reshape(slots), mix=mix.reshape(slots))


def _unit(x, axis):
    """Returns x / ||x||, with gradient 0 where x is 0."""
    return x * jax.lax.rsqrt((x**2).sum(axis, keepdims=True) + 1e-12)
