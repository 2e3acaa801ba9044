"""Turns queries and keys by their positions (RoPE, Su et al. 2021)."""

import jax.numpy as jnp


def rope_angles(position_BT, head_dim: int, base: float):
    """Returns cosines and sines of position * base^(-2i/d), each [B, T, d/2] in float32."""
    frequency = base ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = position_BT[..., None].astype(jnp.float32) * frequency[None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHd, angles):
    """Turns each pair (x[i], x[i + d/2]) by its position's angle i.

    Pairs are halves apart, as in Hugging Face's Llama and Qwen, not neighbours as in the paper.
    """
    cos, sin = (a[:, :, None] for a in angles)
    a, b = jnp.split(x_BTHd.astype(cos.dtype), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTHd.dtype)
