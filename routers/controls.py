"""Defines routers that learn nothing, the controls of every comparison: by hash and at random."""

from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from routers.routing import Router, RouterState, Routing, masked
from routers.selection import ranks


class Hash(Router):
    """Sends each token to K experts that are a fixed function of its id, with weights 1/K.

    Roller et al. 2021, "Hash Layers" (arXiv 2106.04426). A patch of an image has no id: its place
    takes it. Each layer has a function of its own.

    Settings:
      k: experts per token, whole.
    """

    causal: ClassVar[bool] = True
    reads_tokens: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity: int,
        *,
        k: Annotated[int, "[1, 1e5]"] = 2,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_experts, k=k, rngs=rngs)
        del self.kernel
        self.salt = RouterState(jax.random.bits(rngs.params(), dtype=jnp.uint32))

    def __call__(self, x_GTD, *, mask=None, key=None, tokens) -> Routing:
        return self._routing(self._draw(tokens.ids), mask)

    def _draw(self, number_GT, salt=0):
        """Returns integers [G, T, E] that look random, a function of each number and the layer."""
        expert = jnp.arange(self.num_experts, dtype=jnp.uint32)
        bits = _mix(number_GT.astype(jnp.uint32) ^ self.salt[...] ^ jnp.uint32(salt))
        return _mix(bits[..., None] + _mix(expert)[None, None])

    def _routing(self, bits_GTE, mask) -> Routing:
        score = (bits_GTE >> 8).astype(jnp.float32)  # what a float holds exactly
        chosen = masked(ranks(score, self.k) < self.k, mask)
        return Routing(
            weights=chosen.astype(jnp.float32) / self.k,
            rows=chosen.shape[1] * self.k,
            statistics={},
        )


class Random(Hash):
    """Sends each token to K experts drawn at random, with weights 1/K.

    In training each step draws anew; in evaluation the draw is a function of the token's id and
    position, so that a model computes one thing.

    Settings:
      k: experts per token, whole.
    """

    causal: ClassVar[bool] = True

    def __call__(self, x_GTD, *, mask=None, key=None, tokens) -> Routing:
        if key is not None:
            shape = (*x_GTD.shape[:2], self.num_experts)
            return self._routing(jax.random.bits(key, shape, jnp.uint32), mask)
        place = _mix(tokens.positions.astype(jnp.uint32))
        return self._routing(self._draw(tokens.ids.astype(jnp.uint32) ^ place), mask)


def _mix(bits):
    """Returns well-mixed 32-bit integers, one for one (the finaliser of MurmurHash3)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
