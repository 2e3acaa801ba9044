"""Draws tokens from a decoder: the next one from its logits, and rows of them through a cache."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe import seeds
from moe.hosts import mesh
from moe.train.run import Run


class Sampling(NamedTuple):
    """Says how the next token is drawn.

    Attributes:
      temperature: the logits are divided by it; 0 takes the most probable token.
      top_p: the drawn token is one of the fewest, most probable first, whose probabilities add up
        to this (Holtzman et al. 2020).
      seed: of the draws.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


class Rows(NamedTuple):
    """Holds each row's newest token, which the model has not read yet."""

    token_B: jax.Array
    log_prob_B: jax.Array  # of that token, at temperature 1 among all tokens; float32
    position_B: jax.Array  # of that token
    done_B: jax.Array  # whether it is the row's last
    sample_B: jax.Array  # number of the sample: which of a prompt's draws these are


def sample(logits_BV, key_B, temperature: float, top_p: float):
    """Draws a token of each row, int32 [B]; float32 whatever the logits are."""
    logits_BV = logits_BV.astype(jnp.float32)
    if temperature == 0:
        return _likeliest(logits_BV)
    logits_BV = keep_likely(logits_BV / temperature, top_p)
    return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)


def _likeliest(logits_BV):
    """Returns the first of each row's largest; by plain maxima and minima, for argmax is slow on
    CPU."""
    last = logits_BV.shape[-1] - 1
    token_V = jnp.arange(last + 1, dtype=jnp.int32)
    is_best_BV = logits_BV == logits_BV.max(-1, keepdims=True)
    return jnp.where(is_best_BV, token_V[None], last).min(-1)  # `last` too where all are NaN


def keep_likely(logits_BV, top_p: float):
    """Returns the logits, -inf but for the fewest tokens that hold `top_p` of the probability.

    The most probable token always stays; of equal ones the lower number counts as more probable.
    """
    if top_p >= 1:
        return logits_BV
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    probs_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV), order_BV, -1)
    before_BV = jnp.cumsum(probs_BV, -1) - probs_BV  # held by the more probable ones
    keep_BV = (before_BV < top_p).at[:, 0].set(True)
    row = jnp.arange(len(logits_BV))[:, None]
    keep_BV = jnp.zeros_like(keep_BV).at[row, order_BV].set(keep_BV)
    return jnp.where(keep_BV, logits_BV, -jnp.inf)


