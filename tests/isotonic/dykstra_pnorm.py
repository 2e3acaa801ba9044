"""An oracle that shares no pooling with the solvers: Dykstra's projections for every p, in numpy.

The paper runs Dykstra for p = 2 only. With another separable loss its projections become Bregman
projections onto the same pairs, and the algorithm an ascent in the dual, over half the multipliers
at a time (Censor and Reich, "The Dykstra algorithm with Bregman projections", 1998): a pair's
multiplier u tilts the losses of its two positions by -u and +u, and is set to what makes their two
minimisers equal, or to 0 if they are in order without it.
"""

import numpy as np


def dykstra_pnorm(s, w, lam, p, magnitude, tol=1e-9, max_iter=5_000):
    """Solve the problem of `isotonic.pnorm.isotonic_pnorm` for a row `[n]`, slowly.

    Returns v, the largest violation that is left in it, and which neighbours are pooled `[n-1]`.
    """
    dual = np.zeros(len(s) - 1)

    def slope(v, i):
        """Minus the derivative of the losses of positions i at v."""
        d = (s[i] - v) / lam
        return np.sign(d) * np.abs(d) ** (1 / (p - 1)) - w[i] * (v if magnitude else 1)

    def minimiser(positions, tilt):
        """The v at which the summed losses of `positions`, a list of index arrays, are least."""
        reach = np.ptp(s) + lam * (np.abs(w).sum() + np.abs(dual).max() + np.abs(s).max() + 1) ** 2
        low, high = (np.full(tilt.shape, s.mean() + sign * reach) for sign in (-1, 1))
        for _ in range(90):
            v = (low + high) / 2
            above = sum(slope(v, i) for i in positions) > tilt
            low, high = np.where(above, v, low), np.where(above, high, v)
        return (low + high) / 2

    def tilt(dual):
        """What the multipliers add to each equation: that of the left pair, less the right."""
        return np.concatenate([[0], dual]) - np.concatenate([dual, [0]])

    every = np.arange(len(s))
    v = minimiser([every], tilt(dual))
    for _ in range(max_iter):
        for first in (0, 1):
            left = every[first:-1:2]
            dual[left] = 0
            others = tilt(dual)
            common = minimiser([left, left + 1], others[left] + others[left + 1])
            dual[left] = np.maximum(others[left] - slope(common, left), 0)
        v = minimiser([every], tilt(dual))
        rise = np.where(dual > 0, np.abs(np.diff(v)), np.diff(v)).max()
        if rise <= tol * np.abs(s).max():
            break
    return v, rise, dual > 0
