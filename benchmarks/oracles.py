"""Exact answers in float64, and gradients from closed forms: numpy, no code of this project."""

from typing import NamedTuple

import numpy as np

KINK = 1e-5  # rows with an item this near a kink are not held to a gradient: either side is right


class Exact(NamedTuple):
    """y and J^T c, `[rows, n]`; rows of NaN in `gradient` are not to be compared."""

    y: np.ndarray
    gradient: np.ndarray
    total: float | None  # what a row of y adds up to, if it is a mask


def _power(p):
    """Returns y = clip(u, 0, 1)^(q-1) with q - 1 = 1/(p - 1), and its slope."""
    e = round(1 / (p - 1))

    def link(u):
        return np.clip(u, 0, 1) ** e

    def slope(u):
        return np.where((u > 0) & (u < 1), e * np.clip(u, 0, 1) ** (e - 1), 0)

    return link, slope


def _laplace():
    def link(u):
        tail = np.exp(-np.abs(u)) / 2
        return np.where(u < 0, tail, 1 - tail)

    return link, lambda u: np.exp(-np.abs(u)) / 2


def _logistic():
    def link(u):
        return 0.5 * (1 + np.tanh(u / 2))

    return link, lambda u: link(u) * link(-u)


LINKS = {"p=2": _power(2), "p=3/2": _power(1.5), "p=4/3": _power(4 / 3)}
LINKS |= {"laplace": _laplace(), "logistic": _logistic()}


def bisect(total, low, high):
    """Returns where the decreasing `total(t)`, one value a row, crosses zero, to the last bit."""
    for _ in range(200):
        middle = low + (high - low) / 2
        if not ((low < middle) & (middle < high)).any():
            break
        above = total(middle) > 0
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return low + (high - low) / 2


def mask(x, c, k, link, lam=1.0):
    """Returns y = F((x - tau)/lam) with sum y = k, for the link F of that name."""
    f, slope = LINKS[link]
    x = x.astype(np.float64)
    reach = lam if link.startswith("p") else 800 * lam
    low, high = x.min(-1) - reach, x.max(-1) + (0 if link.startswith("p") else reach)
    tau = bisect(lambda t: f((x - t[:, None]) / lam).sum(-1) - k, low, high)
    u = (x - tau[:, None]) / lam
    if c is None:
        return Exact(f(u), None, k)
    d = slope(u) / lam
    total = d.sum(-1, keepdims=True)
    c = c.astype(np.float64)
    gradient = d * (c - (d * c).sum(-1, keepdims=True) / np.where(total > 0, total, 1))
    if link == "p=2":
        gradient[(np.minimum(np.abs(u), np.abs(u - 1)) < KINK).any(-1)] = np.nan
    return Exact(f(u), gradient, k)


def magnitude(x, c, k, lam=1.0):
    """Returns top-k in magnitude for p = 2, where sum_i clip((|x_i| - t)/(lam t), 0, 1) = k."""
    x, c = x.astype(np.float64), c.astype(np.float64)
    sign, a = np.sign(x), np.abs(x)
    high = a.max(-1)
    t = bisect(
        lambda t: np.clip((a - t[:, None]) / (lam * t[:, None]), 0, 1).sum(-1) - k, 0 * high, high
    )[:, None]
    u = (a - t) / (lam * t)
    kept, inner, rise = u >= 1, (u > 0) & (u < 1), (1 + lam) / lam
    y = np.where(kept, a, np.where(inner, rise * (a - t), 0))
    # dt = t sum(da) / sum(a) over the items inside.
    pull = t * (inner * c * sign).sum(-1, keepdims=True)
    pull /= np.maximum((inner * a).sum(-1, keepdims=True), 1e-300)
    gradient = np.where(kept, c, np.where(inner, rise * (c - sign * pull), 0))
    gradient[(np.minimum(np.abs(u), np.abs(u - 1)) < KINK).any(-1)] = np.nan
    return Exact(sign * y, gradient, None)


def midpoint(x, c, k, lam=1.0):
    """Returns the sigmoid of x minus the midpoint of its k-th and (k+1)-th largest."""
    f, slope = LINKS["logistic"]
    x, c = x.astype(np.float64), c.astype(np.float64)
    edge = np.argsort(-x, axis=-1, kind="stable")[:, k - 1 : k + 1]
    u = (x - np.take_along_axis(x, edge, -1).mean(-1, keepdims=True)) / lam
    d = slope(u) / lam
    gradient = d * c
    share = (d * c).sum(-1, keepdims=True) / 2
    moved = np.take_along_axis(gradient, edge, -1) - share
    np.put_along_axis(gradient, edge, moved, -1)
    return Exact(f(u), gradient, None)


def hard(x, c, k):
    """Returns the softmax of x at its k largest places, zero elsewhere."""
    x, c = x.astype(np.float64), c.astype(np.float64)
    e = np.exp(x - x.max(-1, keepdims=True))
    probability = e / e.sum(-1, keepdims=True)
    order = np.argsort(-x, axis=-1, kind="stable")
    kept = np.zeros(x.shape)
    np.put_along_axis(kept, order[:, :k], 1, -1)
    pull = (kept * c * probability).sum(-1, keepdims=True)
    return Exact(kept * probability, probability * (kept * c - pull), None)


def error(value, exact) -> float:
    """max |value - exact| over the rows that `exact` holds anything for; NaN if value has one."""
    rows = ~np.isnan(exact).any(-1)
    return float(np.abs(np.asarray(value, np.float64) - exact)[rows].max(initial=0))
