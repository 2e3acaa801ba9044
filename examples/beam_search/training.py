"""Trains the model on its words by likelihood, then further by each arm, and counts errors."""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.beam_search import beams, model
from examples.beam_search.words import END, LETTERS, Words, errors

# Arms after the first start where it ends: what share of the loss is likelihood under the given
# past, and what share is likelihood under soft beams.
ARMS = {
    "likelihood": (1.0, 0.0),
    "likelihood, further": (1.0, 0.0),
    "soft beams": (0.0, 1.0),
    "both": (0.5, 0.5),
}


class Settings(NamedTuple):
    """Says how a model is made and trained: Adam, gradients clipped to norm 1, rates that end at 0.

    Attributes:
      steps, rate: of the first training.
      further, further_rate: of every arm after it.
      strength: of the soft selection, in units of log-probability.
    """

    width: int = 128
    beams: int = 5
    batch: int = 128
    steps: int = 3000
    rate: float = 3e-3
    further: int = 500
    further_rate: float = 3e-4
    strength: float = 1.0


def losses(settings: Settings, shares: tuple[float, float], params, letters, counts, sounds):
    """Returns each word's loss, the mean over its phonemes and END."""
    memory, state = model.encode(params, letters, counts)
    there = jnp.arange(sounds.shape[1]) <= (sounds != END).sum(1, keepdims=True)
    total = jnp.zeros(len(letters))
    if shares[0]:
        found = model.teach(params, memory, state, sounds)
        total -= shares[0] * (found * there).sum(1) / there.sum(1)
    if shares[1]:
        vocabulary = params["phonemes"].shape[0]
        extend = functools.partial(model.extend, params, memory)
        select = beams.soft(settings.strength)
        found = beams.log_likelihoods(
            extend, state, sounds, settings.beams, vocabulary, select, END
        )
        total -= shares[1] * (found * there).sum(1) / there.sum(1)
    return total


def optimizer(steps: int, rate: float) -> optax.GradientTransformation:
    """Returns Adam whose rate warms up for a tenth of the steps and falls to 0 by a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), max(2, steps))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _step(settings, shares, steps, rate, params, state, batch):
    value, grads = jax.value_and_grad(
        lambda params: losses(settings, shares, params, *batch).mean()
    )(params)
    updates, state = optimizer(steps, rate).update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


def fit(settings: Settings, shares, params, words: Words, steps: int, rate: float, seed: int):
    """Returns the parameters after `steps` batches, and the mean loss of the last tenth."""
    rng, state, found = np.random.default_rng(seed), optimizer(steps, rate).init(params), []
    for _ in range(steps):
        rows = rng.integers(len(words.counts), size=settings.batch)
        batch = words.letters[rows], words.counts[rows], words.sounds[rows]
        params, state, value = _step(settings, shares, steps, rate, params, state, batch)
        found.append(value)
    return params, float(np.mean(found[-max(1, steps // 10) :]))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _spell(width, steps, params, letters, counts):
    memory, state = model.encode(params, letters, counts)
    extend = functools.partial(model.extend, params, memory)
    vocabulary = params["phonemes"].shape[0]
    return beams.search(extend, state, width, vocabulary, steps, END)[0][:, 0]


def spell(width: int, params, words: Words, batch: int = 256) -> np.ndarray:
    """Returns the best sequence of `width` hard beams for each word to test on."""
    found = []
    for start in range(0, len(words.test_counts), batch):
        rows = np.arange(start, start + batch) % len(words.test_counts)
        letters, counts = words.test_letters[rows], words.test_counts[rows]
        found.append(_spell(width, words.sounds.shape[1], params, letters, counts))
    return np.concatenate(found)[: len(words.test_counts)]


def measure(settings: Settings, arms, words: Words, seed: int, say=print) -> dict[str, dict]:
    """Returns each arm's errors and seconds; the first arm is trained, the others start from it."""
    found, params = {}, {}
    for arm in arms:
        start = time.perf_counter()
        if not params:
            steps, rate = settings.steps, settings.rate
            first = model.init(
                jax.random.key(seed), len(LETTERS) + 1, len(words.phonemes) + 1, settings.width
            )
        else:
            steps, rate = settings.further, settings.further_rate
            first = params["likelihood"]
        # All further arms see the same batches.
        own = seed if not params else seed + 1_000_000
        params[arm], loss = fit(settings, ARMS[arm], first, words, steps, rate, own)
        seconds = time.perf_counter() - start
        word, phoneme = errors(spell(settings.beams, params[arm], words), words.references)
        greedy, _ = errors(spell(1, params[arm], words), words.references)
        found[arm] = {
            "word": word,
            "phoneme": phoneme,
            "greedy": greedy,
            "loss": loss,
            "seconds": seconds,
        }
        say(f"{arm}, seed {seed}: loss {loss:.3f}, word error {word:.2%}, {seconds:.0f} s")
    return found
