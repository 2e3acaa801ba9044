"""One scalar root per row:  find tau with  sum_i h(x_i; tau, lam) = k,  and its derivative.

With w = 1_k the isotonic problem behind the relaxed top-k operators of Sander et al. (ICML 2023)
pools a single block, so its solution is one number per row. No sort, no PAV, no Dykstra: a
bracketed iteration on a monotone function, every pass of which is a few sums over the row.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from isotonic.links import Link, Row
from isotonic.rows import Pair, below_infinity, over_row, per_row, row_sum, row_total
from isotonic.search import search
from isotonic.steep import steep_root


class Threshold(NamedTuple):
    """Holds the solution of a row: `h` of shape [..., n], `tau` of shape [...]."""

    h: jax.Array
    tau: jax.Array


def threshold(link: Link, x, k, lam) -> Threshold:
    r"""Solves  \sum_i h(x_i; \tau, \lambda) = k  for tau along the last axis.

    Args:
      link: the selection h, see `isotonic.links`; static.
      x: scores `[..., n]`, float32 or float64. Entries of -inf are selected with weight 0; those of
        +inf are the largest float, so that what is left of k is shared among them.
      k: sum of the selections, real, in (0, n]; scalar or `[...]`, may be traced. Rows with
        fewer than k finite entries select all of them.
      lam: strength > 0; scalar or `[...]`, may be traced.

    Returns:
      The selections `h` and the threshold `tau`; the least float where a row selects all. All is
      NaN, and so are all derivatives, in a row of which a score, k or lam is NaN.

    The error in h is that of one summation, whatever max|x|/lam: tau is carried as the unevaluated
    sum of two floats, so that x - tau keeps its digits, as long as eps^2 |tau| is small beside lam.

    Derivative, forward and reverse, by the implicit function theorem:
      d tau = (dk - \sum_i (h_x dx + h_lam d lam)_i) / \sum_i (h_tau)_i,
    and 0 where no item lies strictly inside the link (the row is already hard).
    """
    return Threshold(*_solve(link, x, k, lam))


# Compiled once for each link: a loop that is called as it stands is compiled at every call.
@partial(jax.jit, static_argnums=0, inline=True)
def _solve(link, x, k, lam):
    h, tau, rest = _threshold(link, x, *per_row(x, k, lam))
    return h, tau + rest


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _threshold(link, x, k, lam):
    x = below_infinity(x)
    row = _statistics(x, k)
    if link.steep:
        h, tau = steep_root(link, x, k, lam, search(link, x, row, k, lam, link.passes))
    else:
        tau = search(link, x, row, k, lam)
        h = link.terms(tau.gap(x), tau.high, lam).h
    return h, *tau


def _threshold_jvp(link, primals, tangents):
    h, *tau = _threshold(link, *primals)
    x, k, lam = below_infinity(primals[0]), *primals[1:]
    n = x.shape[-1]
    if link.steep:
        terms = link.slopes(h, tau[0], lam)
    else:
        terms = link.terms(Pair(*tau).gap(x), tau[0], lam)
    total = row_total(terms.dtau)
    inner = total < 0
    total = jnp.where(inner, total, 0 * tau[0] - jnp.inf)  # divides to 0, or to NaN in rows of NaN
    # Tangents that are zero by construction cost nothing.
    dx, dk, dlam = (None if isinstance(t, SymbolicZero) else t for t in tangents)
    direct = 0 if dx is None else terms.dx * dx
    if dlam is not None:
        direct += terms.dlam * over_row(dlam, n)
    dtau = jnp.zeros_like(k) if isinstance(direct, int) else -row_sum(direct)
    dtau = (dtau if dk is None else dtau + dk) / total
    return (h, *tau), (direct + terms.dtau * over_row(dtau, n), dtau, jnp.zeros_like(dtau))


_threshold.defjvp(_threshold_jvp, symbolic_zeros=True)


def _statistics(x, k) -> Row:
    """Returns the row's statistics, with k kept away from n; means are NaN where a score is."""
    length = x.shape[-1]
    real = (x != -jnp.inf).astype(x.dtype)
    n = row_total(real)
    count = jnp.maximum(n, 1)
    # Divided first: a sum of huge entries overflows.
    part = jnp.where(real > 0, x / length, 0)
    mean = row_total(part) * (length / count)
    deviation = row_total(real * jnp.abs(part - mean[..., None] / length)) * (length / count)
    return Row(n, jnp.where(k < n, k, count / 2), mean, deviation)
