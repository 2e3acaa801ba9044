"""Defines a causal language model, with experts in chosen blocks."""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe.hosts.mesh import constrain
from moe.nn.attention import Places
from moe.nn.blocks import Blocks
from moe.nn.cross_entropy import soft_cap
from moe.nn.decoder_block import Context, DecoderBlock, GroupedQueryAttention, KeyValues
from moe.nn.layer import LayerReport, MoE
from moe.nn.mlp import Mlp
from moe.nn.rope import rope_angles
from moe.nn.skip import Skip
from routers import Tokens


class DecoderOutput(NamedTuple):
    """Holds what the last norm returns, each layer of experts' report by its block's number, and
    the caches if there were any."""

    hidden_BTD: jax.Array
    reports: dict[int, LayerReport]
    caches: dict[str, KeyValues] | None = None


class Decoder(nnx.Module):
    """Maps tokens [B, T] to hidden states [B, T, D], and these to logits.

    The logits of a batch can be the largest array of all: a loss takes `hidden_BTD` and `head()`
    to `moe.nn.cross_entropy`, and only who generates asks for `logits`.

    Args:
      vocab: V.
      width: D.
      block: (number, rngs) -> the block of that number, a `DecoderBlock`.
      kinds, scan, remat: of `moe.nn.blocks.Blocks`.
      kv_heads, head_dim: of the blocks' attention, for the caches and RoPE.
      rope_base: the larger, the slower the slowest turn.
      tied: whether the head is the embedding, transposed.
      softcap: of the logits, 0 for none.
      norm_eps: of the last norm.
      embed_scale: standard deviation of the embedding's and the head's initial values.
    """

    def __init__(
        self,
        *,
        vocab: int,
        width: int,
        block: Callable[[int, nnx.Rngs], nnx.Module],
        kinds: Sequence,
        scan: bool,
        remat: str,
        kv_heads: int,
        head_dim: int,
        rope_base: float = 10_000.0,
        tied: bool = True,
        softcap: float = 0.0,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
        embed_scale: float = 0.02,
        dtype,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.normal(embed_scale)
        table = init(rngs.params(), (vocab, width), jnp.float32)
        self.embedding = nnx.Param(table, axes=("vocab", "embed"))
        self.blocks = Blocks(block, kinds, scan=scan, remat=remat, key=rngs.params())
        self.norm = nnx.RMSNorm(width, epsilon=norm_eps, dtype=dtype, rngs=rngs)
        table = None if tied else init(rngs.params(), (width, vocab), jnp.float32)
        self.untied = None if tied else nnx.Param(table, axes=("embed", "vocab"))
        self.dropout = nnx.Dropout(dropout)
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.rope_base, self.softcap, self.dtype = rope_base, softcap, dtype

    def __call__(
        self,
        tokens_BT,
        *,
        segments=None,
        positions=None,
        mask=None,
        train: bool = False,
        key=None,
        caches=None,
    ) -> DecoderOutput:
        """Computes the hidden states, after the last norm.

        Args:
          segments: number of each token's document in its row [B, T], 0 on padding; None: one.
          positions: of each token in its document [B, T]; None: in its row.
          mask: [B], False on rows that are padding.
          key: seeds dropout and router noise.
          caches: of `init_cache` or an earlier call. A row then is one document, whose tokens
            stand at `positions` and see what earlier calls put before them.
        """
        if segments is None:
            segments = jnp.ones_like(tokens_BT)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        places = Places(segments, positions)
        angles = rope_angles(positions, self.head_dim, self.rope_base)
        context = Context(places, angles, Tokens(tokens_BT, positions))
        real_BT = segments > 0
        if mask is not None:
            real_BT &= mask[:, None]
        embed_key, blocks_key = (None, None) if key is None else jax.random.split(key)
        table = constrain(self.embedding[...], "vocab", None)
        x = table[tokens_BT].astype(self.dtype)
        x = constrain(x, "batch", None, None)
        x = self.dropout(x, deterministic=key is None, rngs=embed_key)
        told = {"context": context, "caches": caches}
        x, reports, caches = self.blocks(x, mask=real_BT, train=train, key=blocks_key, **told)
        return DecoderOutput(self.norm(x), reports, caches)

    def head(self):
        """Returns the kernel [D, V] of the logits, float32."""
        return self.embedding[...].T if self.untied is None else self.untied[...]

    def logits(self, hidden):
        """Returns the logits of hidden states [..., D], float32 [..., V]."""
        head = self.head().astype(hidden.dtype)
        out = jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)
        return soft_cap(out, self.softcap)

    def init_cache(self, batch: int, length: int) -> dict[str, KeyValues]:
        """Returns empty caches for rows of at most `length` tokens."""
        empty = jnp.zeros((batch, length, self.kv_heads, self.head_dim), self.dtype)
        passed = jnp.zeros((batch, length, 1, 1), bool)

        def cache(number: int) -> KeyValues:
            skips = getattr(getattr(self.blocks, str(number)), "skip", None) is not None
            return KeyValues(empty, empty, passed if skips else None)

        return self.blocks.caches(cache)


