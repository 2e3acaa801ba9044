"""Defines the router that samples exactly K experts of a token, and learns by their marginals."""

from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from routers import losses
from routers.exactly_k import exactly_k_marginals, exactly_k_sample
from routers.routing import Router, Routing, masked
from routers.selection import first_choices_first, ranks


class ExactlyK(Router):
    """Samples K experts of each token in training, and takes the K best in evaluation.

    A set S has the probability of independent coins of log-odds logit/lam, given that K show heads.
    Forward the sample z, backward its mean m, the exact marginals: weights (z - stop(m) + m) *
    softmax(logits). ProbMoE (Zhao et al. 2026) with the estimator of SIMPLE (Ahmed et al. 2023).

    Settings:
      k: experts per token, whole.
      strength: lam; the samples tend to the K best as it falls.
      importance, balance, z: weights of the auxiliary losses.
    """

    causal: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity: int,
        *,
        k: Annotated[int, "[1, 1e5]"] = 2,
        strength: Annotated[float, "[1e-6, 1e6]"] = 1.0,
        importance: Annotated[float, "[0, 1e3]"] = 0.01,
        balance: Annotated[float, "[0, 1e3]"] = 0.0,
        z: Annotated[float, "[0, 1e3]"] = 0.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_experts, k=k, rngs=rngs)
        self.strength = strength
        self.importance, self.balance, self.z = importance, balance, z

    def __call__(self, x_GTD, *, mask=None, key=None) -> Routing:
        logits = self.logits(x_GTD)
        probs = jax.nn.softmax(logits, axis=-1)
        rank = ranks(jax.lax.stop_gradient(logits), self.k)
        chosen = (rank < self.k).astype(probs.dtype)
        select = chosen
        if key is not None:
            marginals = exactly_k_marginals(logits, self.k, strength=self.strength)
            chosen = exactly_k_sample(logits, self.k, key, strength=self.strength)
            # In this order an expert that is not chosen has exactly 0.
            select = (chosen - jax.lax.stop_gradient(marginals)) + marginals
            select = jnp.where(chosen > 0, select, select - jax.lax.stop_gradient(select))
        select, chosen = masked(select, mask), masked(chosen, mask)
        return Routing(
            weights=select * probs,
            priority=first_choices_first(rank),
            rows=x_GTD.shape[1] * self.k,
            aux_loss=self.importance * losses.importance(probs, mask)
            + self.balance * losses.load_balance(probs, chosen, mask)
            + self.z * losses.z_loss(logits, mask),
        )
