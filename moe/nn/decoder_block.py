"""Defines a decoder's block: grouped-query attention that sees no future, then a feed-forward."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe.hosts.mesh import constrain
from moe.nn.attention import Places, attention
from moe.nn.mlp import scaled_normal
from moe.nn.rope import rotate
from routers import Tokens

QK_NORMS = ("head", "all", "none")


class Context(NamedTuple):
    """Says of the tokens what every block needs."""

    places: Places
    angles: tuple[jax.Array, jax.Array]  # of `moe.nn.rope`, for the positions
    tokens: Tokens


class KeyValues(NamedTuple):
    """Holds the keys and values of a row's tokens so far: slot s is the token at position s.

    In a block that tokens may skip, `passed` says which of them did not; it has as many axes as
    keys, so that all of a cache lies alike.
    """

    k_BSKd: jax.Array
    v_BSKd: jax.Array
    passed_BS11: jax.Array | None = None


class GroupedQueryAttention(nnx.Module):
    """Maps [B, T, D] to [B, T, D] by H heads of queries and K of keys and values, without biases.

    Args:
      qk_norm: RMSNorm of queries and keys before they are turned: of each "head" (Qwen3), of "all"
        heads as one vector (OLMoE), or "none" (Llama, Mixtral).
      window: tokens that a query sees, itself included; 0: all before it.
      norm_eps: of the norms of queries and keys.
      softcap, backend: of `moe.nn.attention.attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        qk_norm: str = "head",
        window: int = 0,
        softcap: float = 0.0,
        backend: str = "auto",
        norm_eps: float = 1e-6,
        out_scale: float = 1.0,
        dtype,
        rngs: nnx.Rngs,
    ):
        if heads % kv_heads or head_dim % 2 or qk_norm not in QK_NORMS:
            raise ValueError(
                f"{heads=} must be a multiple of {kv_heads=}, {head_dim=} even and {qk_norm=} one "
                f"of {', '.join(QK_NORMS)}"
            )
        common = {"use_bias": False, "dtype": dtype, "rngs": rngs}
        into = {"kernel_metadata": {"axes": ("embed", "heads", None)}}
        self.query = nnx.LinearGeneral(dim, (heads, head_dim), **common, **into)
        self.key = nnx.LinearGeneral(dim, (kv_heads, head_dim), **common, **into)
        self.value = nnx.LinearGeneral(dim, (kv_heads, head_dim), **common, **into)
        self.out = nnx.LinearGeneral(
            (heads, head_dim),
            dim,
            axis=(-2, -1),
            kernel_init=scaled_normal(out_scale),
            kernel_metadata={"axes": ("heads", None, "embed")},
            **common,
        )

        def norm(heads: int) -> nnx.RMSNorm | None:
            features = {"head": 1, "all": heads, "none": 0}[qk_norm] * head_dim
            kind = {"epsilon": norm_eps, "dtype": dtype, "rngs": rngs}
            return nnx.RMSNorm(features, **kind) if features else None

        self.query_norm, self.key_norm = norm(heads), norm(kv_heads)
        self.qk_norm, self.window, self.softcap, self.backend = qk_norm, window, softcap, backend

    def __call__(self, x_BTD, context: Context, cache: KeyValues | None = None):
        """Returns [B, T, D] and, of a cache, the one with these tokens in their positions' slots.

        With a cache, a row is one document: segments then tell its tokens (1) from padding (0).
        """
        q = rotate(self._norm(self.query_norm, self.query(x_BTD)), context.angles)
        k = rotate(self._norm(self.key_norm, self.key(x_BTD)), context.angles)
        v, keys = self.value(x_BTD), None
        if cache is not None:
            passed = None
            if cache.passed_BS11 is not None:
                passed = (context.places.segment > 0)[..., None, None]
            cache = write(cache, KeyValues(k, v, passed), context.places.position)
            k, v, passed = cache
            slot = jnp.arange(k.shape[1], dtype=jnp.int32)
            slot_BS = jnp.broadcast_to(slot, k.shape[:2])
            keys = Places(jnp.ones_like(slot_BS), slot_BS)
            if passed is not None:  # no query is in segment -1
                keys = Places(jnp.where(passed[..., 0, 0], 1, -1), slot_BS)
        options = {"window": self.window, "softcap": self.softcap, "backend": self.backend}
        return self.out(attention(q, k, v, context.places, keys, **options)), cache

    def _norm(self, norm: nnx.RMSNorm | None, x_BTHd):
        if norm is None:
            return x_BTHd
        if self.qk_norm == "head":
            return norm(x_BTHd)
        return norm(x_BTHd.reshape(*x_BTHd.shape[:2], -1)).reshape(x_BTHd.shape)


def write(cache: KeyValues, new: KeyValues, position_BT) -> KeyValues:
    """Puts the keys and values of tokens in their positions' slots; past the end they are lost."""
    row = jnp.arange(len(position_BT))[:, None]

    def put(old, new):
        return old.at[row, position_BT].set(new.astype(old.dtype), mode="drop")

    return jax.tree.map(put, cache, new)


class DecoderBlock(nnx.Module):
    """Computes a pre-norm block, x + attention(norm(x)) and then x + feed_forward(norm(x)).

    `feed_forward` is an `Mlp` or a `MoE`; `context` is a `Context`, a cache `KeyValues`; `skip`
    makes the `moe.nn.skip.Skip` by which tokens go around the block, None: all pass it.
    """

    def __init__(self, dim: int, attention: nnx.Module, feed_forward: nnx.Module, *, dropout=0.0,
                 norm_eps=1e-6, skip: Callable | None = None, dtype, rngs: nnx.Rngs):  # fmt: skip
        norm = {"epsilon": norm_eps, "dtype": dtype, "rngs": rngs}
        self.norm_attention = nnx.RMSNorm(dim, **norm)
        self.attention = attention
        self.norm_feed_forward = nnx.RMSNorm(dim, **norm)
        self.feed_forward = feed_forward
        self.dropout = nnx.Dropout(dropout)
        # The last, so that its draws move nobody else's.
        self.skip = None if skip is None else skip(rngs=rngs)

    def __call__(self, x, **told):
        return self.whole(x, **told) if self.skip is None else self.skip(self, x, **told)

    def whole(self, x, *, mask, train, key, context: Context, cache=None, **told):
        """Computes the block for all tokens."""
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        x = constrain(x, "batch", None, None)
        out, cache = self.attention(self.norm_attention(x), context, cache)
        x += self._drop(out, keys[0])
        x_in, told = self.norm_feed_forward(x), told | {"tokens": context.tokens}
        out, report = self.feed_forward(x_in, mask=mask, train=train, key=keys[1], **told)
        return x + self._drop(out, keys[2]), report, cache

    def among(self, context: Context, taken, place=None) -> Context:
        """Returns the context in which tokens see those that are taken.

        Tokens that are not take the segment of padding; `place` says where in the row each token
        stands, where these are not all of it.
        """
        segment, position, _ = context.places
        places = Places(jnp.where(taken, segment, 0), position, place)
        return context._replace(places=places)

    def _drop(self, x, key):
        return self.dropout(x, deterministic=key is None, rngs=key)
