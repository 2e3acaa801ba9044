"""Label noise: how many labels it changes, to which, and that it depends on the seed alone."""

import numpy as np
import pytest

from moe.data.images import from_arrays, parse_groups, with_label_noise
from moe.errors import UsageError
from moe.tasks import task_of

N = 6000
GROUPS = "0,1,2;4,3"


@pytest.fixture(scope="module")
def source():
    labels = np.arange(N) % 6
    return from_arrays(np.zeros((N, 1, 1, 1), np.uint8), labels, "abcdef")


def labels_of(source):
    return np.array([source[i]["label"] for i in range(len(source))])


def test_labels_are_drawn_within_their_group(source):
    clean, noisy = labels_of(source), labels_of(with_label_noise(source, 0.3, GROUPS, 0))
    for group in ((0, 1, 2), (3, 4)):
        own = np.isin(clean, group)
        assert set(noisy[own]) == {*group}
        wrong = 0.3 * (len(group) - 1) / len(group)
        # Five standard deviations of a mean of coins.
        spread = 5 * np.sqrt(wrong * (1 - wrong) / own.sum())
        assert abs((noisy[own] != clean[own]).mean() - wrong) < spread
    assert (noisy[clean == 5] == 5).all()  # of no group


def test_without_groups_any_class_may_come(source):
    noisy = labels_of(with_label_noise(source, 1.0, "", 0))
    counts = np.bincount(noisy[labels_of(source) == 0], minlength=6)
    assert (abs(counts - N / 36) < 5 * np.sqrt(N / 36)).all()


def test_the_seed_alone_decides(source):
    one, again, other = (labels_of(with_label_noise(source, 0.3, "", s)) for s in (0, 0, 1))
    assert (one == again).all() and (one != other).any()
    assert with_label_noise(source, 0.0, GROUPS, 0) is source
    noisy = with_label_noise(source, 0.3, "", 0)
    assert noisy.class_counts() == tuple(np.bincount(one, minlength=6))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,x", "expected numbers of classes"),
        ("0;;1", "expected numbers of classes"),
        ("0,1;1", "has a class twice"),
        ("0,6", "6 is no class; the 6 classes are 0..5"),
        ("-1,2", "-1 is no class"),
    ],
)
def test_groups_that_are_none(text, message):
    with pytest.raises(UsageError, match=message):
        parse_groups(text, 6)


def test_training_has_the_noise_and_evaluation_has_not(tiny):
    clean, noisy = tiny(), tiny(data__label_noise="1", data__label_groups="0,1,2,3,4,5,6,7,8,9")
    batches = {}
    for name, config in (("clean", clean), ("noisy", noisy)):
        task = task_of(config)
        source = task.open(config, "train")
        config = task.resolve(config, source)
        rows = range(config.batch_size)
        train = next(task.train_batches(config, source, 3, rows))
        batches[name] = train, next(task.eval_batches(config, source, rows))
    (train, evaluated), (noised, tested) = batches["clean"], batches["noisy"]
    np.testing.assert_array_equal(train["image"], noised["image"])
    assert (train["label"] != noised["label"]).any()
    np.testing.assert_array_equal(evaluated["label"], tested["label"])
    with pytest.raises(UsageError, match="10 is no class"):
        config = tiny(data__label_groups="9,10")
        task_of(config).resolve(config, task_of(config).open(config, "train"))
