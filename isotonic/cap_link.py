"""The mask's link for p close to 1, where it is like a softmax: found by its upper end."""

from dataclasses import dataclass

import jax.numpy as jnp

from isotonic.links import Row, Step, Terms
from isotonic.powers import conjugate_exponent
from isotonic.rows import row_sum


@dataclass(frozen=True)
class CapLink:
    """h = clip(1 - v, 0, 1)^(q-1) at v = (c - x)/lam: `MaskLink` by its cap c = tau + lam.

    With a large q - 1 items count that lie within some lam/(q - 1) of the cap. There
    u = 1 - v is nearly 1, and its rounding, to the power of q - 1, costs as many digits as q - 1
    has; v keeps its own. The `tau` that `threshold` returns for this link is c.
    """

    p: float
    steep = False

    @property
    def exponent(self) -> float:
        return conjugate_exponent(self.p)  # q - 1

    def bracket(self, row: Row, lam):
        low, high = row.bounds(row.k)
        _, half = row.bounds(row.k / 2)
        # h <= exp(-(c - x)/width): k/2 items may lie above `half`, the others add up to k/2.
        soft = half + self._width(lam) * jnp.log(2 * row.n / row.k)
        e = self.exponent
        variance = e / ((e + 1) ** 2 * (e + 2))
        return low, jnp.minimum(high + lam, soft), row.normal_start(lam, -1 / (e + 1), variance)

    def terms(self, gap, tau, lam) -> Terms:
        lam = lam[..., None]
        v = -gap / lam
        inside = (v > 0) & (v < 1)
        h = jnp.exp(self.exponent * jnp.log1p(-jnp.clip(v, 0, 1)))
        v = jnp.where(inside, v, 0.5)
        slope = jnp.where(inside, self.exponent * (h / (1 - v)) / lam, 0)
        return Terms(h, slope, -slope, slope * v)

    def half_width(self, item, lam):
        return -self._width(lam) * jnp.log(2.0).astype(lam.dtype)

    def step(self, gap, tau, k, lam) -> Step:
        terms = self.terms(gap, tau, lam)
        whole = row_sum((gap >= 0).astype(gap.dtype))
        total = row_sum(jnp.where(gap < 0, terms.h, 0))
        rest, slope = k - whole, row_sum(terms.dx)
        solvable = (total > 0) & (rest > 0) & (slope > 0)
        # Newton's step for the logarithm, which is linear while the powers are exponentials.
        ratio = jnp.where(solvable, total, 1) / jnp.where(solvable, rest, 1)
        move = jnp.log(ratio) * total / jnp.where(solvable, slope, 1)
        noise = 2 * jnp.finfo(gap.dtype).eps * total
        move = jnp.where(solvable, move, jnp.nan)
        return Step(total - rest, noise, move, self._width(lam))

    def _width(self, lam):
        return lam * (self.p - 1)
