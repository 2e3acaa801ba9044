"""Calls the TPU's attention kernel of JAX, which skips the blocks that its mask hides whole."""

import jax
import jax.numpy as jnp

LANES = 128


def obstacle(tokens: int) -> str:
    """Says why rows of this length cannot be attended; "" if they can."""
    return "" if tokens % LANES == 0 else f"rows of {tokens} tokens are no multiple of {LANES}"


def splash(q_BTHd, k_BTKd, v_BTKd, segment_BT, *, window, softcap, interpret=False):
    """Returns what `moe.nn.attention.attention` does, for rows that attend themselves."""
    # Only who attends on a TPU pays for the import of Pallas.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        LocalMask,
        MultiHeadMask,
        SegmentIds,
        make_splash_mha,
    )

    _, T, H, d = q_BTHd.shape
    mask = LocalMask((T, T), (window - 1, 0), 0) if window else CausalMask((T, T))
    block = next(size for size in (512, 384, 256, LANES) if T % size == 0)
    sizes = BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = make_splash_mha(
        MultiHeadMask([mask] * H),
        block_sizes=sizes,
        attn_logits_soft_cap=softcap or None,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q = (q_BTHd.astype(jnp.float32) * d**-0.5).astype(q_BTHd.dtype)
    q, k, v = (a.swapaxes(1, 2) for a in (q, k_BTKd, v_BTKd))
    out = jax.vmap(kernel)(q, k, v, SegmentIds(segment_BT, segment_BT))
    return out.swapaxes(1, 2)
