"""Trains a perceptron on the flights with one of the losses, and counts its right guesses."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.command import Job
from examples.long_tail.flights import CATEGORIES, Flights, Part, frequencies
from examples.long_tail.losses import arms
from moe.nn.cosine import CosineHead

TABLE = "table"  # the arm that learns nothing


class Settings(NamedTuple):
    """Holds what all arms share."""

    k: int = 5
    epochs: int = 5
    batch: int = 1024
    learning_rate: float = 2e-3
    hidden: int = 256
    embedding: int = 16


class Perceptron(nnx.Module):
    """Scores the places [B, V]: embedded categories and numbers, two hidden layers, a head."""

    def __init__(self, data: Flights, settings: Settings, cosine: bool, *, rngs: nnx.Rngs):
        dim, classes = settings.hidden, len(data.counts)
        embeds = [nnx.Embed(size, settings.embedding, rngs=rngs) for size in data.sizes]
        self.embeds = nnx.List(embeds)
        inputs = len(CATEGORIES) * settings.embedding + data.train.numbers.shape[1]
        self.first = nnx.Linear(inputs, dim, rngs=rngs)
        self.second = nnx.Linear(dim, dim, rngs=rngs)
        head = partial(CosineHead, scale=1.0) if cosine else nnx.Linear
        self.head = head(dim, classes, rngs=rngs)

    def __call__(self, categories, numbers):
        found = [embed(categories[:, i]) for i, embed in enumerate(self.embeds)]
        x = jnp.concatenate([*found, numbers], -1)
        for layer in (self.first, self.second):
            x = jax.nn.relu(layer(x))
        return self.head(x)


def train(job: Job, data: Flights, settings: Settings) -> dict[str, float]:
    """Returns shares of right guesses in test, and "validation", by which widths are chosen."""
    classes = len(data.counts)
    if job.arm == TABLE:
        scores = [frequencies(data.train, part, classes) for part in (data.validation, data.test)]
        return _result(scores, data, settings.k)
    arm = arms(settings.k, data.counts, job.width)[job.arm]
    graph, params = nnx.split(Perceptron(data, settings, arm.cosine, rngs=nnx.Rngs(job.seed)))
    steps = len(data.train.labels) // settings.batch
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(settings.learning_rate, settings.epochs * steps),
        weight_decay=1e-4,
    )

    def loss(params, part: Part, key):
        scores = nnx.merge(graph, params)(part.categories, part.numbers)
        return arm.loss(scores, part.labels, key).mean()

    @jax.jit
    def epoch(params, state, whole: Part, order, key):
        def step(carry, some):
            params, state, key = carry
            key, own = jax.random.split(key)
            batch = jax.tree.map(lambda a: a[some], whole)
            updates, state = optimizer.update(jax.grad(loss)(params, batch, own), state, params)
            return (optax.apply_updates(params, updates), state, key), None

        return jax.lax.scan(step, (params, state, key), order)[0]

    score = jax.jit(lambda params, part: nnx.merge(graph, params)(part.categories, part.numbers))
    whole, rng = jax.tree.map(jnp.asarray, data.train), np.random.default_rng(job.seed)
    state, key = optimizer.init(params), jax.random.key(job.seed)
    for _ in range(settings.epochs):
        order = rng.permutation(len(data.train.labels))[: steps * settings.batch]
        params, state, key = epoch(params, state, whole, order.reshape(steps, -1), key)
    scores = [np.asarray(score(params, part)) for part in (data.validation, data.test)]
    return _result(scores, data, settings.k)


def _result(scores, data: Flights, k: int) -> dict[str, float]:
    validation, test = scores
    return {
        "validation": right(validation, data.validation.labels, k)[1],
        "top1": right(test, data.test.labels, 1)[0],
        "topk": right(test, data.test.labels, k)[0],
        "macro": right(test, data.test.labels, k)[1],
    }


def right(scores: np.ndarray, labels: np.ndarray, k: int) -> tuple[float, float]:
    """Returns the share of rows whose label is among the k best guesses, and the mean of these
    shares over the classes that have rows. Of equal scores the lower class is guessed first."""
    own = np.take_along_axis(scores, labels[:, None], 1)
    earlier = np.arange(scores.shape[1])[None] < labels[:, None]
    among = ((scores > own) | ((scores == own) & earlier)).sum(1) < k
    there = np.bincount(labels)
    each = np.bincount(labels, among)[there > 0] / there[there > 0]
    return float(among.mean()), float(each.mean())
