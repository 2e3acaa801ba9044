"""Computes attention block by block: the [T, S] matrix of weights never exists, on any device.

The softmax is accumulated over blocks of keys (Milakov and Gimelshein 2018; Rabe and Staats 2021)
and the backward pass computes each block's weights again from the logsumexp (Dao et al. 2022), so
that memory grows with T + S. Blocks that lie wholly in the future, or before the window, are never
visited; what a mask hides contributes exactly nothing, so no bit of it leaks.

Letters: B batch, T queries, S keys, H heads, K heads of keys, R = H / K, d width of a head; N
blocks of Q queries, M blocks of X keys.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Queries, and keys, of a block, whose weights are [B, H, block, block]: what a CPU's caches hold
# (256 takes 1.2 to 1.6 times as long there), and elsewhere what keeps a matrix unit busy.
BLOCK = {"cpu": 64}
OTHER_BLOCK = 256
_NEVER = -1e30  # below every logit, and finite: a row that sees nothing makes no NaN


class Setting(NamedTuple):
    """Holds what is static of a call."""

    window: int  # keys that a query sees, itself included; 0: all before it
    softcap: float
    ordered: bool  # queries and keys are the same tokens, in order
    queries: int  # Q
    keys: int  # X


def blockwise(q_BTHd, k_BSKd, v_BSKd, queries, keys, *, window, softcap, ordered, block: int):
    """Returns each query's mean of the values that it may see, [B, T, H, d].

    `queries` and `keys` are (segment, order), [B, T] and [B, S]: a query sees the keys of its own
    segment that are not later than itself and, with a window, fewer than `window` places before.
    """
    T, S = q_BTHd.shape[1], k_BSKd.shape[1]
    Q = min(block, T)
    X = Q if ordered else min(S, max(block, block * block // T))
    setting = Setting(window, softcap, ordered, Q, X)
    q_BTHd = _pad(q_BTHd, Q)
    k_BSKd, v_BSKd = _pad(k_BSKd, X), _pad(v_BSKd, X)
    # Padding of keys is in a segment that no query is in.
    queries, keys = (_pad(queries[0], Q), _pad(queries[1], Q)), (_pad(keys[0], X, -1), keys[1])
    keys = keys[0], _pad(keys[1], X)
    return _attend(setting, q_BTHd, k_BSKd, v_BSKd, queries, keys)[:, :T]


def _pad(a, multiple: int, value=0):
    """Returns the array with axis 1 filled up to a multiple."""
    a = jnp.asarray(a)
    missing = -a.shape[1] % multiple
    widths = [(0, missing) if axis == 1 else (0, 0) for axis in range(a.ndim)]
    return jnp.pad(a, widths, constant_values=value) if missing else a


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(setting: Setting, q_BTHd, k_BSKd, v_BSKd, queries, keys):
    return _forward(setting, q_BTHd, k_BSKd, v_BSKd, queries, keys)[0]


def _forward(setting: Setting, q_BTHd, k_BSKd, v_BSKd, queries, keys):
    """Returns the output and the logsumexp of each query's logits, [N, B, K, R, Q]."""
    q, k, v, rows, columns = _split(setting, q_BTHd, k_BSKd, v_BSKd, queries, keys)
    wide, shape = _wide(q), q.shape[1:]
    never = jnp.full(shape[:-1], _NEVER, wide)
    empty = never, jnp.zeros_like(never), jnp.zeros(shape, wide)

    def step(carry, pair):
        out, lse, state = carry
        i, j, first = pair
        largest, total, mean = jax.tree.map(lambda a, b: jnp.where(first, b, a), state, empty)
        logits, seen = _logits(setting, q[i], k[j], _at(rows, i), _at(columns, j))
        new = jnp.maximum(largest, jnp.where(seen, logits, _NEVER).max(-1))
        weights = jnp.exp(jnp.where(seen, logits - new[..., None], -jnp.inf))
        shrink = jnp.exp(largest - new)
        total = total * shrink + weights.sum(-1)
        mean = mean * shrink[..., None] + _sum("bkrqx,bkxd->bkrqd", weights, v[j], v.dtype)
        safe = jnp.where(total > 0, total, 1)
        out = out.at[i].set((mean / safe[..., None]).astype(out.dtype))
        return (out, lse.at[i].set(new + jnp.log(safe)), (new, total, mean)), None

    start = jnp.zeros_like(q), jnp.zeros(q.shape[:-1], wide), empty
    (out, lse, _), _ = lax.scan(step, start, _pairs(setting, len(q), len(k)))
    return _join(out, q_BTHd), lse


def _keep(setting, q_BTHd, k_BSKd, v_BSKd, queries, keys):
    out, lse = _forward(setting, q_BTHd, k_BSKd, v_BSKd, queries, keys)
    return out, (q_BTHd, k_BSKd, v_BSKd, queries, keys, out, lse)


