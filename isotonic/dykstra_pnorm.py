"""Dykstra's alternating projections for the p-norm problems of `isotonic.pnorm`.

The paper runs Dykstra for p = 2 only. With another separable loss its projections become Bregman
projections onto the same pairs, and the algorithm an ascent in the dual, over half the multipliers
at a time (Censor and Reich, "The Dykstra algorithm with Bregman projections", 1998): a pair's
multiplier u tilts the losses of its two positions by -u and +u, and is set to what makes their two
minimisers equal, or to 0 if they are in order without it.
"""

import jax.numpy as jnp

from isotonic.dykstra import DykstraFit, alternate, every_other
from isotonic.merge import alone_pnorm, pnorm_terms
from isotonic.roots import falling_root

_LEFT, _RIGHT = slice(None, -1), slice(1, None)  # the two positions of each pair


def dykstra_pnorm(
    s, w, lam, *, p: float, magnitude: bool, tol: float = 1e-6, max_iter: int = 5_000
) -> DykstraFit:
    r"""Solve the problem of `isotonic.pnorm.isotonic_pnorm` along the last axis.

    As slow to converge as `isotonic.dykstra.dykstra`, whose remarks apply, and each sweep costs two
    root searches: for comparison, and as an oracle that shares no pooling with the exact solvers.

    Args:
      s: finite scores `[..., n]`; >= 0 for magnitude.
      w: weights `[..., n]`; of any sign for the mask, >= 0 for magnitude.
      lam: strength `[..., 1]` > 0.
      p: of the norm, > 1; magnitude: which of the two problems.
      tol: a row stops once its residual is at most tol * max|s|.
      max_iter: bound on the number of sweeps.
    """
    lam = jnp.broadcast_to(lam, s.shape)
    enough = tol * jnp.abs(s).max(-1, keepdims=True)

    def alone(dual):
        return alone_pnorm(s, w, lam, _tilt(dual), p, magnitude)

    def sweep(v, dual):
        for pairs in every_other(dual):
            others = jnp.where(pairs, 0, dual)
            v = alone(others)
            m = _common(v, s, w, lam, others, p, magnitude)
            found = _multiplier(m, s, w, lam, others, p, magnitude)
            found = jnp.where(v[..., :-1] < v[..., 1:], jnp.maximum(found, 0), 0)
            dual = jnp.where(pairs, found, dual)
        return alone(dual), dual

    dual = jnp.zeros_like(s[..., 1:])
    return alternate(sweep, alone(dual), dual, enough, max_iter)


def _tilt(dual):
    """What the multipliers add to each position's equation: of its left pair, less of its right."""
    zero = jnp.zeros_like(dual[..., :1])
    left, right = jnp.concatenate([zero, dual], -1), jnp.concatenate([dual, zero], -1)
    return left - right if dual.shape[-1] else jnp.zeros((*dual.shape[:-1], 1), dual.dtype)


def _common(free, s, w, lam, dual, p, magnitude):
    """The value that both positions of each pair take together, under the other multipliers."""
    terms, tilt = pnorm_terms(p, magnitude), _tilt(dual)

    def excess(m):
        parts = [terms(m, s[..., half], w[..., half], lam[..., half]) for half in (_LEFT, _RIGHT)]
        value, slope = (sum(a) for a in zip(*parts, strict=True))
        return value - tilt[..., _LEFT] - tilt[..., _RIGHT], slope

    low, high = free[..., _LEFT], free[..., _RIGHT]
    scale = jnp.maximum(jnp.abs(low), jnp.abs(high))
    return falling_root(excess, low / 2 + high / 2, low, high, scale, ~(low < high))


def _multiplier(m, s, w, lam, dual, p, magnitude):
    """The multiplier with which the left position of a pair has its minimum at m."""
    value, _ = pnorm_terms(p, magnitude)(m, s[..., _LEFT], w[..., _LEFT], lam[..., _LEFT])
    return _tilt(dual)[..., _LEFT] - value
