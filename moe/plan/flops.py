"""Counts the FLOPs of the vision transformer by formula; a multiplication and its sum are 2.

Only matrix products are counted: all else is some hundredths of them.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from moe.models.build import model_sizes, moe_layers
from moe.nn.dispatch import slots_per_expert


class Flops(NamedTuple):
    """Holds the FLOPs of one image, forward.

    `experts` are those that the model asks for, K for every token; `slots` what the experts
    compute for it, empty slots included, overflowing tokens not.
    """

    embed: float
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

        The images need none, so the embedding has one product less.
        """
        return 3 * forward - self.embed


def count_flops(config: ConfigDict) -> Flops:
    """Counts those of a config whose data section has its sizes filled in.

    With T tokens, width D, MLP width F, K of E experts of C slots for a group of G images, per
    block: attention 8 T D^2 + 4 T^2 D, MLP 4 T D F, router 2 T D E, experts 4 D F for each of K T
    tokens or E C / G slots. Soft MoE scores T x (E C) pairs and mixes twice, 2 T D E C each.
    """
    model, moe, data = config.model, config.moe, config.data
    dim, depth, hidden, _ = model_sizes(config)
    patches = (data.image_size // model.patch_size) ** 2
    tokens = patches + (model.pool == "cls")
    layers = len(moe_layers(moe.layers, depth))
    k = min(config.router[config.router.name].k, moe.num_experts)
    group = moe.group_size * tokens
    capacity = slots_per_expert(group, k, moe.num_experts, moe.capacity_factor)
    rows = {
        "capacity": moe.num_experts * capacity / moe.group_size,
        "dense": moe.num_experts * tokens,
    }.get(moe.dispatch, k * tokens)
    expert = 4 * dim * (moe.expert_dim or hidden)
    if config.router.name == "soft_moe":
        slots = moe.num_experts * capacity
        rows, router = slots / moe.group_size, 6 * tokens * dim * slots
    else:
        router = 2 * tokens * dim * moe.num_experts
    experts, slots = layers * k * tokens * expert, layers * rows * expert
    if moe.dense:
        wide = round((moe.expert_dim or hidden) * config.router[config.router.name].k
                     * moe.capacity_factor)  # fmt: skip
        experts = slots = layers * 4 * tokens * dim * wide
        router = 0
    return Flops(
        embed=2 * patches * model.patch_size**2 * data.channels * dim,
        attention=depth * (8 * tokens * dim**2 + 4 * tokens**2 * dim),
        mlp=(depth - layers) * 4 * tokens * dim * hidden,
        router=layers * router,
        experts=experts,
        slots=slots,
        head=2 * dim * data.num_classes,
    )
