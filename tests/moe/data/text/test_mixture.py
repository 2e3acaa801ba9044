"""Which set shows a number: shares to within a few, each set's numbers without gap, no memory."""

import dataclasses

import numpy as np
import pytest

from moe.data.text import Mixture
from moe.data.text.mixture import dealing, parse
from moe.errors import UsageError
from tests.moe.data.text.sources import make_source, random_documents

SHARES = [(1.0,), (0.7, 0.3), (1, 1, 1), (5, 3, 2), (1000, 1), (0.1, 0.2, 0.3, 0.4), (1, 1e-12)]


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("start", [0, 10**6 + 7, 10**15])
def test_numbers_of_a_set_follow_one_another(shares, start):
    deal = dealing(shares, seed=1)
    dealt = [deal(start + n) for n in range(3000)]
    for part, share in enumerate(shares):
        counts = np.array([count for other, count in dealt if other == part])
        assert (np.diff(counts) == 1).all()
        assert abs(len(counts) - 3000 * share / sum(shares)) <= len(shares)
        if start and len(counts):  # to within the 2^-32 of a share
            assert abs(counts[0] - start * share / sum(shares)) <= len(shares) + start / 2**30


def test_the_first_numbers_count_from_zero():
    for seed in range(20):
        firsts = {}
        deal = dealing((0.5, 0.3, 0.2), seed)
        for number in range(50):
            part, count = deal(number)
            firsts.setdefault(part, count)
        assert firsts == {0: 0, 1: 0, 2: 0}


def test_seeds_deal_differently():
    assert len({tuple(dealing((1, 1, 1), seed)(n)[0] for n in range(9)) for seed in range(9)}) > 2


def test_names():
    assert parse("stdlib") is None and parse("a/b") is None and parse("C:folder") is None
    assert parse("a:0.7, b/c:3") == [("a", 0.7), ("b/c", 3.0)]
    assert parse("a:1") == [("a", 1.0)]


@pytest.mark.parametrize("name", ["a:0.7,b", "a,b", "a:0,b:1", "a:-1,b:1", "a:nan,b:1", ":1,b:1"])
def test_wrong_names(name):
    with pytest.raises(UsageError, match="expected NAME:WEIGHT"):
        parse(name)


def test_sets_of_different_tokenizers_do_not_mix():
    one = make_source(random_documents(), name="one")
    for change in ({"tokenizer": b"{}"}, {"end": 257}, {"token_bytes": np.ones(300, np.int32)}):
        other = dataclasses.replace(one, name="other", **change)
        with pytest.raises(UsageError, match="of the mixture have different tokenizers"):
            Mixture("one:1,other:1", "train", (one, other), (1.0, 1.0))
