"""What every operator does with its arguments, and that it is compiled once."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isotonic import isotonic_pnorm, isotonic_regression, threshold
from isotonic.links import LogisticLink
from routers import entmax, sparse_topk_magnitude, sparse_topk_mask, topk_hinge_loss
from tests.routers.operators import ALL, KEY, REAL, SIMPLEX, SORTED, STRONG, WHOLE, hinge

X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
SOLVERS = {
    "isotonic_regression": isotonic_regression,
    "isotonic_pnorm": lambda x: isotonic_pnorm(-np.sort(-x), np.arange(8.0)[::-1], p=3.0),
    "threshold": lambda x: threshold(LogisticLink(), jnp.asarray(x), 2.0, 1.0),
    "topk_hinge_loss": hinge,
}
README = pathlib.Path(__file__).parents[2] / "README.md"


@pytest.fixture
def compiler():
    """Collects what the compiler is asked to do: traces, lowerings and compilations."""
    asked = []

    def listen(name, seconds, **_):
        if name.startswith("/jax/core/compile/"):
            asked.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x + 1)(np.float32(0))
    assert asked  # so that silence is an answer
    yield asked
    jax.monitoring.unregister_event_duration_listener(listen)


def with_defaults(operator):
    return lambda x: operator(x, 2, 0.7)


QUICK = {"mask", "magnitude", "entmax", "rank", "regression"}


def few(names):
    """Returns the names; those that are not in `QUICK` are slow, for each compiles for seconds."""
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", few(ALL | SOLVERS))
def test_a_second_call_compiles_nothing(name, compiler):
    run = SOLVERS.get(name) or with_defaults(ALL[name])
    jax.block_until_ready(run(X))
    compiler.clear()
    jax.block_until_ready(run(X))
    # The callback by which Dykstra warns is traced at every call, and compiled once.
    assert [event for event in compiler if not ("dykstra" in name and "trace" in event)] == []


def test_the_readme_example_compiles_nothing_when_run_again(compiler, capsys):
    example = re.search(r"```python\n(.*?)```\n```\n(.*?)```", README.read_text(), re.S)
    code, printed = example.groups()
    exec(code, {})
    assert np.allclose(*(numbers(text) for text in (capsys.readouterr().out, printed)), atol=1e-6)
    compiler.clear()
    exec(code, {})
    assert compiler == []


def numbers(text):
    return [float(word) for word in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", text)]


@pytest.mark.parametrize("name", few(ALL))
def test_lists_whole_numbers_and_float16_are_scores(name):
    run, scores = with_defaults(ALL[name]), [[3, 1, 2, 0]]
    expected = np.asarray(run(np.float32(scores)))
    assert expected.dtype == np.float32
    for alike in (scores, np.asarray(scores), np.asarray(scores, np.uint8), np.float64(scores)):
        y = run(alike)
        assert y.dtype == np.float32
        np.testing.assert_array_equal(y, expected)
    half = run(np.float16(scores))
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, expected.astype(np.float16))


@pytest.mark.parametrize("operator", [sparse_topk_mask, sparse_topk_magnitude])
@pytest.mark.parametrize("strength", [1e-3, 1e-5])
def test_float16_gradients_are_finite_on_ties(operator, strength):
    """Theirs are up to 1/strength, beyond the largest float16; then their directions are kept."""

    def loss(x):
        y = operator(x, 4, strength=strength)
        return (jnp.cos(1.7 * jnp.arange(8)).astype(y.dtype) * y).sum()

    half, single = (
        np.asarray(jax.jit(jax.grad(loss))(jnp.ones(8, dtype)), float)
        for dtype in (jnp.float16, jnp.float32)
    )
    assert np.isfinite(half).all() and np.abs(half).max() > 100
    size = np.abs(single).max()
    np.testing.assert_allclose(half / np.abs(half).max(), single / size, atol=2e-3)
    if size < 2**14:
        np.testing.assert_allclose(half, single, rtol=2e-3)


@pytest.mark.parametrize("name", few(REAL | SORTED | WHOLE | SIMPLEX))
def test_what_is_wrong_is_nan_in_its_row_alone(name):
    """NaN scores, k of -1 and NaN, strengths of -1 and NaN: traced, in values and gradients."""
    x = np.repeat(X[:1], 7, 0)
    k, strength = np.full(7, 2, np.float32), np.full(7, 0.7, np.float32)
    x[1, 3] = np.nan
    bad = [1]
    if name in STRONG:
        strength[2:4], bad = (-1, np.nan), [1, 2, 3]
    if name in REAL | SORTED:
        k[4:6], bad = (-1, np.nan), [1, 2, 3, 4, 5]

    @jax.jit
    def value_and_gradient(x, k, strength):
        def weighted(x):
            y = ALL[name](x, k, strength)
            weights = jnp.cos(1.7 * jnp.arange(y.size // len(y))).reshape(y.shape[1:])
            return (weights * y).sum(), y

        return jax.grad(weighted, has_aux=True)(x)[::-1]

    clean = value_and_gradient(np.repeat(X[:1], 7, 0), np.full(7, 2.0), np.full(7, 0.7))
    good = [row for row in range(7) if row not in bad]
    for leaf, expected in zip(value_and_gradient(x, k, strength), clean, strict=True):
        assert np.isnan(leaf[np.asarray(bad)]).all()
        np.testing.assert_array_equal(leaf[np.asarray(good)], expected[np.asarray(good)])
        assert np.isfinite(expected).all()


WRONG = [
    ({"x": 1.0}, "scores must have an axis of items; got a scalar"),
    ({"x": "abc"}, "scores must be an array of numbers"),
    ({"x": [[1], [2, 3]]}, "scores must be an array of numbers"),
    ({"x": np.ones(5, complex)}, "scores must be real numbers, not complex"),
    ({"axis": 3}, r"axis must be from -2 to 1 for scores of shape \(2, 5\); got 3"),
    ({"axis": 0.5}, "axis must be a whole number and not traced; got 0.5"),
    ({"k": np.nan}, "k must be above 0 and at most 5, the length of axis -1; got nan"),
    ({"k": "2"}, "k must be above 0 and at most 5, the length of axis -1; got 2"),
    ({"k": np.ones(3)}, r"k of shape \(3,\) does not broadcast to \(2,\)"),
    ({"strength": -1}, "strength must be above 0; got -1"),
    ({"strength": np.inf}, r"strength must be above 0; got inf \(float32 has 1.2e-38 to 3.4e\+38"),
    ({"strength": 1e99}, r"strength must be above 0; got 1e\+99 \(float32 has"),
    ({"strength": 10**400}, "strength must be above 0; got 1000"),
    ({"strength": None}, "strength must be above 0; got None"),
    ({"p": "2 "}, "p must be a"),
    ({"p": np.nan}, "p must be a finite number above 1, not nan"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_arguments_say_what_was_expected(change, message):
    with pytest.raises(ValueError, match=message):
        sparse_topk_mask(**{"x": np.ones((2, 5), np.float32), "k": 2, **change})


def test_static_arguments_say_that_they_are():
    with pytest.raises(ValueError, match="p must be a number above 1, not traced"):
        jax.jit(lambda p: sparse_topk_mask(X, 2, p=p))(2.0)
    with pytest.raises(ValueError, match="alpha must be a number above 1, not traced"):
        jax.jit(lambda alpha: entmax(X, alpha=alpha))(2.0)


def test_labels_that_are_no_class():
    with pytest.raises(ValueError, match="labels must be from 0 to 7; got"):
        topk_hinge_loss(X, np.array([0, 1, 2, 8]), KEY, k=2)
    labels = np.array([0, -1, 7, 8])
    loss = jax.jit(lambda x, labels: topk_hinge_loss(x, labels, KEY, k=2))(X, labels)
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False, True])
