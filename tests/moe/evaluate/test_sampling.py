"""Tokens are drawn as a reference in numpy draws them, and the cache changes none of them."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.evaluate import evaluation
from moe.evaluate.sampling import Sampler, Sampling, keep_likely, sample
from moe.train.run import set_up
from tests.moe.conftest import QUICK, open_source

BEGIN, CONTEXT = 256, 32
PROMPTS = [[BEGIN], [BEGIN, *b"def f("], [BEGIN, *b"import"], [BEGIN, *range(50, 79)]]


def likely(logits, top_p: float) -> set[int]:
    """The fewest tokens that hold top_p, one by one."""
    probs = np.exp(logits - logits.max())
    probs = probs / probs.sum()
    chosen, held = set(), 0.0
    for token in sorted(range(len(probs)), key=lambda i: (-probs[i], i)):
        if held >= top_p and chosen:
            break
        chosen.add(token)
        held += probs[token]
    return chosen


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_the_likely_tokens_are_those_of_the_reference(top_p):
    logits = np.random.default_rng(0).normal(size=(7, 23)).astype(np.float32) * 3
    logits[1] = 0.0  # all equal: the lower numbers come first
    logits[2, 4:] = logits[2, 3]
    logits[3, 5:] = -np.inf
    kept = np.asarray(keep_likely(jnp.asarray(logits), top_p))
    for row, own in zip(kept, logits, strict=True):
        expected = likely(own.astype(np.float64), top_p)
        if top_p < 1:
            assert set(np.flatnonzero(row > -np.inf)) == expected - set(
                np.flatnonzero(own == -np.inf)
            )
        np.testing.assert_array_equal(row[row > -np.inf], own[row > -np.inf])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.9), (2.0, 0.6)])
def test_draws_have_the_frequencies_of_the_reference(temperature, top_p):
    logits = np.array([2.0, -1.0, 0.5, 0.5, 1.0, -3.0])
    exact = np.exp(logits / temperature)
    chosen = likely(logits / temperature, top_p)
    exact = np.array([p if i in chosen else 0 for i, p in enumerate(exact)])
    exact /= exact.sum()
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    many = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    drawn = np.bincount(sample(many, keys, temperature, top_p), minlength=len(logits)) / count
    error = np.sqrt(exact * (1 - exact) / count)
    assert (np.abs(drawn - exact) <= 4.5 * error).all()


def test_without_temperature_the_most_probable_is_taken():
    logits = jnp.asarray([[1.0, 3.0, 3.0], [-1.0, -jnp.inf, -2.0]], jnp.bfloat16)
    assert sample(logits, None, 0, 0.5).tolist() == [1, 0]


@pytest.fixture(scope="module")
def loaded(finished_text_run):
    run, _ = evaluation.prepare(finished_text_run, None, {})
    params, *_ = evaluation.restore(finished_text_run, run, None)
    return run, params


def whole_passes(run, params):
    """Returns a function: tokens -> log-probabilities of what follows each, without a cache."""

    def forward(params, tokens, length):
        model = nnx.merge(run.graphdef, params)
        segments = (jnp.arange(CONTEXT)[None] < length[:, None]).astype(jnp.int32)
        return jax.nn.log_softmax(model.logits(model(tokens, segments=segments).hidden_BTD))

    compiled = run.jit(forward, compiler_options=QUICK)

    def of(tokens):
        whole = np.zeros((8, CONTEXT), np.int32)
        whole[:, : len(tokens)] = tokens
        out = compiled(params, jnp.asarray(whole), jnp.full(8, len(tokens)))
        return np.asarray(out[0, : len(tokens)])

    return of


@pytest.fixture(scope="module")
def log_probs(loaded):
    return whole_passes(*loaded)


def sampler(run, sampling, **settings):
    sizes = {"rows": 4, "longest": 30, "most": 12, "vocabulary": 257, "stops": [BEGIN]}
    return Sampler(run, sampling, **sizes | settings)


def rows(drawn, count):
    """Returns each row's tokens, up to its last, and their log-probabilities."""
    drawn, found = list(drawn), []
    for i in range(count):
        done = [bool(step.done_B[i]) for step in drawn]
        end = done.index(True) + 1 if True in done else len(done)
        assert done == sorted(done)
        found.append([(int(s.token_B[i]), float(s.log_prob_B[i])) for s in drawn[:end]])
    return found


