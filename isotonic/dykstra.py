"""Dykstra's alternating projections for isotonic regression: parallel steps, slow convergence.

Sander et al., "Fast, Differentiable and Sparse Top-k: a Convex Analysis Perspective" (ICML 2023,
arXiv 2302.01425), section on Dykstra's algorithm; the authors run a fixed number of iterations
without weights.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from isotonic.blocks import block_starts


class DykstraFit(NamedTuple):
    """A `Fit` and how far it has converged; the last two fields have the batch shape `[...]`."""

    v: jax.Array  # fitted values [..., n], decreasing up to `residual`
    block: jax.Array  # int32 [..., n]: the position at which the block of each position starts
    residual: jax.Array  # largest violation of the optimality conditions, in units of y
    iterations: jax.Array  # int32: sweeps this row took


class _State(NamedTuple):
    v: jax.Array  # [..., n]
    dual: jax.Array  # [..., n-1], multipliers of v_i >= v_(i+1)
    residual: jax.Array  # [..., 1]
    iterations: jax.Array  # [..., 1]


def dykstra(y, w, *, tol: float = 1e-6, max_iter: int = 5_000) -> DykstraFit:
    r"""Solve  argmin_{v_1 >= ... >= v_n}  1/2 \sum_i w_i (y_i - v_i)^2  along the last axis.

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
      y: data `[..., n]`, n >= 1, float32 or float64.
      w: weights `[..., n]` > 0. Smaller ones are raised to eps * max(w).
      tol: a row stops once its residual is at most tol * max|y|.
      max_iter: bound on the number of sweeps.
    """
    eps = jnp.finfo(y.dtype).eps
    w = jnp.maximum(w, eps * w.max(-1, keepdims=True))
    enough = tol * jnp.abs(y).max(-1, keepdims=True)

    def sweep(v, dual):
        for pairs in every_other(dual):
            v, dual = _project(v, dual, w, pairs)
        return v, dual

    return alternate(sweep, y, jnp.zeros_like(y[..., 1:]), enough, max_iter)


def every_other(dual):
    """The pairs that start at even positions, then the others."""
    even = jnp.broadcast_to(jnp.arange(dual.shape[-1]) % 2 == 0, dual.shape)
    return even, ~even


def alternate(sweep, v, dual, enough, max_iter: int) -> DykstraFit:
    """Sweep until the residual of each row is at most `enough` `[..., 1]`.

    Args:
      sweep: (v, dual) -> (v, dual).
      v, dual: where to start: values `[..., n]` and multipliers of v_i >= v_(i+1) `[..., n-1]`.
    """

    def unfinished(state):
        return ((state.residual > enough) & (state.iterations < max_iter)).any()

    def improve(state):
        # Finished rows are frozen: a row's result must not depend on its companions.
        moving = state.residual > enough
        v, dual = sweep(state.v, state.dual)
        swept = _State(v, dual, _residual(v, dual), state.iterations + 1)
        return _State(*(jnp.where(moving, a, b) for a, b in zip(swept, state, strict=True)))

    residual = _residual(v, dual)
    state = _State(v, dual, residual, jnp.zeros_like(residual, jnp.int32))
    v, dual, residual, iterations = jax.lax.while_loop(unfinished, improve, state)
    return DykstraFit(v, block_starts(dual > 0), residual[..., 0], iterations[..., 0])


def _project(v, dual, w, pairs):
    """Weighted projection of v plus its corrections onto {v_i >= v_(i+1) : i in pairs}.

    Adding back a pair's correction and averaging it if it still violates is the same as raising
    its multiplier by what closes the gap, but not below zero.
    """
    left, right = w[..., :-1], w[..., 1:]
    # Shares first: left * right may overflow.
    stiffness = left * (right / (left + right))
    change = jnp.maximum(stiffness * (v[..., 1:] - v[..., :-1]), -dual)
    change = jnp.where(pairs, change, 0)
    up, down = change / left, change / right
    keep = [(0, 0)] * (v.ndim - 1)
    v = v + jnp.pad(up, [*keep, (0, 1)]) - jnp.pad(down, [*keep, (1, 0)])
    return v, dual + change


def _residual(v, dual):
    """Largest violation of v_i >= v_(i+1), and of equality where the multiplier is positive.

    The other optimality conditions (stationarity and the multipliers' sign) hold at every sweep.
    """
    gap = v[..., 1:] - v[..., :-1]
    violation = jnp.where(dual > 0, jnp.abs(gap), gap)
    return violation.max(-1, keepdims=True, initial=0)
