"""Defines the routers in which each expert chooses its tokens: hard top-k and the relaxed one."""

from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from routers import losses
from routers.annealing import Annealed
from routers.routing import Router, Routing, masked
from routers.selection import largest
from routers.topk import sparse_topk_mask


class ExpertChoice(Router):
    """Gives each expert the C tokens of its group that score it highest: S = softmax over experts,
    top-C over tokens, weights S (Zhou et al. 2022, "Mixture-of-Experts with Expert Choice
    Routing"). Balanced by construction; a token may get any number of experts.

    Settings:
      k: experts per token on average; the layer derives the capacity C from it.
      z: weight of the z-loss.
    """

    causal: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity: int,
        *,
        k: Annotated[float, "(0, 1e5]"] = 2.0,
        z: Annotated[float, "[0, 1e3]"] = 0.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_experts, k=k, rngs=rngs)
        self.capacity, self.z = capacity, z

    def __call__(self, x_GTD, *, mask=None, key=None) -> Routing:
        logits = self.logits(x_GTD)
        probs = masked(jax.nn.softmax(logits, axis=-1), mask)
        chosen = largest(jax.lax.stop_gradient(probs).swapaxes(1, 2), self.capacity).swapaxes(1, 2)
        return Routing(
            weights=jnp.where(chosen, probs, 0),
            rows=self.capacity * logits.shape[-1],
            aux_loss=self.z * losses.z_loss(logits, mask),
        )


class SparseExpertChoice(Annealed):
    """Lets experts choose through the relaxed top-k mask: the router of Sander et al. 2023.

    For each expert, m = `sparse_topk_mask`(logits, C) along the *tokens* of the group; weights
    m * softmax(logits). Exactly sparse, and differentiable in which tokens are taken. Where scores
    are closer than `strength` the support has more than C tokens: the dispatch keeps the C
    heaviest and reports the mass of the others.

    Settings:
      k: experts per token on average; the layer derives the capacity C from it.
      p, strength: of the operator.
      final_strength: to which the strength goes over the run; 0: it stays.
      z: weight of the z-loss.
    """

    causal: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity: int,
        *,
        k: Annotated[float, "(0, 1e5]"] = 2.0,
        p: Annotated[float, "(1, 100]"] = 2.0,
        strength: Annotated[float, "[1e-6, 1e6]"] = 0.5,
        final_strength: Annotated[float, "0 or [1e-6, 1e6]"] = 0.0,
        z: Annotated[float, "[0, 1e3]"] = 0.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_experts, k=k, rngs=rngs)
        self.capacity, self.p, self.z = capacity, p, z
        self.set_strength(strength, final_strength)

    def __call__(self, x_GTD, *, mask=None, key=None) -> Routing:
        logits = self.logits(x_GTD)
        scores = logits if mask is None else jnp.where(mask[..., None], logits, -jnp.inf)
        select = sparse_topk_mask(scores, self.capacity, p=self.p, strength=self.strength, axis=1)
        return Routing(
            weights=masked(select * jax.nn.softmax(logits, axis=-1), mask),
            aux_loss=self.z * losses.z_loss(logits, mask),
            statistics=self.observe(),
        )
