"""Slow, exact answers to test against: the dual of each operator by bisection, in long doubles."""

import numpy as np

WIDE = np.longdouble
# u^(q-1) for each p; multiplied out, since pow is slow in long double.
POWERS = {2.0: lambda u: u, 1.5: lambda u: u * u, 4 / 3: lambda u: u * u * u, 3.0: np.sqrt}


def selection(gap, tau, lam, p, magnitude):
    """h at gap = x - tau. Written from the papers' formulas, not from `isotonic.links`."""
    u = np.maximum(gap / lam, 0)
    link = POWERS[p]
    if not magnitude:
        return link(np.minimum(u, 1))
    inside = u < tau ** (p - 1)  # and not y < tau: y may overflow
    return np.where(inside, link(np.where(inside, u, 0)) / tau, u > 0)


def exact_threshold(x, k, lam, p, magnitude=False):
    """h, tau and out of a row: sum_i h(x_i; tau, lam) = k.

    tau is first found in float64, then again as a correction of it in long double: x - tau is
    exact for the x near tau, so h carries some 1e-18 whatever max|x|/lam is. `out` is the shrunk
    row of top-k in magnitude, tau h + x - tau within the link.
    """
    x, k, lam = np.asarray(x, np.float64), WIDE(k), WIDE(lam)
    real = np.isfinite(x)
    if k >= real.sum():
        return 1.0 * real, -np.inf, x
    low, high = (0.0 if magnitude else x[real].min() - float(lam)), x[real].max()
    pivot = _bisect(x, 0.0, low, high, k, float(lam), p, magnitude, steps=2000)
    margin = WIDE(1e-9 * (float(lam) + abs(pivot)))
    gap, pivot = x.astype(WIDE) - WIDE(pivot), WIDE(pivot)
    low = max(-margin, -pivot) if magnitude else -margin
    rest = _bisect(gap, pivot, low, margin, k, lam, p, magnitude, steps=300)
    gap, tau = gap - rest, pivot + rest
    h = selection(gap, tau, lam, p, magnitude)
    out = np.where(h < 1, np.where(h > 0, h * tau + gap, 0), x)
    return h.astype(np.float64), float(tau), out.astype(np.float64)


def _bisect(gap, base, low, high, k, lam, p, magnitude, steps):
    """Where the selections of `gap` - t, at the threshold `base` + t, add up to k."""
    middle = low + (high - low) / 2
    for _ in range(steps):
        total = selection(gap - middle, base + middle, lam, p, magnitude).sum()
        if total == k:  # a hard row has an interval of roots; at its ends out is least certain
            break
        low, high = (middle, high) if total > k else (low, middle)
        middle = low + (high - low) / 2
        if not low < middle < high:
            break
    return middle
