"""Builds the model of a config."""

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from moe.errors import UsageError
from moe.models.vit import SIZES, VisionTransformer
from moe.nn.blocks import Block
from moe.nn.layer import MoE
from moe.nn.mlp import Mlp
from routers import ROUTERS


def build_model(config: ConfigDict, rngs: nnx.Rngs) -> VisionTransformer:
    """Returns the model with fresh parameters; the config was checked and has its data's sizes."""
    model, moe, data = config.model, config.moe, config.data
    width, depth, mlp_dim, heads = model_sizes(config)
    expert_layers = moe_layers(moe.layers, depth)
    settings = config.router[config.router.name].to_dict()
    expert_dim = moe.expert_dim or mlp_dim
    dtype = jnp.dtype(model.dtype)

    def block(number: int, tokens: int, rngs: nnx.Rngs) -> Block:
        mlp = feed_forward(number in expert_layers, tokens, rngs)
        return Block(width, heads, mlp, dropout=model.dropout, dtype=dtype, rngs=rngs)

    def feed_forward(experts: bool, tokens: int, rngs: nnx.Rngs):
        if not experts:
            return Mlp(width, mlp_dim, dtype=dtype, rngs=rngs)
        if moe.dense:
            hidden = max(1, round(expert_dim * settings["k"] * moe.capacity_factor))
            return Mlp(width, hidden, dtype=dtype, rngs=rngs)
        return MoE(
            width,
            expert_dim,
            tokens,
            router=ROUTERS[config.router.name],
            settings=settings,
            num_experts=moe.num_experts,
            group_size=moe.group_size,
            capacity_factor=moe.capacity_factor,
            eval_capacity_factor=moe.eval_capacity_factor,
            dispatch=moe.dispatch,
            dropless_bound=moe.dropless_bound,
            dropless_receive=moe.dropless_receive,
            dropout=moe.dropout,
            dtype=dtype,
            rngs=rngs,
        )

    return VisionTransformer(
        image_size=data.image_size,
        channels=data.channels,
        num_classes=data.num_classes,
        patch_size=model.patch_size,
        width=width,
        block=block,
        kinds=[i in expert_layers for i in range(depth)],
        scan=model.scan,
        remat=model.remat,
        pool=model.pool,
        position=model.position,
        dropout=model.dropout,
        dtype=dtype,
        rngs=rngs,
    )


def model_sizes(config: ConfigDict) -> tuple[int, int, int, int]:
    """Returns width D, depth L, MLP width F and heads H: explicit, or else of the named size."""
    model = config.model
    explicit = (model.width, model.depth, model.mlp_dim, model.num_heads)
    return tuple(own or named for own, named in zip(explicit, SIZES[model.size], strict=True))


def moe_layers(spec: str, depth: int) -> frozenset[int]:
    """Returns the numbers of the blocks with experts, counted from 0.

    "last-N": the last N of every second block, as in V-MoE (of 12 blocks, last-2 are 9 and 11);
    "every-N": each N-th block, ending with the last; "1,3": those blocks; "none".
    """
    kind, _, number = spec.partition("-")
    try:
        if spec in ("none", ""):
            return frozenset()
        if kind == "last":
            layers = range(depth - 1, -1, -2)[: int(number)]
            fits = 0 < int(number) == len(layers)
        elif kind == "every":
            layers = range(int(number) - 1, depth, int(number))
            fits = len(layers) > 0
        else:
            layers = [int(block) for block in spec.split(",")]
            fits = all(0 <= block < depth for block in layers)
            fits = fits and len(set(layers)) == len(layers)
    except ValueError:
        layers, fits = (), False
    if not fits:
        raise UsageError(
            f"moe.layers={spec!r} fits no model of {depth} blocks; expected last-N, every-N, "
            "a list of different ones such as '1,3' (counted from 0), or none"
        )
    return frozenset(layers)


def count_parameters(params, active_share: float = 1.0) -> int:
    """Counts the parameters; with `active_share` = K/E, those that one token uses."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        share = active_share if "experts" in jax.tree_util.keystr(path) else 1
        total += round(leaf.size * share)
    return total
