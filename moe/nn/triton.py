"""Calls the GPU's attention kernel of JAX, Pallas compiled by Triton, which knows documents."""

import jax.numpy as jnp

BLOCK = 128  # queries, and keys, that one program of the kernel holds


def obstacle(tokens: int, window: int, softcap: float) -> str:
    """Says why such rows cannot be attended; "" if they can."""
    if window or softcap:
        return "it has neither windows nor caps of logits"
    return "" if tokens % BLOCK == 0 else f"rows of {tokens} tokens are no multiple of {BLOCK}"


def triton(q_BTHd, k_BTKd, v_BTKd, segment_BT, *, interpret=False):
    """Returns what `moe.nn.attention.attention` does, for rows that attend themselves."""
    # Only who attends on a GPU pays for the import of Pallas.
    from jax.experimental.pallas.ops.gpu.attention import mha

    H, d = q_BTHd.shape[2:]
    k_BTHd, v_BTHd = (jnp.repeat(a, H // a.shape[2], 2) for a in (k_BTKd, v_BTKd))
    return mha(
        q_BTHd, k_BTHd, v_BTHd, segment_BT, sm_scale=d**-0.5, causal=True, interpret=interpret
    )
