"""Builds the model of a config, and checks that the config's settings fit each other."""

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from moe.blocks import Block
from moe.config import check_ranges
from moe.data import Augment
from moe.errors import UsageError
from moe.layers import Mlp, MoE
from moe.optimizer import warmup_steps
from moe.vit import SIZES, VisionTransformer
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


def check(config: ConfigDict) -> None:
    """Looks for all that is wrong with a config whatever the data and the devices.

    Raises:
      UsageError: a value is outside its range, or values do not fit each other.
    """
    check_ranges(config)
    Augment.from_mapping(config.data.augment)
    warmup_steps(config)
    _check_model(config)
    k, experts = config.router[config.router.name].k, config.moe.num_experts
    if k > experts:
        raise UsageError(
            f"config.router.{config.router.name}.k={k} is above moe.num_experts={experts}"
        )
    group = config.moe.group_size
    for key, size, step in (
        ("batch_size", config.batch_size, group * config.optimizer.accumulate),
        ("eval.batch_size", config.eval.batch_size, group),
    ):
        if size % step:
            raise UsageError(
                f"config.{key}={size} must be a multiple of {step}: groups of "
                f"moe.group_size={group} examples, times optimizer.accumulate in training"
            )
    if list(config.mesh.values()).count(-1) > 1:
        raise UsageError("config.mesh has -1 (all that the others leave) twice; expected it once")


def _check_model(config: ConfigDict) -> None:
    model, size = config.model, config.data.image_size
    width, depth, _, heads = model_sizes(config)
    moe_layers(config.moe.layers, depth)
    if width % heads:
        raise UsageError(f"config.model.num_heads={heads} does not divide the width {width}")
    if model.position == "sincos" and width % 4:
        raise UsageError(f"config.model.position='sincos' needs a width of 4 N, not {width}")
    if not size:
        return  # the data set will say it
    if size % model.patch_size:
        raise UsageError(
            f"config.model.patch_size={model.patch_size} does not divide the image size {size}"
        )
    for key in ("crop", "cutout"):
        pixels = config.data.augment[key]
        if pixels > size:
            raise UsageError(f"config.data.augment.{key}={pixels} is above the image size {size}")


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
