r"""A top-k loss without noise: the partial Fenchel-Young loss of the relaxed top-k mask.

With P(1_k) = {0 <= m <= 1, \sum m = k} and the norm of `sparse_topk_mask`, let

  F_k(theta) = max_{m in P(1_k)}  <theta, m> - (lam/p) ||m||_p^p.

A guess of k classes is right if it has the label y: any m with m_y = 1 will do. The loss is what
the best such guess lacks,

  L = F_k(theta) - [theta_y - lam/p + F_{k-1}(theta without y)]  >=  0,

and 0 exactly where the mask of theta has m_y = 1. (Fenchel-Young losses, Blondel et al. 2020, have
one target; "partial" says that here it is a set, whose nearest point is taken.)
"""

from functools import partial

import jax
import jax.numpy as jnp

from routers.operands import as_scores, check_axis, check_norm, class_numbers, nan_rows, rows, whole
from routers.topk import sparse_topk_mask


def sparse_topk_loss(scores, labels, k, *, p=2.0, strength=1.0):
    r"""Returns the partial Fenchel-Young loss: is the label's score among the k largest?

    It is convex, tends to max(0, s_[k] - s_y) as lam falls, s_[k] the k-th largest of the other
    scores, and k = 1, p = 2, lam = 1 is the sparsemax loss (Martins and Astudillo 2016).

    Args:
      scores: theta `[..., V]`, the V classes last; dtypes as for `sparse_topk_mask`. Entries of
        -inf are no guesses.
      labels: y `[...]`, whole numbers in [0, V).
      k: how many guesses are allowed, static, a whole number in [1, V - 1].
      p: norm of the regulariser, > 1, static.
      strength: lam > 0, which is also the margin: a loss of 0 needs s_y above s_[k] by at most it.
        A number or an array that broadcasts against `labels`. May be traced.

    Returns:
      The loss of each example `[...]`, of the scores' dtype.

    Derivative in scores and strength, forward and reverse, of any order: in the scores it is
    m_k(theta) - (e_y + m_{k-1}(theta without y)), never 0 on a mistake, and sums to 0.

    Raises:
      ValueError: labels of the wrong shape, or that are not whole numbers in [0, V) (where not
        traced), k outside [1, V - 1]; and those of `sparse_topk_mask`.
    """
    k, p, scores = whole(k), check_norm(p), as_scores(scores)
    check_axis(-1, scores)
    classes = scores.shape[-1]
    if not 1 <= k < classes:
        raise ValueError(f"k must be at least 1 and below {classes}, the classes; got {k}")
    labels = class_numbers(labels, scores)
    x, _, lam, _ = rows(scores, k, strength, -1)
    wrong = jnp.where(labels < classes, 1, jnp.nan).astype(x.dtype)  # of a traced label
    own = jax.nn.one_hot(labels, classes, dtype=bool)
    return _loss(k, p, nan_rows(x, lam, wrong), lam, own).astype(scores.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _loss(k, p, x, lam, own):
    return _parts(k, p, x, lam, own)[0]


@_loss.defjvp
def _loss_jvp(k, p, primals, tangents):
    x, lam, own = primals
    dx, dlam, _ = tangents
    loss, slope, powers = _parts(k, p, x, lam, own)
    return loss, (slope * dx).sum(-1) + powers / p * dlam


def _parts(k, p, x, lam, own):
    """Returns the loss, its derivative in x, and p times that in lam, by the envelope theorem."""
    mask = sparse_topk_mask(x, k, p=p, strength=lam)
    rest = jnp.zeros_like(mask)
    if k > 1:
        others = jnp.where(own, -jnp.inf, x)
        rest = sparse_topk_mask(others, k - 1, p=p, strength=lam)
    target = jnp.where(own, 1, rest)
    # Where the label is wholly in, both masks are one, and their roundings are no loss.
    right = (jnp.where(own, mask, 0).sum(-1) >= 1)[..., None]
    slope = jnp.where(right, 0, mask - target)
    powers = jnp.where(right, 0, target**p - mask**p).sum(-1)
    # Both masks add up to k: relative to the label's score nothing large is subtracted.
    score = jnp.where(own, x, 0).sum(-1, keepdims=True)
    gap = jnp.where(slope == 0, 0, x - score)
    loss = (slope * gap).sum(-1) + lam / p * powers
    return jnp.maximum(loss, 0), slope, powers
