r"""Projections onto permutahedra: soft sorting and soft ranking.

The permutahedron P(w) is the convex hull of all permutations of w. Ranking and sorting are linear
programs over it; a regulariser makes their solutions continuous functions of x that still agree
with the hard ones where the gaps between the entries of x are large enough.

Blondel, Teboul, Berthet and Djolonga, "Fast Differentiable Sorting and Ranking" (ICML 2020), for
p = 2; the p-norm as in Sander et al. (ICML 2023).
"""

import jax.numpy as jnp

from isotonic.pnorm import isotonic_dual
from isotonic.powers import conjugate_exponent, signed_power
from routers.operands import check_norm, nan_rows, rows


def permutahedron_projection(z, w, *, p=2.0, strength=1.0, solver=None, axis=-1):
    r"""Solves a regularised linear program over the permutahedron of w.

      argmax_{y in P(w)}  <z, y> - (lam/p) ||y||_p^p,    lam = strength;

    for p = 2 this is the Euclidean projection of z/lam onto P(w).

    Args:
      z: scores, any shape, as for `sparse_topk_mask`. Entries of -inf are absent: they get 0, and
        the m others the projection onto the permutahedron of the m largest entries of w.
      w: any vector of the axis' length, or an array that broadcasts to z; in any order, finite.
      p: norm of the regulariser, > 1, static; at most 6 in float32 and 20 in float64.
      strength: lam > 0; a number, or an array that broadcasts against z without `axis`. May be
        traced.
      solver: as for `isotonic.isotonic_regression`; for p != 2 "merge" (the default), or "pav" if
        w >= 0.
      axis: the axis of the items.

    Returns:
      y, of z's shape and dtype; along the axis it adds up to the sum of w. Where z moves as a
      whole y stays as it is, to the rounding of z alone.

    Derivative in z, w and strength, forward and reverse, by the blocks of the isotonic solution;
    piecewise linear for p = 2. Where entries tie, that of one of the orders.

    Raises:
      ValueError: p outside its range, an unknown solver, strength <= 0 (where not traced).
    """
    check_norm(p)
    z, _, lam, restore = rows(z, 1, strength, axis)
    w = jnp.asarray(w, z.dtype)
    if w.ndim > 1:
        w = jnp.moveaxis(jnp.broadcast_to(w, restore(z).shape), axis, -1)
    w = jnp.broadcast_to(-jnp.sort(-w, axis=-1), z.shape)
    return restore(project_rows(z, w, lam, p, solver)[0])


def soft_rank(x, *, p=2.0, strength=1.0, descending=False, solver=None, axis=-1):
    r"""Ranks differentiably: 1 for the smallest entry to n for the largest, ties shared.

    The projection of x onto the permutahedron of (1, ..., n); of -x if `descending`, so that 1 is
    the rank of the largest. For p = 2 ranks are exact where neighbours are at least `strength`
    apart, and tend to (n + 1)/2 as it grows. Entries of -inf get 0, and the others the ranks that
    they have beside them.

    Arguments, derivatives and errors as for `permutahedron_projection`.

    Source: Blondel et al. 2020, soft rank.
    """
    check_norm(p)
    x, _, lam, restore = rows(x, 1, strength, axis)
    ranks = jnp.broadcast_to(jnp.arange(x.shape[-1], 0, -1, dtype=x.dtype), x.shape)
    y = project_rows(-x if descending else x, ranks, lam, p, solver)[0]
    return restore(jnp.where(x == -jnp.inf, 0, y))


def soft_sort(x, *, p=2.0, strength=1.0, descending=False, solver=None, axis=-1):
    r"""Sorts differentiably, in increasing order unless `descending`.

    The projection of (1, ..., n) onto the permutahedron of x. For p = 2 the values are exact where
    neighbours in sorted order are at most 1/strength apart, and tend to the mean as it grows.

    Arguments, derivatives and errors as for `permutahedron_projection`, with finite x for w.

    Source: Blondel et al. 2020, soft sort.
    """
    check_norm(p)
    x, _, lam, restore = rows(x, 1, strength, axis)
    places = jnp.broadcast_to(jnp.arange(x.shape[-1], 0, -1, dtype=x.dtype), x.shape)
    y = _project_sorted(places, -jnp.sort(-nan_rows(x)), lam, p, solver)[0]
    return restore(y if descending else y[..., ::-1])


def project_rows(x, w, lam, p, solver, magnitude=False):
    """Returns, by sorting and isotonic optimization, y and s - v*, in the order of x `[..., n]`.

    v* solves  min_{v_1 >= ... >= v_n} R*(s - v) + f(v)  for w `[..., n]` in decreasing order, lam
    `[...]`, and y = sign(s - v*) (|s - v*|/lam)^(q-1).
    """
    order = jnp.argsort(-x, axis=-1)
    s = jnp.take_along_axis(nan_rows(x), order, -1)
    inverse = jnp.argsort(order, axis=-1)
    solution = _project_sorted(s, w, lam, p, solver, magnitude)
    return tuple(jnp.take_along_axis(a, inverse, -1) for a in solution)


def _project_sorted(s, w, lam, p, solver, magnitude=False):
    """As `project_rows`, of rows in decreasing order."""
    lam = lam[..., None]
    d = isotonic_dual(s, w, lam=lam, p=p, magnitude=magnitude, solver=solver)
    return signed_power(d, conjugate_exponent(p)), lam * d
