"""Makes the sets of both tasks, as arrays, and deals them in batches of alike lengths."""

from typing import NamedTuple

import numpy as np

from examples.beam_trees import listops, logic
from examples.beam_trees.listops import Limits
from examples.beam_trees.trees import flatten, merges

# Sequences are cut or padded to these lengths, so that few programs are compiled.
WIDTHS = (6, 10, 14, 20, 28, 40, 56, 80, 100, 140, 200, 300, 400, 500, 600, 700, 800, 900, 1000)
LONG = 2 / 7  # see Limits.nest


class Examples(NamedTuple):
    """Holds sequences, one or two of an example (sides); unused places hold 0.

    Attributes:
      tokens: [n, sides, S].
      counts: how many places are used, [n, sides].
      merges: the places to merge at for the gold tree, [n, sides, S - 1].
      labels: [n].
    """

    tokens: np.ndarray
    counts: np.ndarray
    merges: np.ndarray
    labels: np.ndarray


class Task(NamedTuple):
    """Says what is read, and holds the sets "train", "dev", and those to test on by name."""

    tokens: tuple[str, ...]
    classes: tuple[str, ...]
    sets: dict[str, Examples]

    @property
    def tests(self) -> list[str]:
        """Returns the names of the sets to test on, the one like the training set first."""
        return [name for name in self.sets if name not in ("train", "dev")]


# What is tested on beside expressions like those that are trained on.
LISTOPS = {
    "small": (
        Limits(4, 20),
        {
            "21-40 tokens": Limits(21, 40),
            "41-80 tokens": Limits(41, 80, nest=LONG),
            "10 arguments": Limits(21, 40, arguments=10, depth=9),
        },
    ),
    "published": (
        Limits(4, 100),
        {
            "200-300 tokens": Limits(200, 300, nest=LONG),
            "500-600 tokens": Limits(500, 600, nest=LONG),
            "900-1000 tokens": Limits(900, 1000, nest=LONG),
            "10 arguments": Limits(100, 1000, arguments=10, depth=9),
            "15 arguments": Limits(100, 1000, arguments=15, depth=9),
        },
    ),
}
LOGIC = {"small": (3, (4, 5, 6)), "published": (6, (7, 8, 9, 10, 11, 12))}


def make(
    task: str, size: str, train: int, test: int, seed: int, operators: tuple[str, ...] | None = None
) -> Task:
    """Returns the task "listops" or "logic" with so many examples to train and to test on.

    Args:
      operators: those that lists of "listops" have; None for all.
    """
    if task == "logic":
        return _logic(size, train, test, seed)
    return _listops(size, train, test, seed, operators or tuple(listops.OPERATORS))


def _listops(size: str, train: int, test: int, seed: int, operators: tuple[str, ...]) -> Task:
    limits, others = LISTOPS[size]
    limits = limits._replace(operators=operators)

    def encode(trees):
        labels = [listops.value(tree) for tree in trees]
        return arrays([(tree,) for tree in trees], listops.TOKENS, labels)

    drawn = listops.draw(train + 2 * test, limits, seed)
    known = frozenset(drawn)
    sets = {
        "train": encode(drawn[2 * test :]),
        "dev": encode(drawn[:test]),
        f"to {limits.longest} tokens": encode(drawn[test : 2 * test]),
    }
    for number, (name, other) in enumerate(others.items(), 1):
        other = other._replace(operators=operators)
        sets[name] = encode(listops.draw(test, other, seed + 1000 * number, known))
    return Task(listops.TOKENS, listops.CLASSES, sets)


def _logic(size: str, train: int, test: int, seed: int) -> Task:
    most, others = LOGIC[size]

    def encode(pairs):
        labels = [logic.CLASSES.index(logic.relation(*pair)) for pair in pairs]
        return arrays(pairs, logic.TOKENS, labels)

    drawn = logic.draw(train + 2 * test, range(most + 1), seed)
    known = frozenset(drawn)
    sets = {
        "train": encode(drawn[2 * test :]),
        "dev": encode(drawn[:test]),
        f"0-{most} operators": encode(drawn[test : 2 * test]),
    }
    for count in others:
        pairs = logic.draw(test, range(count, count + 1), seed + 1000 * count, known)
        sets[f"{count} operators"] = encode(pairs)
    return Task(logic.TOKENS, logic.CLASSES, sets)


def arrays(examples: list[tuple], tokens: tuple[str, ...], labels: list[int]) -> Examples:
    """Returns trees, one or two of an example, as arrays."""
    number = {token: place for place, token in enumerate(tokens)}
    rows = [[[number[token] for token in flatten(tree)] for tree in trees] for trees in examples]
    longest = max(len(row) for sides in rows for row in sides)
    shape = len(rows), len(rows[0]), longest
    found = Examples(
        np.zeros(shape, np.int32),
        np.array([[len(row) for row in sides] for sides in rows], np.int32),
        np.zeros((*shape[:2], longest - 1), np.int32),
        np.array(labels, np.int32),
    )
    for n, (sides, trees) in enumerate(zip(rows, examples, strict=True)):
        for side, (row, tree) in enumerate(zip(sides, trees, strict=True)):
            found.tokens[n, side, : len(row)] = row
            found.merges[n, side, : len(row) - 1] = merges(tree)
    return found


def batches(examples: Examples, size: int, rng: np.random.Generator | None = None):
    """Yields batches of equal size and of alike lengths, and the weight of each example in them.

    Every example has weight 1 once; what fills up the last batch of a length has weight 0.

    Args:
      rng: shuffles; None keeps the order.
    """
    longest = examples.counts.max(-1)
    order = np.arange(len(longest)) if rng is None else rng.permutation(len(longest))
    bucket = np.searchsorted(WIDTHS, longest[order])
    parts = []
    for number in np.unique(bucket):
        rows = order[bucket == number]
        parts += [(number, rows[start : start + size]) for start in range(0, len(rows), size)]
    if rng is not None:
        rng.shuffle(parts)
    for number, rows in parts:
        weight = (np.arange(size) < len(rows)).astype(np.float32)
        yield _cut(Examples(*(x[np.resize(rows, size)] for x in examples)), WIDTHS[number]), weight


def _cut(batch: Examples, width: int) -> Examples:
    def fit(x, width):
        x = x[..., :width]
        return np.pad(x, [(0, 0), (0, 0), (0, width - x.shape[-1])])

    tokens, merged = fit(batch.tokens, width), fit(batch.merges, width - 1)
    return batch._replace(tokens=tokens, merges=merged)
