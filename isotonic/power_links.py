"""The links of the p-norm relaxations: the top-k mask and top-k in magnitude.

Sander et al., "Fast, Differentiable and Sparse Top-k" (ICML 2023), with p > 1 and q = p/(p - 1).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from isotonic.links import Row, Step, Terms
from isotonic.powers import conjugate_exponent, power, power_slope
from isotonic.rows import count_inside, row_total


class PowerLink:
    """What the two links share: items strictly inside the link are powers u^(q-1) of 0 < u < 1.

    Steep ones, of p > 2, have more, for `isotonic.steep`: `slopes`, their terms from h; `cap`, what
    divides the power y of the lowest selected item, and its derivative in y; and `passes`.
    """

    p: float

    @property
    def exponent(self) -> float:
        return conjugate_exponent(self.p)  # q - 1

    @property
    def steep(self) -> bool:
        return self.exponent < 1

    @property
    def noise(self) -> tuple[float, float]:
        """Returns mean and variance of the V in [0, 1] with P(V < u) = u^(q-1)."""
        e = self.exponent
        return e / (e + 1), e / ((e + 1) ** 2 * (e + 2))

    def _step(self, u, floor, k, width, pull) -> Step:
        """Makes a step from u `[..., n]`, h = max(u^(q-1), floor) inside the link."""
        v = jnp.where(u < 1, jnp.maximum(u, 0), 0)  # u inside the link, else 0
        e = self.exponent
        count, whole = count_inside(u)
        rest = k - whole  # what the items inside have to add up to
        solvable = (count > 0) & (rest > 0)
        safe = jnp.where(solvable, count, 1)
        h = power(v, e)
        total = row_total(h if floor is None else jnp.where(v > 0, jnp.maximum(h, floor), 0))
        if e in (1, 2, 3):
            means = [*(row_total(power(v, j)) / safe for j in range(1, int(e))), total / safe]
            shift = _active_set_root(means, jnp.where(solvable, rest, 0) / safe, pull)
        else:
            slope = row_total(jnp.where(v > 0, power_slope(jnp.where(v > 0, v, 0.5), e), 0))
            # Newton's step for total^(1/(q-1)), which is linear in u if all items are equal.
            solvable &= (total > 0) & (slope > 0)
            safe = jnp.where(solvable, total, 1)
            ratio = power(jnp.where(solvable, rest, 0) / safe, 1 / e)
            shift = e * (ratio - 1) / jnp.where(solvable, slope / safe + ratio * pull, 1)
        excess = total - rest
        move = jnp.where(solvable, -shift * width, jnp.nan)
        return Step(excess, 2 * jnp.finfo(u.dtype).eps * total, move, width / (1 + pull))


def _active_set_root(means, rest, pull):
    """Returns delta with  mean (u_i + delta)^e = rest (1 - pull delta)  over items in the link.

    The exact root if no item enters or leaves. `means` are those of u, ..., u^e, e <= 3. About
    the mean m of u + delta, with central moments m2 and m3, the three equations are
      m = c - b m,    m^2 + m2 = c - b m,    m^3 + 3 m2 m + m3 = c - b m,
    with b = rest pull and c = rest + b mean(u).
    """
    first = means[0]
    b = rest * pull
    c = rest + b * first
    if len(means) == 1:
        return c / (1 + b) - first
    m2 = jnp.maximum(means[1] - first**2, 0)
    if len(means) == 2:
        c = jnp.maximum(c - m2, 0)
        root = b + jnp.sqrt(b**2 + 4 * c)
        return 2 * c / jnp.where(root > 0, root, 1) - first
    m3 = means[2] - 3 * first * means[1] + 2 * first**3
    a, c = 3 * m2 + b, c - m3  # m^3 + a m = c
    # Both are above the root and one of them not far; three of Halley's steps, no cube root.
    c = jnp.maximum(c, jnp.finfo(c.dtype).tiny)
    m = jnp.minimum(jnp.exp(jnp.log(c) / 3), c / jnp.maximum(a, jnp.finfo(c.dtype).tiny))

    def halley(_, m):
        value, slope = (m**2 + a) * m - c, 3 * m**2 + a
        bend = 2 * slope**2 - 6 * m * value
        return m - 2 * value * slope / jnp.where(bend > 0, bend, 1)

    # A loop, lest XLA fuses three unrolled steps into each of the root's users.
    return jax.lax.fori_loop(0, 3, halley, m) - first


@dataclass(frozen=True)
class MaskLink(PowerLink):
    """Is F(u) = clip(u, 0, 1)^(q-1), u = (x - tau)/lam: the top-k mask relaxed by a p-norm."""

    p: float
    passes = 12  # of a search that only has to tell where about the root of a steep link is

    def bracket(self, row: Row, lam):
        low, high = row.bounds(row.k)
        # And as if all items were inside the link, none further than the sum of deviations.
        u = lam * (row.k / row.n) ** (self.p - 1)
        least, _ = row.bounds(row.n - 1)
        _, most = row.bounds(1)
        return (
            jnp.maximum(low - lam, least - u),
            jnp.minimum(high, most - u),
            row.normal_start(lam, *self.noise),
        )

    def terms(self, gap, tau, lam) -> Terms:
        lam = lam[..., None]
        u = gap / lam
        inside = (u > 0) & (u < 1)
        v = jnp.where(inside, u, 0.5)
        h = power(jnp.clip(u, 0, 1), self.exponent)
        slope = jnp.where(inside, power_slope(v, self.exponent) / lam, 0)
        return Terms(h, slope, -slope, -slope * v)

    def slopes(self, h, tau, lam) -> Terms:
        inside = (h > 0) & (h < 1)
        v = power(jnp.where(inside, h, 0.5), self.p - 1)
        slope = jnp.where(inside, power_slope(v, self.exponent) / lam[..., None], 0)
        return Terms(h, slope, -slope, -slope * v)

    def cap(self, item, y, lam):
        return jnp.ones_like(y), jnp.zeros_like(y)

    def half_width(self, item, lam):
        return lam / 2

    def step(self, gap, tau, k, lam) -> Step:
        return self._step(gap / lam[..., None], None, k, lam, 0.0)


@dataclass(frozen=True)
class MagnitudeLink(PowerLink):
    """Is h = min( ((a - tau)_+/lam)^(q-1) / tau, 1 ), a = |x| >= 0, tau > 0: top-k in magnitude.

    With y the regularised solution on a coordinate, h = y/tau where the coordinate is shrunk, and
    1 where it is kept whole. Computed as the mask's link of width lam tau^(p-1), whose powers stay
    in the float range at every scale of a.
    """

    p: float
    passes = 60  # as for the mask, but where tau is far below the items no other root is as good

    def bracket(self, row: Row, lam):
        _, high = row.bounds(row.k)
        quantile = jnp.clip(row.normal_start(0.0, 0.0, 0.0), row.mean / 8, high)
        return jnp.zeros_like(high), high, quantile - self.half_width(quantile, lam)

    def half_width(self, item, lam):
        item = jnp.maximum(item, jnp.finfo(item.dtype).tiny)
        half = self._width(item, lam)[0] / 2
        return half / (1 + half / item)

    def _width(self, tau, lam):
        """lam tau^(p-1) by its root: the power itself may overflow where the width does not.

        For p = 2 there is none, and twice the scores have to the bit twice the threshold.
        """
        root = power(tau, (self.p - 1) / 2)
        return lam * tau if self.p == 2 else lam * root * root, root

    def terms(self, gap, tau, lam) -> Terms:
        u, tau, width, root = self._unit(gap, tau[..., None], lam[..., None])
        inside = (u > 0) & (u < 1)
        v = jnp.where(inside, u, 0.5)
        # y >= tiny, so that a root tau below it is found at it, with h > 0 wherever a > tau.
        floor = jnp.finfo(gap.dtype).tiny / tau
        h = jnp.where(inside, jnp.maximum(power(v, self.exponent), floor), jnp.clip(u, 0, 1))
        return self._slopes(h, inside, v, tau, width, root)

    def slopes(self, h, tau, lam) -> Terms:
        tau = jnp.maximum(tau, jnp.finfo(h.dtype).tiny)[..., None]
        inside = (h > 0) & (h < 1)
        v = power(jnp.where(inside, h, 0.5), self.p - 1)
        return self._slopes(h, inside, v, tau, *self._width(tau, lam[..., None]))

    def _slopes(self, h, inside, v, tau, width, root) -> Terms:
        # Bounded: sums of slopes over the row must not overflow either.
        slope = jnp.minimum(power_slope(v, self.exponent) / width, jnp.finfo(h.dtype).max / 1e8)
        slope = jnp.where(inside, slope, 0)
        return Terms(h, slope, -slope - jnp.where(inside, h / tau, 0), -slope * v * root * root)

    def cap(self, item, y, lam):
        power_ = power(y, self.p - 2)
        return item - lam * (power_ * y), -lam * (self.p - 1) * power_

    def step(self, gap, tau, k, lam) -> Step:
        u, tau, width, _ = self._unit(gap, tau[..., None], lam[..., None])
        floor = jnp.finfo(gap.dtype).tiny / tau
        width, tau = width[..., 0], tau[..., 0]
        return self._step(u, floor, k, width, width / tau)

    def _unit(self, gap, tau, lam):
        tau = jnp.maximum(tau, jnp.finfo(gap.dtype).tiny)
        width, root = self._width(tau, lam)
        return jnp.where(gap <= 0, 0, gap / width), tau, width, root
