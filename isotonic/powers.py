"""Powers u^(q-1) of non-negative numbers, their slopes, and the exponent that goes with p."""

from functools import partial

import jax
import jax.numpy as jnp


def conjugate_exponent(p: float) -> float:
    """q - 1 = 1/(p - 1), exactly whole where rounding of p (as in 4/3) alone makes it not so."""
    exponent = 1 / (p - 1)
    return float(round(exponent)) if abs(exponent - round(exponent)) < 1e-9 else exponent


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
