"""Hard selections that a compiler splits over devices by rows, which it does not for `lax.top_k`.

On CPU (and wherever else top-k is one opaque call) XLA gathers the whole operand of `lax.top_k` on
every device; maxima, sorts and cumulative sums stay where their rows are. Ties go to the first,
as there; entries are finite.
"""

import jax
import jax.numpy as jnp

ROUNDS = 8  # maxima one after the other, up to here; beyond it sorts are cheaper


def ranks(x, k: int):
    """Returns each entry's place among the k largest of the last axis, from 0; k for the others.

    Returns int32 of x's shape.
    """
    if k > ROUNDS:
        order = jnp.argsort(-x, axis=-1)
        return jnp.minimum(jnp.argsort(order, axis=-1), k).astype(jnp.int32)
    rank = jnp.full(x.shape, k, jnp.int32)
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    for place in range(k):
        best = jnp.argmax(jnp.where(rank < k, -jnp.inf, x), axis=-1, keepdims=True)
        rank = jnp.where(index == best, place, rank)
    return rank


def largest(x, k: int):
    """Whether each entry is among the k largest of the last axis, bool of x's shape."""
    kth = jnp.sort(x, axis=-1)[..., -k, None]
    above, tie = x > kth, x == kth
    room = k - above.sum(-1, keepdims=True)
    return above | (tie & (jnp.cumsum(tie, axis=-1) <= room))
