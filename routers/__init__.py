"""Routers for mixtures of experts behind one interface, and the operators they are made of."""

from routers.balanced import LossFree, Quantile
from routers.budget import LapsumBudget, SparseBudget
from routers.controls import Hash, Random
from routers.exactly_k import exactly_k_marginals, exactly_k_sample
from routers.expert_choice import ExpertChoice, SparseExpertChoice
from routers.permutahedron import permutahedron_projection, soft_rank, soft_sort
from routers.perturbed import (
    perturbed_kth_value,
    perturbed_topk_mask,
    rarity_margins,
    topk_hinge_loss,
)
from routers.routing import Router, RouterState, Routing, Tokens
from routers.sampled import ExactlyK
from routers.simplex import entmax, sparsemax
from routers.soft_masks import lapsum_topk_mask, sigmoid_topk_mask, sinkhorn_topk_mask
from routers.soft_moe import SoftMoE
from routers.sorted_sinkhorn import sorted_sinkhorn_topk
from routers.thresholds import ExpertThreshold, SparseThreshold
from routers.token_choice import SparseTopK, TopK
from routers.topk import sparse_topk_magnitude, sparse_topk_mask
from routers.topk_loss import sparse_topk_loss
from routers.variable import ReLU, Threshold, TopP

# A new router: its class in a file, and a line here. Flags, tests and comparisons follow.
ROUTERS: dict[str, type[Router]] = {
    "topk": TopK,
    "expert_choice": ExpertChoice,
    "sparse_topk": SparseTopK,
    "sparse_expert_choice": SparseExpertChoice,
    "soft_moe": SoftMoE,
    "loss_free": LossFree,
    "quantile": Quantile,
    "relu": ReLU,
    "top_p": TopP,
    "threshold": Threshold,
    "expert_threshold": ExpertThreshold,
    "sparse_threshold": SparseThreshold,
    "sparse_budget": SparseBudget,
    "lapsum_budget": LapsumBudget,
    "exactly_k": ExactlyK,
    "hash": Hash,
    "random": Random,
}

__all__ = [
    "ROUTERS",
    "Router",
    "RouterState",
    "Routing",
    "Tokens",
    "entmax",
    "exactly_k_marginals",
    "exactly_k_sample",
    "lapsum_topk_mask",
    "permutahedron_projection",
    "perturbed_kth_value",
    "perturbed_topk_mask",
    "rarity_margins",
    "sigmoid_topk_mask",
    "sinkhorn_topk_mask",
    "soft_rank",
    "soft_sort",
    "sorted_sinkhorn_topk",
    "sparse_topk_loss",
    "sparse_topk_magnitude",
    "sparse_topk_mask",
    "sparsemax",
    "topk_hinge_loss",
]
