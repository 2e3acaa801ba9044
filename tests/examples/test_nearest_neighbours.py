"""Nearest neighbours: votes against scikit-learn, and a tiny run of the command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits, load_iris
from sklearn.neighbors import KNeighborsClassifier

from examples.masks import MASKS
from examples.nearest_neighbours import sets, voting
from examples.nearest_neighbours.__main__ import main
from examples.nearest_neighbours.training import Settings, batches
from moe.errors import UsageError


def problem(load, k):
    """Returns queries whose k-th and next neighbours differ, candidates and their classes."""
    x, y = load(return_X_y=True)
    x = x / x.std()
    order = np.random.default_rng(0).permutation(len(x))[:150]
    queries, known, labels = x[order[:40]], x[order[40:]], y[order[40:]]
    near = np.sort(((queries[:, None] - known) ** 2).sum(-1), -1)
    return queries[near[:, k] - near[:, k - 1] > 1e-3], known, labels


@pytest.mark.parametrize(
    "load, masks", [(load_iris, ["sparse"]), (load_digits, ["sparse", "sinkhorn", "hard"])]
)
def test_the_hard_limit_is_scikit_learn_s(load, masks):
    k = 5
    queries, known, labels = problem(load, k)
    assert len(queries) > 20
    expected = KNeighborsClassifier(k).fit(known, labels).predict_proba(queries)
    arrays = jnp.float32(queries), jnp.float32(known)
    count = expected.shape[1]
    distances_QN = voting.distances(*arrays)
    classes_NC = jax.nn.one_hot(labels, count)
    for name in masks:
        weights_QN = voting.weights(name, distances_QN, k, 1e-5)
        np.testing.assert_allclose(weights_QN.sum(-1), k, rtol=1e-5)
        np.testing.assert_allclose(voting.shares(weights_QN, classes_NC), expected, atol=1e-5)
    hard = voting.hard_shares(*arrays, jnp.asarray(labels), k, count)
    np.testing.assert_allclose(hard, expected, atol=1e-6)


def test_distances():
    x, y = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
    expected = ((x[:, None] - y) ** 2).sum(-1)
    np.testing.assert_allclose(voting.distances(x, y), expected, rtol=1e-4, atol=1e-5)


def test_permuting_the_candidates_permutes_their_weights():
    distances_QN = jnp.abs(jax.random.normal(jax.random.key(0), (4, 20)))
    order = np.random.default_rng(0).permutation(20)
    for name in ("sparse", "sinkhorn", "sigmoid", "softmax"):
        weights_QN = voting.weights(name, distances_QN, 3, 0.2)
        moved = voting.weights(name, distances_QN[:, order], 3, 0.2)
        np.testing.assert_allclose(moved, weights_QN[:, order], atol=1e-6)


def test_votes_and_losses_by_hand():
    weights_QN = jnp.array([[1.0, 0.5, 0.5, 0.0]])
    shares_QC = voting.shares(weights_QN, jax.nn.one_hot(jnp.array([0, 0, 1, 2]), 3))
    np.testing.assert_allclose(shares_QC, [[0.75, 0.25, 0]])
    np.testing.assert_allclose(voting.linear_loss(shares_QC, jnp.array([0])), [0.25])
    floor = voting.FLOOR
    expected = [-np.log((1 - floor) * 0.75 + floor / 3)]
    np.testing.assert_allclose(voting.log_loss(shares_QC, jnp.array([0])), expected, rtol=1e-6)
    np.testing.assert_allclose(voting.log_loss(shares_QC, jnp.array([2])), [-np.log(floor / 3)])
    np.testing.assert_array_equal(voting.shares(jnp.zeros((1, 4)), jnp.ones((4, 2))), 0)


def test_the_parts_of_the_digits_are_apart():
    images = sets.load("digits")
    sizes = [len(part.labels) for part in images]
    assert sizes == [1257, 270, 270] and images.num_classes == 10
    assert images.train.images.shape[1:] == (8, 8, 1) and images.test.images.max() == 1
    rows = np.concatenate([part.images.reshape(len(part.images), -1) for part in images])
    assert len(np.unique(rows, axis=0)) == 1797
    (queries, candidates), *_ = batches(images.train, 0, Settings(queries=5, candidates=7))
    assert len(queries.labels) == 5 and candidates.images.shape == (7, 8, 8, 1)


@pytest.mark.slow
def test_a_tiny_run_has_a_row_for_every_arm(tmp_path, capsys):
    flags = "--steps=2 --queries=8 --candidates=16 --k=3 --dim=8 --limit=60 --seeds=1 --widths=0.3"
    arms = "sparse,head,head_votes,pixels"
    main([*flags.split(), f"--arms={arms}", f"--out={tmp_path}"])
    text = (tmp_path / "table.md").read_text()
    assert all(f"| `{arm}` |" in text for arm in arms.split(","))
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--k=101"], "expected no more"),
        (["--queries=1200"], "of 1257 training images"),
        (["--arms=lapsun"], "none of sparse"),
        (["--seeds=0"], "below 1"),
        (["--reference=none"], "--reference: 'none'"),
        (["--dataset=mnist_5k", "--data_dir=none"], r"type pip install .* --out=none"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, flags, line):
    with pytest.raises(UsageError, match=line):
        main([*flags, f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_every_mask_is_an_arm():
    from examples.nearest_neighbours.training import ARMS

    assert set(MASKS) < set(ARMS)
