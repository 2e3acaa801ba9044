"""Chooses the next beams among all candidates: softly, so that scores learn what was worth making.

A candidate is one merge in one beam. Each function returns weights [N, candidates, beams], of which
a column makes a new beam; columns sum to 1, or to 0 where candidates are too few. `scores` are
log-probabilities, -inf where there is no such merge; `noisy` are the same with noise, by which
candidates are chosen.

  straight_through   greedy: the best is taken, the softmax is differentiated (Choi et al. 2018)
  one_soft           the best B - 1, and all others as one (Chowdhury and Caragea 2023)
  sparse             the relaxed top-B mask of Sander et al. 2023, cut into B pieces of mass 1
  soft               the first B columns of entropic optimal transport (Xie et al. 2020, sorted)
"""

import jax
import jax.numpy as jnp

from routers import sorted_sinkhorn_topk, sparse_topk_mask


def straight_through(scores, noisy, beams: int, strength: float):
    """Returns the best candidate's indicator, with the derivative of softmax(noisy / strength)."""
    if beams != 1:
        raise ValueError(f"greedy search has one beam; got {beams}")
    soft = jax.nn.softmax(noisy / strength)
    hard = jax.nn.one_hot(noisy.argmax(-1), noisy.shape[-1])
    return (hard + (soft - jax.lax.stop_gradient(soft)))[..., None]


def one_soft(scores, noisy, beams: int, strength: float):
    """Returns the indicators of the best B - 1, and the softmax of all others' scores.

    The authors average those that are left of the B best merges of each beam; here all are, which
    costs nothing as the candidates are never made one by one.
    """
    best = jax.nn.one_hot(jax.lax.top_k(noisy, beams - 1)[1], scores.shape[-1])
    best *= jnp.isfinite(scores)[..., None, :]
    others = jnp.where(best.any(-2), -jnp.inf, scores) / strength
    some = jnp.isfinite(others).any(-1, keepdims=True)
    rest = jnp.where(some, jax.nn.softmax(jnp.where(some, others, 0)), 0)
    return jnp.concatenate([best.swapaxes(-1, -2), rest[..., None]], -1)


def sparse(scores, noisy, beams: int, strength: float):
    """Returns the top-B mask laid out in order of the scores, and cut after each whole 1.

    Candidates of weight 1 are beams of their own, up to the first that is not; exact zeros stay
    out. Where the mask is hard, this is hard beam search.
    """
    mask = sparse_topk_mask(noisy, beams, strength=strength)
    order = jnp.argsort(-noisy)
    mask = jnp.take_along_axis(mask, order, -1)[..., None]
    end, place = jnp.cumsum(mask, -2), jnp.arange(beams)
    pieces = jnp.maximum(jnp.minimum(end, place + 1) - jnp.maximum(end - mask, place), 0)
    return jnp.take_along_axis(pieces, jnp.argsort(order)[..., None], -2)


def soft(scores, noisy, beams: int, strength: float):
    """Returns the soft indicators of the best, the second, ..., the B-th."""
    return sorted_sinkhorn_topk(noisy, beams, strength=strength, tol=1e-3, num_iters=100)


SELECTIONS = {
    "greedy": straight_through,
    "one_soft": one_soft,
    "sparse": sparse,
    "soft": soft,
}
