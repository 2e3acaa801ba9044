"""Powers u^(q-1) of non-negative numbers, their slopes, and the exponent that goes with p."""

from functools import partial

import jax
import jax.numpy as jnp


def conjugate_exponent(p: float) -> float:
    """q - 1 = 1/(p - 1), exactly whole where rounding of p (as in 4/3) alone makes it not so."""
    exponent = 1 / (p - 1)
    return float(round(exponent)) if abs(exponent - round(exponent)) < 1e-9 else exponent


def power(u, exponent: float):
    """Returns u ** exponent, u >= 0; small whole exponents and roots by the cheap instruction."""
    if exponent == 0.5:
        return jnp.sqrt(u)
    whole = round(exponent)
    if abs(exponent - whole) < 1e-9 and whole <= 8:  # 1/(p-1) is 3.0000000000000007 for p = 4/3
        return jax.lax.integer_pow(u, whole)
    return u**exponent


def power_slope(u, exponent: float):
    """Returns the derivative of `power`, finite: for exponent < 1 it diverges at 0, so u >= eps.

    The exact Jacobians of the operators stay bounded as one item enters the support (its weight
    cancels in the weighted mean that is subtracted), so the floor costs nothing but infinities.
    """
    if exponent < 1:
        u = jnp.maximum(u, jnp.finfo(u.dtype).eps)
    return exponent * power(u, exponent - 1)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def signed_power(u, exponent: float):
    """Returns sign(u) |u| ** exponent, with a finite derivative everywhere."""
    size = jnp.abs(u)
    return jnp.sign(u) * jnp.where(size > 0, power(jnp.where(size > 0, size, 1), exponent), 0)


@signed_power.defjvp
def _signed_power_jvp(exponent, primals, tangents):
    (u,), (du,) = primals, tangents
    return signed_power(u, exponent), power_slope(jnp.abs(u), exponent) * du