class Sampler:
    """Continues prompts, many rows at a time, with the parameters of a run of text.

    A row is a function of (parameters, prompt, sample, seed): its draws have keys of its own
    number and position, and the other rows, padding among them, take no part in it.

    Args:
      run: of text; its mesh computes.
      sampling: how tokens are drawn.
      rows: computed at a time; the mesh may need a few more, which are padding.
      longest: tokens of the longest prompt.
      most: tokens to draw for a row.
      vocabulary: tokens that may be drawn: a model can have more than its tokenizer.
      stops: the tokens that end a row.
    """

    def __init__(
        self,
        run: Run,
        sampling: Sampling,
        *,
        rows: int,
        longest: int,
        most: int,
        vocabulary: int,
        stops: Sequence[int],
    ):
        self.run, self.sampling, self.longest, self.most = run, sampling, longest, most
        self.context = run.config.data.seq_len
        shards = run.mesh.size // run.mesh.shape["tensor"]
        self.rows = math.ceil(rows / shards) * shards
        self._length = min(self.context, longest + most)
        self._vocabulary, self._stops = vocabulary, tuple(dict.fromkeys(stops))
        self._key = seeds.key(sampling.seed, "generation")
        self._prefill = run.jit(self._read_prompts)
        self._step = run.jit(self._read_token, donate_argnums=2)

    def draw(
        self, params, prompts: Sequence[Sequence[int]], samples: Sequence[int]
    ) -> Iterator[Rows]:
        """Yields the next token of every prompt's row, in numpy, until all rows are done.

        A row is done after a token of `stops`, or one at position `context`: training had no such
        position, so that the model cannot read that token. What comes after is no text.

        Args:
          prompts: tokens of at most `rows` prompts, 1 to `longest` each.
          samples: the number of each.
        """
        numbers = np.zeros(self.rows, np.int32)
        numbers[: len(samples)] = samples
        tokens = np.zeros((self.rows, self.longest), np.int32)
        lengths = np.zeros(self.rows, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        batch = self.run.put({"tokens": tokens, "lengths": lengths, "numbers": numbers})
        rows, caches = self._prefill(params, self._key, *batch.values())
        for left in reversed(range(self.most)):
            now = rows
            if left:  # the devices go on while the host shows the token
                rows, caches = self._step(params, self._key, caches, rows)
            told = Rows(*(a[: len(prompts)] for a in jax.device_get(now)))
            yield told
            if told.done_B.all():
                return

    def _read_prompts(self, params, key, tokens_BT, length_B, sample_B):
        """Fills caches with the prompts, and draws the token after each."""
        model = nnx.merge(self.run.graphdef, params)
        caches = model.init_cache(self.rows, self._length)
        places = _places(length_B, self.longest)
        out = model(tokens_BT, **places, caches=_spread(caches))
        last_B = jnp.maximum(length_B - 1, 0)
        last_BD = out.hidden_BTD[jnp.arange(self.rows), last_B]
        read = Rows(last_B, jnp.zeros(self.rows), last_B, length_B == 0, sample_B)
        rows = self._next(model, key, last_BD, read)
        return rows, _spread(out.caches)

    def _read_token(self, params, key, caches, rows: Rows):
        """Reads the newest token of each row that goes on, and draws the one after it."""
        model = nnx.merge(self.run.graphdef, params)
        # What has ended is padding: it takes no expert.
        places = {
            "segments": jnp.where(rows.done_B, 0, 1)[:, None],
            "positions": rows.position_B[:, None],
        }
        out = model(rows.token_B[:, None], **places, caches=caches)
        return self._next(model, key, out.hidden_BTD[:, 0], rows), _spread(out.caches)

    def _next(self, model, key, hidden_BD, rows: Rows) -> Rows:
        """Draws a token for each row, and says which rows end with it."""
        logits_BV = model.logits(hidden_BD)
        known_V = jnp.arange(logits_BV.shape[-1]) < self._vocabulary
        logits_BV = jnp.where(known_V[None], logits_BV, -jnp.inf)
        position_B = rows.position_B + 1
        key_B = jax.vmap(functools.partial(_fold, key))(rows.sample_B, position_B)
        token_B = sample(logits_BV, key_B, self.sampling.temperature, self.sampling.top_p)
        done_B = rows.done_B | (position_B >= self.context)
        done_B |= (token_B[:, None] == jnp.array(self._stops)[None]).any(-1)
        log_prob_BV = jax.nn.log_softmax(logits_BV)
        log_prob_B = jnp.take_along_axis(log_prob_BV, token_B[:, None], -1)[:, 0]
        return Rows(token_B, log_prob_B, position_B, done_B, rows.sample_B)


def _places(length_B, tokens: int) -> dict[str, jax.Array]:
    """Says where the tokens of right-padded prompts stand.

    The slots that padding writes in a cache are those of later positions: each is overwritten
    before a token that stands there or later looks at it.
    """
    position_BT = jnp.broadcast_to(jnp.arange(tokens)[None], (len(length_B), tokens))
    return {
        "segments": (position_BT < length_B[:, None]).astype(jnp.int32),
        "positions": position_BT,
    }


def _spread(caches):
    """Lays the caches out over the mesh, rows and heads: one layout, so one compiled step."""

    def place(a):
        return mesh.constrain(a, *[None] * (a.ndim - 4), "batch", None, "heads", None)

    return jax.tree.map(place, caches)


def _fold(key, *numbers):
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
