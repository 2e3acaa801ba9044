"""Compares derivatives with finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def check_derivatives(f, point, *, step=1e-5, rtol=1e-6, atol=1e-6):
    """Asserts that forward and reverse derivatives of a scalar f are its central differences.

    In float64, differences of `step` 1e-5 have an error of 1e-10 by truncation and 1e-11 by
    rounding. Two programs are compiled, which is what such a test costs.
    """
    flat, build = ravel_pytree(tuple(jnp.asarray(a, jnp.float64) for a in point))
    moves = step * jnp.eye(flat.size)
    g = lambda flat: f(*build(flat))  # noqa: E731
    up, down = jax.jit(jax.vmap(g))(jnp.concatenate([flat + moves, flat - moves])).reshape(2, -1)
    forward, reverse = jax.jit(lambda flat: (jax.jacfwd(g)(flat), jax.grad(g)(flat)))(flat)
    for slopes in (forward, reverse):
        np.testing.assert_allclose(slopes, (up - down) / (2 * step), rtol=rtol, atol=atol)
