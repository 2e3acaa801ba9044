"""Computes the auxiliary losses of routers from scores or probabilities [G, T, E].

`mask` [G, T] is False on padding tokens, which do not count; None means that all are real. Every
loss is computed over all groups together, as over one large batch; `by_group` does otherwise.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from routers.selection import ranks


def load_balance(probs_GTE, chosen_GTE, mask=None):
    """Returns E * sum_e f_e P_e: f_e is e's share of the choices, P_e its mean probability.

    It is 1 when balanced. The gradient flows through P only, f being a count. Switch Transformers
    (Fedus et al. 2021), eq. 4-6; GShard (Lepikhin et al. 2020), algorithm 1 (which squares the
    same sums per group); with K > 1 choices f is divided by K, so that 1 stays the optimum.
    """
    chosen = shares(chosen_GTE.astype(probs_GTE.dtype), mask)
    share = jax.lax.stop_gradient(chosen / jnp.maximum(chosen.sum(), 1e-9))
    return probs_GTE.shape[-1] * (share * shares(probs_GTE, mask)).sum()


def importance(probs_GTE, mask=None):
    """Returns the squared coefficient of variation of sum_t p_te (Shazeer et al. 2017, eq. 6-7)."""
    return _squared_cv(shares(probs_GTE, mask))


def load(clean_GTE, noisy_GTE, k: int, noise, mask=None, *, of_others: bool = True):
    """Returns the squared coefficient of variation of the expected number of tokens per expert.

    The chance that expert e is among the k best if its noise alone is drawn again:
    Phi((clean_e - t_e)/noise) with t_e the k-th best noisy score of the other experts. Shazeer et
    al. 2017, appendix A, eq. 8-10; `noise` is the standard deviation of the Gaussian noise.

    Where `of_others` is False, t is the k-th best noisy score of all experts, as in Riquelme et al.
    2021, appendix A.2: the k chosen ones then have to beat the last of themselves.
    """
    if of_others and k >= clean_GTE.shape[-1]:
        return jnp.zeros((), jnp.result_type(clean_GTE))  # every expert is always chosen
    rank = ranks(jax.lax.stop_gradient(noisy_GTE), k + of_others)

    def score(place):
        return jnp.where(rank == place, noisy_GTE, 0).sum(-1, keepdims=True)

    threshold = jnp.where(rank < k, score(k), score(k - 1)) if of_others else score(k - 1)
    return _squared_cv(shares(norm.cdf((clean_GTE - threshold) / noise), mask))


def z_loss(logits_GTE, mask=None):
    """Returns the mean of logsumexp(logits)^2, to keep scores small (Zoph et al. 2022, eq. 5)."""
    z = jax.nn.logsumexp(logits_GTE, axis=-1, keepdims=True)
    return shares(z**2, mask).sum()


def orthogonality(kernel_DE):
    """Returns the sum of |R^T R - I| over all pairs of experts, for the router's matrix R.

    Similarity-preserving balancing (SimBal, arXiv 2506.14038): it looks at no token.
    """
    gram = jnp.matmul(kernel_DE.T, kernel_DE, precision="highest")
    return jnp.abs(gram - jnp.eye(len(gram))).sum()


def entropy(probs_GTE, mask=None):
    """Returns the mean entropy of a token's probabilities, in nats."""
    logs = jnp.log(jnp.where(probs_GTE > 0, probs_GTE, 1))
    return -shares(probs_GTE * logs, mask).sum()


def by_group(loss: Callable) -> Callable:
    """Returns `loss`, a function of arrays [G, T, ...] and a mask, as the mean of each group's own.

    Groups of padding alone do not count. V-MoE computes its losses so (Riquelme et al. 2021): on a
    device by itself, and with a gradient that also balances within every group.
    """

    def mean(*arrays, mask=None):
        mask = jnp.ones(arrays[0].shape[:2], bool) if mask is None else mask
        loss_G = jax.vmap(lambda mask, *group: loss(*(a[None] for a in group), mask=mask[None]))(
            mask, *arrays
        )
        real_G = mask.any(1)
        return jnp.where(real_G, loss_G, 0).sum() / jnp.maximum(real_G.sum(), 1)

    return mean


def shares(x_GTE, mask=None):
    """Returns the mean over real tokens, [E]: of choices, each expert's share of the tokens."""
    if mask is None:
        return x_GTE.mean((0, 1))
    weight = mask[..., None].astype(x_GTE.dtype)
    return (x_GTE * weight).sum((0, 1)) / jnp.maximum(weight.sum(), 1)


def _squared_cv(x_E):
    return x_E.var() / jnp.maximum(x_E.mean() ** 2, 1e-9)