def window_of(number: int, window: int, global_every: int) -> int:
    """Returns how many tokens a query of a block sees, itself included; 0: all before it."""
    return 0 if global_every and (number + 1) % global_every == 0 else window


def build_decoder(
    *,
    vocab: int,
    width: int,
    depth: int,
    heads: int,
    mlp_dim: int,
    rngs: nnx.Rngs,
    kv_heads: int = 0,
    head_dim: int = 0,
    tokens: int = 0,
    expert_layers: Collection[int] = (),
    experts: Mapping | None = None,
    expert_dim: int = 0,
    shared_experts: int = 0,
    dense_dim: int = 0,
    skip_layers: Collection[int] = (),
    skip: Mapping | None = None,
    window: int = 0,
    global_every: int = 0,
    qk_norm: str = "head",
    attention_softcap: float = 0.0,
    attention: str = "auto",
    dropout: float = 0.0,
    norm_eps: float = 1e-6,
    scan: bool = True,
    remat: str = "none",
    dtype=jnp.float32,
    **settings,
) -> Decoder:
    """Builds a decoder of equal blocks, RMSNorm, RoPE and SwiGLU, no biases.

    The kernels that write to the residual stream begin smaller by sqrt(2 depth) (GPT-2).

    Args:
      kv_heads, head_dim: 0 for `heads` and for width / heads.
      tokens: of a row in training, from which experts get their capacity.
      expert_layers: numbers of the blocks whose feed-forward is a layer of experts.
      experts: settings of that `moe.nn.layer.MoE`, which is causal: router, settings, num_experts,
        capacity_factor, dispatch, ...
        None: dense layers of width `dense_dim` stand there.
      expert_dim: hidden width of an expert; 0 for mlp_dim.
      skip_layers: numbers of the blocks that tokens may skip, none of them with experts.
      skip: settings of their `moe.nn.skip.Skip`, which is causal.
      shared_experts: so many times expert_dim is the hidden width of the network that all tokens
        pass beside their experts.
      window: tokens that a query sees, but in each `global_every`-th block (0: in no block) all.
      norm_eps: of every RMSNorm.
      attention, attention_softcap: back end and soft-cap of `moe.nn.attention.attention`.
      settings: further ones of `Decoder`: rope_base, tied, softcap, embed_scale.
    """
    kv_heads, head_dim = kv_heads or heads, head_dim or width // heads
    expert_dim = expert_dim or mlp_dim
    kind = {"gated": True, "bias": False, "out_scale": 1 / math.sqrt(2 * depth)}

    def feed_forward(number: int, rngs: nnx.Rngs) -> nnx.Module:
        if number not in expert_layers or experts is None:
            hidden = dense_dim if number in expert_layers else mlp_dim
            return Mlp(width, hidden, **kind, dtype=dtype, rngs=rngs)
        shared = shared_experts * expert_dim
        settings = {"group_size": 1, "causal": True, "shared": shared, **kind, **experts}
        return MoE(width, expert_dim, tokens, **settings, dtype=dtype, rngs=rngs)

    def block(number: int, rngs: nnx.Rngs) -> DecoderBlock:
        attend = GroupedQueryAttention(
            width,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            qk_norm=qk_norm,
            window=window_of(number, window, global_every),
            softcap=attention_softcap,
            backend=attention,
            norm_eps=norm_eps,
            out_scale=kind["out_scale"],
            dtype=dtype,
            rngs=rngs,
        )
        feed = feed_forward(number, rngs)
        choose = functools.partial(Skip, width, tokens, **skip or {}, causal=True)
        chosen = choose if number in skip_layers else None
        rest = {"dropout": dropout, "norm_eps": norm_eps, "dtype": dtype, "rngs": rngs}
        return DecoderBlock(width, attend, feed, skip=chosen, **rest)

    def kind_of(number: int) -> tuple:
        skips = number in skip_layers
        return number in expert_layers, skips, window_of(number, window, global_every)

    return Decoder(
        vocab=vocab,
        width=width,
        block=block,
        kinds=[kind_of(number) for number in range(depth)],
        scan=scan,
        remat=remat,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dropout=dropout,
        norm_eps=norm_eps,
        dtype=dtype,
        rngs=rngs,
        **settings,
    )
