"""Expressions and formulas: their values, their relations, their trees, their batches."""

import numpy as np
import pytest

from examples.beam_trees import data, listops, logic
from examples.beam_trees.listops import Limits
from examples.beam_trees.trees import flatten, merges, parse
from moe.errors import UsageError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[MED 1 2 4 9 ]", 3),
        ("[MED 1 2 ]", 1),  # of 1.5 the whole part
        ("[SM 5 [MED 3 8 4 ] 2 ]", 1),
        ("7", 7),
    ],
)
def test_values(text, value):
    tree = parse(text)
    assert listops.value(tree) == value
    assert " ".join(flatten(tree)) == text


@pytest.mark.parametrize(
    ("left", "right", "relation"),
    [
        ("a", "( not a )", "^"),
        ("a", "( a ( or b ) )", "<"),
        ("( a ( or b ) )", "a", ">"),
        ("a", "b", "#"),
        ("( a ( and b ) )", "( not a )", "|"),
        ("( a ( or b ) )", "( not a )", "v"),
        ("a", "a", "="),
        ("( not ( a ( and b ) ) )", "( ( not a ) ( or ( not b ) ) )", "="),
    ],
)
def test_relations(left, right, relation):
    assert logic.relation(parse(left), parse(right)) == relation


def test_merges_lead_to_the_tree_from_left_to_right():
    tree = parse("[MAX 2 [MIN 4 7 ] ]")
    items = flatten(tree)
    for at in merges(tree):
        items[at : at + 2] = [(items[at], items[at + 1])]
    inner = ((("[MIN", "4"), "7"), "]")
    assert items == [((("[MAX", "2"), inner), "]")]


def test_expressions_keep_their_limits_and_differ():
    limits = Limits(6, 30, arguments=4, depth=3)
    trees = listops.draw(60, limits, seed=1)
    assert len(set(trees)) == 60 and trees == listops.draw(60, limits, seed=1)
    assert not set(trees) & set(listops.draw(60, limits, 1, frozenset(trees)))

    def check(tree, depth):
        if isinstance(tree, tuple):
            assert depth < 3 and 2 <= len(tree) - 2 <= 4
            for part in tree[1:-1]:
                check(part, depth + 1)

    for tree in trees:
        assert 6 <= len(flatten(tree)) <= 30
        check(tree, 1)


def test_only_the_operators_asked_for_are_drawn():
    def drawn(*operators):
        sets = data.make("listops", "small", 40, 10, 0, operators).sets.values()
        return [
            {listops.TOKENS[token] for token in some.tokens[_used(some)]} - {"]", *"0123456789"}
            for some in sets
        ]

    assert drawn("[MIN", "[SM") == [{"[MIN", "[SM"}] * 6
    assert drawn() == [{*listops.OPERATORS}] * 6


def _used(examples):
    return np.arange(examples.tokens.shape[-1]) < examples.counts[..., None]


def test_too_few_expressions_are_an_error():
    with pytest.raises(UsageError, match=r"found 10 .* ask for fewer"):
        listops.draw(11, Limits(1, 1, depth=1), 0)


def test_pairs_have_the_operators_asked_for_and_are_neither_always_true_nor_false():
    pairs = logic.draw(50, range(2, 4), seed=0)
    operators = {"and", "or", "not"}
    sizes = [[sum(t in operators for t in flatten(tree)) for tree in pair] for pair in pairs]
    assert {max(size) for size in sizes} == {2, 3}
    assert all(0 < logic.worlds(tree) < logic.ALL for pair in pairs for tree in pair)


def test_batches_hold_each_example_once_cut_to_its_length():
    task = data.make("logic", "small", 30, 5, seed=0)
    examples = task.sets["train"]
    assert [*task.tests] == ["0-3 operators", "4 operators", "5 operators", "6 operators"]
    seen = []
    for batch, weight in data.batches(examples, 8, np.random.default_rng(0)):
        width = batch.tokens.shape[-1]
        assert width in data.WIDTHS and batch.merges.shape == (8, 2, width - 1)
        for n in np.flatnonzero(weight):
            sides = [list(batch.tokens[n, s, : batch.counts[n, s]]) for s in (0, 1)]
            seen.append(str([[int(token) for token in side] for side in sides]))
    expected = [
        str([[int(t) for t in examples.tokens[n, s, : examples.counts[n, s]]] for s in (0, 1)])
        for n in range(30)
    ]
    assert sorted(seen) == sorted(expected)
