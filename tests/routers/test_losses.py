"""The auxiliary losses against plain numpy, their optima, padding and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import logsumexp, softmax
from scipy.stats import norm

from routers import losses
from routers.token_choice import TopK

G, T, E, K, NOISE = 2, 5, 4, 2, 0.3
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(G, T, E))
NOISY = LOGITS + NOISE * RNG.normal(size=(G, T, E))
PROBS = softmax(LOGITS, axis=-1)
CHOSEN = np.argsort(np.argsort(-LOGITS, -1), -1) < K
MASK = np.arange(T) < np.asarray([[5], [3]])


def chances(clean, noisy):
    """P(expert e is among the K best when its noise alone is drawn again), by loops."""
    out = np.zeros_like(clean)
    for index in np.ndindex(clean.shape):
        others = np.delete(noisy[index[:-1]], index[-1])
        out[index] = norm.cdf((clean[index] - np.sort(others)[-K]) / NOISE)
    return out


def squared_cv(x):
    return x.var() / x.mean() ** 2


def balance(probs, chosen):
    return E * (chosen.mean((0, 1)) / K * probs.mean((0, 1))).sum()


def chances_of_all(clean, noisy):
    """As `chances`, with the K-th best score of all experts for a threshold: V-MoE's, in loops."""
    out = np.zeros_like(clean)
    for index in np.ndindex(clean.shape):
        out[index] = norm.cdf((clean[index] - np.sort(noisy[index[:-1]])[-K]) / NOISE)
    return out


def load_of_all(clean, noisy, mask=None):
    return losses.load(clean, noisy, K, NOISE, mask, of_others=False)


def load(clean, noisy, mask=None):
    return losses.load(clean, noisy, K, NOISE, mask)


# name: (loss, its arrays, the formula)
CASES = {
    "load_balance": (losses.load_balance, (PROBS, CHOSEN), balance),
    "importance": (losses.importance, (PROBS,), lambda p: squared_cv(p.sum((0, 1)))),
    "load": (load, (LOGITS, NOISY), lambda c, n: squared_cv(chances(c, n).sum((0, 1)))),
    "load_of_all": (
        load_of_all,
        (LOGITS, NOISY),
        lambda c, n: squared_cv(chances_of_all(c, n).sum((0, 1))),
    ),
    "z_loss": (losses.z_loss, (LOGITS,), lambda x: (logsumexp(x, axis=-1) ** 2).mean()),
}
cases = pytest.mark.parametrize("name", CASES)


@cases
def test_equals_the_formula(name):
    loss, arrays, formula = CASES[name]
    computed = loss(*(jnp.asarray(a) for a in arrays))
    np.testing.assert_allclose(computed, formula(*arrays), rtol=5e-6)  # float32 sums of 40


@cases
def test_padding_counts_as_if_deleted(name):
    loss, arrays, formula = CASES[name]
    expected = formula(*(a[MASK][None] for a in arrays))
    # A router marks no choice on padding; the other arrays may hold anything there.
    filled = [np.where(MASK[..., None], a, 0 if a.dtype == bool else 7) for a in arrays]
    computed = loss(*(jnp.asarray(a) for a in filled), jnp.asarray(MASK))
    np.testing.assert_allclose(computed, expected, rtol=5e-6)


def test_by_group_is_the_mean_of_the_groups_own():
    mean = losses.by_group(lambda p, mask: losses.importance(p, mask))
    own = [squared_cv(PROBS[g][MASK[g]].sum(0)) for g in range(G)]
    np.testing.assert_allclose(mean(jnp.asarray(PROBS), mask=jnp.asarray(MASK)), np.mean(own), 5e-6)
    # A group of padding alone does not count.
    first = jnp.asarray(MASK).at[1].set(False)
    np.testing.assert_allclose(mean(jnp.asarray(PROBS), mask=first), own[0], rtol=5e-6)
    assert abs(np.mean(own) - squared_cv(PROBS[MASK].sum(0))) > 1e-3  # the whole batch's


