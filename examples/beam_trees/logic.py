"""Draws pairs of formulas of propositional logic, and the relation between them.

Bowman, Manning and Potts 2015. With a formula's worlds the assignments that make it true, the
seven relations of a pair compare two sets: a = b, a < b, a > b, a ^ b (complements), a | b (no
world in common), a v b (together all worlds), and a # b (none of these).
"""

import random

from examples.beam_trees.trees import Tree
from moe.errors import UsageError

VARIABLES = "abcdef"
TOKENS = ("(", ")", "and", "or", "not", *VARIABLES)
CLASSES = ("=", "<", ">", "^", "|", "v", "#")
USED = 4  # variables of a pair
WORLDS = 2 ** len(VARIABLES)
ALL = 2**WORLDS - 1
TRIES = 10_000
# Bit w of a variable's number is its value in world w.
TRUE_IN = {
    name: sum(1 << world for world in range(WORLDS) if world >> place & 1)
    for place, name in enumerate(VARIABLES)
}


def worlds(tree: Tree) -> int:
    """Returns the set of worlds in which a formula is true, as the bits of a number."""
    if isinstance(tree, str):
        return TRUE_IN[tree]
    if tree[1] == "not":
        return ALL & ~worlds(tree[2])
    _, left, (_, connective, right, _), _ = tree
    left, right = worlds(left), worlds(right)
    return left & right if connective == "and" else left | right


def relation(left: Tree, right: Tree) -> str:
    """Returns the relation of two formulas, neither always true nor always false."""
    a, b = worlds(left), worlds(right)
    if a == b:
        return "="
    apart, together = a & b == 0, a | b == ALL
    if apart or together:
        return "^" if apart and together else "|" if apart else "v"
    return "<" if a & b == a else ">" if a & b == b else "#"


def draw(
    count: int, operators: range, seed: int, without: frozenset = frozenset()
) -> list[tuple[Tree, Tree]]:
    """Returns different pairs, none in `without`, whose larger formula has so many operators.

    Raises:
      UsageError: there seem to be too few of them.
    """
    rng, found = random.Random(seed), {}
    for _ in range(TRIES * count):
        most = rng.choice(operators)
        sizes = [most, rng.randint(0, most)]
        rng.shuffle(sizes)
        names = rng.sample(VARIABLES, USED)
        pair = tuple(_formula(rng, size, names) for size in sizes)
        if pair not in without and all(0 < worlds(tree) < ALL for tree in pair):
            found[pair] = None
        if len(found) == count:
            return list(found)
    raise UsageError(
        f"found {len(found)} different pairs with {operators[0]} to {operators[-1]} operators, "
        f"not {count}; ask for fewer, or for larger ones"
    )


def _formula(rng: random.Random, operators: int, names: list[str]) -> Tree:
    if operators == 0:
        return rng.choice(names)
    connective = rng.choice(("and", "or", "not"))
    if connective == "not":
        return ("(", "not", _formula(rng, operators - 1, names), ")")
    left = rng.randrange(operators)
    right = _formula(rng, operators - 1 - left, names)
    return ("(", _formula(rng, left, names), ("(", connective, right, ")"), ")")
