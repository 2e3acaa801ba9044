"""Defines the routers in which each token chooses its experts: hard (softmax top-k) and relaxed."""

import functools
import math
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from routers import losses
from routers.annealing import Annealed
from routers.routing import Router, Routing, masked
from routers.selection import best_groups, first_choices_first, ranks
from routers.topk import sparse_topk_mask


class TopK(Router):
    """Sends each token to the K experts with the highest scores, weighted by their softmax.

    Noisy top-k gating of Shazeer et al. 2017 in the form of V-MoE (Riquelme et al. 2021):
    weights softmax(logits + noise), noise N(0, (noise/E)^2) in training only.

    Settings:
      k: experts per token, whole.
      renormalise: True divides a token's K weights by their sum, which is the softmax over the K
        alone (Mixtral, Qwen3); False keeps each expert's share of the softmax over all E (OLMoE,
        V-MoE).
      scale: factor of the weights.
      groups, best_groups: experts stand in so many groups of neighbours, and a token chooses among
        the experts of its best groups (`selection.best_groups`): in a mesh, of fewer devices.
      null_experts: so many more choices that cost nothing and return 0, by which tokens get fewer
        than K real experts (MoE++, arXiv 2410.07348; arXiv 2601.15370).
      noise: standard deviation of the noise, in units of 1/E.
      batch_priority: True fills an expert's slots by weight (V-MoE's batch prioritized routing);
        False by order: all first choices in the order of the tokens, then all second choices.
        Either way a later token may take an earlier one's slot: a causal model's layers ignore both
        and fill slots in order of position (`moe.nn.dispatch`); True is an error there.
      importance, load, balance, z, simbal: weights of the auxiliary losses (`routers.losses`;
        `simbal` is `orthogonality`); `load` needs noise.
      vmoe_losses: True computes them as published with V-MoE: each group's own, averaged;
        `importance` of the scores without noise; `load` with the threshold over all experts.
    """

    causal: ClassVar[bool] = True  # but for a setting

    @classmethod
    def why_not_causal(cls, settings):
        if settings.get("batch_priority"):
            return "batch_priority=True lets later tokens take slots; batch_priority=False does not"
        return super().why_not_causal(settings)

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity: int,
        *,
        k: Annotated[int, "[1, 1e5]"] = 2,
        renormalise: bool = False,
        noise: Annotated[float, "0 or [1e-6, 1e3]"] = 1.0,
        batch_priority: bool = False,
        importance: Annotated[float, "[0, 1e3]"] = 0.005,
        load: Annotated[float, "[0, 1e3]"] = 0.005,
        balance: Annotated[float, "[0, 1e3]"] = 0.0,
        z: Annotated[float, "[0, 1e3]"] = 0.0,
        vmoe_losses: bool = False,
        scale: Annotated[float, "[1e-3, 1e3]"] = 1.0,
        groups: Annotated[int, "[1, 1e5]"] = 1,
        best_groups: Annotated[int, "[1, 1e5]"] = 1,
        null_experts: Annotated[int, "[0, 1e5]"] = 0,
        simbal: Annotated[float, "[0, 1e3]"] = 0.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_experts, k=k, null_experts=null_experts, rngs=rngs)
        self.groups, self.best_groups = _checked_groups(num_experts, k, groups, best_groups)
        if groups > 1 and null_experts:
            raise ValueError("null_experts stand in no group; expected groups=1 or null_experts=0")
        self.renormalise, self.noise = renormalise, noise / num_experts
        self.scale, self.simbal = scale, simbal
        self.batch_priority = batch_priority
        self.importance, self.load, self.balance, self.z = importance, load, balance, z
        self.vmoe_losses = vmoe_losses

    def __call__(self, x_GTD, *, mask=None, key=None) -> Routing:
        clean = self.logits(x_GTD)
        noisy, has_noise = clean, key is not None and self.noise > 0
        if has_noise:
            noisy += self.noise * jax.random.normal(key, clean.shape)
        probs = jax.nn.softmax(noisy, axis=-1)
        scores = jax.lax.stop_gradient(noisy)
        if self.best_groups < self.groups:
            among = best_groups(jax.lax.stop_gradient(probs), self.groups, self.best_groups)
            scores = jnp.where(among, scores, jnp.finfo(scores.dtype).min)
        rank = ranks(scores, self.k)  # 0 is the token's first choice
        chosen = masked(rank < self.k, mask)
        aux_loss = functools.partial(self._aux_loss, has_noise)
        if self.vmoe_losses:
            aux_loss = losses.by_group(aux_loss)
        weights = jnp.where(chosen, probs, 0)
        if self.renormalise:
            total = weights.sum(-1, keepdims=True)
            weights /= jnp.where(total > 0, total, 1)  # padding has none
        return Routing(
            weights=self.real(weights if self.scale == 1 else self.scale * weights),
            priority=None if self.batch_priority else self.real(first_choices_first(rank)),
            rows=x_GTD.shape[1] * self.k,
            aux_loss=aux_loss(clean, noisy, chosen, mask=mask) + self._simbal_loss(),
            margin=_margin(scores, rank, self.k),
        )

    def _simbal_loss(self):
        return self.simbal * losses.orthogonality(self.kernel[...]) if self.simbal else 0.0

    def _aux_loss(self, has_noise: bool, clean, noisy, chosen, *, mask):
        """Returns the weighted sum of the auxiliary losses."""
        probs = jax.nn.softmax(noisy, axis=-1)
        important = jax.nn.softmax(clean, axis=-1) if self.vmoe_losses else probs
        aux = (
            self.importance * losses.importance(important, mask)
            + self.balance * losses.load_balance(probs, chosen, mask)
            + self.z * losses.z_loss(clean, mask)
        )
        if has_noise:
            load = functools.partial(losses.load, of_others=not self.vmoe_losses)
            aux += self.load * load(clean, noisy, self.k, self.noise, mask)
        return aux