def test_the_published_losses_of_vmoe():
    """Of each group by itself, importance of the scores without noise, a threshold over all."""
    weights = {"importance": 0.3, "load": 0.7}
    router = TopK(3, E, 1, k=K, noise=NOISE * E, **weights, vmoe_losses=True, rngs=nnx.Rngs(0))
    x, key = jnp.asarray(RNG.normal(size=(G, T, 3)), jnp.float32), jax.random.key(1)
    clean = np.asarray(router.logits(x), np.float64)
    noisy = clean + NOISE * np.asarray(jax.random.normal(key, clean.shape), np.float64)
    importance = [squared_cv(softmax(clean[g], axis=-1).sum(0)) for g in range(G)]
    load = [squared_cv(chances_of_all(clean[g], noisy[g]).sum(0)) for g in range(G)]
    expected = 0.3 * np.mean(importance) + 0.7 * np.mean(load)
    np.testing.assert_allclose(router(x, key=key).aux_loss, expected, rtol=1e-5)
    np.testing.assert_allclose(router(x).aux_loss, 0.3 * np.mean(importance), rtol=1e-5)


def test_optima():
    even = jnp.full((G, 6, 3), 1 / 3)
    turns = jax.nn.one_hot(jnp.arange(6) % 3, 3)[None].repeat(G, 0)
    first = jnp.zeros((G, 6, 3)).at[..., 0].set(1)
    np.testing.assert_allclose(losses.load_balance(even, turns), 1, rtol=1e-6)
    np.testing.assert_allclose(losses.load_balance(turns, turns), 1, rtol=1e-6)
    np.testing.assert_allclose(losses.load_balance(first, first), 3, rtol=1e-6)  # E, the worst
    np.testing.assert_allclose(losses.importance(even), 0, atol=1e-7)
    np.testing.assert_allclose(losses.importance(turns), 0, atol=1e-7)
    np.testing.assert_allclose(losses.importance(first), 2, rtol=1e-6)  # E - 1
    np.testing.assert_allclose(losses.load(turns, turns, 1, 0.1), 0, atol=1e-6)
    assert losses.load(LOGITS, NOISY, E, NOISE) == 0  # every expert is always chosen
    np.testing.assert_allclose(losses.z_loss(jnp.full((1, 2, 4), -np.log(4.0))), 0, atol=1e-12)


@cases
def test_gradient_reaches_the_logits(name):
    loss = {
        "load_balance": lambda x: losses.load_balance(jax.nn.softmax(x), jnp.asarray(CHOSEN)),
        "importance": lambda x: losses.importance(jax.nn.softmax(x)),
        "load": lambda x: load(x, x + jnp.asarray(NOISY - LOGITS)),
        "load_of_all": lambda x: load_of_all(x, x + jnp.asarray(NOISY - LOGITS)),
        "z_loss": losses.z_loss,
    }[name]
    with jax.enable_x64(True):
        loss, x = jax.jit(loss), jnp.asarray(LOGITS)
        slope = jax.grad(loss)(x)
        direction = np.random.default_rng(1).normal(size=x.shape)
        difference = (loss(x + 1e-6 * direction) - loss(x - 1e-6 * direction)) / 2e-6
        assert jnp.isfinite(slope).all() and jnp.abs(slope).max() > 1e-4
        # Differences of values near 1 at 1e-6 keep nine digits.
        np.testing.assert_allclose((slope * direction).sum(), difference, rtol=1e-6, atol=1e-8)


@cases
@pytest.mark.parametrize("real", [False, True])
def test_finite_without_real_tokens_and_on_equal_ones(name, real):
    loss, arrays, _ = CASES[name]
    rest = [jnp.zeros_like(jnp.asarray(a)) for a in arrays[1:]]
    mask = jnp.full((G, T), real)
    value, slope = jax.value_and_grad(lambda x: loss(x, *rest, mask))(jnp.zeros((G, T, E)))
    assert jnp.isfinite(value) and jnp.isfinite(slope).all()


def test_load_is_the_chance_of_being_chosen():
    """Each expert's noise drawn again 20,000 times, the others' kept."""
    draws = NOISE * np.random.default_rng(2).normal(size=20_000)
    expected = chances(LOGITS, NOISY)
    for token in np.ndindex(G, T):
        for e in range(E):
            others = np.sort(np.delete(NOISY[token], e))
            rate = (LOGITS[token][e] + draws > others[-K]).mean()
            # Four standard deviations of a rate over 20,000 draws, at most 0.0036 each.
            assert abs(rate - expected[token][e]) < 4 * 0.0036
