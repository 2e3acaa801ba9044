r"""Sparse relatives of softmax: the relaxed top-1, whose cap at 1 never binds.

alpha-entmax is sparse_topk_mask with k = 1, p = alpha and strength 1/(alpha - 1): non-negative
weights that sum to 1 are at most 1 anyway. So it shares that operator's threshold search, without
a sort, and its derivative.
"""

from routers.operands import check_norm
from routers.topk import sparse_topk_mask


def sparsemax(x, *, axis=-1):
    r"""Projects onto the simplex: weights that sum to 1, many of them exactly 0.

    argmin_{y >= 0, \sum y = 1}  ||y - x||^2  =  argmax <x, y> - ||y||^2/2.

    Args:
      x: scores, any shape; float16, bfloat16, float32 or float64 (solved in float32 or better).
        Entries of -inf get weight 0; a row of nothing else is 0.
      axis: the axis of the items.

    Returns:
      The weights, of x's shape and dtype.

    Derivative in x, forward and reverse: on the support S, of |S| items, J = I - 1 1^T / |S|;
    0 elsewhere.

    Raises:
      ValueError: scores that are not floating point.

    Source: Martins & Astudillo 2016.
    """
    return entmax(x, alpha=2.0, axis=axis)


def entmax(x, *, alpha=1.5, axis=-1):
    r"""Returns alpha-entmax: from softmax (alpha -> 1) to sparsemax (alpha = 2) and sparser.

    argmax_{y >= 0, \sum y = 1}  <x, y> - (\sum y^alpha - 1)/(alpha (alpha - 1)),
    y_i = max((alpha - 1) x_i - tau, 0)^(1/(alpha - 1))  with tau such that \sum y = 1.

    Args:
      x: scores, as for `sparsemax`.
      alpha: > 1, static. Use `jax.nn.softmax` for 1.
      axis: the axis of the items.

    Returns:
      The weights, of x's shape and dtype.

    Derivative in x, forward and reverse: with d = y^(2 - alpha) on the support and 0 elsewhere,
    J = diag(d) - d d^T / sum(d).

    Raises:
      ValueError: alpha <= 1 or infinite, or scores that are not floating point.

    Source: Peters et al. 2019.
    """
    alpha = check_norm(alpha, "alpha")
    return sparse_topk_mask(x, 1, p=alpha, strength=1 / (alpha - 1), axis=axis)
