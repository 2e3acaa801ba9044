"""The paper's own way to the relaxed mask: sort, 500 sweeps of Dykstra's projections, unsort.

Sander et al. (ICML 2023) run a fixed number of sweeps and stop, converged or not.
"""

from functools import partial

import jax
import jax.numpy as jnp

from isotonic.blocks import block_sum
from isotonic.dykstra import dykstra

SWEEPS = 500


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def dykstra_fit(y, sweeps=SWEEPS):
    """Returns the decreasing fit to y `[..., n]` after that many sweeps, whatever its residual."""
    return dykstra(y, jnp.ones_like(y), tol=0.0, max_iter=sweeps).v


def _forward(y, sweeps):
    fit = dykstra(y, jnp.ones_like(y), tol=0.0, max_iter=sweeps)
    return fit.v, fit.block


def _backward(sweeps, block, c):
    return (block_sum(c, block) / block_sum(jnp.ones_like(c), block),)


dykstra_fit.defvjp(_forward, _backward)


def dykstra_mask(x, k, sweeps=SWEEPS):
    """Returns the relaxed top-k mask of x `[..., n]` for p = 2 and strength 1."""
    order = jnp.argsort(-x, axis=-1)
    s = jnp.take_along_axis(x, order, -1)
    w = (jnp.arange(x.shape[-1]) < k).astype(x.dtype)
    y = s - dykstra_fit(s - w, sweeps)
    return jnp.take_along_axis(y, jnp.argsort(order, axis=-1), -1)
