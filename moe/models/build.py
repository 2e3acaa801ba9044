"""Builds what the models share: the feed-forward layer of each block, as a config asks for it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from moe.errors import UsageError
from moe.nn.draws import aside
from moe.nn.layer import MoE
from moe.nn.mlp import Mlp
from moe.nn.skip import rows
from routers import ROUTERS

KEYS = 3  # that a layer of experts draws for its parameters: the router's, and two kernels


def feed_forward(
    moe: ConfigDict,
    router: ConfigDict,
    layers: frozenset[int],
    width: int,
    mlp_dim: int,
    dense_dim: int,
    dtype=jnp.float32,
    exact: bool = False,
) -> Callable[[int, int, nnx.Rngs], nnx.Module]:
    """Returns (block number, tokens T, rngs) -> the block's MLP, or its experts if in `layers`.

    Args:
      moe, router: these sections of a config.
      layers: numbers of the blocks with experts.
      width, mlp_dim: D and F; the latter also of the experts where they have no width of their own.
      dense_dim: F of the MLP that stands for a layer of experts under `moe.dense`.
      exact: whether GELU is `moe.nn.mlp.activate`'s exact one.
    """

    def build(number: int, tokens: int, rngs: nnx.Rngs) -> nnx.Module:
        if number not in layers:
            return Mlp(width, mlp_dim, exact=exact, dtype=dtype, rngs=rngs)
        if moe.dense:
            own = aside(rngs, KEYS)  # the block's other parameters are those of a sparse model
            return Mlp(width, dense_dim, exact=exact, dtype=dtype, rngs=own)
        return MoE(
            width,
            moe.expert_dim or mlp_dim,
            tokens,
            group_size=moe.group_size,
            **expert_settings(moe, router),
            exact=exact,
            dtype=dtype,
            rngs=rngs,
        )

    return build


def expert_settings(moe: ConfigDict, router: ConfigDict) -> dict:
    """Returns the arguments of `moe.nn.layer.MoE` that a config has, whatever the model."""
    names = ("num_experts", "capacity_factor", "eval_capacity_factor", "dispatch")
    names += ("dropless_bound", "dropless_receive", "dropout")
    own = {"router": ROUTERS[router.name], "settings": router[router.name].to_dict()}
    return own | {key: moe[key] for key in names}


def skip_layers(section: ConfigDict, depth: int, tokens: int) -> frozenset[int]:
    """Returns the numbers of the blocks that tokens may skip, of the section `depth` of a config;
    none where all T tokens of a row pass with weight 1, which is the plain model."""
    layers = moe_layers(section.layers, depth, "depth.layers")
    whole = section.router != "threshold" and not section.gated
    return frozenset() if whole and skip_rows(section, tokens).chosen == tokens else layers


def skip_rows(section: ConfigDict, tokens: int):
    """Returns `moe.nn.skip.Rows` of a config's section `depth`."""
    names = ("router", "capacity", "bound", "eval_bound")
    return rows(tokens, **{name: section[name] for name in names})


def skip_settings(section: ConfigDict) -> dict:
    """Returns the arguments of `moe.nn.skip.Skip` that a config has."""
    return {key: value for key, value in section.items() if key != "layers"}


def moe_layers(spec: str, depth: int, key: str = "moe.layers") -> frozenset[int]:
    """Returns the numbers of the blocks that a key names, those with experts, counted from 0.

    "last-N": the last N of every second block, as in V-MoE (of 12 blocks, last-2 are 9 and 11);
    "every-N": each N-th block, ending with the last; "from-N": all but the first N; "1,3": those
    blocks; "none".
    """
    kind, _, number = spec.partition("-")
    try:
        if spec in ("none", ""):
            return frozenset()
        if kind == "last":
            layers = range(depth - 1, -1, -2)[: int(number)]
            fits = 0 < int(number) == len(layers)
        elif kind == "from":
            layers = range(int(number), depth)
            fits = 0 <= int(number) < depth
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
            f"{key}={spec!r} fits no model of {depth} blocks; expected last-N, every-N, "
            "from-N, a list of different ones such as '1,3' (counted from 0), or none"
        )
    return frozenset(layers)


def count_parameters(params, active_share: float = 1.0) -> int:
    """Counts the parameters; with `active_share` = K/E, those that one token uses."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        share = active_share if "experts" in jax.tree_util.keystr(path) else 1
        total += round(leaf.size * share)
    return total
