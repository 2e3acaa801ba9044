"""Draws ListOps: nested lists of digits under MAX, MIN, MED and SM, whose value is a digit.

Nangia and Bowman 2018. A list has 2 to 5 arguments, each of them a list with chance 1/4.
"""

import random
from typing import NamedTuple

import numpy as np

from examples.beam_trees.trees import Tree
from moe.errors import UsageError

OPERATORS = {
    "[MAX": max,
    "[MIN": min,
    "[MED": lambda values: int(np.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
TOKENS = (*OPERATORS, "]", *"0123456789")
CLASSES = tuple("0123456789")
TRIES = 10_000  # of an expression, before it is said that there are no more


class Limits(NamedTuple):
    """Says which expressions are drawn.

    Attributes:
      shortest, longest: in tokens.
      arguments: the most that a list has.
      depth: from here on there are digits only; the whole expression has depth 1.
      operators: those that are drawn.
      nest: chance that an argument is a list. The published one, 1/4, seldom makes long lists;
        with 2/7 a list of 2 to 5 arguments has one list among them, in the mean.
    """

    shortest: int
    longest: int
    arguments: int = 5
    depth: int = 20
    nest: float = 0.25
    operators: tuple[str, ...] = tuple(OPERATORS)


def value(tree: Tree) -> int:
    """Returns the digit that an expression stands for."""
    if isinstance(tree, str):
        return int(tree)
    return OPERATORS[tree[0]]([value(part) for part in tree[1:-1]])


def draw(count: int, limits: Limits, seed: int, without: frozenset = frozenset()) -> list[Tree]:
    """Returns different expressions, none of which is in `without`.

    Raises:
      UsageError: there seem to be too few within the limits.
    """
    rng, found = random.Random(seed), {}
    for _ in range(TRIES * count):
        tree = _try(rng, limits)
        if tree is not None and tree not in without:
            found[tree] = None
        if len(found) == count:
            return list(found)
    raise UsageError(
        f"found {len(found)} different expressions of {limits.shortest} to {limits.longest} "
        f"tokens, not {count}; ask for fewer, or for longer ones"
    )


def _try(rng: random.Random, limits: Limits) -> Tree | None:
    """Returns one expression, or None where it left the limits."""
    left = limits.longest

    def node(depth):
        nonlocal left
        # The whole is a list: the ten lone digits would be drawn once each.
        if depth >= limits.depth or (depth > 1 and rng.random() > limits.nest):
            left -= 1
            return str(rng.randrange(10))
        left -= 2
        parts = [rng.choice(limits.operators)]
        for _ in range(rng.randint(2, limits.arguments)):
            if left <= 0:
                left = -1
                break
            parts.append(node(depth + 1))
        return (*parts, "]")

    tree = node(1)
    return tree if 0 <= left <= limits.longest - limits.shortest else None
