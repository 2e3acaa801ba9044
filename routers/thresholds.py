"""Defines expert choice without a look ahead: experts take the tokens above a remembered threshold.

Expert choice compares a token with later ones. A threshold of earlier steps compares it with none:
each expert takes K/E of the tokens, on average, and a text may be read from left to right.
"""

from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from routers import histogram, losses
from routers.annealing import Annealed
from routers.routing import Router, RouterState, Routing, masked

LOW, HIGH = -16.0, 16.0  # of logits, in the counts


class ExpertThreshold(Router):
    """Sends a token to each expert e whose score for it is at least c_e; weights are the scores.

    Scores are sigmoid(logits); c_e is the running mean of the k-th largest score of each batch, for
    k = K/E of its tokens. "Expert Threshold" routing (arXiv 2603.11535). Its expert-choice warm-up,
    which looks ahead, is left out: thresholds start from one batch that no gradient sees.

    Settings:
      k: experts per token, on average.
      decay: of the running mean.
      z: weight of the z-loss.
    """

    causal: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity: int,
        *,
        k: Annotated[float, "(0, 1e5]"] = 2.0,
        decay: Annotated[float, "[0, 0.999999]"] = 0.9,
        z: Annotated[float, "[0, 1e3]"] = 0.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_experts, k=k, rngs=rngs)
        self.decay, self.z = decay, z
        self.threshold = RouterState(jnp.zeros(num_experts))  # in logits

    def __call__(self, x_GTD, *, mask=None, key=None) -> Routing:
        logits = self.logits(x_GTD)
        chosen = masked(logits >= self.threshold[...][None, None], mask)
        return Routing(
            weights=jnp.where(chosen, jax.nn.sigmoid(logits), 0),
            aux_loss=self.z * losses.z_loss(logits, mask),
            statistics={"scores": histogram.count(logits, LOW, HIGH, mask)},
        )

    def advance(self, state, statistics, progress):
        old, new = state["threshold"], self._of_batch(state, statistics)
        return state | {"threshold": self.decay * old + (1 - self.decay) * new}

    def calibrate(self, state, statistics):
        return state | {"threshold": self._of_batch(state, statistics)}

    def _of_batch(self, state, statistics):
        """Returns the thresholds that give each expert K/E of the batch; of no tokens, the old."""
        counts = statistics["scores"]
        tokens = counts.sum(-1).mean()
        share = self.k / len(counts) * tokens
        return jnp.where(tokens > 0, self._solve(state, counts, share), state["threshold"])

    def _solve(self, state, counts, share):
        return histogram.kth_largest(counts, share, LOW, HIGH)


class SparseThreshold(ExpertThreshold, Annealed):
    """Weighs by the paper's relaxed mask at a remembered threshold: sparse expert choice, causal.

    m_te = clip((logit_te - theta_e)/lam, 0, 1)^(q-1), weights m * softmax(logits): the mask of
    Sander et al. 2023 along the tokens (`sparse_expert_choice`) with the running mean of the roots
    theta_e of earlier batches, sum_t m_te = (K/E) tokens, in place of the root of its own group.
    Exactly sparse, differentiable in which tokens are taken, balanced by its memory.

    Settings:
      k: sum of a token's mask, on average. Where scores are closer than `strength` a token has more
        experts than that, some in part.
      by_number: True holds the number of a token's experts at k instead, so that the work is that
        of other routers with this k; theta_e then is the k-th largest score, as `expert_threshold`.
      p, strength: of the operator; final_strength as for `sparse_topk`.
      decay: of the running mean.
      z: weight of the z-loss.
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
        strength: Annotated[float, "[1e-6, 1e6]"] = 0.5,
        final_strength: Annotated[float, "0 or [1e-6, 1e6]"] = 0.0,
        by_number: bool = False,
        decay: Annotated[float, "[0, 0.999999]"] = 0.9,
        z: Annotated[float, "[0, 1e3]"] = 0.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_experts, capacity, k=k, decay=decay, z=z, rngs=rngs)
        self.p, self.by_number = p, by_number
        self.set_strength(strength, final_strength)

    def __call__(self, x_GTD, *, mask=None, key=None) -> Routing:
        logits = self.logits(x_GTD)
        select = self._mask(logits - self.threshold[...][None, None], self.strength)
        select = masked(select, mask)
        return Routing(
            weights=select * jax.nn.softmax(logits, axis=-1),
            aux_loss=self.z * losses.z_loss(logits, mask),
            statistics={"scores": histogram.count(logits, LOW, HIGH, mask)},
        )

    def _mask(self, above, strength):
        """Returns clip(above/strength, 0, 1)^(1/(p-1)), with a finite derivative everywhere."""
        within = (above > 0) & (above < strength)
        inner = jnp.where(within, above / strength, 0.5) ** (1 / (self.p - 1))
        return jnp.where(within, inner, (above > 0).astype(above.dtype))

    def advance(self, state, statistics, progress):
        return Annealed.advance(self, super().advance(state, statistics, progress), None, progress)

    def _solve(self, state, counts, share):
        if self.by_number:
            return super()._solve(state, counts, share)
        strength = state["now"] if self.last else self.first
        mask = lambda above: self._mask(above, strength)  # noqa: E731
        return histogram.threshold(counts, share, LOW, HIGH, mask)
