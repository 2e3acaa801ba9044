"""Cascades: known losses and recalls, impressions of made-up ratings, and a tiny run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.cascade import impressions, losses
from examples.cascade.__main__ import main
from examples.cascade.impressions import HISTORY, ITEMS, NEUTRAL, PRIOR
from examples.cascade.metrics import joint_recall
from examples.cascade.training import KEEP
from examples.masks import MASKS, UNIFORM, soft_mask
from moe.errors import UsageError
from routers import sigmoid_topk_mask, sparse_topk_mask

TRUTH = jnp.arange(ITEMS) < 10
EQUAL = jnp.zeros(2)


def test_scores_that_separate_the_truth_have_no_loss():
    """The sparse mask is hard, and so the loss exactly 0, from a gap of `strength` on."""
    mask = functools.partial(sparse_topk_mask, strength=0.5)
    x = jnp.where(TRUTH, 0.5, 0.0)
    loss, slope = jax.value_and_grad(losses.joint_topk_loss)([x, 3 * x], TRUTH, 10, mask, EQUAL)
    assert loss == 0 and not any(np.any(g) for g in slope)
    assert losses.joint_topk_loss([0.9 * x, x], TRUTH, 10, mask, EQUAL) > 0


def test_more_may_survive_than_the_truths():
    mask = functools.partial(sparse_topk_mask, strength=0.5)
    best = jnp.arange(ITEMS)[::-1] * 1.0  # every truth is among the 20 and the 30 best
    loss = functools.partial(losses.joint_topk_loss, mask=mask, log_weights=EQUAL)
    assert loss([best, best], TRUTH, KEEP, negatives=False) == 0
    assert loss([best, best], TRUTH, KEEP) > 0
    # The worst first, no truth survives either stage: half of its cost for each, once for both.
    expected = 2 * 10 / ITEMS * np.log(1 / losses.FLOOR)
    found = loss([-best, -best], TRUTH, KEEP, negatives=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_two_items_by_hand():
    """Of N = 2 items and k = 1, DFTopK's weights are sigmoid((x1 - x2)/(2 tau))."""
    x, tau = jnp.array([0.3, -0.4]), 0.7
    p = 1 / (1 + np.exp(-0.7 / (2 * tau)))
    mask = functools.partial(sigmoid_topk_mask, strength=tau)
    np.testing.assert_allclose(mask(x, 1), [p, 1 - p], rtol=1e-6)
    truth, floor = jnp.array([True, False]), losses.FLOOR
    log = lambda p: np.log((1 - floor) * p + floor)  # noqa: E731
    stage = -log(p)  # of both items: the second's 1 - (1 - p) is the same
    joint = -(log(p * p) + log(1 - (1 - p) ** 2)) / 2
    w = jnp.log(jnp.array([1.0, 2.0]))
    expected = stage / 2 + stage / 8 + np.log(2.0) + joint
    np.testing.assert_allclose(
        losses.joint_topk_loss([x, x], truth, 1, mask, w), expected, rtol=1e-6
    )


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_moves_the_truths_up(name):
    def loss(x):
        def mask(x, k):
            return soft_mask(name, x, k, 1.0, jax.random.key(0))

        return losses.joint_topk_loss([x, x], TRUTH, 10, mask, EQUAL)

    x = 0.3 * jax.random.normal(jax.random.key(1), TRUTH.shape)
    slope = np.asarray(jax.grad(loss)(x))
    assert np.isfinite(slope).all() and (slope * np.where(TRUTH, 1, -1)).sum() < 0


def test_the_lambda_loss_by_hand():
    # Ranks 1 and 2: 1/log2(2) - 1/log2(3), with maxDCG = 1.
    weight = 1 - 1 / np.log2(3)
    for x, sign in (((0.5, -0.2), 1), ((-0.2, 0.5), -1)):
        loss = losses.lambda_loss(jnp.array([x]), jnp.array([[True, False]]))
        np.testing.assert_allclose(loss, weight * np.log2(1 + np.exp(-0.7 * sign)), rtol=1e-6)
    assert losses.lambda_loss(jnp.zeros((1, 2)), jnp.ones((1, 2), bool)) == 0


def test_the_fenchel_young_loss():
    truth = TRUTH[None]
    separated = jnp.where(truth, 1.0, 0.0)
    assert losses.fenchel_young_loss(separated, truth, 1.0) == pytest.approx(0, abs=1e-6)
    x = jax.random.normal(jax.random.key(0), truth.shape)
    loss, slope = jax.value_and_grad(losses.fenchel_young_loss)(x, truth, 1.0)
    assert loss > 0
    np.testing.assert_allclose(slope, sparse_topk_mask(x, 10) - truth, atol=1e-6)


def test_recalls_of_perfect_and_of_random_scores():
    perfect = jnp.where(TRUTH, 1.0, 0.0)[None]
    assert joint_recall((perfect, perfect), TRUTH[None], KEEP) == 1
    assert joint_recall((-perfect, perfect), TRUTH[None], KEEP) == 0  # lost in the first stage
    # 30/40 * 20/30 = 1/2 on average, of 20 thousand rows of 10: about .001 off.
    scores = jax.random.uniform(jax.random.key(0), (2, 20_000, ITEMS))
    truth = jnp.broadcast_to(TRUTH, scores.shape[1:])
    assert joint_recall(scores, truth, KEEP).mean() == pytest.approx(0.5, abs=0.004)


