"""The two stages: towers whose product is fast, and a network that sees both sides at once."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from examples.cascade.impressions import Impressions, MovieLens

EMBEDDING = 8
# Made once: models that are alike share what is compiled.
SMALL, ZEROS = nnx.initializers.normal(0.05), nnx.initializers.zeros


class Batch(NamedTuple):
    """Holds impressions, with the features of their films."""

    user: jax.Array  # [B]
    items: jax.Array  # [B, N]
    history: jax.Array  # [B, H]
    liking: jax.Array  # [B, H]
    facts: jax.Array  # [B, N, F]: mean and count of the ratings so far, year, genres


def batch_of(impressions: Impressions, data: MovieLens) -> Batch:
    """Returns impressions as the stages read them."""
    items = impressions.items
    facts = (
        (impressions.mean - 3.5)[..., None],
        jnp.log1p(impressions.count)[..., None] / 3,
        data.year[items][..., None] / 10,
        data.genres[items],
    )
    facts = jnp.concatenate(facts, -1).astype(jnp.float32)
    return Batch(impressions.user, items, impressions.history, impressions.liking, facts)


class Layers(nnx.Module):
    """Dense layers of the given widths with ReLU between them."""

    def __init__(self, widths: tuple[int, ...], *, rngs: nnx.Rngs):
        """Makes a layer for each pair of neighbours in `widths`."""
        pairs = itertools.pairwise(widths)
        self.layers = nnx.List([nnx.Linear(*pair, rngs=rngs) for pair in pairs])

    def __call__(self, x):
        """Returns the last layer's output, without a ReLU."""
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class Embeddings(nnx.Module):
    """Embeddings of people and films; each stage has its own."""

    def __init__(self, data: MovieLens, *, rngs: nnx.Rngs):
        """Makes small embeddings, those of people 0: one who was never seen is like the mean."""
        self.film = nnx.Embed(len(data.year), EMBEDDING, embedding_init=SMALL, rngs=rngs)
        self.user = nnx.Embed(data.num_users, EMBEDDING, embedding_init=ZEROS, rngs=rngs)

    def person(self, batch: Batch):
        """Returns [B, 3E]: their own embedding, the mean film that they rated, and that liked."""
        films_BHE = self.film(batch.history)
        real_BH1 = (batch.history > 0)[..., None]
        count_B1 = jnp.maximum(real_BH1.sum(1), 1)
        seen = jnp.where(real_BH1, films_BHE, 0).sum(1) / count_B1
        liked = jnp.where(real_BH1, films_BHE * batch.liking[..., None], 0).sum(1) / count_B1
        return jnp.concatenate([self.user(batch.user), seen, liked], -1)


class Retrieval(nnx.Module):
    """Two towers, 128-64-32, of the person and of the film; the score is their product (DSSM)."""

    def __init__(self, data: MovieLens, *, rngs: nnx.Rngs):
        """Makes the embeddings and the towers."""
        self.embeddings = Embeddings(data, rngs=rngs)
        facts = data.genres.shape[1] + 3
        self.person = Layers((3 * EMBEDDING, 128, 64, 32), rngs=rngs)
        self.film = Layers((EMBEDDING + facts, 128, 64, 32), rngs=rngs)

    def __call__(self, batch: Batch):
        """Returns the scores [B, N]."""
        person_BD = self.person(self.embeddings.person(batch))
        film = jnp.concatenate([self.embeddings.film(batch.items), batch.facts], -1)
        return jnp.einsum("bd,bnd->bn", person_BD, self.film(film)) / 32**0.5


class Ranking(nnx.Module):
    """A network 128-128-32-1 of the person, the film and what the person thought of its like (DIN).

    The last is attention from a film to those of the history: the mean of their embeddings and of
    how they were liked, weighed by a softmax of products.
    """

    def __init__(self, data: MovieLens, *, rngs: nnx.Rngs):
        """Makes the embeddings, the attention's projection and the network."""
        self.embeddings = Embeddings(data, rngs=rngs)
        facts = data.genres.shape[1] + 3
        self.query = nnx.Linear(EMBEDDING, EMBEDDING, rngs=rngs)
        self.layers = Layers((5 * EMBEDDING + 1 + facts, 128, 128, 32, 1), rngs=rngs)

    def __call__(self, batch: Batch):
        """Returns the scores [B, N]."""
        film_BNE, past_BHE = self.embeddings.film(batch.items), self.embeddings.film(batch.history)
        scores = jnp.einsum("bne,bhe->bnh", self.query(film_BNE), past_BHE)
        real = (batch.history > 0)[:, None, :]
        weights = jax.nn.softmax(jnp.where(real, scores, -1e9), -1) * real
        alike = jnp.einsum("bnh,bhe->bne", weights, past_BHE)
        liked = jnp.einsum("bnh,bh->bn", weights, batch.liking)[..., None]
        person = self.embeddings.person(batch)[:, None]
        person = jnp.broadcast_to(person, (*film_BNE.shape[:2], person.shape[-1]))
        x = jnp.concatenate([person, film_BNE, alike, liked, batch.facts], -1)
        return self.layers(x)[..., 0]


class Cascade(nnx.Module):
    """Both stages, and the learned weights of the joint loss."""

    def __init__(self, data: MovieLens, *, rngs: nnx.Rngs):
        """Makes two stages that share no parameter."""
        self.retrieval = Retrieval(data, rngs=rngs)
        self.ranking = Ranking(data, rngs=rngs)
        self.log_weights = nnx.Param(jnp.zeros(2))

    def __call__(self, batch: Batch):
        """Returns the scores of both stages, each [B, N]."""
        return self.retrieval(batch), self.ranking(batch)
