r"""Samples of exactly k items, and the probabilities with which these have each item.

A set S of k items has the probability  P(S) = exp(\sum_{i in S} x_i/lam) / Z,  lam = strength: that
of independent coins with log-odds x_i/lam of which exactly k show heads. The sums over all sets are
elementary symmetric polynomials, O(n k) for a row.

They are computed as a distribution, not as logarithms: a shift of all scores changes no P(S), so
the coins can be those whose heads are k on average (their log-odds are found by the root of
`isotonic.threshold`, and they are the mask of `sinkhorn_topk_mask`). Exactly k heads is then about
the likeliest count of all, and every sum is one of probabilities, without cancellation.
"""

from functools import partial

import jax
import jax.numpy as jnp

from isotonic.links import LogisticLink
from isotonic.rows import below_infinity
from isotonic.threshold import threshold
from routers.operands import nan_rows, rows, whole


def exactly_k_marginals(x, k, *, strength=1.0, axis=-1):
    r"""Returns each item's probability to be one of k: weights in [0, 1] that sum to k.

    y_i = P(i in S),  P(S) proportional to exp(\sum_{i in S} x_i/lam) over the sets of k items.

    Args:
      x: scores, any shape; float16, bfloat16, float32 or float64 (solved in float32 or better).
        Entries of -inf get weight 0; rows with fewer than k others select all of them. Those of
        +inf are the largest float.
      k: how many to select, static, a whole number in [1, n].
      strength: lam > 0; a number or an array that broadcasts against x without `axis`. May be
        traced. The weights tend to the hard mask as lam falls and to k/n as it grows.
      axis: the axis of the items.

    Returns:
      The weights, of x's shape and dtype. Memory: n (k + 1) floats for each row.

    Derivative in x and strength, forward and reverse, of any order: the covariance of the
    indicators, dy_i/dx_j = (P(i and j in S) - y_i y_j)/lam.

    Raises:
      ValueError: k not whole, not static or outside [1, n], or strength <= 0 (where not traced).

    Source: Ahmed et al. 2023, SIMPLE (the marginals as gradients of log Z, in logarithms).
    """
    k = whole(k)
    x, number, lam, restore = rows(x, k, strength, axis)
    return restore(_marginals(x, number, lam, k))


# Compiled once for each k: a loop that is called as it stands is compiled at every call.
@partial(jax.jit, static_argnames="k", inline=True)
def _marginals(x, number, lam, k):
    x = below_infinity(x)
    coin = _coins(x, number, lam)
    before, after = _counts(coin, k), _counts(coin[..., ::-1], k)[::-1]
    # Item i, and of the k - 1 others j before it and the rest after it.
    others = (before[:-1, ..., :k] * after[1:, ..., k - 1 :: -1]).sum(-1)
    total = before[-1, ..., k]
    y = coin * jnp.moveaxis(others, 0, -1) / jnp.where(total > 0, total, 1)[..., None]
    few = (x > -jnp.inf).sum(-1, keepdims=True) <= k
    return nan_rows(jnp.where(few, x > -jnp.inf, y), x.max(-1), lam)


def exactly_k_sample(x, k, key, *, strength=1.0, axis=-1):
    r"""Draws sets of exactly k items: a mask of ones and zeros for each row.

    Arguments and errors as for `exactly_k_marginals`, whose y is the mean of these masks; `key` is
    that of the draws, one for all rows. Rows with fewer than k entries above -inf select them all.

    Returns:
      The mask, of x's shape and dtype; it has no derivative. A straight-through estimator is
      mask + y - stop_gradient(y).

    Source: Ahmed et al. 2023, SIMPLE: items one by one, given how many are still to come.
    """
    k = whole(k)
    x, number, lam, restore = rows(x, k, strength, axis)
    return restore(_sample(*jax.lax.stop_gradient((x, number, lam)), key, k))


@partial(jax.jit, static_argnames="k", inline=True)
def _sample(x, number, lam, key, k):
    x = below_infinity(x)
    coin = _coins(x, number, lam)
    counts, n = _counts(coin, k), x.shape[-1]
    uniform = jax.random.uniform(key, (n, *x.shape[:-1]), x.dtype)

    def draw(left, item):
        """Takes item i or not, where `left` of the items 0 to i are to be taken."""
        i, p, u, before, here = item
        at = lambda table, r: (table * jax.nn.one_hot(r, k + 1, dtype=bool)).sum(-1)  # noqa: E731
        take = (u * at(here, left) < p * at(before, left - 1)) | (left > i)
        return left - take, take

    left = jnp.full_like(coin[..., 0], k, dtype=jnp.int32)
    items = (jnp.arange(n), jnp.moveaxis(coin, -1, 0), uniform, counts[:-1], counts[1:])
    taken = jnp.moveaxis(jax.lax.scan(draw, left, items, reverse=True)[1], 0, -1)
    mask = jnp.where(x > -jnp.inf, taken, 0).astype(x.dtype)
    return nan_rows(mask, x.max(-1), lam)


def _coins(x, k, lam):
    """Returns the probabilities of heads `[..., n]` of coins of log-odds x/lam, shifted to k."""
    h, tau = threshold(LogisticLink(), *jax.lax.stop_gradient((x, k, lam)))
    gap = jnp.where(x == -jnp.inf, 0, x - tau[..., None])
    return _with_slope(gap / lam[..., None], h)


@jax.custom_jvp
def _with_slope(log_odds, p):
    """Returns p, with the derivative of the logistic function by `log_odds`."""
    return p


@_with_slope.defjvp
def _with_slope_jvp(primals, tangents):
    p = _with_slope(*primals)
    return p, p * (1 - p) * tangents[0]


def _counts(coin, k):
    """Returns P(j heads among the first i coins) `[n + 1, ..., k + 1]` at [i, ..., j]."""
    none = jnp.zeros((*coin.shape[:-1], k + 1), coin.dtype).at[..., 0].set(1) + 0 * coin[..., :1]

    def toss(counts, p):
        p = p[..., None]
        more = jnp.concatenate([jnp.zeros_like(p), counts[..., :-1]], -1)
        counts = (1 - p) * counts + p * more
        return counts, counts

    return jnp.concatenate([none[None], jax.lax.scan(toss, none, jnp.moveaxis(coin, -1, 0))[1]])
