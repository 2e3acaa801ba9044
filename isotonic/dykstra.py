"""Dykstra's alternating projections for isotonic regression: parallel steps, slow convergence.

Sander et al., "Fast, Differentiable and Sparse Top-k: a Convex Analysis Perspective" (ICML 2023,
arXiv 2302.01425), section on Dykstra's algorithm; the authors run a fixed number of iterations
without weights.
"""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp

from isotonic.blocks import Fit, Offset, block_starts, positions


class DykstraFit(NamedTuple):
    """A `Fit` and how far it has converged; the last three fields have the batch shape `[...]`."""

    v: jax.Array  # fitted values [..., n], decreasing up to `residual`
    block: jax.Array  # int32 [..., n]: the position at which the block of each position starts
    residual: jax.Array  # largest violation of the optimality conditions, in units of y
    iterations: jax.Array  # int32: sweeps this row took
    converged: jax.Array  # bool: the residual is as small as was asked


class _State(NamedTuple):
    v: jax.Array  # [..., n]
    dual: jax.Array  # [..., n-1], multipliers of v_i >= v_(i+1)
    residual: jax.Array  # [..., 1]
    iterations: jax.Array  # [..., 1]


def dykstra(
    y, w, offset: Offset | None = None, *, tol: float = 1e-6, max_iter: int = 5_000
) -> DykstraFit:
    r"""Solves  argmin_{v_1 >= ... >= v_n}  1/2 \sum_i w_i (y_i - v_i)^2  along the last axis.

    Projects in turn onto {v_1 >= v_2, v_3 >= v_4, ...} and {v_2 >= v_3, v_4 >= v_5, ...}: each
    averages all its violating pairs at once, after adding back the correction that the same
    projection subtracted a sweep earlier. The correction of a pair is its multiplier over w.

    It converges slowly: information moves one position per projection, so a block of m positions
    needs about m^2 sweeps, and more when the weights are uneven. With the right blocks the error
    in v is at most (m - 1) * residual. Read `residual` before trusting a long row.

    Blocks, and so derivatives, come from the multipliers: a pair is pooled iff its multiplier is
    positive. Comparing values would need a tolerance, which mistakes near-equal neighbours for
    pools and unconverged pools for neighbours.

    Args:
      y: data `[..., n]`, n >= 1, float32 or float64. Entries of -inf, which all come last, are
        never pooled.
      w: weights `[..., n]` > 0. Smaller ones are raised to eps * max(w).
      offset: what is to be added to y and, in the result, to v.
      tol: a row stops once its residual is at most tol * max|y|.
      max_iter: bound on the number of sweeps.
    """
    eps = jnp.finfo(y.dtype).eps
    w = jnp.maximum(w, eps * w.max(-1, keepdims=True))
    enough = tol * jnp.where(y > -jnp.inf, jnp.abs(y), 0).max(-1, keepdims=True)
    fall = 0 if offset is None else -jnp.diff(offset.x) / offset.unit

    def rise(v):
        """Returns how far each value lies above the one before it."""
        return jnp.where(v[..., 1:] > -jnp.inf, v[..., 1:] - v[..., :-1] - fall, -jnp.inf)

    def unfinished(state):
        return ((state.residual > enough) & (state.iterations < max_iter)).any()

    def improve(state):
        # Finished rows are frozen: a row's result must not depend on its companions.
        moving = state.residual > enough
        v, dual = state.v, state.dual
        even = positions(dual) % 2 == 0
        for pairs in (even, ~even):
            v, dual = _project(v, dual, rise(v), w, pairs)
        swept = _State(v, dual, _residual(rise(v), dual), state.iterations + 1)
        return _State(*(jnp.where(moving, a, b) for a, b in zip(swept, state, strict=True)))

    dual = jnp.zeros_like(y[..., 1:])
    residual = _residual(rise(y), dual)
    state = _State(y, dual, residual, jnp.zeros_like(residual, jnp.int32))
    v, dual, residual, iterations = jax.lax.while_loop(unfinished, improve, state)
    converged = ~(residual > enough)
    block = block_starts(dual > 0)
    return DykstraFit(v, block, *(a[..., 0] for a in (residual, iterations, converged)))


def dykstra_or_warn(y, w, offset: Offset | None = None) -> Fit:
    """Solves as `dykstra` does; warns, also from compiled code, of rows that did not converge."""
    fit = dykstra(y, w, offset)
    _tell(fit.residual, fit.converged)
    return Fit(fit.v, fit.block)


@jax.jit  # so that eager calls do not trace the callback again
def _tell(residual, converged):
    jax.debug.callback(_warn, residual, converged)


def _warn(residual, converged):
    if not converged.all():
        warnings.warn(
            f"Dykstra's projections left {(~converged).sum()} of {converged.size} rows unsolved, "
            f"with a residual of up to {residual.max():.2g}; solver='pav' and 'merge' are exact",
            RuntimeWarning,
            stacklevel=2,
        )


def _project(v, dual, rise, w, pairs):
    """Projects v plus its corrections, weighted, onto {v_i >= v_(i+1) : i in pairs}.

    Adding back a pair's correction and averaging it if it still violates is the same as raising
    its multiplier by what closes the gap, but not below zero.
    """
    left, right = w[..., :-1], w[..., 1:]
    # Shares first: left * right may overflow.
    stiffness = left * (right / (left + right))
    change = jnp.where(pairs, jnp.maximum(stiffness * rise, -dual), 0)
    up, down = change / left, change / right
    keep = [(0, 0)] * (v.ndim - 1)
    v = v + jnp.pad(up, [*keep, (0, 1)]) - jnp.pad(down, [*keep, (1, 0)])
    return v, dual + change


def _residual(rise, dual):
    """Returns the largest rise, or lack of equality where the multiplier is positive.

    The other optimality conditions (stationarity and the multipliers' sign) hold at every sweep.
    """
    violation = jnp.where(dual > 0, jnp.abs(rise), rise)
    return violation.max(-1, keepdims=True, initial=0)
