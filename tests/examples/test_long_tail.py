"""The long tail of flights: how they are read, what counts as right, losses by hand, tiny runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.long_tail import flights, losses
from examples.long_tail.__main__ import main
from examples.long_tail.training import right
from moe.errors import UsageError
from routers import rarity_margins

SIZE = 480


def columns():
    """Flights of two carriers whose hour says where they go, but for a rare third place."""
    rng = np.random.default_rng(0)
    hour, month = rng.integers(0, 2, SIZE), np.arange(SIZE) % 12 + 1
    dest = np.array(["AAA", "BBB"])[hour]
    dest[::40] = "CCC"
    dest[11] = "ZZZ"  # of December, to a place that training does not know
    return {
        "year": np.full(SIZE, 2013),
        "month": month,
        "day": rng.integers(1, 28, SIZE),
        "sched_dep_time": 605 + 1000 * hour,
        "carrier": rng.choice(["XX", "YY"], SIZE),
        "origin": rng.choice(["JFK", "EWR"], SIZE),
        "dest": dest,
    }


def test_flights_are_split_by_months():
    made = flights.make(columns())
    lengths = [len(part.labels) for part in (made.train, made.validation, made.test)]
    assert lengths == [9 * 40, 40, 79] and made.unseen == 1
    assert made.sizes == (2, 2, 7, 2)
    assert made.counts.sum() == 360 and len(made.counts) == 3
    assert made.train.categories.min() == 0
    np.testing.assert_allclose((made.train.numbers**2).sum(-1), 2, rtol=1e-5)


def test_dates_have_their_weekday():
    one = columns() | {"month": np.arange(SIZE) % 12 + 1, "day": np.ones(SIZE, int)}
    made = flights.make(one)
    # The first of January to September 2013: a Tuesday, a Friday, ... (0 is Monday).
    assert made.train.categories[:9, 2].tolist() == [1, 4, 4, 0, 2, 5, 0, 3, 6]


def test_frequencies_are_those_of_the_group():
    made = flights.make(columns())
    scores = flights.frequencies(made.train, made.test, 3)
    own = made.test.categories[0, [0, 1, 3]]
    alike = (made.train.categories[:, [0, 1, 3]] == own).all(1)
    counts = np.bincount(made.train.labels[alike], minlength=3)
    np.testing.assert_allclose(np.floor(scores[0]), counts)
    assert right(scores, made.test.labels, 1)[0] > 0.9


def test_right_guesses_by_hand():
    scores = np.array([[3.0, 2, 1], [3, 2, 1], [1, 1, 1], [0, 1, 2]])
    labels = np.array([0, 1, 1, 0])
    assert right(scores, labels, 1) == (0.25, (0.5 + 0) / 2)
    assert right(scores, labels, 2) == (0.75, (0.5 + 1) / 2)


def test_losses_by_hand():
    counts = (17, 23, 55)
    arms = losses.arms(1, counts, 1e-4)
    scores, labels, key = jnp.array([[0.2, 0.5, -0.1]]), jnp.array([0]), jax.random.key(0)
    logs = jax.nn.log_softmax(scores)[0]
    value = lambda name: float(arms[name].loss(scores, labels, key)[0])  # noqa: E731
    np.testing.assert_allclose(value("cross_entropy"), -logs[0], rtol=1e-6)
    focal = -((1 - jnp.exp(logs[0])) ** 2) * logs[0]
    np.testing.assert_allclose(value("focal"), focal, rtol=1e-5)
    margin = rarity_margins(counts, 0.2)[0]
    moved = 60 * (scores - jnp.array([[margin, 0, 0]]))
    np.testing.assert_allclose(value("ldam"), -jax.nn.log_softmax(moved)[0, 0], rtol=1e-5)
    # relu(margin + the second largest score - that of the label, which is the second largest).
    np.testing.assert_allclose(value("hinge"), 1, atol=1e-3)
    np.testing.assert_allclose(value("hinge_margins"), 60 * margin, atol=1e-2)
    np.testing.assert_allclose(value("fenchel_young"), 0.3, atol=1e-3)


def test_a_tiny_table_is_made_and_then_read(tmp_path, capsys):
    np.savez(tmp_path / "flights.npz", **columns())
    argv = [f"--data_dir={tmp_path}", f"--out={tmp_path / 'out'}", "--seeds=2", "--epochs=2"]
    argv += ["--arms=table,cross_entropy,hinge_margins", "--widths=0.1", "--batch=32", "--k=1"]
    main([*argv, "--hidden=8", "--embedding=4"])
    table = (tmp_path / "out" / "table.md").read_text()
    assert "`hinge_margins`, width 0.1" in table and "360, 40, 79 for training" in table
    assert (tmp_path / "out" / "picture.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "out" / "runs.jsonl").read_text()
    main([*argv, "--hidden=8", "--embedding=4"])
    assert (tmp_path / "out" / "runs.jsonl").read_text() == lines
    assert (tmp_path / "out" / "table.md").read_text() == table


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--k=3", "3 guesses of 3 destinations"), ("--batch=999", "there are 360 flights")],
)
def test_what_does_not_fit(argument, message, tmp_path):
    np.savez(tmp_path / "flights.npz", **columns())
    with pytest.raises(UsageError, match=message):
        main([f"--data_dir={tmp_path}", f"--out={tmp_path / 'out'}", "--k=2", argument])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="no flights for training"):
        part = {name: column[10:11] for name, column in columns().items()}
        flights.make(part)
