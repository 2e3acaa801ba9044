"""Searches the tree over a sequence by beams, merge by merge (Chowdhury and Caragea 2023).

Every step makes one merge in each beam. A beam's score is the sum of the log-probabilities of its
merges, each a softmax over the neighbours of that time. Letters: N examples, B beams, S places of
which an example uses the first `counts`, D width. What stands behind those is never looked at.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

LOW = -1e9  # in the place of -inf, where all of a row may be absent
SHORT = 10  # so few places are not worth another loop to compile


class Beams(NamedTuple):
    """Holds items [N, B, S, D], the parents of all neighbours [N, B, S - 1, D], scores [N, B]."""

    items: jax.Array
    pairs: jax.Array
    scores: jax.Array


class Search(NamedTuple):
    """Says how beams are made.

    Attributes:
      compose: (left [..., D], right [..., D], key) -> parents [..., D].
      score: parents [..., D] -> [...].
      beams: how many.
      select: candidates' scores, the same with noise, beams, strength -> weights, of `selection`;
        None takes the best candidates as they are.
      strength: of `select`.
      noise: scale of the Gumbel noise on the candidates' scores while they are chosen.
    """

    compose: Callable
    score: Callable
    beams: int
    select: Callable | None = None
    strength: float = 1.0
    noise: float = 0.0


def find(search: Search, leaves, counts, key=None, merges=None) -> Beams:
    """Returns the beams after all merges: an example's roots are the items at place 0.

    Args:
      leaves: [N, S, D].
      counts: how many places an example uses, from 1 to S, [N].
      key: of noise and dropout; None for neither.
      merges: the places to merge at, [N, S - 1], in the place of a search; one beam.
    """
    n, places, _ = leaves.shape
    items = jnp.repeat(leaves[:, None], search.beams, 1)
    scores = jnp.where(jnp.arange(search.beams) == 0, 0.0, -jnp.inf)
    scores = jnp.broadcast_to(scores, (n, search.beams))
    if places == 1:
        return Beams(items, items[:, :, 1:], scores)
    # The beams are one and the same at first.
    first = search.compose(leaves[:, :-1], leaves[:, 1:], _fold(key, 0))
    pairs = jnp.repeat(first[:, None], search.beams, 1)

    def step(beams, xs):
        time, place = xs
        left = counts - time  # items that an example still has
        fresh = _step(search, beams, left, _fold(key, time + 1), place)
        going = left > 1
        keep = [
            jnp.where(going.reshape(n, *[1] * (x.ndim - 1)), x, y)
            for x, y in zip(fresh, beams, strict=True)
        ]
        return Beams(*keep), None

    # What a step makes on its way is made again in the backward pass, which is faster on a CPU too
    # than to write it to memory and to read it.
    step = jax.checkpoint(step)
    xs = jnp.arange(places - 1), None if merges is None else merges.swapaxes(0, 1)
    beams = Beams(items, pairs, scores)
    for start, end in _spans(places):
        here = jax.tree.map(lambda x, span=slice(start, end): x[span], xs)
        beams = jax.lax.scan(step, _cut(beams, places - start), here)[0]
    return beams


def _spans(places: int) -> list[tuple[int, int]]:
    """Returns spans of merges, each up to where half of the places that were left are used."""
    spans, start = [], 0
    while places - start > SHORT:
        spans.append((start, start + (places - start) // 2))
        start = spans[-1][1]
    return [*spans, (start, places - 1)]


def root(beams: Beams):
    """Returns the mean of the beams' roots by the softmax of their scores, [N, D]."""
    return jnp.einsum("nb,nbd->nd", jax.nn.softmax(beams.scores), beams.items[:, :, 0])