def _backward(setting: Setting, kept, g_BTHd):
    """Returns the derivatives by q, k and v; sums are float32 or better.

    P are the R Q queries of a head of keys. Blocks of weights lie here as [B, K, X, P] and dq as
    [N, B, K, d, P]: each product reads them as they lie, where it would copy a turned one.
    """
    q_BTHd, k_BSKd, v_BSKd, queries, keys, out, lse = kept
    q, k, v, rows, columns = _split(setting, q_BTHd, k_BSKd, v_BSKd, queries, keys)
    g, wide, shape = _queries(g_BTHd, k, setting.queries), _wide(q), q.shape
    delta = (g.astype(wide) * _queries(out, k, setting.queries).astype(wide)).sum(-1)
    q, g = (a.reshape(*shape[:3], -1, shape[-1]) for a in (q, g))
    lse, delta = (a.reshape(*shape[:3], 1, -1) for a in (lse, delta))
    rows = [jnp.tile(a, shape[3]) for a in rows]

    def step(carry, pair):
        dq, dk, dv = carry
        i, j, _ = pair
        logits = _capped(setting, _sum("bkxd,bkpd->bkxp", k[j], q[i], k.dtype) * shape[-1] ** -0.5)
        seen = _seen(setting, _at(rows, i), _at(columns, j)).swapaxes(1, 2)[:, None]
        weights = jnp.exp(jnp.where(seen, logits - lse[i], -jnp.inf))
        dv = dv.at[j].add(_sum("bkxp,bkpd->bkxd", weights, g[i], g.dtype))
        slope = weights * (_sum("bkxd,bkpd->bkxp", v[j], g[i], v.dtype) - delta[i])
        if setting.softcap:
            slope *= 1 - (logits / setting.softcap) ** 2
        slope = (slope * shape[-1] ** -0.5).astype(q.dtype)
        dq = dq.at[i].add(_sum("bkxd,bkxp->bkdp", k[j], slope, k.dtype))
        dk = dk.at[j].add(_sum("bkxp,bkpd->bkxd", slope, q[i], q.dtype))
        return (dq, dk, dv), None

    start = tuple(jnp.zeros(a.shape, wide) for a in (q.swapaxes(-1, -2), k, v))
    (dq, dk, dv), _ = lax.scan(step, start, _pairs(setting, len(q), len(k)))
    dq = dq.swapaxes(-1, -2).reshape(shape)
    return _join(dq, q_BTHd), _join(dk, k_BSKd), _join(dv, v_BSKd), None, None


_attend.defvjp(_keep, _backward)


def _logits(setting: Setting, q, k, row, column):
    """Returns a block's logits [B, K, R, Q, X] and which of them count, [B, 1, 1, Q, X]."""
    logits = _capped(setting, _sum("bkrqd,bkxd->bkrqx", q, k, k.dtype) * q.shape[-1] ** -0.5)
    return logits, _seen(setting, row, column)[:, None, None]


def _capped(setting: Setting, logits):
    return setting.softcap * jnp.tanh(logits / setting.softcap) if setting.softcap else logits


def _seen(setting: Setting, row, column):
    """Returns which keys the queries of a block see, [B, Q, X]."""
    (segment, order), (other, place) = row, column
    back = order[:, :, None] - place[:, None, :]
    seen = (segment[:, :, None] == other[:, None, :]) & (back >= 0)
    return seen & (back < setting.window) if setting.window else seen


def _pairs(setting: Setting, N: int, M: int):
    """Returns the pairs (i, j) of a block of queries and one of keys that it may see, by i, and
    whether a pair is the first of its i."""
    pairs = []
    for i in range(N):
        see = range(M)
        if setting.ordered:
            first = max(0, i * setting.queries - setting.window + 1) if setting.window else 0
            see = range(first // setting.keys, i + 1)
        pairs += [(i, j, n == 0) for n, j in enumerate(see)]
    i, j, first = np.array(pairs).T
    return i.astype(np.int32), j.astype(np.int32), first.astype(bool)


def _split(setting, q_BTHd, k_BSKd, v_BSKd, queries, keys):
    """Returns all in blocks: q [N, B, K, R, Q, d], k and v [M, B, K, X, d], places [N, B, Q]."""
    k, v = (_blocks(a, setting.keys).transpose(1, 0, 3, 2, 4) for a in (k_BSKd, v_BSKd))
    rows = [_blocks(a, setting.queries).swapaxes(0, 1) for a in queries]
    columns = [_blocks(a, setting.keys).swapaxes(0, 1) for a in keys]
    return _queries(q_BTHd, k, setting.queries), k, v, rows, columns


def _queries(a_BTHd, k, size: int):
    """Returns queries, or what is like them, [N, B, K, R, Q, d]."""
    B, T, H, d = a_BTHd.shape
    K = k.shape[2]
    return a_BTHd.reshape(B, T // size, size, K, H // K, d).transpose(1, 0, 3, 4, 2, 5)


def _blocks(a, size: int):
    return a.reshape(a.shape[0], a.shape[1] // size, size, *a.shape[2:])


def _join(a, like):
    """Returns blocks [N, B, K, R, Q, d] or [M, B, K, X, d] as the array that they were cut from."""
    a = a if a.ndim == 6 else a[:, :, :, None]
    return a.transpose(1, 0, 4, 2, 3, 5).reshape(like.shape).astype(like.dtype)


def _at(places, i):
    return [a[i] for a in places]


def _sum(equation: str, a, b, dtype):
    """Returns an einsum of factors of a dtype, added up in float32 or better."""
    return jnp.einsum(equation, a.astype(dtype), b, preferred_element_type=_wide(b))


def _wide(a):
    return jnp.promote_types(a.dtype, jnp.float32)
