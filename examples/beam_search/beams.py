"""Searches sequences by beams, hard or soft: a soft beam is a mean of hard ones (Xie et al. 2020).

A model is a function extend(state, shares) -> (state, log_probs): from what it remembers, a tree of
[N, k, ...], and the last token as shares of the vocabulary [N, k, V] (all 0 at the start), to the
log-probabilities of the next one. Of the k * V extensions a selection makes k new beams by weights
A, [N, k * V, k]: their states are sum A h, their last tokens sum A e, their scores sum A s.

The token `end` ends a sequence. A beam of which the share d has ended goes on with probability
1 - d as the model says, and with d as `end` again.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from routers import sorted_sinkhorn_topk

TINY = 1e-6  # shares below it count as none
FLOOR = 1e-6  # added to a probability before its logarithm, lest one step outweighs all others
CANDIDATES = 4  # extensions that the soft selection looks at, for each beam


class Beams(NamedTuple):
    """Holds the states [N, k, ...], shares of the last token [N, k, V] and scores [N, k]."""

    state: object
    shares: jax.Array
    scores: jax.Array


def start(state, beams: int, vocabulary: int) -> Beams:
    """Returns beams of which the first alone is one; state has no axis of beams, [N, ...]."""
    state = jax.tree.map(lambda x: jnp.repeat(x[:, None], beams, 1), state)
    n = jax.tree.leaves(state)[0].shape[0]
    scores = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)
    shares = jnp.zeros((n, beams, vocabulary))
    return Beams(state, shares, jnp.broadcast_to(scores, (n, beams)))


def hard(scores, beams: int):
    """Returns the indicators of the best extensions, the best first: [N, M] -> [N, M, beams]."""
    best = jax.nn.one_hot(jax.lax.top_k(scores, beams)[1], scores.shape[1], axis=1)
    return best * jnp.isfinite(scores)[..., None]


def soft(strength) -> Callable:
    """Returns the selection by sorted SOFT: soft indicators of the best, the second, ...

    It looks at the best `CANDIDATES` extensions for each beam; the others would have next to
    nothing, and make the transport plan slow.
    """

    def select(scores, beams: int):
        best, index = jax.lax.top_k(scores, min(CANDIDATES * beams, scores.shape[1]))
        plan = sorted_sinkhorn_topk(best, beams, strength=strength, tol=1e-4, num_iters=200)
        weights = jnp.zeros((*scores.shape, beams))
        return weights.at[jnp.arange(len(scores))[:, None], index].set(plan)

    return select


def advance(beams: Beams, extend: Callable, select: Callable, end: int):
    """Returns the next beams, the log-probabilities of all extensions, and the weights' parents.

    Parents are the weights A summed over the token, [N, k, k]: how much of each old beam is in
    each new one.
    """
    n, k, vocabulary = beams.shares.shape
    state, log_probs = extend(beams.state, beams.shares)
    log_probs = _ended(log_probs, beams.shares[..., end], end)
    scores = (beams.scores[..., None] + log_probs).reshape(n, -1)
    weights = select(scores, k)
    total = weights.sum(1)
    alive = total > 0.5  # there were extensions left for it; only rounding keeps it from 0 and 1
    weights /= jnp.where(alive, total, 1)[:, None]
    mean = jnp.einsum("ncj,nc->nj", weights, jnp.where(jnp.isfinite(scores), scores, 0))
    weights = weights.reshape(n, k, vocabulary, k)
    parents, shares = weights.sum(2), weights.sum(1).swapaxes(1, 2)
    state = jax.tree.map(lambda x: jnp.einsum("nbj,nb...->nj...", parents, x), state)
    return Beams(state, shares, jnp.where(alive, mean, -jnp.inf)), log_probs, parents


def _ended(log_probs, d, end: int):
    """Returns log((1 - d) p + d [token is end]), -inf where that is 0."""

    def log(share):
        some = share > TINY
        return jnp.where(some, jnp.log(jnp.where(some, share, 1)), -jnp.inf)[..., None]

    log_probs += log(1 - d)
    is_end = jnp.arange(log_probs.shape[-1]) == end
    return jnp.where(is_end, jnp.logaddexp(log_probs, log(d)), log_probs)


def search(extend: Callable, state, beams: int, vocabulary: int, steps: int, end: int):
    """Returns the sequences [N, beams, steps] and scores [N, beams] of hard beams, best first."""

    def step(carry, time):
        now, sequences = carry
        now, _, parents = advance(now, extend, hard, end)
        sequences = jnp.take_along_axis(sequences, parents.argmax(1)[..., None], 1)
        return (now, sequences.at[..., time].set(now.shares.argmax(-1))), None

    first = start(state, beams, vocabulary)
    sequences = jnp.zeros((*first.scores.shape, steps), int)
    (last, sequences), _ = jax.lax.scan(step, (first, sequences), jnp.arange(steps))
    return sequences, last.scores


def log_likelihoods(extend: Callable, state, sequences, beams: int, vocabulary: int, select, end):
    """Returns the log-probabilities of each token of sequences [N, T] under beams, [N, T].

    A token's probability is the mean of the beams', by the softmax of their scores. Beams make
    their own way: the sequence tells what should come at a time, never what came before.
    """

    def step(now, tokens):
        following, log_probs, _ = advance(now, extend, select, end)
        own = jnp.take_along_axis(log_probs, tokens[:, None, None], -1)[..., 0]
        probability = (jax.nn.softmax(now.scores) * jnp.exp(own)).sum(-1)
        return following, jnp.log(probability + FLOOR)

    first = start(state, beams, vocabulary)
    return jax.lax.scan(step, first, sequences.swapaxes(0, 1))[1].swapaxes(0, 1)
