"""A batch is a function of its step: resume, processes and epochs, bit for bit."""

import dataclasses
import itertools
import time

import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from moe.data.images import Augment, eval_batches, from_arrays, train_batches
from moe.data.stream import epoch_order, example_rngs
from moe.errors import UsageError

N, CLASSES = 23, 5
EVERYTHING = {"flip": True, "crop": 1, "resized_crop": (0.5, 1.0), "cutout": 2, "mixup": 0.3}
PLAIN = {"flip": False, "crop": 0, "resized_crop": (), "cutout": 0, "mixup": 0.0}


@pytest.fixture(params=["in memory", "per record"])
def source(request):
    """Images whose first pixel tells their index."""
    images = np.random.default_rng(0).integers(0, 256, (N, 6, 6, 1), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(N)
    made = from_arrays(images, [i % CLASSES for i in range(N)], [str(c) for c in range(CLASSES)])
    return dataclasses.replace(made, in_memory=request.param == "in memory")


def _train(source, steps, *, start_step=0, augment=EVERYTHING, **changes):
    settings = {"batch_size": 12, "seed": 3, "image_size": 6} | changes
    batches = train_batches(source, start_step=start_step, augment=augment, **settings)
    return list(itertools.islice(batches, steps))


def _assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def _index(images) -> np.ndarray:
    """Reads the index of an example back from its first pixel."""
    return np.round((images[:, 0, 0, 0] + 1) * 127.5).astype(int)


def test_shapes_and_dtypes(source):
    (batch,) = _train(source, 1, image_size=8)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "image": ((12, 8, 8, 1), "float32"),
        "label": ((12,), "int32"),
        "label_mixed": ((12,), "int32"),
        "mix": ((12,), "float32"),
    }
    assert abs(batch["image"]).max() <= 1
    assert _train(source, 1, augment=PLAIN)[0].keys() == {"image", "label"}


def test_same_arguments_same_bits(source):
    _assert_equal(_train(source, 5), _train(source, 5))


def test_threads_change_nothing(source):
    _assert_equal(_train(source, 5, num_threads=0), _train(source, 5, num_threads=3))


@pytest.mark.parametrize("start_step", [1, 2, 7])
def test_resume_is_exact(source, start_step):
    _assert_equal(
        _train(source, 10)[start_step:], _train(source, 10 - start_step, start_step=start_step)
    )


PARTS = {  # of a batch of 12, for each process
    "halves": [range(6), range(6, 12)],
    "quarters": [range(i, i + 3) for i in (0, 3, 6, 9)],
    "apart": [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]],
    "overlapping": [range(8), range(4, 12)],
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_processes_together_make_the_same_batch(source, parts):
    whole = _train(source, 4)
    for rows in parts:
        expected = [{key: a[list(rows)] for key, a in batch.items()} for batch in whole]
        _assert_equal(_train(source, 4, rows=rows), expected)


def test_batch_size_cuts_the_same_stream(source):
    """What example g is does not depend on the batch it falls in."""
    small, large = _train(source, 6, batch_size=4), _train(source, 2, batch_size=12)
    for key in large[0]:
        streams = [np.concatenate([batch[key] for batch in run]) for run in (small, large)]
        np.testing.assert_array_equal(*streams)


def test_every_epoch_shows_every_example_once(source):
    images = np.concatenate([b["image"] for b in _train(source, 6, augment=PLAIN)])
    epochs = [_index(images[e * N : (e + 1) * N]) for e in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(N))
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()


def test_seeds_give_unrelated_orders():
    """A shuffle seeded with seed + epoch would show seed 1 in its first epoch seed 0's second."""
    orders = [[epoch_order(N, seed)(g) for g in range(2 * N)] for seed in (0, 1)]
    assert orders[0][N:] != orders[1][:N]


def test_streams_of_examples_differ():
    draws = {example_rngs(seed)(g).random() for seed in SEEDS for g in range(100)}
    assert len(draws) == 100 * len(SEEDS)


SEEDS = (*range(10), 1 << 31, 1 << 32, (1 << 32) + 1, 1 << 62)  # all bits of a seed count


def test_orders_of_seeds_and_epochs_differ():
    orders = {
        tuple(epoch_order(N, seed)(e * N + i) for i in range(N)) for seed in SEEDS for e in range(3)
    }
    assert len(orders) == 3 * len(SEEDS)


def test_one_order_is_computed_for_each_epoch(source, monkeypatch):
    """Not one for each thread that reads: of ImageNet-21k it takes a second and 100 MB."""
    made, real = [], np.random.default_rng

    def slow(seed):
        made.append(seed)
        time.sleep(0.05)
        return real(seed)

    monkeypatch.setattr(np.random, "default_rng", slow)
    _train(source, 4, num_threads=8)  # 48 examples of 23, and their partners: three epochs
    assert len(made) in (3, 4)  # two batches more are made ahead


