r"""Top-k masks that are nowhere exactly zero: by LapSum, by optimal transport and by a sigmoid.

The operators that `sparse_topk_mask` is compared with: each a distribution function F of
(x_i - theta)/lam. They differ in F and in what theta is:

  operator               F          theta                           sum over the row
  lapsum_topk_mask       Laplace    the root of sum = k             k
  sinkhorn_topk_mask     logistic   the root of sum = k             k
  sigmoid_topk_mask      logistic   midpoint of x_(k) and x_(k+1)   not k

x_(j) is the j-th largest entry of a row. `routers.sorted_sinkhorn` tells the k places apart.
"""

import jax
import jax.numpy as jnp

from isotonic.links import LaplaceLink, LogisticLink
from isotonic.rows import below_infinity
from isotonic.threshold import threshold
from routers.operands import nan_rows, rows, whole


def lapsum_topk_mask(x, k, *, strength=1.0, axis=-1):
    r"""Returns a sum of Laplace distribution functions: weights in (0, 1) that sum to k.

    y_i = F((x_i - tau)/lam)  with tau such that \sum_i y_i = k,    lam = strength,
    F(u) = exp(u)/2 for u < 0, else 1 - exp(-u)/2.

    Args:
      x: scores, any shape; float16, bfloat16, float32 or float64 (solved in float32 or better).
        Entries of -inf get weight 0, those of +inf are the largest float.
      k: how many to select, real, in (0, n]: a number, or an array that broadcasts against x
        without `axis` (one k per row). May be traced.
      strength: lam > 0, the width of F in units of x; a number or an array like k. May be traced.
        The mask tends to the hard one as lam falls and to k/n as lam grows.
      axis: the axis of the items.

    Returns:
      The mask, of x's shape and dtype.

    Derivative in x, k and strength, forward and reverse: with d_i = F'((x_i - tau)/lam)/lam,
    J = diag(d) - d d^T / sum(d) and dy/dk = d / sum(d); 0 where the mask is hard to the last digit.

    Raises:
      ValueError: k outside (0, n] or strength <= 0 (where not traced).

    Source: Struski et al. 2025, LapSum. Theirs is a closed form after a sort; this is a root.
    """
    x, k, lam, restore = rows(x, k, strength, axis)
    return restore(threshold(LaplaceLink(), x, k, lam).h)


def sinkhorn_topk_mask(x, k, *, strength=1.0, axis=-1):
    r"""Returns the top-k mask by entropic optimal transport to the two anchors 0 and 1 (SOFT).

    Row 1 of the plan that solves, with C_ij = (x_i - a_j)^2, a = (0, 1), and eps' = 2 lam,

      min_{P >= 0}  <P, C> + eps' \sum_ij P_ij (log P_ij - 1),
      \sum_j P_ij = 1,  \sum_i P_i0 = n - k,  \sum_i P_i1 = k.

    Two anchors leave one unknown: y_i = 1/(1 + exp(-(x_i - tau)/lam)) with tau such that
    \sum_i y_i = k. That root is found directly, without Sinkhorn iterations.

    The paper divides C by its largest entry C_max before it weighs the entropy with eps, hence
    strength = eps C_max/2. C_max may be computed per row and passed as an array; the authors'
    code takes it over the whole batch, which makes rows depend on each other, and selects the
    k smallest where this selects the k largest.

    Arguments, errors and derivatives as for `lapsum_topk_mask`, with this F.

    Returns:
      The mask, of x's shape and dtype.

    Source: Xie et al. 2020, SOFT top-k.
    """
    x, k, lam, restore = rows(x, k, strength, axis)
    return restore(threshold(LogisticLink(), x, k, lam).h)


def sigmoid_topk_mask(x, k, *, strength=1.0, axis=-1):
    r"""Returns a sigmoid about the midpoint between the k-th and the next score (DFTopK).

    y_i = 1/(1 + exp(-(x_i - theta)/lam)),    theta = (x_(k) + x_(k+1))/2,    lam = strength.

    The sum is not k: the weights of a long row's many low scores add up. What holds is that
    exactly the k largest are above 1/2, unless x_(k) = x_(k+1).

    Args:
      x: scores, as for `lapsum_topk_mask`.
      k: how many to select, static, a whole number in [1, n]: there is no midpoint for a real k.
        x_(n+1) is taken to be -inf, so that k = n selects everything with weight 1, and so do
        rows with at most k finite entries.
      strength: as for `lapsum_topk_mask`.
      axis: the axis of the items.

    Returns:
      The mask, of x's shape and dtype.

    Derivative in x and strength, forward and reverse: with d_i = y_i (1 - y_i)/lam,
    J = diag(d) - d (e_(k) + e_(k+1))^T / 2, so that two items alone receive what the others lose.
    Among equal scores these are the ones of lowest index.

    Raises:
      ValueError: k not whole, not static or outside [1, n], or strength <= 0 (where not traced).

    Source: Zhu et al. 2025, DFTopK.
    """
    k = whole(k)
    x, _, lam, restore = rows(x, k, strength, axis)
    x = below_infinity(nan_rows(x, lam))
    real, lam = x != -jnp.inf, lam[..., None]
    best = largest(x, k + 1)[..., k - 1 :]
    full = best[..., 1:] == -jnp.inf
    theta = jnp.where(full, 0, best / 2).sum(-1, keepdims=True)
    # Bounded before the division, which may overflow: the slope is 0 well inside the bounds.
    gap = jnp.clip(jnp.where(real, x, 0) - theta, -1000 * lam, 1000 * lam)
    return restore(jnp.where(real, jnp.where(full, 1, jax.nn.sigmoid(gap / lam)), 0))


def largest(x, count):
    """The largest entries in decreasing order `[..., count]`, -inf where there are no more."""
    more = [(0, 0)] * (x.ndim - 1) + [(0, max(count - x.shape[-1], 0))]
    return jax.lax.top_k(jnp.pad(x, more, constant_values=-jnp.inf), count)[0]
