"""Counts FLOPs by formula, and those of a layer of experts; a multiplication and its sum are 2.

Only matrix products are counted: all else is some hundredths of them.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from moe.models.build import skip_layers, skip_rows
from moe.nn.dispatch import slots_per_expert


class Flops(NamedTuple):
    """Holds the FLOPs of one example, forward.

    `experts` are those that the model asks for, K for every token; `slots` what the experts
    compute for it, empty slots included, overflowing tokens not.
    """

    embed: float  # of the examples themselves, which need no gradient
    attention: float
    mlp: float
    router: float
    experts: float
    slots: float
    head: float

    @property
    def model(self) -> float:
        """Returns what the model asks for."""
        return self._others + self.experts

    @property
    def computed(self) -> float:
        """Returns what is computed for it."""
        return self._others + self.slots

    @property
    def _others(self) -> float:
        return self.embed + self.attention + self.mlp + self.router + self.head

    def training(self, forward: float) -> float:
        """Returns forward and backward: each product twice more, for its factors' gradients.

        The examples need none, so the embedding has one product less.
        """
        return 3 * forward - self.embed


def count_experts(
    config: ConfigDict, tokens: int, dim: int, hidden: int, products: int = 2
) -> tuple[float, float, float]:
    """Returns the FLOPs of a layer's router, experts and slots, for one example of T tokens.

    With K of E experts of width F and C slots for a group of G examples: router 2 T D E, experts
    `products` * 2 D F for each of K T tokens or E C / G slots. Soft MoE scores T x (E C) pairs and
    mixes twice, 2 T D E C each.
    """
    moe, name = config.moe, config.router.name
    wide = moe.expert_dim or hidden
    if moe.dense:
        experts = 2 * products * tokens * dim * dense_width(config, hidden)
        return 0, experts, experts
    k = min(config.router[name].k, moe.num_experts)
    capacity = slots_per_expert(moe.group_size * tokens, k, moe.num_experts, moe.capacity_factor)
    rows = {
        "capacity": moe.num_experts * capacity / moe.group_size,
        "dense": moe.num_experts * tokens,
    }.get(moe.dispatch, k * tokens)
    router = 2 * tokens * dim * moe.num_experts
    if name == "soft_moe":
        slots = moe.num_experts * capacity
        rows, router = slots / moe.group_size, 6 * tokens * dim * slots
    expert = 2 * products * dim * wide
    return router, k * tokens * expert, rows * expert


def sum_experts(
    config: ConfigDict, layers: Iterable[int], passing: Sequence[int], dim: int, hidden: int, **kind
) -> tuple[float, float, float]:
    """Returns `count_experts` of all layers together, for the tokens that pass each block."""
    counted = [count_experts(config, passing[i], dim, hidden, **kind) for i in layers]
    router, experts, slots = zip(*counted, strict=True) if counted else ((), (), ())
    return sum(router), sum(experts), sum(slots)


def count_passing(config: ConfigDict, depth: int, tokens: int) -> list[int]:
    """Returns how many of a row's T tokens each block computes in training: T, or its slots."""
    skipped = skip_layers(config.depth, depth, tokens)
    slots = skip_rows(config.depth, tokens).train
    return [slots if number in skipped else tokens for number in range(depth)]


def dense_width(config: ConfigDict, hidden: int) -> int:
    """Returns the width of the MLP that stands for a layer of experts at equal FLOPs.

    A layer computes K experts for a token, and as many slots as their capacity where it has one,
    beside those that all tokens share.
    """
    moe, k = config.moe, config.router[config.router.name].k
    slots = k * (moe.capacity_factor if moe.dispatch == "capacity" else 1)
    return max(1, round((moe.expert_dim or hidden) * (slots + moe.get("shared_experts", 0))))


def attended(tokens: int, window: int) -> int:
    """Counts the pairs of a query and a key at or before it, of the last `window` (0: all)."""
    window = min(window or tokens, tokens)
    return window * (window + 1) // 2 + (tokens - window) * window
