"""Defines routers whose layers share one budget of experts per token, and learn how to spend it."""

from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from routers import losses
from routers.annealing import Annealed
from routers.routing import Routing, masked
from routers.soft_masks import lapsum_topk_mask
from routers.topk import sparse_topk_mask


class SparseBudget(Annealed):
    """Sends each token to the support of its relaxed top-k mask, with a k that each layer learns.

    Weights m * softmax(logits) as `sparse_topk`, where layer l has k_l = least + c exp(a_l), at
    most E, with its parameter a_l and the c that makes the mean of k_l over the layers K: one
    budget for all, spent where it lowers the loss most. dm/dk is a closed form
    (`sparse_topk_mask`), so k_l needs no estimator. While all a_l are equal this is `sparse_topk`.
    The idea of a learned budget is SoftMoE's (Zasada et al. 2026, arXiv 2606.17952); this mask has
    no truncation.

    Settings:
      k: K, the mean of k_l over the layers, real.
      least: the least k_l.
      p, strength, final_strength, importance, balance, z: as for `sparse_topk`.
    """

    causal: ClassVar[bool] = True
    offers: ClassVar[str] = "spending"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity: int,
        *,
        k: Annotated[float, "(0, 1e5]"] = 2.0,
        least: Annotated[float, "(0, 1e5]"] = 0.5,
        p: Annotated[float, "(1, 100]"] = 2.0,
        strength: Annotated[float, "[1e-6, 1e6]"] = 1.0,
        final_strength: Annotated[float, "0 or [1e-6, 1e6]"] = 0.0,
        importance: Annotated[float, "[0, 1e3]"] = 0.01,
        balance: Annotated[float, "[0, 1e3]"] = 0.0,
        z: Annotated[float, "[0, 1e3]"] = 0.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_experts, k=k, rngs=rngs)
        self.least, self.p = min(least, k), p
        self.set_strength(strength, final_strength)
        self.importance, self.balance, self.z = importance, balance, z
        self.spending = nnx.Param(jnp.zeros(()))

    def share(self, offers_L):
        """Returns k_l of each layer: their mean is K, each from `least` to E."""
        layers, most = len(offers_L), self.num_experts - self.least

        def spend(full):
            """Returns what each layer gets beyond the least, where `full` ones get the most."""
            rest = layers * (self.k - self.least) - full.sum() * most
            return jnp.where(full, most, rest * jax.nn.softmax(offers_L, where=~full))

        full = jnp.zeros(layers, bool)
        for _ in range(layers):  # each round fills at least one more, or none is left to fill
            full |= spend(full) > most * (1 + 1e-6)  # rounding fills none
        return jnp.minimum(self.least + spend(full), self.num_experts)

    def __call__(self, x_GTD, *, mask=None, key=None, share=None) -> Routing:
        logits = self.logits(x_GTD)
        probs = jax.nn.softmax(logits, axis=-1)
        k = self.share(self.spending[...][None])[0] if share is None else share
        select = masked(self.select(logits, k), mask)
        return Routing(
            weights=select * probs,
            aux_loss=self.importance * losses.importance(probs, mask)
            + self.balance * losses.load_balance(probs, select, mask)
            + self.z * losses.z_loss(logits, mask),
            statistics=self.observe(),
        )

    def select(self, logits_GTE, k):
        """Returns the mask [G, T, E] that sums to k."""
        return sparse_topk_mask(logits_GTE, k, p=self.p, strength=self.strength)


class LapsumBudget(SparseBudget):
    """Sends each token to the experts of its truncated LapSum mask; each layer learns its k.

    As SoftMoE (Zasada et al. 2026, arXiv 2606.17952) says in its abstract: the mask is positive
    everywhere, and what is below `cutoff` is cut off. The truncated mask sums to less than k_l. How
    the authors cut and normalise is not in the abstract; here nothing is divided.

    Settings:
      cutoff: entries of the mask below it become 0.
      strength: width of the Laplace distribution.
      Others as for `sparse_budget`.
    """

    causal: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity: int,
        *,
        k: Annotated[float, "(0, 1e5]"] = 2.0,
        least: Annotated[float, "(0, 1e5]"] = 0.5,
        cutoff: Annotated[float, "[0, 0.5)"] = 0.1,
        strength: Annotated[float, "[1e-6, 1e6]"] = 0.3,
        final_strength: Annotated[float, "0 or [1e-6, 1e6]"] = 0.0,
        importance: Annotated[float, "[0, 1e3]"] = 0.01,
        balance: Annotated[float, "[0, 1e3]"] = 0.0,
        z: Annotated[float, "[0, 1e3]"] = 0.0,
        rngs: nnx.Rngs,
    ):
        same = {"strength": strength, "final_strength": final_strength, "rngs": rngs}
        same |= {"importance": importance, "balance": balance, "z": z, "k": k, "least": least}
        super().__init__(dim, num_experts, capacity, **same)
        self.cutoff = cutoff

    def select(self, logits_GTE, k):
        mask = lapsum_topk_mask(logits_GTE, k, strength=self.strength)
        return jnp.where(mask >= self.cutoff, mask, 0)
