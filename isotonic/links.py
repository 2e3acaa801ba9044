"""The functions F whose sums over a row are solved for a threshold, with the slopes they need.

A link says how much of item x_i is selected at threshold tau and strength lam: h(x_i; tau, lam),
which falls from 1 to 0 as tau grows. `isotonic.threshold` finds the tau at which a row's selections
add up to k. `isotonic.power_links` has those of Sander et al., here are the distribution functions.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from isotonic.rows import row_sum


class Terms(NamedTuple):
    """Holds a link's values and partial derivatives, each of the row's shape `[..., n]`."""

    h: jax.Array  # selection of each item
    dx: jax.Array  # dh/dx at fixed tau, >= 0
    dtau: jax.Array  # dh/dtau at fixed x, <= 0
    dlam: jax.Array  # dh/dlam at fixed x and tau


class Row(NamedTuple):
    """Holds what a search starts from, each of shape `[...]`; k < n."""

    n: jax.Array  # number of items
    k: jax.Array  # sum of selections to reach
    mean: jax.Array  # of the items
    deviation: jax.Array  # mean absolute deviation from the mean

    def bounds(self, k):
        """Returns (a, b): fewer than n - k items lie below a, and fewer than k above b.

        By Markov's inequality for the deviations of either sign, which add up to n deviation/2;
        with room for the rounding of the statistics.
        """
        room = jnp.sqrt(jnp.finfo(self.mean.dtype).eps)
        reach = self.n * self.deviation * (0.5 + room)
        room = room * jnp.abs(self.mean)
        return self.mean - reach / (self.n - k) - room, self.mean + reach / k + room

    def normal_start(self, lam, mean, variance):
        """Returns the root of a row of normal items, for a link that is about normal itself.

        h = P(tau + lam V < x) with V of the given mean and variance, so that k/n is the
        probability that the normal variable x - lam V exceeds tau.
        """
        share = jnp.clip(self.k / self.n, 1e-6, 1 - 1e-6)
        sigma = math.sqrt(math.pi / 2) * self.deviation
        return self.mean - lam * mean - jnp.hypot(sigma, lam * variance**0.5) * ndtri(share)


class Step(NamedTuple):
    """Holds what a pass over a row tells of its root, each of shape `[...]`."""

    excess: jax.Array  # sum h - k
    noise: jax.Array  # rounding error of excess
    move: jax.Array  # by which to move tau; NaN where the link knows no better than bisection
    width: jax.Array  # of the link, in units of x: a move of eps * width changes h by about eps


class Link(Protocol):
    """What `threshold` asks of a link. Equal links compare equal: they are static arguments.

    Thresholds tau, strengths lam and sums k have the rows' shape `[...]`, items add an axis.
    """

    steep: bool  # does it leave 0 with an infinite slope? Then see `isotonic.steep`

    def bracket(self, row: Row, lam):
        """Returns thresholds (a, b, start) with the root between a and b."""

    def terms(self, gap, tau, lam) -> Terms:
        """Returns the values at `gap` = x - tau `[..., n]`, which has no cancellation."""

    def half_width(self, item, lam):
        """Returns how far below an item the threshold is that selects about half of it."""

    def step(self, gap, tau, k, lam) -> Step:
        """Makes one pass: sums over the row, and a Newton step of the best order they allow."""


class DistributionLink:
    """Base of links that are a symmetric distribution function of (x - tau)/lam.

    A subclass has `variance`, `terms` and `tail(share)`: u >= 0 with F(-u) <= share.
    """

    variance: float
    steep = False

    def bracket(self, row: Row, lam):
        share = row.k / row.n
        # sum h <= #{x > tau - u lam} + n F(-u): were F(-u) = share/2, k/2 items must lie there.
        _, high = row.bounds(row.k / 2)
        low, _ = row.bounds((row.n + row.k) / 2)
        low, high = low - lam * self.tail((1 - share) / 2), high + lam * self.tail(share / 2)
        return low, high, row.normal_start(lam, 0.0, self.variance)

    def half_width(self, item, lam):
        return jnp.zeros_like(item)

    def step(self, gap, tau, k, lam) -> Step:
        terms = self.terms(gap, tau, lam)
        # Items near 1 are counted, and only their deficits summed: beside 50,000 whole items the
        # digits of the few fractional ones would be lost in float32.
        whole = terms.h > 0.5
        count = row_sum(whole.astype(gap.dtype))
        excess = (count - k) + row_sum(jnp.where(whole, terms.h - 1, terms.h))
        slope = row_sum(terms.dx)
        move = jnp.where(slope > 0, excess / jnp.where(slope > 0, slope, 1), jnp.nan)
        # The summed parts are at most twice the slopes times lam.
        return Step(excess, jnp.finfo(gap.dtype).eps * slope * lam, move, lam)


@dataclass(frozen=True)
class LogisticLink(DistributionLink):
    """Is F(u) = 1/(1 + exp(-u)), u = (x - tau)/lam: entropic optimal transport to two anchors."""

    variance = math.pi**2 / 3

    def tail(self, share):
        return -jnp.log(share)

    def terms(self, gap, tau, lam) -> Terms:
        lam = lam[..., None]
        u = gap / lam
        h = jax.nn.sigmoid(u)
        slope = h * jax.nn.sigmoid(-u) / lam
        return Terms(h, slope, -slope, -slope * jnp.where(slope > 0, u, 0))


@dataclass(frozen=True)
class LaplaceLink(DistributionLink):
    """Is F(u) = exp(u)/2 for u < 0, else 1 - exp(-u)/2, at u = (x - tau)/lam, as in LapSum."""

    variance = 2.0

    def tail(self, share):
        return -jnp.log(share)

    def terms(self, gap, tau, lam) -> Terms:
        lam = lam[..., None]
        u = gap / lam
        half = jnp.exp(-jnp.abs(u)) / 2
        slope = half / lam
        return Terms(
            jnp.where(u > 0, 1 - half, half), slope, -slope, -slope * jnp.where(half > 0, u, 0)
        )
