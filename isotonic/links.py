"""The functions F whose sums over a row are solved for a threshold, with the slopes they need.

A link says how much of item x_i is selected at threshold tau and strength lam: h(x_i; tau, lam),
which falls from its largest value to 0 as tau grows. `isotonic.threshold` finds the tau at which a
row's selections add up to k. Sander et al., "Fast, Differentiable and Sparse Top-k" (ICML 2023),
give the two links here: the top-k mask and top-k in magnitude, with p > 1 and q = p/(p - 1).
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Terms(NamedTuple):
    """A link's values and partial derivatives, each of the row's shape `[..., n]`."""

    h: jax.Array  # selection of each item
    dx: jax.Array  # dh/dx at fixed tau, >= 0
    dtau: jax.Array  # dh/dtau at fixed x, <= 0
    dlam: jax.Array  # dh/dlam at fixed x and tau


class Link(Protocol):
    """What `threshold` asks of a link."""

    def bracket(self, low, high, share, lam):
        """Thresholds (a, b), a <= b, between which the items of [low, high] average `share`."""

    def terms(self, gap, tau, lam) -> Terms:
        """Values at `gap` = x - tau, which the solver computes without cancellation."""


def power(u, exponent: float):
    """u ** exponent for u >= 0; small whole exponents and square roots by the cheap instruction."""
    if exponent == 0.5:
        return jnp.sqrt(u)
    whole = round(exponent)
    if abs(exponent - whole) < 1e-9 and whole <= 8:  # 1/(p-1) is 3.0000000000000007 for p = 4/3
        return jax.lax.integer_pow(u, whole)
    return u**exponent


def power_slope(u, exponent: float):
    """Derivative of `power`, kept finite: for exponent < 1 it diverges at 0, so u >= eps there.

    The exact Jacobians of the operators stay bounded as one item enters the support (its weight
    cancels in the weighted mean that is subtracted), so the floor costs nothing but infinities.
    """
    if exponent < 1:
        u = jnp.maximum(u, jnp.finfo(u.dtype).eps)
    return exponent * power(u, exponent - 1)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def positive_power(u, exponent: float):
    """max(u, 0) ** exponent, with derivative 0 for u <= 0 and a finite one everywhere."""
    return jnp.where(u > 0, power(jnp.where(u > 0, u, 1), exponent), 0)


@positive_power.defjvp
def _positive_power_jvp(exponent, primals, tangents):
    (u,), (du,) = primals, tangents
    inside = u > 0
    slope = jnp.where(inside, power_slope(jnp.where(inside, u, 1), exponent), 0)
    return positive_power(u, exponent), slope * du


@dataclass(frozen=True)
class MaskLink:
    """F(u) = clip(u, 0, 1)^(q-1) at u = (x - tau)/lam: the p-norm relaxation of the top-k mask."""

    p: float

    @property
    def exponent(self) -> float:
        return 1 / (self.p - 1)  # q - 1

    def bracket(self, low, high, share, lam):
        u = lam * share ** (self.p - 1)  # lam F^-1(share)
        return low - u, high - u

    def terms(self, gap, tau, lam) -> Terms:
        u = gap / lam
        inside = (u > 0) & (u < 1)
        v = jnp.where(inside, u, 0.5)
        h = jnp.where(inside, power(v, self.exponent), u >= 1)
        slope = jnp.where(inside, power_slope(v, self.exponent) / lam, 0)
        return Terms(h, slope, -slope, -slope * v)


@dataclass(frozen=True)
class MagnitudeLink:
    """h = min( ((a - tau)_+/lam)^(q-1) / tau, 1 ) for a = |x| >= 0 and tau > 0: top-k in magnitude.

    With y the regularised solution on a coordinate, h = y/tau where the coordinate is shrunk, and
    1 where it is kept whole. Computed as the mask's link of width lam tau^(p-1), whose powers stay
    in the float range at every scale of a.
    """

    p: float

    @property
    def exponent(self) -> float:
        return 1 / (self.p - 1)

    def bracket(self, low, high, share, lam):
        return jnp.zeros_like(high), high

    def terms(self, gap, tau, lam) -> Terms:
        tiny = jnp.finfo(gap.dtype).tiny
        tau = jnp.maximum(tau, tiny)
        root = power(tau, (self.p - 1) / 2)  # the power itself may overflow where width does not
        width = lam * root * root
        positive = gap > 0
        u = jnp.where(positive, gap / width, 0)
        inside = positive & (u < 1)
        v = jnp.where(inside, u, 0.5)
        # y >= tiny, so that a root tau below it is found at it, with h > 0 wherever a > tau.
        h = jnp.where(inside, jnp.maximum(power(v, self.exponent), tiny / tau), positive)
        # Bounded: sums of slopes over the row must not overflow either.
        slope = jnp.minimum(power_slope(v, self.exponent) / width, jnp.finfo(gap.dtype).max / 1e8)
        slope = jnp.where(inside, slope, 0)
        return Terms(h, slope, -slope - jnp.where(inside, h / tau, 0), -slope * v * root * root)
