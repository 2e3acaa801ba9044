"""Reads letters by a GRU in both directions, and says phonemes by one that attends to them.

Cho et al. 2014; the attention is the product of Luong et al. 2015. Letters: N words, L letters, T
phonemes, k beams, H width, V vocabulary.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from examples.layers import dense, linear


class Memory(NamedTuple):
    """Holds what is attended to: keys [N, L, H], values [N, L, 2 H], whether it is there [N, L]."""

    keys: jax.Array
    values: jax.Array
    there: jax.Array


def init(key, letters: int, phonemes: int, width: int) -> dict:
    """Returns the parameters; `letters` and `phonemes` count what fills up and ends."""
    keys = iter(jax.random.split(key, 12))

    def fresh_gru():
        return {
            "gates": dense(next(keys), 2 * width, 2 * width),
            "new": dense(next(keys), 2 * width, width),
        }

    return {
        "letters": 0.1 * jax.random.normal(next(keys), (letters, width)),
        "phonemes": 0.1 * jax.random.normal(next(keys), (phonemes, width)),
        "forward": fresh_gru(),
        "backward": fresh_gru(),
        "decoder": fresh_gru(),
        "keys": dense(next(keys), 2 * width, width),
        "start": dense(next(keys), 2 * width, width),
        "attended": dense(next(keys), 3 * width, width),
        "out": dense(next(keys), width, phonemes),
    }


def gru(cell: dict, state, x):
    """Returns the next state, [..., H]."""
    reset, update = jnp.split(
        jax.nn.sigmoid(linear(cell["gates"], jnp.concatenate([x, state], -1))), 2, -1
    )
    new = jnp.tanh(linear(cell["new"], jnp.concatenate([x, reset * state], -1)))
    return update * state + (1 - update) * new


def encode(params: dict, letters, counts):
    """Returns what the decoder attends to, and its first state [N, H].

    Args:
      letters: [N, L], of which the first `counts` [N] are there.
    """
    x = params["letters"][letters]
    there = jnp.arange(letters.shape[1]) < counts[:, None]

    def read(cell, state, inputs):
        x, there = inputs
        state = jnp.where(there[:, None], gru(cell, state, x), state)
        return state, state

    inputs = x.swapaxes(0, 1), there.T
    zeros = jnp.zeros_like(x[:, 0])
    ends, values = [], []
    for direction in ("forward", "backward"):
        end, states = jax.lax.scan(
            partial(read, params[direction]), zeros, inputs, reverse=direction == "backward"
        )
        ends.append(end)
        values.append(states.swapaxes(0, 1))
    values = jnp.concatenate(values, -1)
    state = jnp.tanh(linear(params["start"], jnp.concatenate(ends, -1)))
    return Memory(linear(params["keys"], values), values, there), state


def extend(params: dict, memory: Memory, state, shares):
    """Returns the next states [N, k, H] and the log-probabilities of phonemes [N, k, V].

    Args:
      shares: the last phonemes, [N, k, V]; all 0 at the start.
    """
    state = gru(params["decoder"], state, shares @ params["phonemes"])
    scores = jnp.einsum("nkh,nlh->nkl", state, memory.keys) / state.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(memory.there[:, None], scores, -jnp.inf))
    context = jnp.einsum("nkl,nlc->nkc", weights, memory.values)
    mixed = jnp.tanh(linear(params["attended"], jnp.concatenate([state, context], -1)))
    return state, jax.nn.log_softmax(linear(params["out"], mixed))


def teach(params: dict, memory: Memory, state, sounds):
    """Returns the log-probabilities of phonemes [N, T], each given those before it."""
    vocabulary = params["phonemes"].shape[0]
    before = jax.nn.one_hot(sounds[:, :-1], vocabulary)
    before = jnp.pad(before, [(0, 0), (1, 0), (0, 0)])

    def step(state, inputs):
        shares, tokens = inputs
        state, log_probs = extend(params, memory, state, shares[:, None])
        return state, jnp.take_along_axis(log_probs[:, 0], tokens[:, None], -1)[:, 0]

    inputs = before.swapaxes(0, 1), sounds.T
    return jax.lax.scan(step, state[:, None], inputs)[1].T
