"""Routers for mixtures of experts behind one interface, and the operators they are made of."""

from routers.expert_choice import ExpertChoice, SparseExpertChoice
from routers.routing import Router, Routing
from routers.soft_moe import SoftMoE
from routers.token_choice import SparseTopK, TopK
from routers.topk import sparse_topk_magnitude, sparse_topk_mask

# A new router: its class in a file, and a line here. Flags, tests and comparisons follow.
ROUTERS: dict[str, type[Router]] = {
    "topk": TopK,
    "expert_choice": ExpertChoice,
    "sparse_topk": SparseTopK,
    "sparse_expert_choice": SparseExpertChoice,
    "soft_moe": SoftMoE,
}

__all__ = [
    "ROUTERS",
    "Router",
    "Routing",
    "sparse_topk_magnitude",
    "sparse_topk_mask",
]
