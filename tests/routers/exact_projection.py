"""Slow answers for any w and p: pool adjacent violators in long doubles, one row at a time."""

from typing import NamedTuple

import numpy as np

WIDE = np.longdouble


class Projection(NamedTuple):
    """The solution of a row, in the order of its scores; `[n]` each."""

    y: np.ndarray  # sign(d) |d|^(q-1)
    d: np.ndarray  # (s - v)/lam
    block: np.ndarray  # which pool each position is in


def signed(u, exponent):
    return np.sign(u) * np.abs(u) ** WIDE(exponent)


def project(x, w, lam, p, magnitude=False) -> Projection:
    """Solve the problem of `isotonic_pnorm` for the scores x and the decreasing w, and y from it.

    A pool is known by d at its first score: d_i = d - (s - s_i)/lam, so nothing far from 0 enters.
    """
    x, w, lam = np.asarray(x, WIDE), np.asarray(w, WIDE), WIDE(lam)
    order = np.argsort(-x, kind="stable")
    order = order[x[order] > -np.inf]
    s, w = x[order], w[: len(order)]
    pools = []
    for i in range(len(s)):
        pools.append((i, i + 1, _root(s[i : i + 1], w[i], lam, p, magnitude)))
        while len(pools) > 1 and _falls(pools[-2], pools[-1], s, lam):
            first, stop = pools[-2][0], pools[-1][1]
            d = _root(s[first:stop], w[first:stop].sum(), lam, p, magnitude)
            pools[-2:] = [(first, stop, d)]
    d, block = np.zeros(len(x), WIDE), -np.arange(1, len(x) + 1)
    for first, stop, d_first in pools:
        d[order[first:stop]] = d_first - (s[first] - s[first:stop]) / lam
        block[order[first:stop]] = first
    return Projection(signed(d, 1 / (p - 1)), d, block)


def _falls(left, right, s, lam):
    """Say whether the value of the left pool is the lower one."""
    return right[2] + (s[left[0]] - s[right[0]]) / lam < left[2]


def _root(s, weight, lam, p, magnitude):
    """The d of the first score of a pool, by bisection."""
    gap = (s[0] - s) / lam
    most = np.abs(weight) * (max(s[0], 0) if magnitude else 1)
    reach = signed(most, p - 1) + gap[-1]
    low, high = -reach if not magnitude else WIDE(0), reach
    for _ in range(20_000):
        d = low + (high - low) / 2
        if not low < d < high:
            break
        total = signed(d - gap, 1 / (p - 1)).sum()
        low, high = (
            (d, high) if total < (weight * (s[0] - lam * d) if magnitude else weight) else (low, d)
        )
    return d


def cotangents(solution: Projection, x, w, lam, p, u, magnitude=False):
    """J^T u in x and in w, where u belongs to y, or to the shrunk row y + lam d of magnitude."""
    x, u, lam = np.asarray(x, WIDE), np.asarray(u, WIDE), WIDE(lam)
    order = np.argsort(-x, kind="stable")
    by_item = np.empty_like(x)
    by_item[order] = np.asarray(w, WIDE)
    in_x, in_w = np.zeros_like(x), np.zeros_like(x)
    for start in np.unique(solution.block):
        inside = solution.block == start
        if x[inside][0] == -np.inf:
            continue
        # A lone score may have d = 0, where c is 0 or infinite; the limit is the same.
        d = np.maximum(np.abs(solution.d[inside]), WIDE(1e-30))
        c = d ** WIDE(1 / (p - 1) - 1) / (p - 1)
        push = u[inside] * (c + (lam if magnitude else 0))
        weight, v = by_item[inside].sum(), 1
        whole = c.sum()
        if magnitude:
            v, whole = (x[inside] - lam * solution.d[inside])[0], whole + lam * weight
        # d_i moves by (dx_i - mean)/lam, and with its pool by (mean weight [+ v dw]) / whole.
        together = push.sum() * (weight if magnitude else 0) / whole
        in_x[inside] = (push - push.sum() * c / c.sum()) / lam + together * c / c.sum()
        in_w[inside] = push.sum() * v / whole
    return in_x, in_w[order]
