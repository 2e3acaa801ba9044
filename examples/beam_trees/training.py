"""Trains a reader of trees, and tests it: the arms differ in how the tree is found alone."""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.beam_trees import cell, search
from examples.beam_trees.data import Examples, Task, batches
from examples.beam_trees.selection import SELECTIONS

# The names of the arms, as the table has them.
ARMS = {
    "gold": "gold tree",
    "greedy": "greedy, straight-through Gumbel",
    "hard": "hard beams",
    "one_soft": "OneSoft",
    "sparse": "`sparse_topk_mask`",
    "soft": "`sorted_sinkhorn_topk` (SOFT)",
}


class Settings(NamedTuple):
    """Says how a model is made and trained.

    The optimizer is the authors': rectified Adam with lookahead (Ranger), gradients clipped to norm
    1; the rate halves after `patience` epochs without a better one, and training ends after `stop`.
    """

    width: int = 32
    beams: int = 2
    batch: int = 64
    dropout: float = 0.1
    epochs: int = 6
    rate: float = 3e-3
    decay: float = 1e-2
    strength: float = 1.0
    noise: float = 1.0
    patience: int = 2
    stop: int = 4


def logits(arm: str, settings: Settings, params, batch: Examples, key=None):
    """Returns the classes' logits [N, classes]; with a key as in training, else searched hard."""
    n, sides, width = batch.tokens.shape
    single, gold = arm in ("gold", "greedy"), arm == "gold"
    how = search.Search(
        compose=functools.partial(_compose, params, settings.dropout),
        score=functools.partial(cell.score, params),
        beams=1 if single else settings.beams,
        select=SELECTIONS.get(arm) if key is not None else None,
        strength=settings.strength,
        noise=settings.noise,
    )
    leaves = cell.leaves(params, batch.tokens.reshape(n * sides, width))
    merges = batch.merges.reshape(n * sides, -1) if gold else None
    beams = search.find(how, leaves, batch.counts.reshape(-1), key, merges)
    return cell.classify(params, search.root(beams).reshape(n, sides, -1))


def _compose(params, dropout, left, right, key):
    return cell.compose(params, left, right, key, dropout)


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """Returns Ranger with a rate that can be changed between steps."""

    @optax.inject_hyperparams
    def fast(learning_rate):
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_radam(),
            optax.add_decayed_weights(settings.decay),
            optax.scale_by_learning_rate(learning_rate),
        )

    return optax.lookahead(fast(settings.rate), sync_period=5, slow_step_size=0.8)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(arm, settings, params, state, batch, weight, key):
    def loss(fast):
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits(arm, settings, fast, batch, key), batch.labels
        )
        return (losses * weight).sum() / weight.sum()

    value, grads = jax.value_and_grad(loss)(params.fast)
    updates, state = optimizer(settings).update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


@functools.partial(jax.jit, static_argnums=(0, 1))
def _right(arm, settings, params, batch, weight):
    return ((logits(arm, settings, params, batch).argmax(-1) == batch.labels) * weight).sum()


def accuracy(arm: str, settings: Settings, params, examples: Examples) -> float:
    """Returns the share of examples whose class is found."""
    # All beams are searched in the same way now: one program for them.
    arm = arm if arm in ("gold", "greedy") else "hard"
    dealt = batches(examples, settings.batch)
    right = [_right(arm, settings, params, *batch) for batch in dealt]
    return float(np.sum(right)) / len(examples.labels)


def train(arm: str, settings: Settings, task: Task, seed: int, say=print) -> dict[str, float]:
    """Returns the accuracies on the sets to test on, of the epoch that was best on "dev"."""
    start = time.perf_counter()
    sides = task.sets["train"].tokens.shape[1]
    root = jax.random.key(seed)
    params = optax.LookaheadParams.init_synced(
        cell.init(root, len(task.tokens), settings.width, len(task.classes), sides)
    )
    state = optimizer(settings).init(params)
    rng, number = np.random.default_rng(seed), 0
    best, kept, since = -1.0, params.slow, 0
    for epoch in range(settings.epochs):
        losses = []
        for batch in batches(task.sets["train"], settings.batch, rng):
            number += 1
            key = jax.random.fold_in(root, number)
            params, state, value = _step(arm, settings, params, state, *batch, key)
            losses.append(value)
        right = accuracy(arm, settings, params.slow, task.sets["dev"])
        seconds = time.perf_counter() - start
        say(
            f"{arm} seed {seed} epoch {epoch + 1}: loss {np.mean(losses):.3f}, "
            f"dev {right:.2%}, {seconds:.0f} s"
        )
        since = 0 if right > best else since + 1
        if right > best:
            best, kept = right, params.slow
        if since == settings.stop:
            break
        if since and since % settings.patience == 0:
            rate = state.fast_state.hyperparams
            rate["learning_rate"] = jnp.asarray(rate["learning_rate"]) / 2
    found = {name: accuracy(arm, settings, kept, task.sets[name]) for name in task.tests}
    return found | {"seconds": time.perf_counter() - start}
