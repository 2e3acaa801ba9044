"""Defines the vision transformer (Dosovitskiy et al. 2021) with experts in chosen blocks (V-MoE,
Riquelme et al. 2021)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe.hosts.mesh import constrain
from moe.nn.blocks import Blocks
from moe.nn.cosine import CosineHead
from moe.nn.layer import LayerReport

# width D, depth L, MLP width F, heads H: ViT paper, table 1; S from Steiner et al. 2021, table 2.
SIZES = {
    "S": (384, 12, 1536, 6),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "H": (1280, 32, 5120, 16),
}


POOLS = ("cls", "mean")
POSITIONS = ("learned", "sincos")
HEADS = ("linear", "cosine")


class Output(NamedTuple):
    """Holds logits [B, V] in float32, and each layer of experts' report by its block's number."""

    logits: jax.Array
    reports: dict[int, LayerReport]


class VisionTransformer(nnx.Module):
    """Maps images [B, S, S, channels] to class logits.

    Args:
      image_size, channels, num_classes: of the data; `patch_size` divides `image_size`.
      width: D.
      block: (number, tokens T, rngs) -> the block of that number, a `moe.nn.blocks.Block`.
      kinds, scan, remat: of `moe.nn.blocks.Blocks`.
      position: "learned" embeddings, or fixed "sincos" ones, which need fewer steps.
      pool: "cls" reads the class off an extra learned token, "mean" off the mean of all tokens.
      head: "linear", or `moe.nn.cosine`'s, whose scores are `head_scale` times cosines.
      norm_eps: of the last LayerNorm.
      dropout: rate after attention and feed-forward, and on the embedded tokens.
      dtype: of the computation; parameters, router, norms' statistics and logits are float32.
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        num_classes: int,
        patch_size: int,
        width: int,
        block: Callable[..., nnx.Module],
        kinds: Sequence,
        scan: bool,
        remat: str,
        pool: str,
        position: str,
        head: str = "linear",
        head_scale: float = 1.0,
        dropout: float,
        norm_eps: float = 1e-6,
        dtype,
        rngs: nnx.Rngs,
    ):
        patches = (image_size // patch_size) ** 2
        tokens = patches + (pool == "cls")
        patch = (patch_size, patch_size)
        self.embed = nnx.Conv(
            channels,
            width,
            patch,
            strides=patch,
            padding="VALID",
            dtype=dtype,
            kernel_metadata={"axes": (None, None, None, "embed")},
            rngs=rngs,
        )
        small = nnx.initializers.normal(0.02)
        embedding = (1, tokens, width)
        self.position = (
            nnx.Param(small(rngs.params(), embedding, jnp.float32))
            if position == "learned"
            else None
        )
        self.cls = nnx.Param(jnp.zeros((1, 1, width))) if pool == "cls" else None
        self.blocks = Blocks(
            lambda number, rngs: block(number, tokens, rngs),
            kinds,
            scan=scan,
            remat=remat,
            key=rngs.params(),
        )
        self.dropout = nnx.Dropout(dropout)
        self.norm = nnx.LayerNorm(width, epsilon=norm_eps, dtype=dtype, rngs=rngs)
        if head == "cosine":
            self.head = CosineHead(width, num_classes, scale=head_scale, rngs=rngs)
        else:
            self.head = nnx.Linear(
                width,
                num_classes,
                kernel_init=nnx.initializers.zeros_init(),
                dtype=jnp.float32,
                precision="highest",  # else TPUs round float32 to bfloat16, and GPUs to TF32
                kernel_metadata={"axes": ("embed", "vocab")},
                bias_metadata={"axes": ("vocab",)},
                rngs=rngs,
            )

    def __call__(self, images, *, mask=None, train: bool = False, key=None) -> Output:
        """Computes logits; `mask` [B] is False on padding, `key` seeds dropout and router noise."""
        embed_key, blocks_key = (None, None) if key is None else jax.random.split(key)
        x = self.embed(constrain(images, "batch", None, None, None))
        if self.position is None:
            x += sincos_positions(*x.shape[1:]).astype(x.dtype)[None]
        x = constrain(x.reshape(len(images), -1, x.shape[-1]), "batch", None, None)
        if self.cls is not None:
            first = jnp.broadcast_to(self.cls[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
            x = jnp.concatenate([first, x], axis=1)
        if self.position is not None:
            x += self.position[...].astype(x.dtype)
        x = self.dropout(x, deterministic=key is None, rngs=embed_key)
        x, reports, _ = self.blocks(x, mask=mask, train=train, key=blocks_key)
        x = self.norm(x)
        x = x.mean(1) if self.cls is None else x[:, 0]
        x = constrain(x, "batch", None)  # its cotangent, else, comes split like the head's rows
        return Output(self.head(x.astype(jnp.float32)), reports)


def sincos_positions(height: int, width: int, dim: int) -> jax.Array:
    """Returns sines and cosines of a patch's row and column, [height, width, dim] (Vaswani et al.
    2017, section 3.5, in two dimensions as in Beyer et al. 2022, "Better plain ViT baselines")."""
    frequency = 1e4 ** -jnp.linspace(0, 1, dim // 4)
    y, x = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    angles = jnp.concatenate([a[..., None] * frequency[None, None] for a in (y, x)], -1)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
