"""Hard selections that a compiler splits over devices by rows, which it does not for `lax.top_k`.

On CPU (and wherever else top-k is one opaque call) XLA gathers the whole operand of `lax.top_k` on
every device; maxima, counts and cumulative sums stay where their rows are. Ties go to the first,
as there; entries are finite, but for those of `kth_value`.
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


def kth_value(x, k: int):
    """Returns the k-th largest entry of the last axis; NaN where all entries are."""
    if k > ROUNDS:
        return jax.lax.top_k(x, k)[0][..., -1]
    # A CPU's `top_k` sorts, which costs more than a few maxima.
    value = jnp.where(ranks(x, k) == k - 1, x, 0).sum(-1)
    return jnp.where((x == -jnp.inf).sum(-1) > x.shape[-1] - k, -jnp.inf, value)


def first_choices_first(rank_GTE):
    """Returns priorities that fill slots with all tokens' first choices, then all second ones, each
    in the order of the tokens."""
    tokens = rank_GTE.shape[1]
    return -(rank_GTE * tokens + jnp.arange(tokens)[None, :, None])


def best_groups(scores, groups: int, best: int):
    """Whether each entry of the last axis is in one of its row's `best` groups of neighbours.

    A group's score is the sum of its two highest entries (DeepSeek-V3, arXiv 2412.19437).
    """
    grouped = scores.reshape(*scores.shape[:-1], groups, -1)
    highest = jnp.where(ranks(grouped, 2) < 2, grouped, 0).sum(-1)
    chosen = ranks(highest, best) < best
    return jnp.broadcast_to(chosen[..., None], grouped.shape).reshape(scores.shape)


def largest(x, k: int):
    """Whether each entry is among the k largest of the last axis, bool of x's shape.

    A search for the k-th largest by the bits of floats, from the highest, two a pass: counts along
    rows, many times cheaper than a sort. The last pass compares within the loop, on the very
    numbers that were counted: computed again, in another fusion, the k-th could differ from itself
    by a rounding and be lost.
    """
    key, digits = _ordered(x), 2
    passes = 8 * key.dtype.itemsize // digits
    step = jnp.arange(1, 2**digits, dtype=key.dtype)[(None,) * (key.ndim - 1)]

    def narrow(i, carry):
        key, kth = carry  # the k-th largest is at least `kth`, in its bits so far
        unit = (digits * (passes - 1 - i)).astype(key.dtype)
        tried = kth[..., None] + (step << unit)
        enough = (key[..., None] >= tried[..., None, :]).sum(-2) >= k
        kth += enough.sum(-1, dtype=key.dtype) << unit
        return jnp.where(i == passes - 1, _compare(key, kth[..., None]), key), kth

    least = jnp.full_like(key[..., 0], jnp.iinfo(key.dtype).min)
    sign, _ = jax.lax.fori_loop(0, passes, narrow, (key, least))
    above, tie = sign > 0, sign == 0
    room = k - above.sum(-1, keepdims=True)
    return above | (tie & (jnp.cumsum(tie, axis=-1) <= room))


def _ordered(x):
    """Returns integers in the order of the floats x; 0 and -0 are one."""
    x = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.int64 if x.dtype == jnp.float64 else jnp.int32)
    return jnp.where(bits < 0, jnp.iinfo(bits.dtype).min - bits, bits)


def _compare(a, b):
    """Returns 1 where a > b, 0 where they are equal, -1 elsewhere, of a's type."""
    return (a > b).astype(a.dtype) - (a < b).astype(a.dtype)