@pytest.fixture(scope="module")
def ratings():
    """Made-up ratings of 12 people, 45 each, of 120 films; film 7 is loved by all."""
    rng = np.random.default_rng(0)
    films = np.stack([rng.permutation(120)[:45] + 1000 for _ in range(12)])
    rating = rng.integers(1, 6, films.shape).astype(float)
    rating[films == 1007] = 5.0
    return {
        "userId": np.repeat(np.arange(12) + 5, 45),
        "movieId": films.ravel(),
        "rating": rating.ravel(),
        "timestamp": rng.permutation(10_000)[: films.size],
        "year": np.where(films.ravel() % 10 == 0, np.nan, 1990.0 + films.ravel() % 7),
        "genres": np.where(films.ravel() % 2, "Drama|War", "Comedy"),
        "title": films.ravel().astype(str),
    }


@pytest.fixture(scope="module")
def made(ratings):
    return impressions.make(ratings)


def test_impressions_are_what_they_say(ratings, made):
    parts = made.train, made.validation, made.test
    assert [len(part) for part in parts] == [19, 3, 2]  # 12 people, 2 runs of 20 each
    films = np.unique(ratings["movieId"])
    given = dict(
        zip(
            zip(ratings["userId"], ratings["movieId"], strict=True),
            zip(ratings["rating"], ratings["timestamp"], strict=True),
            strict=True,
        )
    )
    begins = []
    for i in range(len(made.train)):
        person = made.train.user[i] + 4
        items, truth = films[made.train.items[i] - 1], made.train.truth[i]
        rated = np.array([(person, item) in given for item in items])
        assert len(set(items)) == ITEMS and rated.sum() == 20 and truth.sum() == 10
        assert rated[truth].all()
        values = np.array([given.get((person, item), (0, 0))[0] for item in items])
        assert values[truth].min() >= values[rated & ~truth].max()
        begin = min(given[person, item][1] for item in items[rated])
        begins.append(begin)
        past = made.train.history[i]
        before = sorted(
            time for (who, _), (_, time) in given.items() if who == person and time < begin
        )
        times = [given[person, films[film - 1]][1] for film in past[past > 0]]
        assert times == before[-HISTORY:]
        for item, mean, count in zip(items, made.train.mean[i], made.train.count[i], strict=True):
            own = [r for (_, film), (r, time) in given.items() if film == item and time < begin]
            assert count == len(own)
            assert mean == pytest.approx((sum(own) + PRIOR * NEUTRAL) / (len(own) + PRIOR))
    assert begins == sorted(begins)
    assert set(made.test.user) - {0} <= set(made.train.user)
    assert made.genres.shape == (len(films) + 1, 3)
    np.testing.assert_array_equal(made.genres[1 + np.searchsorted(films, 1007)], [0, 1, 1])


@pytest.mark.slow
def test_a_tiny_run_has_a_row_for_every_arm(tmp_path, ratings, capsys):
    np.savez(tmp_path / "movielens.npz", **ratings)
    arms = "random,item_mean,popularity,fenchel_young,sparse"
    flags = "--epochs=1 --batch=8 --seeds=1 --widths=1"
    main([*flags.split(), f"--arms={arms}", f"--data_dir={tmp_path}", f"--out={tmp_path / 'out'}"])
    text = (tmp_path / "out" / "table.md").read_text()
    assert all(f"| `{arm}` |" in text for arm in arms.split(","))
    assert text in capsys.readouterr().out


@pytest.mark.slow
def test_steps_are_timed_by_the_number_of_films(tmp_path, ratings):
    np.savez(tmp_path / "movielens.npz", **ratings)
    flags = f"--batch=8 --arms=bce,sparse --time=40,50 --data_dir={tmp_path} --out={tmp_path}"
    main(flags.split())
    rows = [line.split("|") for line in (tmp_path / "time.md").read_text().splitlines()]
    assert [cell.strip() for cell in rows[0][1:-1]] == ["arm", "40 films", "50 films"]
    assert [row[1].strip() for row in rows[2:]] == ["`bce`", "`sparse`"]
    assert [cell.count("(1.00)") for cell in rows[2][2:4]] == [1, 1]
    assert not (tmp_path / "runs.jsonl").exists()


def test_what_does_not_fit_is_one_line(tmp_path, ratings):
    with pytest.raises(UsageError, match=r"examples\.data movielens --out"):
        main([f"--data_dir={tmp_path}", f"--out={tmp_path / 'out'}"])
    np.savez(tmp_path / "movielens.npz", **ratings)
    with pytest.raises(UsageError, match="of 19 impressions"):
        main(["--batch=20", f"--data_dir={tmp_path}", f"--out={tmp_path / 'out'}"])
    for wrong in (
        "--time=0",
        "--time=40,x",
        "--time=40 --reference=random",
        "--time=39",
        "--time=40 --arms=x",
    ):
        with pytest.raises(UsageError, match=wrong.rpartition("--")[2].partition("=")[0]):
            main([*wrong.split(), f"--data_dir={tmp_path}"])
    assert not (tmp_path / "out").exists()


def test_the_strength_of_the_loss_is_that_of_the_mask():
    assert MASKS["sparse"].deviation == UNIFORM
