"""Trains one network and tests it: by the vote of its neighbours, by a softmax, or by neither."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.command import Job
from examples.masks import MASKS
from examples.nearest_neighbours import voting
from examples.nearest_neighbours.network import Classifier, Convnet
from examples.nearest_neighbours.sets import Images, Part

# `head`: the classifier's own answer; `head_votes`: neighbours by the embedding that it learned;
# `softmax`: votes weighed by all distances, without a k; `pixels`: neighbours in the images.
CONTROLS = ("head", "head_votes", "softmax", "pixels")
ARMS = (*MASKS, *CONTROLS)
WITHOUT_WIDTH = ("head", "head_votes", "pixels")
CHUNK = 1000  # images that are embedded, or compared, at a time


class Settings(NamedTuple):
    """Holds what all arms share."""

    dataset: str = "digits"
    k: int = 9
    steps: int = 600
    queries: int = 100
    candidates: int = 100
    dim: int = 64
    learning_rate: float = 1e-3
    loss: str = "log"
    limit: int = 0


def train(job: Job, images: Images, settings: Settings) -> dict[str, float]:
    """Returns the accuracies of a run on the validation and the test images.

    Arms with one seed see the same batches, and those without a head start from the same weights.
    """
    if job.arm == "pixels":
        return _tested(lambda x: x.reshape(len(x), -1), images, settings.k)
    network = make_network(job, images, settings)
    graph, params = nnx.split(network)
    params = fit(graph, params, images, job, settings)
    if job.arm == "head":
        parts = {"validation": images.validation, "test": images.test}
        return {
            name: _share(in_chunks(partial(_answer, graph, params), part.images), part)
            for name, part in parts.items()
        }
    return _tested(partial(_embed, graph, params), images, settings.k)


def make_network(job: Job, images: Images, settings: Settings) -> Convnet | Classifier:
    """Returns the network of an arm, as it begins."""
    rngs, side = nnx.Rngs(job.seed), images.train.images.shape[1]
    if job.arm in ("head", "head_votes"):
        return Classifier(side, settings.dim, images.num_classes, rngs=rngs)
    return Convnet(side, settings.dim, rngs=rngs)


def fit(graph, params, images: Images, job: Job, settings: Settings):
    """Returns the parameters after all steps."""
    state = optimizer(settings).init(params)
    keys = jax.random.split(jax.random.key(job.seed), settings.steps)
    arm = "head" if job.arm == "head_votes" else job.arm  # trained alike
    fixed = graph, arm, settings, images.num_classes
    for key, batch in zip(keys, batches(images.train, job.seed, settings), strict=True):
        params, state = step(fixed, params, state, batch, job.width, key)
    return params


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """Returns Adam, its rate falling to 0 along a cosine."""
    return optax.adam(optax.cosine_decay_schedule(settings.learning_rate, settings.steps))


# At the top, so that the seeds and widths of an arm share what is compiled.
@partial(jax.jit, static_argnums=0)
def step(fixed, params, state, batch, width, key):
    """Returns the parameters and the optimizer's state after a batch."""
    graph, arm, settings, num_classes = fixed

    def loss(params):
        network = nnx.merge(graph, params)
        if arm == "head":
            return head_loss(network, batch)
        votes = votes_of(network, batch, arm, settings.k, width, key, num_classes)
        return voting.LOSSES[settings.loss](votes, batch[0].labels).mean()

    updates, state = optimizer(settings).update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def votes_of(network, batch, arm: str, k: int, width, key, num_classes: int):
    """Returns the votes [Q, C] of the batch's candidates on its queries."""
    queries, candidates = batch
    embedded = network(jnp.concatenate([queries.images, candidates.images]))
    mine, theirs = jnp.split(embedded, [len(queries.labels)])
    weights_QN = voting.weights(arm, voting.distances(mine, theirs), k, width, key)
    return voting.shares(weights_QN, jax.nn.one_hot(candidates.labels, num_classes))


def head_loss(network, batch):
    """Returns the cross-entropy of the queries and the candidates, with the classifier's head.

    It is told the labels of both, as a vote is.
    """
    x = jnp.concatenate([part.images for part in batch])
    labels = jnp.concatenate([part.labels for part in batch])
    return optax.softmax_cross_entropy_with_integer_labels(network.logits(x), labels).mean()


@partial(jax.jit, static_argnums=0)
def _embed(graph, params, images):
    return nnx.merge(graph, params)(images)


@partial(jax.jit, static_argnums=0)
def _answer(graph, params, images):
    return nnx.merge(graph, params).logits(images).argmax(-1)


def batches(train: Part, seed: int, settings: Settings):
    """Yields the queries and the candidates of each step, all different images."""
    order = np.random.default_rng(seed)
    for _ in range(settings.steps):
        some = order.choice(
            len(train.labels), settings.queries + settings.candidates, replace=False
        )
        yield tuple(
            Part(train.images[part], train.labels[part])
            for part in np.split(some, [settings.queries])
        )


def _tested(embed: Callable, images: Images, k: int) -> dict[str, float]:
    """Returns the accuracy of the vote of the k nearest of all training images."""
    known, labels = in_chunks(embed, images.train.images), jnp.asarray(images.train.labels)

    def answer(x):
        return _majority(x, known, labels, k, images.num_classes)

    return {
        name: _share(in_chunks(answer, in_chunks(embed, part.images)), part)
        for name, part in (("validation", images.validation), ("test", images.test))
    }


@partial(jax.jit, static_argnums=(3, 4))
def _majority(x, known, labels, k, num_classes):
    return voting.hard_shares(x, known, labels, k, num_classes).argmax(-1)


def in_chunks(function: Callable, array):
    """Returns the function's rows, computed a chunk of rows at a time."""
    return jnp.concatenate(
        [function(array[start : start + CHUNK]) for start in range(0, len(array), CHUNK)]
    )


def _share(answers, part: Part) -> float:
    return float((np.asarray(answers) == part.labels).mean())
