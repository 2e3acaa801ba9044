"""What a cascade is judged by: how many truths are left after both stages."""

import jax
import jax.numpy as jnp


def kept(scores, count: int, among=None):
    """Returns a mask of the `count` best [..., N], all `among` those of a mask; ties by place."""
    if among is not None:
        scores = jnp.where(among, scores, -jnp.inf)
    best = jax.lax.top_k(scores, count)[1]
    mask = jnp.zeros(scores.shape, bool)
    return jnp.put_along_axis(mask, best, True, axis=-1, inplace=False)


def joint_recall(scores_by_stage, truth, keep):
    """Returns the share of each row's truths that all stages keep.

    Recall@10@20 has 10 truths, and `keep` (30, 20): retrieval keeps 30 items, ranking 20 of them.
    """
    alive = None
    for scores, count in zip(scores_by_stage, keep, strict=True):
        alive = kept(scores, count, alive)
    return (alive & truth).sum(-1) / truth.sum(-1)
