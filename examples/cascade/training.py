"""Trains a cascade with one of the losses, and finds how many truths survive it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.cascade import losses
from examples.cascade.impressions import TRUTHS, Impressions, MovieLens
from examples.cascade.metrics import joint_recall
from examples.cascade.models import Batch, Cascade, batch_of
from examples.command import Job
from examples.masks import MASKS, UNIFORM, soft_mask

KEEP = (30, 20)  # of 40 items: Recall@10@20

# Losses of each stage alone; every other arm that trains is the joint loss with that mask.
STAGES = ("bce", "lambda", "fenchel_young")
BASELINES = ("random", "popularity", "item_mean")
ARMS = (*BASELINES, *STAGES, *MASKS)
WITHOUT_WIDTH = (*BASELINES, "bce", "lambda")


class Settings(NamedTuple):
    """Holds what all arms share."""

    epochs: int = 10
    batch: int = 128
    learning_rate: float = 1e-2
    quotas: str = "truths"  # or "kept": what the masks of the joint loss select


def train(job: Job, data: MovieLens, settings: Settings) -> dict[str, float]:
    """Returns the joint recalls of a run, after the epoch that was best in validation."""
    if job.arm in BASELINES:
        parts = {"validation": data.validation, "test": data.test}
        return {name: recall_of(baseline(job, part), part) for name, part in parts.items()}
    graph, params = nnx.split(Cascade(data, rngs=nnx.Rngs(job.seed)))
    state = optax.adam(settings.learning_rate).init(params)
    seen = [(batch_of(part, data), part) for part in (data.validation, data.test)]
    rng, key = np.random.default_rng(job.seed), jax.random.key(job.seed)
    whole = jax.tree.map(jnp.asarray, (batch_of(data.train, data), data.train.truth))
    found = []
    for _ in range(settings.epochs):
        order = rng.permutation(len(data.train))
        for start in range(0, len(order) - settings.batch + 1, settings.batch):
            key, own = jax.random.split(key)
            some = order[start : start + settings.batch]
            fixed = graph, job.arm, settings
            params, state = step(fixed, params, state, whole, some, job.width, own)
        found.append([recall_of(scores(graph, params, batch), part) for batch, part in seen])
    best = max(range(len(found)), key=lambda epoch: found[epoch][0])
    return {"validation": found[best][0], "test": found[best][1], "epoch": best + 1}


# At the top, so that the seeds and widths of an arm share what is compiled.
@partial(jax.jit, static_argnums=0)
def step(fixed, params, state, whole, some, width, key):
    """Returns the parameters and Adam's state after `some` of the impressions."""
    graph, arm, settings = fixed
    batch, truth = jax.tree.map(lambda leaf: leaf[some], whole)

    def loss(params):
        return objective(arm, settings, nnx.merge(graph, params), batch, truth, width, key)

    updates, state = optax.adam(settings.learning_rate).update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state


@partial(jax.jit, static_argnums=0)
def scores(graph, params, batch: Batch):
    """Returns the scores of both stages."""
    return nnx.merge(graph, params)(batch)


def objective(arm: str, settings: Settings, cascade: Cascade, batch: Batch, truth, width, key):
    """Returns the loss of a batch."""
    both = cascade(batch)
    if arm in STAGES:
        alone: dict[str, Callable] = {
            "bce": losses.stage_bce,
            "lambda": losses.lambda_loss,
            "fenchel_young": lambda x, t: losses.fenchel_young_loss(x, t, width / UNIFORM),
        }
        return sum(alone[arm](x, truth) for x in both)
    exact = settings.quotas == "truths"  # else more survive than the truths
    ks = (TRUTHS, TRUTHS) if exact else KEEP

    def mask(x, k):
        return soft_mask(arm, x, k, width, key)

    return losses.joint_topk_loss(both, truth, ks, mask, cascade.log_weights[...], exact)


def baseline(job: Job, part: Impressions):
    """Returns scores that nothing was trained for, for both stages."""
    if job.arm == "random":
        one = np.random.default_rng(job.seed).random(part.items.shape)
    else:
        one = part.count if job.arm == "popularity" else part.mean
    return (jnp.asarray(one),) * 2


def recall_of(both, part: Impressions) -> float:
    """Returns the mean Recall@10@20 of the impressions."""
    return float(joint_recall(both, jnp.asarray(part.truth), KEEP).mean())
