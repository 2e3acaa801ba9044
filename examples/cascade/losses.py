r"""Losses of a cascade of rankers that is to keep the truths: of each stage, and of all jointly.

Stage j scores the N items of an impression, x_j, and P_j = mask(x_j, k) is how far each survives
it. A mask is a probability already: it enters a cross-entropy as it is, never through a sigmoid.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from routers import sparse_topk_mask

# Of a probability in a logarithm: a mask may be exactly 0 where it should be 1. A power of two, so
# that p = 1 stays exactly 1.
FLOOR = 2.0**-10

Mask = Callable  # (scores [..., N], k) -> weights


def cross_entropy(survives, truth, negatives: bool = True):
    """Returns the mean cross-entropy of probabilities, exactly 0 where they are the truth.

    Without `negatives` it asks only that the truths survive.
    """

    def log(p):
        return jnp.log((1 - FLOOR) * p + FLOOR)

    return -jnp.where(truth, log(survives), log(1 - survives) if negatives else 0).mean()


def joint_topk_loss(
    scores_by_stage: Sequence[jax.Array],
    truth,
    k: int | Sequence[int],
    mask: Mask,
    log_weights,
    negatives: bool = True,
):
    r"""Returns the loss of DFTopK and LCRON, for any mask.

    \sum_j (BCE(P_j, t) / (2 w_j^2) + log w_j) + BCE(\prod_j P_j, t),    P_j = mask(x_j, k_j),

    where w_j are learned (Kendall et al. 2018). The product is a lower bound of the probability to
    survive all stages (Wang et al. 2025, LCRON).

    Args:
      scores_by_stage: x_j [..., N].
      truth: t [..., N], True on the items to keep.
      k: how many a mask selects, or so many for each stage. The released code of DFTopK takes
        the number of truths everywhere, so that P = t is possible.
      mask: `(scores, k) -> weights`.
      log_weights: log w_j, one for each stage.
      negatives: False leaves the other items out of BCE. Needed where k is more than the truths,
        since then some of them have to survive.
    """
    ks = [k] * len(scores_by_stage) if isinstance(k, int) else k
    survives = [mask(x, k) for x, k in zip(scores_by_stage, ks, strict=True)]
    loss, product = 0.0, 1.0
    for p, log_w in zip(survives, log_weights, strict=True):
        # A sigmoid's weights, and roundings, may leave a product slightly outside of [0, 1].
        loss += cross_entropy(p, truth, negatives) * jnp.exp(-2 * log_w) / 2 + log_w
        product = product * p
    return loss + cross_entropy(product, truth, negatives)


def stage_bce(scores, truth):
    """Returns the mean cross-entropy of each item alone: the scores are log-odds."""
    return optax.sigmoid_binary_cross_entropy(scores, truth.astype(scores.dtype)).mean()


def lambda_loss(scores, truth):
    r"""Returns the mean NDCG-Loss2 over rows (Wang et al. 2018, LambdaLoss), of binary gains.

    \sum_{t_i > t_j} |1/D(|r_i - r_j|) - 1/D(|r_i - r_j| + 1)| / maxDCG * log2(1 + exp(x_j - x_i)),

    with r the ranks, from 1, and D(r) = log2(1 + r).
    """
    count = scores.shape[-1]
    order = jnp.argsort(-jax.lax.stop_gradient(scores), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    apart = jnp.abs(rank[..., :, None] - rank[..., None, :])
    step = 1 / jnp.log2(1 + jnp.maximum(apart, 1)) - 1 / jnp.log2(2 + jnp.maximum(apart, 1))
    pair = truth[..., :, None] & ~truth[..., None, :]
    best = jnp.cumsum(1 / jnp.log2(2 + jnp.arange(count)))
    ideal = best[jnp.maximum(truth.sum(-1) - 1, 0)]
    gap = scores[..., :, None] - scores[..., None, :]
    cost = jnp.where(pair, step * jax.nn.softplus(-gap) / jnp.log(2.0), 0)
    return (cost.sum((-2, -1)) / ideal).mean()


def fenchel_young_loss(scores, truth, strength):
    r"""Returns the mean Fenchel-Young loss of the sparse mask with p = 2, over rows.

    F(x) - <x, t> + (lam/2) |t|^2,    F(x) = max_y <x, y> - (lam/2) |y|^2 over the polytope,

    whose gradient is mask(x) - t: no mistake is without one, though the mask has exact zeros. It
    is 0 exactly where the mask is t (Blondel et al. 2020). Every row has as many truths.
    """
    target = truth.astype(scores.dtype)
    mask = jax.lax.stop_gradient(sparse_topk_mask(scores, target.sum(-1), strength=strength))
    value = (scores * (mask - target)).sum(-1)
    return (value + strength / 2 * ((target**2).sum(-1) - (mask**2).sum(-1))).mean()
