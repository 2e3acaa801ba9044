"""Says which routers stand for all where a test compiles a layer or a model for each.

Layers tell routers apart by what they hand over alone, and these differ in that; the others run
with the slow tests. What a router promises by itself is tested for all (`tests/routers`).
"""

import pytest

KINDS = (
    "topk",  # K experts for each token, slots in order
    "sparse_topk",  # any number, slots by weight
    "sparse_expert_choice",  # chosen along the tokens
    "soft_moe",  # mixtures of tokens
    "sparse_threshold",  # remembers
    "hash",  # reads tokens, and has no parameter
)
# Their choices bound the rows of a group by K per token.
FIXED_K = ("topk", "loss_free", "quantile", "exactly_k", "hash", "random")
CONTROLS = ("hash", "random")  # have nothing to learn


def each_kind(names, quick=KINDS):
    """Returns the names as parameters of a test, all but the quick ones as slow."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]
