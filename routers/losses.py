"""Auxiliary losses of routers: values of probabilities [G, T, E], none is stored away.

`mask` [G, T] is False on padding tokens, which do not count; None means that all are real. Every
loss is computed over all groups together, as over one large batch.
"""

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from routers.selection import ranks


def load_balance(probs_GTE, chosen_GTE, mask=None):
    """E * sum_e f_e P_e, with f_e the share of choices that fell on e and P_e its mean probability.

    1 when balanced. The gradient flows through P only, f being a count. Switch Transformers
    (Fedus et al. 2021), eq. 4-6; GShard (Lepikhin et al. 2020), algorithm 1 (which squares the
    same sums per group); with K > 1 choices f is divided by K, so that 1 stays the optimum.
    """
    chosen = _mean_over_tokens(chosen_GTE.astype(probs_GTE.dtype), mask)
    share = jax.lax.stop_gradient(chosen / jnp.maximum(chosen.sum(), 1e-9))
    return probs_GTE.shape[-1] * (share * _mean_over_tokens(probs_GTE, mask)).sum()


def importance(probs_GTE, mask=None):
    """Squared coefficient of variation of sum_t p_te (Shazeer et al. 2017, eq. 6-7)."""
    return _squared_cv(_mean_over_tokens(probs_GTE, mask))


def load(clean_GTE, noisy_GTE, k: int, noise, mask=None):
    """Squared coefficient of variation of the expected number of tokens per expert.

    The chance that expert e is among the k best if its noise alone is drawn again:
    Phi((clean_e - t_e)/noise) with t_e the k-th best noisy score of the other experts. Shazeer et
    al. 2017, appendix A, eq. 8-10; `noise` is the standard deviation of the Gaussian noise.
    """
    if k >= clean_GTE.shape[-1]:
        return jnp.zeros((), clean_GTE.dtype)  # every expert is always chosen
    rank = ranks(jax.lax.stop_gradient(noisy_GTE), k + 1)
    last, next_ = (
        jnp.where(rank == place, noisy_GTE, 0).sum(-1, keepdims=True) for place in (k - 1, k)
    )
    threshold = jnp.where(rank < k, next_, last)
    return _squared_cv(_mean_over_tokens(norm.cdf((clean_GTE - threshold) / noise), mask))


def z_loss(logits_GTE, mask=None):
    """Mean of logsumexp(logits)^2, which keeps scores small (ST-MoE, Zoph et al. 2022, eq. 5)."""
    z = jax.nn.logsumexp(logits_GTE, axis=-1, keepdims=True)
    return _mean_over_tokens(z**2, mask).sum()


def _mean_over_tokens(x_GTE, mask):
    """Mean over real tokens, [E]."""
    if mask is None:
        return x_GTE.mean((0, 1))
    weight = mask[..., None].astype(x_GTE.dtype)
    return (x_GTE * weight).sum((0, 1)) / jnp.maximum(weight.sum(), 1)


def _squared_cv(x_E):
    return x_E.var() / jnp.maximum(x_E.mean() ** 2, 1e-9)
