"""Compresses the gradients of workers to their largest entries, with memories that make up for it.

Each worker w sends C(x), the k entries of largest magnitude of a vector x that it alone knows: k
values and k places for n numbers. C is a contraction, |x - C(x)|^2 <= (1 - k/n) |x|^2, but the mean
of what C keeps of several gradients may point anywhere: without a memory, descent on three
quadratics diverges at any learning rate. The methods differ in what C sees:

  method   sent                the memory that a worker keeps    the gradient that all use
  none     d = C(g)            nothing                           mean d
  ef       d = C(g + e)        e <- g + e - d                    mean d
  ef21     d = C(g - h)        h <- h + d                        m <- m + mean d, the mean of h

Seide et al. 2014 and Karimireddy et al. 2019 for error feedback; Richtarik et al. 2021 for EF21. In
their code e is in units of the step, learning rate times gradient; here all is in units of the
gradient, so that what comes after, clipping and any optimizer, needs to know nothing of it.

Vectors are rows [..., n] of the last axis; workers may be one more axis before it, or devices.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from routers.selection import largest


class Sent(NamedTuple):
    """Holds what a worker sends of a row: k values and their places, in increasing order."""

    values: jax.Array  # [..., k]
    places: jax.Array  # [..., k], int32


def count(n: int, keep: float) -> int:
    """Returns k, a share `keep` of n rounded up: at least 1."""
    return max(1, min(n, math.ceil(round(keep * n, 6))))  # 0.1 * 30 is 3.0000000000000004


def top(x, k: int) -> tuple[Sent, jax.Array]:
    """Returns C(x), the k entries of largest magnitude of each row, and x - C(x).

    Of equal magnitudes the first are kept; NaN counts as larger than any. The threshold is found by
    counts along the row (`routers.selection.largest`), never by a sort.

    Args:
      x: rows [..., n], float32 or float64.
      k: from 1 to n, static.
    """
    kept = largest(jnp.abs(x), k)
    order = jnp.cumsum(kept, axis=-1, dtype=jnp.int32)
    find = jnp.vectorize(jnp.searchsorted, signature="(n),(k)->(k)")
    places = find(order, jnp.arange(1, k + 1, dtype=jnp.int32)).astype(jnp.int32)
    return Sent(jnp.take_along_axis(x, places, -1), places), jnp.where(kept, 0, x)


def none(g, memory, k: int) -> tuple[Sent, jax.Array]:
    """Returns C(g), and the memory as it was: what is left out is lost."""
    return top(g, k)[0], memory


def ef(g, e, k: int) -> tuple[Sent, jax.Array]:
    """Returns C(g + e) and the new e: what is left out is sent later."""
    return top(g + e, k)


def ef21(g, h, k: int) -> tuple[Sent, jax.Array]:
    """Returns C(g - h) and the new h, which follows g; all workers follow the mean of h."""
    change = g - h
    sent, rest = top(change, k)
    return sent, h + (change - rest)


METHODS: dict[str, Callable] = {"ef": ef, "ef21": ef21}


def mean(sent: Sent, n: int) -> jax.Array:
    """Returns the mean [..., n] over workers, the first axis of what they sent.

    One worker is added after the other: scattered additions of several to one place have no fixed
    order on every device, and copies of a model would drift apart.
    """
    workers, *rows = sent.values.shape[:-1]

    def row(values, places):
        def add(total, one):
            values, places = one
            kinds = {"unique_indices": True, "indices_are_sorted": True}
            return total.at[places].add(values, **kinds), None

        return jax.lax.scan(add, jnp.zeros(n, values.dtype), (values, places))[0] / workers

    for _ in rows:
        row = jax.vmap(row, in_axes=1)
    return row(*sent)
