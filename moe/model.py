"""From a config to a model: the one place that reads the sections `model`, `moe` and `router`."""

import difflib

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from moe.blocks import REMATS, Block
from moe.config import flatten
from moe.dispatch import DISPATCHES
from moe.errors import UsageError
from moe.layers import Mlp, MoE
from moe.optimizer import OPTIMIZERS, SCHEDULES
from moe.step import LOSSES
from moe.vit import SIZES, VisionTransformer
from routers import ROUTERS


def build_model(config: ConfigDict, rngs: nnx.Rngs) -> VisionTransformer:
    """Returns the model with fresh parameters; `config.data` has its sizes filled in.

    Raises:
      UsageError: a setting names something that does not exist, or the settings do not fit.
    """
    check_names(config)
    model, moe, data = config.model, config.moe, config.data
    width, depth, mlp_dim, heads = model_sizes(config)
    expert_layers = moe_layers(moe.layers, depth)
    if moe.num_experts < 1 or moe.group_size < 1:
        raise UsageError("moe.num_experts and moe.group_size must be 1 or more")
    settings = config.router[config.router.name].to_dict()
    expert_dim = moe.expert_dim or mlp_dim

    if width % heads:
        raise UsageError(f"num_heads {heads} does not divide width {width}")
    dtype = jnp.dtype(model.dtype)

    def block(number: int, tokens: int, rngs: nnx.Rngs) -> Block:
        mlp = feed_forward(number in expert_layers, tokens, rngs)
        return Block(width, heads, mlp, dropout=model.dropout, dtype=dtype, rngs=rngs)

    def feed_forward(experts: bool, tokens: int, rngs: nnx.Rngs):
        if not experts:
            return Mlp(width, mlp_dim, dtype=dtype, rngs=rngs)
        if moe.dense:
            hidden = round(expert_dim * settings["k"] * moe.capacity_factor)
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

    try:
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
    except ValueError as error:  # sizes that do not fit, from the layers that know
        raise UsageError(str(error)) from error


def model_sizes(config: ConfigDict) -> tuple[int, int, int, int]:
    """Width D, depth L, MLP width F and heads H: the named size's, but for the explicit ones."""
    model = config.model
    explicit = (model.width, model.depth, model.mlp_dim, model.num_heads)
    return tuple(mine or named for mine, named in zip(explicit, SIZES[model.size], strict=True))


def check_names(config: ConfigDict) -> None:
    """Raises UsageError where a setting names what does not exist; needs no data."""
    for key, known in {
        "model.name": ["vit"],
        "model.size": list(SIZES),
        "model.dtype": ["float32", "bfloat16"],
        "model.remat": list(REMATS),
        "router.name": list(ROUTERS),
        "moe.dispatch": list(DISPATCHES),
        "loss": list(LOSSES),
        "optimizer.name": list(OPTIMIZERS),
        "optimizer.schedule": list(SCHEDULES),
        "optimizer.grad_dtype": ["float32", "bfloat16"],
    }.items():
        value = flatten(config)[key]
        if value not in known:
            close = difflib.get_close_matches(value, known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(
                f"config.{key}={value!r} is unknown; expected {', '.join(known)}{hint}"
            )


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
    except ValueError:
        layers, fits = (), False
    if not fits:
        raise UsageError(
            f"moe.layers={spec!r} fits no model of {depth} blocks; expected last-N, every-N, "
            "a list such as '1,3' (counted from 0), or none"
        )
    return frozenset(layers)


def count_parameters(params, active_share: float = 1.0) -> int:
    """Number of parameters; with `active_share` = K/E, of those that one token uses."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        share = active_share if "experts" in jax.tree_util.keystr(path) else 1
        total += round(leaf.size * share)
    return total
