"""Beams against all sequences of a small model, soft beams against hard ones, and the errors."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.beam_search import beams, model, training, words
from moe.errors import UsageError

STEPS, V, STOP = 3, 3, 2


@pytest.fixture(scope="module")
def tables():
    """Returns log-probabilities [time, token before, token]; before the first stands row V."""
    logits = 1.5 * np.random.default_rng(0).normal(size=(STEPS, V + 1, V))
    return np.asarray(jax.nn.log_softmax(logits), np.float32)


def extend(tables, time, shares):
    rows = jnp.asarray(tables)[time[:, 0, 0].round().astype(int)]
    before = jnp.concatenate([shares, 1 - shares.sum(-1, keepdims=True)], -1)
    return time + 1, jnp.einsum("nkb,nbv->nkv", before, rows)


def enumerated(tables):
    """Returns all sequences with their scores, the best first; STOP goes on as STOP."""
    found = {}
    for sequence in itertools.product(range(V), repeat=STEPS):
        score, before = 0.0, V
        for time, token in enumerate(sequence):
            if before == STOP:
                score += 0 if token == STOP else -np.inf
            else:
                score += tables[time, before, token]
            before = token
        if score > -np.inf:
            found[sequence] = score
    return sorted(found.items(), key=lambda item: -item[1])


@functools.partial(jax.jit, static_argnums=(1, 2))
def ends(tables, k, strength):
    """Returns the scores after all steps: of soft beams, or of hard ones where strength is 0."""
    select = beams.soft(strength) if strength else beams.hard
    now = beams.start(jnp.zeros((2, 1)), k, V)
    for _ in range(STEPS):
        now, _, _ = beams.advance(now, functools.partial(extend, tables), select, STOP)
    return now


def test_all_beams_are_those_of_enumeration(tables):
    best = enumerated(tables)
    state = jnp.zeros((2, 1))
    sequences, scores = beams.search(functools.partial(extend, tables), state, 9, V, STEPS, STOP)
    for n in range(2):
        assert [tuple(row) for row in sequences[n].tolist()] == [row for row, _ in best[:9]]
        np.testing.assert_allclose(scores[n], [score for _, score in best[:9]], rtol=1e-5)


@pytest.mark.parametrize("k", [1, 4, 9])
def test_soft_beams_tend_to_hard_ones(tables, k):
    hard, soft = ends(tables, k, 0), ends(tables, k, 1e-3)
    np.testing.assert_allclose(soft.scores, hard.scores, rtol=1e-4)
    np.testing.assert_allclose(soft.shares, hard.shares, atol=1e-4)


def test_one_beam_is_greedy_and_a_score_is_the_sum_of_log_probabilities(tables):
    run = functools.partial(extend, tables)
    sequences, scores = beams.search(run, jnp.zeros((1, 1)), 1, V, STEPS, STOP)
    expected, total, before = [], 0.0, V
    for time in range(STEPS):
        row = tables[time, before] if before != STOP else np.where(np.arange(V) == STOP, 0, -np.inf)
        before = int(row.argmax())
        expected.append(before)
        total += row[before]
    assert sequences[0, 0].tolist() == expected
    np.testing.assert_allclose(scores[0, 0], total, rtol=1e-6)


def test_the_first_token_is_judged_by_the_model_alone(tables):
    run = functools.partial(extend, tables)
    sequences = jnp.array([[0, 1, 2], [1, 2, 2]])
    found = beams.log_likelihoods(run, jnp.zeros((2, 1)), sequences, 3, V, beams.soft(0.5), STOP)
    expected = np.log(np.exp(tables[0, V, [0, 1]]) + beams.FLOOR)
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-6)
    assert (found < 0.01).all()


def listed(said):
    names, sounds = zip(*said, strict=True)
    return {"words": np.array(names, "S"), "phonemes": np.array(sounds, "S")}


def test_what_should_come_later_reaches_earlier_choices(tables):
    def loss(tables, strength):
        run = functools.partial(extend, tables)
        sequences = jnp.array([[0, 1, 1], [1, 2, 2]])
        select = beams.soft(strength)
        found = beams.log_likelihoods(run, jnp.zeros((2, 1)), sequences, 2, V, select, STOP)
        return found[:, 2].sum()

    grad = jax.jit(jax.grad(loss))(tables, 0.5)
    assert np.isfinite(grad).all()
    assert (np.abs(grad).max((1, 2)) > 1e-4).all()


@pytest.fixture(scope="module")
def small():
    said = [("cat", "K AE1 T"), ("cat", "K AA1 T"), ("at", "AE1 T"), ("taxi", "T AE1 K S IY0")]
    return words.split(words.parse(listed([*said, ("act", "AE1 K T")])), 3, 1, 5, seed=0)


def test_words_are_read(small):
    said = listed([("a", "AH0"), ("a", "EY1"), ("a", "EY2"), ("x-ray", "EH1 K S")])
    assert words.parse(said) == {"a": [("AH",), ("EY",)]}
    assert small.phonemes == ["AA", "AE", "IY", "K", "S", "T"]
    assert small.sounds.shape[1] == 6 and (small.sounds[:, -1] == words.END).all()
    assert len(small.test_counts) == 1 and len(small.counts) in (3, 4)
    with pytest.raises(UsageError, match="there are 1 words"):
        words.split({"a": [("AH",)]}, 1, 1, 5, 0)


def test_errors_take_the_closest_pronunciation():
    assert words.edits("kitten", "sitting") == 3 and words.edits("", "ab") == 2
    guesses = np.array([[3, 4, 0, 9], [1, 2, 3, 4]])
    assert words.errors(guesses, [[(3, 5, 6), (3, 4)], [(1, 2)]]) == (0.5, 2 / 4)


def test_the_state_ignores_what_is_behind_a_word():
    params = model.init(jax.random.key(0), 5, 4, 3)
    letters, counts = np.array([[1, 2, 0, 0], [1, 2, 3, 4]]), np.array([2, 2])

    @jax.jit
    def read(params):
        memory, state = model.encode(params, letters, counts)
        return state, model.extend(params, memory, state[:, None], jnp.zeros((2, 1, 4)))[1]

    state, log_probs = read(params)
    np.testing.assert_array_equal(state[0], state[1])
    np.testing.assert_allclose(log_probs[0], log_probs[1], atol=1e-6)


@pytest.mark.slow  # four training steps are compiled
def test_every_arm_trains_and_its_gradient_is_finite(small):
    settings = training.Settings(width=4, beams=2, batch=4, steps=2, further=2)
    found = training.measure(settings, list(training.ARMS), small, 0, say=lambda _: None)
    assert set(found) == set(training.ARMS)
    for arm in found.values():
        assert np.isfinite(arm["loss"]) and 0 <= arm["word"] <= 1