def test_labels_belong_to_their_images(source):
    for batch in _train(source, 4, augment=PLAIN):
        np.testing.assert_array_equal(batch["label"], _index(batch["image"]) % CLASSES)
        np.testing.assert_array_equal(batch["image"][0], _float(source, _index(batch["image"])[0]))


def _float(source, index) -> np.ndarray:
    return source[index]["image"].astype(np.float32) / np.float32(127.5) - np.float32(1)


def test_mixup_mixes_each_example_with_the_next(source):
    plain = _train(source, 6, augment=PLAIN)
    mixed = _train(source, 5, augment=PLAIN | {"mixup": 0.5})
    images = np.concatenate([b["image"] for b in plain])
    labels = np.concatenate([b["label"] for b in plain])
    for step, batch in enumerate(mixed):
        here = slice(12 * step, 12 * step + 12)
        after = slice(12 * step + 1, 12 * step + 13)
        mix = batch["mix"]
        assert (mix >= 0).all() and (mix <= 1).all()
        np.testing.assert_array_equal(batch["label"], labels[here])
        np.testing.assert_array_equal(batch["label_mixed"], labels[after])
        weight = mix[:, None, None, None]
        expected = weight * images[here] + (1 - weight) * images[after]
        np.testing.assert_allclose(batch["image"], expected, atol=1e-6)
    weights = np.concatenate([b["mix"] for b in mixed])
    assert len(np.unique(weights)) == len(weights)


@pytest.mark.parametrize("kind", [ConfigDict, FrozenConfigDict, dict, lambda d: Augment(**d)])
def test_settings_from_a_config(source, kind):
    _assert_equal(_train(source, 2, augment=kind(EVERYTHING)), _train(source, 2))


def test_missing_settings_are_off(source):
    _assert_equal(_train(source, 2, augment={}), _train(source, 2, augment=PLAIN))


@pytest.mark.parametrize("batch_size, process_count", [(4, 1), (23, 1), (64, 1), (12, 3), (64, 4)])
def test_eval_covers_each_example_once(source, batch_size, process_count):
    parts = [
        list(
            eval_batches(
                source,
                batch_size=batch_size,
                image_size=6,
                rows=np.split(np.arange(batch_size), process_count)[i],
            )
        )
        for i in range(process_count)
    ]
    assert {len(part) for part in parts} == {-(-N // batch_size)}
    seen = []
    for step in zip(*parts, strict=True):
        for batch in step:
            assert batch["image"].shape == (batch_size // process_count, 6, 6, 1)
            assert {v.dtype.name for v in batch.values()} == {"float32", "int32"}
            real = batch["mask"] == 1
            assert set(np.unique(batch["mask"])) <= {0, 1}
            assert not batch["image"][~real].any() and not batch["label"][~real].any()
            indices = _index(batch["image"][real])
            np.testing.assert_array_equal(batch["label"][real], indices % CLASSES)
            seen.extend(indices)
    np.testing.assert_array_equal(seen, np.arange(N))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 0}, "batch_size=0: expected 1 or more; pass --config.batch_size"),
        ({"rows": [0, 12]}, r"rows \[0, 12\]: expected increasing ones of 0..11"),
        ({"rows": [1, 1]}, "expected increasing ones"),
        ({"rows": []}, "expected increasing ones"),
        ({"seed": -1}, "seed=-1: expected"),
        ({"start_step": -1}, "start_step=-1: expected 0 or more"),
        ({"augment": {"flop": True}}, "unknown augmentation flop: expected some of flip, crop"),
        ({"augment": {"flip": 1}}, "flip=1: expected True or False"),
        ({"augment": {"crop": -1}}, "crop=-1: expected a number of pixels"),
        ({"augment": {"cutout": 1.5}}, "cutout=1.5: expected a number of pixels"),
        ({"augment": {"resized_crop": (0.5,)}}, r"resized_crop=\(0.5,\): expected \(lo, hi\)"),
        ({"augment": {"resized_crop": (0.0, 1.0)}}, "expected .* 0 < lo <= hi <= 1"),
        ({"augment": {"resized_crop": 0.5}}, r"resized_crop=0.5: expected \(lo, hi\)"),
        ({"augment": {"mixup": -0.1}}, "mixup=-0.1: expected alpha >= 0"),
    ],
)
def test_messages(source, changes, message):
    with pytest.raises(UsageError, match=message):
        _train(source, 1, **changes)


def test_empty_split():
    empty = from_arrays(np.zeros((0, 6, 6, 1), np.uint8), [], ["a"])
    with pytest.raises(UsageError, match="is empty"):
        _train(empty, 1)
    assert not list(eval_batches(empty, batch_size=4, image_size=6))
