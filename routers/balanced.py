"""Defines the routers that balance by a bias on the choice alone: it learns from the load, without
a gradient and without an auxiliary loss, and weighs nothing."""

from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from routers import histogram, losses
from routers.routing import Router, RouterState, Routing, masked
from routers.selection import first_choices_first, ranks

LOW, HIGH = -2.0, 2.0  # of a margin: scores are in (0, 1), biases have the mean 0


class LossFree(Router):
    """Chooses the K experts of the highest sigmoid(logit) + bias; weighs by the sigmoid alone.

    After each step bias_e += rate * sign(mean load - load of e). Wang et al. 2024, "Auxiliary-Loss-
    Free Load Balancing" (arXiv 2408.15664), section 2; the gate of DeepSeek-V3 (arXiv 2412.19437).

    Settings:
      k: experts per token, whole.
      rate: of the bias, in units of the score, a step.
      renormalise: True divides a token's K weights by their sum.
      scale: factor of the weights (DeepSeek-V3: 2.5).
      balance, z: weights of auxiliary losses, beside the bias; the published router has none.
      null_experts: as for `topk`.
    """

    causal: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity: int,
        *,
        k: Annotated[int, "[1, 1e5]"] = 2,
        rate: Annotated[float, "[0, 1]"] = 1e-3,
        renormalise: bool = True,
        scale: Annotated[float, "[1e-3, 1e3]"] = 1.0,
        balance: Annotated[float, "[0, 1e3]"] = 0.0,
        z: Annotated[float, "[0, 1e3]"] = 0.0,
        null_experts: Annotated[int, "[0, 1e5]"] = 0,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_experts, k=k, null_experts=null_experts, rngs=rngs)
        self.rate, self.renormalise, self.scale = rate, renormalise, scale
        self.balance, self.z = balance, z
        self.bias = RouterState(jnp.zeros(num_experts + null_experts))

    def __call__(self, x_GTD, *, mask=None, key=None) -> Routing:
        logits = self.logits(x_GTD)
        scores = jax.nn.sigmoid(logits)
        biased = jax.lax.stop_gradient(scores) + self.bias[...][None, None]
        rank = ranks(biased, self.k)
        chosen = masked(rank < self.k, mask)
        weights = jnp.where(chosen, scores, 0)
        if self.renormalise:
            total = weights.sum(-1, keepdims=True)
            weights /= jnp.where(total > 0, total, 1)
        shares = scores / scores.sum(-1, keepdims=True)
        return Routing(
            weights=self.real(self.scale * weights),
            priority=self.real(first_choices_first(rank)),
            rows=x_GTD.shape[1] * self.k,
            aux_loss=self.balance * losses.load_balance(shares, chosen, mask)
            + self.z * losses.z_loss(logits, mask),
            statistics=self.observe(scores, biased, chosen, mask),
        )

    def observe(self, scores_GTE, biased_GTE, chosen_GTE, mask):
        """Returns the sums from which the bias learns."""
        return {"load": chosen_GTE.sum((0, 1)).astype(jnp.float32)}

    def advance(self, state, statistics, progress):
        load = statistics["load"]
        return state | {"bias": state["bias"] + self.rate * jnp.sign(load.mean() - load)}


class Quantile(LossFree):
    """Chooses as `loss_free` does, with the bias that would have balanced the last batch.

    alpha_t is the (k+1)-th largest score + bias of a token; expert e would take its fair share k/E
    of the tokens with the bias at the k/E-quantile of alpha_t - score_te, which becomes its bias,
    less the mean over experts. Su 2026, quantile balancing (kexue.fm/archives/11619).

    The quantile is read from counts (`routers.histogram`), exact to a few thousandths.

    Settings:
      decay: of the average of a new bias with the old one; 0 takes the new.
      Others as for `loss_free`.
    """

    causal: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity: int,
        *,
        k: Annotated[int, "[1, 1e5]"] = 2,
        decay: Annotated[float, "[0, 0.999999]"] = 0.0,
        renormalise: bool = True,
        scale: Annotated[float, "[1e-3, 1e3]"] = 1.0,
        balance: Annotated[float, "[0, 1e3]"] = 0.0,
        z: Annotated[float, "[0, 1e3]"] = 0.0,
        null_experts: Annotated[int, "[0, 1e5]"] = 0,
        rngs: nnx.Rngs,
    ):
        same = {"renormalise": renormalise, "scale": scale, "balance": balance, "z": z}
        same |= {"null_experts": null_experts, "k": k, "rngs": rngs}
        super().__init__(dim, num_experts, capacity, rate=0.0, **same)
        self.decay = decay

    def observe(self, scores_GTE, biased_GTE, chosen_GTE, mask):
        experts = scores_GTE.shape[-1]
        if self.k >= experts:
            alpha = jnp.full((*scores_GTE.shape[:2], 1), HIGH)  # every token takes every expert
        else:
            next_best = ranks(biased_GTE, self.k + 1) == self.k
            alpha = jnp.where(next_best, biased_GTE, 0).sum(-1, keepdims=True)
        return {"shortfalls": histogram.count(scores_GTE - alpha, LOW, HIGH, mask)}

    def advance(self, state, statistics, progress):
        new = self._balancing(state, statistics)
        return state | {"bias": self.decay * state["bias"] + (1 - self.decay) * new}

    def calibrate(self, state, statistics):
        return state | {"bias": self._balancing(state, statistics)}

    def _balancing(self, state, statistics):
        """Returns the bias that would have given each expert its share; of no tokens, the old."""
        counts = statistics["shortfalls"]
        tokens = counts.sum(-1).mean()
        bias = -histogram.kth_largest(counts, self.k / len(counts) * tokens, LOW, HIGH)
        return jnp.where(tokens > 0, bias - bias.mean(), state["bias"])
