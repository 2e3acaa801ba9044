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

    Arms with one seed start from the same weights and see the same batches, but for those with a
    head, which see the queries and no candidates.
    """
    if job.arm == "pixels":
        return _tested(lambda x: x.reshape(len(x), -1), images, settings.k)
    rngs, side = nnx.Rngs(job.seed), images.train.images.shape[1]
    if job.arm in ("head", "head_votes"):
        network = Classifier(side, settings.dim, images.num_classes, rngs=rngs)
        objective = head_loss
    else:
        network = Convnet(side, settings.dim, rngs=rngs)
        options = {"arm": job.arm, "k": settings.k, "loss": settings.loss}
        objective = partial(vote_loss, num_classes=images.num_classes, **options)
    graph, params = nnx.split(network)
    params = fit(graph, params, objective, images.train, job, settings)
    network = nnx.merge(graph, params)
    if job.arm == "head":
        answer = jax.jit(lambda x: nnx.merge(graph, params).logits(x).argmax(-1))
        return {
            name: _share(in_chunks(answer, part.images), part)
            for name, part in (("validation", images.validation), ("test", images.test))
        }
    embed = jax.jit(lambda x: nnx.merge(graph, params)(x))
    return _tested(embed, images, settings.k)


def vote_loss(network, batch, width, key, *, arm: str, k: int, loss: str, num_classes: int):
    """Returns the mean loss of the queries' votes among the candidates of the batch."""
    queries, candidates = batch
    count = len(queries.labels)
    embedded = network(jnp.concatenate([queries.images, candidates.images]))
    distances_QN = voting.distances(embedded[:count], embedded[count:])
    weights_QN = voting.weights(arm, distances_QN, k, width, key)
    classes_NC = jax.nn.one_hot(candidates.labels, num_classes)
    return voting.LOSSES[loss](voting.shares(weights_QN, classes_NC), queries.labels).mean()


def head_loss(network, batch, width, key):
    """Returns the cross-entropy of the queries and the candidates, with the classifier's head.

    It is given the labels of both, as a vote is.
    """
    x = jnp.concatenate([part.images for part in batch])
    labels = jnp.concatenate([part.labels for part in batch])
    return optax.softmax_cross_entropy_with_integer_labels(network.logits(x), labels).mean()


def fit(graph, params, objective: Callable, train: Part, job: Job, settings: Settings):
    """Returns the parameters after all steps of Adam, its rate falling to 0 along a cosine."""
    schedule = optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
    optimizer = optax.adam(schedule)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch, width, key):
        def loss(params):
            return objective(nnx.merge(graph, params), batch, width, key)

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    keys = jax.random.split(jax.random.key(job.seed), settings.steps)
    for key, batch in zip(keys, batches(train, job.seed, settings), strict=True):
        params, state = step(params, state, batch, job.width, key)
    return params


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

    @jax.jit
    def answer(x):
        return voting.hard_shares(x, known, labels, k, images.num_classes).argmax(-1)

    return {
        name: _share(in_chunks(answer, in_chunks(embed, part.images)), part)
        for name, part in (("validation", images.validation), ("test", images.test))
    }


def in_chunks(function: Callable, array):
    """Returns the function's rows, computed a chunk of rows at a time."""
    return jnp.concatenate(
        [function(array[start : start + CHUNK]) for start in range(0, len(array), CHUNK)]
    )


def _share(answers, part: Part) -> float:
    return float((np.asarray(answers) == part.labels).mean())
