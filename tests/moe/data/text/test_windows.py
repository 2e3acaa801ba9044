"""Batches of text against a loop over tokens; resume, processes and epochs, bit for bit."""

import dataclasses
import itertools

import numpy as np
import pytest

from moe.data.stream import epoch_order
from moe.data.text import Mixture, eval_batches, train_batches
from moe.data.text.windows import cut
from moe.errors import DataError, UsageError
from tests.moe.data.text.sources import make_source, random_documents

T, B = 16, 12
KINDS = {"one mark": 256, "a mark of its own at the end": 257}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def source(request):
    return make_source(random_documents(), end=request.param)


@pytest.fixture
def mixture():
    parts = [make_source(random_documents(30, seed=seed), name=str(seed)) for seed in range(3)]
    return Mixture("0:5,1:3,2:2", "train", tuple(parts), (5.0, 3.0, 2.0))


def naive_rows(source, seq_len: int) -> list[dict[str, list]]:
    """Returns every window by the definitions, one token at a time."""
    stream, rows = source.tokens.tolist(), []
    for start in range(0, len(stream) - 1, seq_len):
        row = {key: [] for key in ("tokens", "targets", "weight", "bytes", "segments", "positions")}
        segment = position = 0
        for t in range(start, start + seq_len):
            if t + 1 >= len(stream):
                for values in row.values():
                    values.append(0)
                continue
            if t == start or stream[t] == source.begin:
                segment, position = segment + 1, -1
            position += 1
            target = stream[t + 1]
            weight = int(target != source.begin or source.begin == source.end)
            row["tokens"].append(stream[t])
            row["targets"].append(target)
            row["weight"].append(weight)
            row["bytes"].append(int(target < 256))
            row["segments"].append(segment)
            row["positions"].append(position)
        rows.append(row)
    return rows


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def train(source, steps, *, start_step=0, **changes):
    settings = {"batch_size": B, "seed": 3, "seq_len": T} | changes
    return list(itertools.islice(train_batches(source, start_step=start_step, **settings), steps))


@pytest.mark.parametrize("seq_len", [1, 7, T, 1000])
def test_windows_equal_a_loop_over_tokens(source, seq_len):
    rows = naive_rows(source, seq_len)
    assert source.windows(seq_len) == len(rows)
    batch = cut([(source, i) for i in range(len(rows))], seq_len)
    for key, values in batch.items():
        assert values.dtype == (np.float32 if key == "weight" else np.int32), key
        np.testing.assert_array_equal(values, [row[key] for row in rows], err_msg=key)


def test_training_shows_the_windows_in_the_order_of_the_epoch(source):
    rows, order = naive_rows(source, T), epoch_order(source.windows(T), 3)
    for step, batch in enumerate(train(source, 8)):
        for place in range(B):
            row = rows[order(step * B + place)]
            assert {key: values[place].tolist() for key, values in batch.items()} == row


@pytest.mark.parametrize("start_step", [1, 5, 11])
@pytest.mark.parametrize("kind", ["source", "mixture"])
def test_resume_is_exact(request, kind, start_step):
    text = request.getfixturevalue(kind) if kind == "mixture" else make_source(random_documents())
    assert_equal(train(text, 14)[start_step:], train(text, 14 - start_step, start_step=start_step))


PARTS = {  # of a batch of 12, for each process
    "halves": [range(6), range(6, 12)],
    "quarters": [range(i, i + 3) for i in (0, 3, 6, 9)],
    "apart": [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]],
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_processes_together_make_the_same_batch(mixture, parts):
    """Also in the middle of a run that began with another number of them."""
    for start_step in (0, 4):
        whole = train(mixture, 4, start_step=start_step)
        for rows in parts:
            expected = [{key: a[list(rows)] for key, a in batch.items()} for batch in whole]
            assert_equal(train(mixture, 4, start_step=start_step, rows=rows), expected)


def test_batch_size_cuts_the_same_stream(mixture):
    small, large = train(mixture, 6, batch_size=4), train(mixture, 2, batch_size=12)
    for key in large[0]:
        streams = [np.concatenate([batch[key] for batch in run]) for run in (small, large)]
        np.testing.assert_array_equal(*streams)


@pytest.mark.parametrize("batch_size, processes", [(4, 1), (4, 4), (64, 2), (12, 3)])
@pytest.mark.parametrize("kind", ["source", "mixture"])
def test_evaluation_predicts_each_token_once_in_order(request, kind, batch_size, processes):
    text = request.getfixturevalue(kind) if kind == "mixture" else make_source(random_documents())
    runs = [
        list(eval_batches(text, batch_size=batch_size, seq_len=T, rows=rows))
        for rows in np.split(np.arange(batch_size), processes)
    ]
    windows = sum(part.windows(T) for part in text.parts)
    assert {len(run) for run in runs} == {-(-windows // batch_size)}
    targets = []
    for step in zip(*runs, strict=True):
        for batch in step:
            assert batch["tokens"].shape == (batch_size // processes, T)
            padding = batch["segments"] == 0
            assert all(not values[padding].any() for values in batch.values())
            targets += batch["targets"][~padding].tolist()
    assert targets == [t for part in text.parts for t in part.tokens[1:].tolist()]


def test_bytes_of_an_evaluation_are_those_of_the_text(source):
    batches = list(eval_batches(source, batch_size=8, seq_len=T))
    assert sum(int(b["bytes"].sum()) for b in batches) == sum(map(len, random_documents()))
    wanted = sum(int(b["weight"].sum()) for b in batches)  # the end of each document, too
    assert wanted == sum(len(document) + 1 for document in random_documents())


def test_a_row_of_padding_alone():
    source = make_source([[1, 2, 3]])
    (batch,) = eval_batches(source, batch_size=4, seq_len=T, rows=[2, 3])
    assert {key: a.dtype.name for key, a in batch.items()} == {
        key: a.dtype.name for key, a in train(source, 1)[0].items()
    }
    assert not any(a.any() for a in batch.values())


def test_seeds_give_other_orders(source):
    assert not np.array_equal(train(source, 1)[0]["tokens"], train(source, 1, seed=4)[0]["tokens"])


def test_documents_are_found_by_their_begin(source):
    found = dataclasses.replace(source, offsets=None).documents
    np.testing.assert_array_equal(found, source.offsets)
    for number, document in enumerate(random_documents()):
        assert source.document(number).tolist() == document


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 0}, "batch_size=0: expected 1 or more"),
        ({"rows": [0, 12]}, "expected increasing ones of 0..11"),
        ({"seed": -1}, "seed=-1: expected"),
        ({"start_step": -1}, "start_step=-1: expected 0 or more"),
        ({"seq_len": 0}, "seq_len=0: expected 1 or more"),
    ],
)
def test_messages(source, changes, message):
    with pytest.raises(UsageError, match=message):
        train(source, 1, **changes)


def test_nothing_in_the_split():
    with pytest.raises(UsageError, match="split 'train' of 'made' is empty"):
        train(make_source([]), 1)


def test_a_token_of_another_tokenizer_is_one_line():
    source = make_source([[1, 2, 999]])
    with pytest.raises(DataError, match="holds the token 999, and its tokenizer has 258"):
        train(source, 1)
