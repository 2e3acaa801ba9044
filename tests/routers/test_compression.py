"""Compressed gradients: what is sent against numpy, and descent whose end is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routers import compression
from routers.compression import METHODS, count

# Compiled once, however often they are called.
top, none, ef, ef21 = (
    jax.jit(f, static_argnames="k")
    for f in (compression.top, compression.none, compression.ef, compression.ef21)
)
mean = jax.jit(compression.mean, static_argnames="n")
COMPILED = {"none": none, "ef": ef, "ef21": ef21}


def kept_by_sorting(x, k):
    """C(x) by a stable sort, row by row: of equal magnitudes the first."""
    rows = np.asarray(x).reshape(-1, x.shape[-1])
    out = np.zeros_like(rows)
    for row, x in zip(out, rows, strict=True):
        places = np.argsort(-np.abs(x), kind="stable")[:k]
        row[places] = x[places]
    return out


@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_largest_magnitudes_are_sent(k):
    x = np.random.default_rng(0).normal(size=(2, 4, 10)).astype(np.float32)
    x[0, 0] = [1, -2, 2, 0, -2, 1, 0, 2, -1, 2]  # ties
    x[0, 1] = 0
    x[0, 2, 3:] = -0.0
    sent, rest = top(jnp.asarray(x), k=k)
    expected = kept_by_sorting(x, k).reshape(x.shape)
    out = np.zeros_like(x)
    np.put_along_axis(out, np.asarray(sent.places), np.asarray(sent.values), -1)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(rest, x - expected)
    assert (np.diff(sent.places, axis=-1) > 0).all() and sent.values.shape[-1] == k


def test_what_is_not_finite_is_sent_first():
    sent, rest = top(jnp.array([1.0, jnp.nan, -jnp.inf, 3.0]), k=2)
    assert sent.places.tolist() == [1, 2] and rest.tolist() == [1, 0, 0, 3]


def test_what_is_left_is_at_most_its_share():
    """|x - C(x)|^2 <= (1 - k/n) |x|^2, with equality for equal magnitudes."""
    x = np.random.default_rng(1).normal(size=(50, 12)).astype(np.float32)
    x[0] = 2 * (-1.0) ** np.arange(12)
    for k in (1, 5, 12):
        left = np.float64(top(jnp.asarray(x), k=k)[1] ** 2).sum(-1)
        bound = (1 - k / 12) * np.float64(x**2).sum(-1)
        assert (left <= bound * (1 + 1e-6)).all()
        assert left[0] == pytest.approx(bound[0])


def test_counts():
    assert [count(30, 0.1), count(10, 0.25), count(5, 0.001), count(7, 1.0)] == [3, 3, 1, 7]


A = np.array([[-3.0, 2, 2], [2, -3, 2], [2, 2, -3]])
RATE = 0.01


def descent(method, memory, steps):
    """Descends on the mean of <a_w, x>^2 + |x|^2/4 over three workers; each sends one entry.

    They are Beznosikov's et al. (2020), "On biased compression for distributed learning".
    """

    def step(carry, _):
        x, memory, m = carry
        sent, memory = method(gradients(x), memory, k=1)
        d = mean(sent, n=3)
        m = m + d if method is ef21 else d
        return (x - RATE * m, memory, m), x

    with jax.enable_x64(True):
        memory = jnp.asarray(memory)
        start = (jnp.ones(3), memory, memory.mean(0))
        (x, *_), path = jax.lax.scan(step, start, None, length=steps)
        return np.asarray(x), np.asarray(path)


def gradients(x):
    return 2 * (A @ x)[:, None] * A + x / 2


def test_three_workers_diverge_without_a_memory():
    x, path = descent(none, np.zeros((3, 3)), 1000)
    factor = 1 + 11 * RATE / 6
    np.testing.assert_allclose(path[1:] / path[:-1], factor, rtol=1e-12)
    np.testing.assert_allclose(x, factor**1000, rtol=1e-10)
    np.testing.assert_allclose(x, 7.76e7, rtol=1e-3)


def test_three_workers_converge_with_one():
    found = {
        "ef": np.linalg.norm(descent(ef, np.zeros((3, 3)), 1000)[0]),
        "ef21": np.linalg.norm(descent(ef21, gradients(np.ones(3)), 1000)[0]),
    }
    assert found == pytest.approx({"ef": 1.27072110e-5, "ef21": 1.21574841e-5}, rel=1e-6)


@pytest.fixture(scope="module")
def walk():
    """Gradients of 20 steps [20, W, n], 4 workers."""
    return np.random.default_rng(2).normal(size=(20, 4, 30)).astype(np.float32)


def test_what_is_sent_and_what_is_left_are_all_gradients(walk):
    e, total = jnp.zeros((4, 30)), np.zeros(30)
    for g in walk:
        sent, e = ef(jnp.asarray(g), e, k=3)
        total += np.float64(mean(sent, n=30))
    np.testing.assert_allclose(
        total + np.float64(e).mean(0), np.float64(walk).sum(0).mean(0), atol=1e-5
    )
    assert np.abs(e).max() > 1


def test_the_memory_of_ef21_follows_the_gradients(walk):
    h, m = jnp.zeros((4, 30)), np.zeros(30)
    for g in walk:
        sent, h = ef21(jnp.asarray(g), h, k=3)
        m += np.float64(mean(sent, n=30))
        np.testing.assert_allclose(m, np.float64(h).mean(0), atol=1e-5)
    for _ in range(10):  # a gradient that stays is known after n/k steps
        _, h = ef21(jnp.asarray(g), h, k=3)
    np.testing.assert_allclose(h, g, rtol=1e-6)


@pytest.mark.parametrize("name", ["none", *METHODS])
def test_all_entries_are_the_gradient(name, walk):
    """k = n: nothing is lost, and there is nothing to make up for."""
    memory = jnp.zeros((4, 30))
    sent, after = COMPILED[name](jnp.asarray(walk[0]), memory, k=30)
    np.testing.assert_array_equal(mean(sent, n=30), functools.reduce(np.add, walk[0]) / 4)
    np.testing.assert_array_equal(after, walk[0] if name == "ef21" else memory)


def test_means_of_rows():
    x = np.random.default_rng(3).normal(size=(4, 2, 3, 30)).astype(np.float32)
    sent, _ = top(jnp.asarray(x), k=5)
    expected = kept_by_sorting(x, 5).reshape(x.shape).mean(0)
    np.testing.assert_allclose(mean(sent, n=30), expected, rtol=1e-6, atol=1e-7)