class SparseTopK(Annealed):
    """Sends each token to the experts in the support of its relaxed top-k mask.

    Weights m * softmax(logits), with m = `sparse_topk_mask`(logits, K) along the experts: exactly
    sparse, and differentiable also in *which* experts are chosen (Sander et al. 2023). A token may
    have more than K experts where its scores are closer than `strength`.

    Settings:
      k: sum of a token's mask, real.
      p, strength: of the operator.
      final_strength: to which the strength goes over the run; 0: it stays.
      null_experts: as for `topk`.
      importance, balance, z: weights of the auxiliary losses; `balance` counts the relaxed mask.
    """

    causal: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity: int,
        *,
        k: Annotated[float, "(0, 1e5]"] = 2.0,
        p: Annotated[float, "(1, 100]"] = 2.0,
        strength: Annotated[float, "[1e-6, 1e6]"] = 1.0,
        final_strength: Annotated[float, "0 or [1e-6, 1e6]"] = 0.0,
        null_experts: Annotated[int, "[0, 1e5]"] = 0,
        importance: Annotated[float, "[0, 1e3]"] = 0.01,
        balance: Annotated[float, "[0, 1e3]"] = 0.0,
        z: Annotated[float, "[0, 1e3]"] = 0.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_experts, k=k, null_experts=null_experts, rngs=rngs)
        self.p = p
        self.set_strength(strength, final_strength)
        self.importance, self.balance, self.z = importance, balance, z

    def __call__(self, x_GTD, *, mask=None, key=None) -> Routing:
        logits = self.logits(x_GTD)
        probs = jax.nn.softmax(logits, axis=-1)
        select = masked(sparse_topk_mask(logits, self.k, p=self.p, strength=self.strength), mask)
        return Routing(
            weights=self.real(select * probs),
            aux_loss=self.importance * losses.importance(probs, mask)
            + self.balance * losses.load_balance(probs, select, mask)
            + self.z * losses.z_loss(logits, mask),
            margin=self._margin(logits),
            statistics=self.observe(),
        )

    def _margin(self, logits):
        """Returns by how much the k-th score is above the next, k rounded up."""
        k = math.ceil(self.k)
        return _margin(logits, ranks(jax.lax.stop_gradient(logits), k), k)


def _checked_groups(num_experts: int, k: int, groups: int, best: int) -> tuple[int, int]:
    if num_experts % groups or best > groups or k > best * (num_experts // groups):
        raise ValueError(
            f"groups={groups} must divide num_experts={num_experts}, and best_groups={best} of "
            f"them have at least k={k} experts"
        )
    if groups > 1 and num_experts // groups < 2:
        raise ValueError(f"groups={groups} of num_experts={num_experts} have fewer than 2 each")
    return groups, best


def _margin(scores_GTE, rank_GTE, k: int):
    """Returns the k-th score less the next one, [G, T]; None where there is no next one."""
    if k >= scores_GTE.shape[-1]:
        return None
    scores_GTE, chosen = jax.lax.stop_gradient(scores_GTE), rank_GTE < k
    kth = jnp.where(chosen, scores_GTE, jnp.inf).min(-1)
    return kth - jnp.where(chosen, -jnp.inf, scores_GTE).max(-1)
