"""What every top-k operator does with its arguments: check them, and put the items last."""

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np


def check_norm(p):
    """Is p the exponent of a norm that has a conjugate?"""
    if not p > 1 or math.isinf(p):
        raise ValueError(f"p must be a finite number above 1, not {p}")


def whole(k):
    """k as a Python number, for the operators that cannot select a fraction of an item."""
    try:
        return operator.index(k)
    except TypeError:
        message = f"k must be a whole number, one for all rows and not traced; got {k}"
        raise ValueError(message) from None


def rows(x, k, strength, axis):
    """x `[..., n]`, its items last, k and lam `[...]`, in the solver's dtype; and the way back.

    Raises:
      ValueError: on scores of whole numbers, k outside (0, n] or strength <= 0 (where not traced).
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"scores must be floating point, not {x.dtype}")
    n = x.shape[axis]
    for name, value, low, high in (("k", k, 0, n), ("strength", strength, 0, math.inf)):
        if isinstance(value, jax.core.Tracer):
            continue
        value = np.asarray(value)
        if not ((value > low) & (value <= high)).all():
            limit = f" and at most {high}, the length of axis {axis}" if high < math.inf else ""
            raise ValueError(f"{name} must be above {low}{limit}; got {value}")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    items = jnp.moveaxis(x, axis, -1).astype(dtype)
    k, lam = (jnp.broadcast_to(jnp.asarray(a, dtype), items.shape[:-1]) for a in (k, strength))
    return items, k, lam, lambda y: jnp.moveaxis(y, -1, axis).astype(x.dtype)
