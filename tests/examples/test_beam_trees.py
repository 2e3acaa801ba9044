"""The search for trees against enumeration, and its soft relatives against the hard one."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.beam_trees import cell, training
from examples.beam_trees.search import Search, _spans, find, root
from examples.beam_trees.selection import one_soft, soft, sparse

D = 4


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    return {
        "left": rng.normal(size=(D, D)).astype(np.float32),
        "right": rng.normal(size=(D, D)).astype(np.float32),
        "score": 2 * rng.normal(size=D).astype(np.float32),
    }


def compose(weights, left, right, key=None):
    return jnp.tanh(left @ weights["left"] + right @ weights["right"])


@functools.partial(jax.jit, static_argnums=(0, 1))
def searched(beams, select, weights, leaves, counts, strength, merges=None):
    how = Search(
        functools.partial(compose, weights), lambda x: x @ weights["score"], beams, select, strength
    )
    return find(how, leaves, counts, merges=merges)


def follow(weights, leaves, order):
    """Returns the root and the score of merges at the places `order`, in NumPy."""
    items, total = list(leaves), 0.0
    for at in order:
        pairs = [
            np.tanh(a @ weights["left"] + b @ weights["right"])
            for a, b in itertools.pairwise(items)
        ]
        logits = np.array([pair @ weights["score"] for pair in pairs])
        total += logits[at] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        items[at : at + 2] = [pairs[at]]
    return items[0], total


@pytest.fixture(scope="module")
def sequences():
    """Returns the leaves of three examples, and how many they use."""
    leaves = np.random.default_rng(1).normal(size=(3, 4, D)).astype(np.float32)
    return leaves, np.array([4, 3, 1], np.int32)


# All orders of three merges are six: more beams than that are never needed.
ENOUGH = 6


def test_enough_beams_find_all_orders(weights, sequences):
    leaves, counts = sequences
    found = searched(ENOUGH, None, weights, leaves, counts, 1.0)
    for n, count in enumerate(counts):
        orders = itertools.product(*(range(size) for size in range(count - 1, 0, -1)))
        ways = [follow(weights, leaves[n, :count], order) for order in orders]
        ways.sort(key=lambda way: -way[1])
        roots, scores = (np.array(x) for x in zip(*ways, strict=True))
        np.testing.assert_allclose(found.scores[n, : len(ways)], scores, atol=1e-5)
        assert (found.scores[n, len(ways) :] == -np.inf).all()
        np.testing.assert_allclose(np.exp(found.scores[n]).sum(), 1, rtol=1e-5)
        mean = np.exp(scores) @ roots / np.exp(scores).sum()
        np.testing.assert_allclose(root(found)[n], mean, atol=1e-5)


def test_one_beam_is_greedy(weights, sequences):
    leaves, counts = sequences
    found = searched(1, None, weights, leaves, counts, 1.0)
    for n, count in enumerate(counts):
        own, order = leaves[n, :count], []
        for size in range(count - 1, 0, -1):
            order.append(max(range(size), key=lambda at: follow(weights, own, [*order, at])[1]))
        expected, score = follow(weights, own, order)
        np.testing.assert_allclose(root(found)[n], expected, atol=1e-5)
        np.testing.assert_allclose(found.scores[n, 0], score, atol=1e-5)


def test_given_merges_are_made(weights, sequences):
    leaves, counts = sequences
    orders = np.array([[2, 0, 0], [1, 0, 0], [0, 0, 0]], np.int32)
    found = searched(1, None, weights, leaves, counts, 1.0, orders)
    for n, count in enumerate(counts):
        expected, _ = follow(weights, leaves[n, :count], orders[n, : count - 1])
        np.testing.assert_allclose(root(found)[n], expected, atol=1e-5)


def others(leaves, counts):
    """Returns leaves with other numbers behind those that are used."""
    used = np.arange(leaves.shape[1]) < counts[:, None]
    return np.where(used[..., None], leaves, 1e3)


@pytest.mark.parametrize("select", [None, one_soft, sparse, soft])
def test_padding_changes_nothing(weights, sequences, select):
    leaves, counts = sequences
    found = searched(2, select, weights, leaves, counts, 0.5)
    again = searched(2, select, weights, others(leaves, counts), counts, 0.5)
    np.testing.assert_array_equal(root(found), root(again))
    np.testing.assert_array_equal(root(found)[2], leaves[2, 0])


@pytest.mark.parametrize("select", [None, one_soft])
def test_places_that_fall_away_are_not_used(weights, select):
    leaves = np.random.default_rng(2).normal(size=(3, 25, D)).astype(np.float32)
    counts = np.array([25, 13, 6], np.int32)
    longer = others(np.pad(leaves, [(0, 0), (0, 18), (0, 0)]), counts)
    assert _spans(25) == [(0, 12), (12, 18), (18, 24)] and len(_spans(43)) == 4
    with jax.enable_x64(True):
        precise = jax.tree.map(np.float64, (weights, leaves, longer))
        found, again = (searched(2, select, precise[0], x, counts, 0.5) for x in precise[1:])
        np.testing.assert_allclose(root(found), root(again), atol=1e-10)
        np.testing.assert_allclose(found.scores, again.scores, rtol=1e-10)


def test_one_soft_changes_nothing_where_nothing_is_left_over(weights, sequences):
    hard = searched(ENOUGH, None, weights, *sequences, 1.0)
    mild = searched(ENOUGH, one_soft, weights, *sequences, 1.0)
    np.testing.assert_allclose(mild.scores, hard.scores, atol=1e-6)
    np.testing.assert_allclose(root(mild), root(hard), atol=1e-6)


@pytest.mark.parametrize("select", [sparse, soft])
def test_relaxed_beams_tend_to_hard_ones(weights, sequences, select):
    hard = searched(2, None, weights, *sequences, 1.0)
    relaxed = searched(2, select, weights, *sequences, 1e-4)
    np.testing.assert_allclose(relaxed.scores, hard.scores, atol=1e-3)
    np.testing.assert_allclose(root(relaxed), root(hard), atol=1e-4)


def test_selections_by_hand():
    scores = jnp.array([[0.0, -0.4, -0.6, -3.0, -jnp.inf]])
    cut = sparse(scores, scores, 2, 1.0)[0]
    # The mask is 1, 0.6, 0.4, 0, 0: one beam alone, and one of two.
    np.testing.assert_allclose(cut, [[1, 0], [0, 0.6], [0, 0.4], [0, 0], [0, 0]], atol=1e-6)
    rest = one_soft(scores, scores, 2, 1.0)[0]
    shares = np.exp([-0.4, -0.6, -3.0]) / np.exp([-0.4, -0.6, -3.0]).sum()
    np.testing.assert_allclose(rest[:, 0], [1, 0, 0, 0, 0])
    np.testing.assert_allclose(rest[:, 1], [0, *shares, 0], atol=1e-6)
    columns = soft(scores, scores, 2, 1.0)[0].sum(0)
    np.testing.assert_allclose(columns, 1, atol=2e-3)


@pytest.mark.parametrize(
    "arm",
    [pytest.param(arm, marks=[] if arm == "sparse" else pytest.mark.slow) for arm in training.ARMS],
)
def test_gradients_reach_the_scores_and_are_finite(arm):
    settings = training.Settings(width=D, beams=3, dropout=0.0)
    params = cell.init(jax.random.key(0), 5, D, 3, 2)
    rng = np.random.default_rng(0)
    counts = np.array([[1, 4], [3, 2]], np.int32)
    batch = training.Examples(
        rng.integers(5, size=(2, 2, 4)).astype(np.int32),
        counts,
        np.zeros((2, 2, 3), np.int32),
        np.array([0, 2], np.int32),
    )

    def loss(params):
        return (training.logits(arm, settings, params, batch, jax.random.key(1)) ** 2).sum()

    grads = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(grad).all() for grad in jax.tree.leaves(grads))
    assert (np.abs(grads["score"]["kernel"]).max() > 1e-6) == (arm != "gold")


def test_the_cell_is_its_formula():
    params = cell.init(jax.random.key(0), 5, D, 3, 1)
    left, right = np.random.default_rng(0).normal(size=(2, D)).astype(np.float32)
    hidden = jax.nn.gelu(np.concatenate([left, right]) @ params["hidden"]["kernel"])
    f, g, i, c = np.asarray(hidden @ params["gates"]["kernel"]).reshape(4, D)
    x = left / (1 + np.exp(-f)) + right / (1 + np.exp(-g)) + c / (1 + np.exp(-i))
    expected = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
    np.testing.assert_allclose(cell.compose(params, left, right, None, 0.1), expected, atol=1e-5)