@pytest.mark.slow
def test_greedy_text_through_the_cache_is_that_of_whole_passes(loaded, log_probs):
    run, params = loaded
    greedy = sampler(run, Sampling(temperature=0))
    found = rows(greedy.draw(params, PROMPTS, [0] * 4), 4)
    for prompt, row in zip(PROMPTS, found, strict=True):
        tokens = list(prompt)
        for token, log_prob in row:
            expected = log_probs(tokens)[-1]
            assert token == expected.argmax()
            assert log_prob == pytest.approx(expected.max(), abs=1e-5)
            tokens.append(token)
    assert [len(row) for row in found] == [12, 12, 12, 3]  # the last fills the context
    compiled = inspect.getclosurevars(greedy._step).nonlocals["compiled"]
    assert compiled._cache_size() == 1  # the steps after the first are the same program


def test_a_row_depends_on_its_prompt_and_sample_alone(loaded, log_probs):
    run, params = loaded
    warm = sampler(run, Sampling(seed=5), vocabulary=120)
    together = rows(warm.draw(params, [*PROMPTS[:3], PROMPTS[1]], [0, 0, 1, 1]), 4)
    assert max(token for row in together for token, _ in row) < 120
    assert len({tuple(token for token, _ in row) for row in together}) == 4
    short = sampler(run, Sampling(seed=5), vocabulary=120, rows=1, longest=7, most=25)
    for one, prompt, number, expected in (
        (warm, PROMPTS[2], 1, together[2]),
        (short, PROMPTS[1], 0, together[1]),
        (short, PROMPTS[1], 1, together[3]),
    ):
        (row,) = rows(itertools.islice(one.draw(params, [prompt], [number]), 12), 1)
        assert [token for token, _ in row] == [token for token, _ in expected]
        np.testing.assert_allclose([p for _, p in row], [p for _, p in expected], atol=1e-5)
    tokens = [*PROMPTS[1], *(token for token, _ in together[1])]
    known = log_probs(tokens)[6:-1, :120]
    known = known - np.log(np.exp(known).sum(-1, keepdims=True))
    for expected, (token, log_prob) in zip(known, together[1], strict=True):
        assert log_prob == pytest.approx(expected[token], abs=1e-5)
    other = sampler(run, Sampling(seed=6), vocabulary=120)
    assert rows(other.draw(params, PROMPTS[:1], [0]), 1)[0] != together[0]


@pytest.mark.slow
def test_a_row_ends_with_the_token_that_ends_a_document(loaded):
    run, params = loaded
    greedy = Sampling(temperature=0)
    first = itertools.islice(sampler(run, greedy).draw(params, PROMPTS[1:2], [0]), 2)
    stop = int(list(first)[1].token_B[0])
    found = rows(sampler(run, greedy, stops=[stop]).draw(params, PROMPTS[1:2], [0]), 1)
    assert [token for token, _ in found[0]].index(stop) == len(found[0]) - 1 <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"model.scan": "true", "model.depth": "4", "moe.layers": "every-2"},
        {"model.window": "5", "model.global_every": "2", "model.softcap": "3"},
        {"model.qk_norm": "all", "model.tied": "false", "moe.dispatch": "dense"},
        {"router.name": "sparse_topk", "moe.dispatch": "capacity"},
        {"moe.dense": "true"},
        {"mesh.expert": "2", "mesh.tensor": "2", "model.kv_heads": "2"},
        {"mesh.fsdp": "4", "mesh.expert": "2", "model.scan": "true"},
        {"model.dtype": "bfloat16", "model.remat": "full"},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_every_model_samples_what_it_computes(settings, tiny_text):
    source = open_source(tiny_text(), "test[:1]")
    run = set_up(tiny_text(**settings), source)
    params = jax.tree.map(lambda a: a * 3, run.initial_state()["params"])
    drawn = rows(sampler(run, Sampling(seed=1)).draw(params, PROMPTS, range(4)), 4)
    of, bound = whole_passes(run, params), 0.05 if "model.dtype" in settings else 2e-4
    for prompt, row in zip(PROMPTS, drawn, strict=True):
        expected = of([*prompt, *(token for token, _ in row)][:CONTEXT])[len(prompt) - 1 :]
        for log_probs, (token, log_prob) in zip(expected, row, strict=False):
            assert log_prob == pytest.approx(log_probs[token], abs=bound)