def _step(search: Search, beams: Beams, left, key, merge) -> Beams:
    n, width, places = beams.pairs.shape[:3]
    if merge is not None:
        at = jnp.broadcast_to(merge[:, None], (n, width))
        return _merge(search, beams, at, beams.scores, key)
    there = (jnp.arange(places) < left[:, None] - 1)[:, None]
    logits = search.score(beams.pairs)
    scores = beams.scores[..., None] + jax.nn.log_softmax(jnp.where(there, logits, LOW))
    # A finished example has no candidates: any finite numbers, as its step is thrown away.
    scores = jnp.where(there, scores, jnp.where(left[:, None, None] > 1, -jnp.inf, 0))
    scores = scores.reshape(n, width * places)
    noisy = scores
    if key is not None and search.noise:
        noisy += search.noise * jax.random.gumbel(_fold(key, 0), scores.shape)
    if search.select is None:
        index = jax.lax.top_k(noisy, width)[1]
        beams = Beams(*(_take(x, index // places) for x in beams))
        chosen = jnp.take_along_axis(scores, index, 1)
        return _merge(search, beams, index % places, chosen, key)
    weights = search.select(scores, noisy, width, search.strength)
    return _mix(search, beams, weights, scores, key)


def _merge(search: Search, beams: Beams, at, scores, key) -> Beams:
    """Makes the merge at place `at` [N, B] of each beam; of the pairs only two are new."""
    parent = _pick(beams.pairs, at)
    place = jnp.arange(beams.items.shape[2])[:, None]
    here = at[..., None, None]
    items = jnp.where(place <= here, beams.items, jnp.roll(beams.items, -1, 2))
    items = jnp.where(place == here, parent[:, :, None], items)
    before, after = _pick(items, jnp.maximum(at - 1, 0)), _pick(items, at + 1)
    two = search.compose(jnp.stack([before, parent]), jnp.stack([parent, after]), _fold(key, 1))
    place = place[:-1]
    pairs = jnp.where(place <= here, beams.pairs, jnp.roll(beams.pairs, -1, 2))
    pairs = jnp.where(place == here - 1, two[0][:, :, None], pairs)
    pairs = jnp.where(place == here, two[1][:, :, None], pairs)
    return Beams(items, pairs, scores)


def _mix(search: Search, beams: Beams, weights, scores, key) -> Beams:
    """Makes new beams J, each the mean of candidates by its column of weights [N, B * (S - 1), J].

    A candidate's item at a place is the old one where its merge is further right, the parent
    where it is here, and the old one's neighbour where it is further left.
    """
    total = weights.sum(1)
    alive = total > 0.5  # there were candidates left for it; only rounding keeps it from 0 and 1
    weights /= jnp.where(alive, total, 1)[:, None]
    n, width, places = beams.pairs.shape[:3]
    mean = jnp.einsum("ncj,nc->nj", weights, jnp.where(jnp.isfinite(scores), scores, 0))
    weights = weights.reshape(n, width, places, -1)
    upto = jnp.cumsum(weights, 2)
    items = (
        jnp.einsum("nbsj,nbsd->njsd", upto[:, :, -1:] - upto, beams.items[:, :, :-1])
        + jnp.einsum("nbsj,nbsd->njsd", weights, beams.pairs)
        + jnp.einsum("nbsj,nbsd->njsd", upto - weights, beams.items[:, :, 1:])
    )
    pairs = search.compose(items[:, :, :-1], items[:, :, 1:], _fold(key, 1))
    last = [(0, 0), (0, 0), (0, 1), (0, 0)]
    items, pairs = jnp.pad(items, last), jnp.pad(pairs, last)
    return Beams(items, pairs, jnp.where(alive, mean, -jnp.inf))


def _cut(beams: Beams, places: int) -> Beams:
    """Returns the beams without the places behind those that an example still uses."""
    return Beams(beams.items[:, :, :places], beams.pairs[:, :, : places - 1], beams.scores)


def _take(x, beam):
    """Returns the beams of numbers `beam` [N, B]."""
    return jnp.take_along_axis(x, beam.reshape(*beam.shape, *[1] * (x.ndim - 2)), 1)


def _pick(x, at):
    """Returns what stands at the place `at` [N, B] of each beam, the last where that is outside."""
    at = jnp.minimum(at, x.shape[2] - 1)[..., None, None]
    return jnp.take_along_axis(x, at, 2)[:, :, 0]


def _fold(key, number):
    return None if key is None else jax.random.fold_in(key, number)
