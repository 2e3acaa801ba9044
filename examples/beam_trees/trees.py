"""Reads bracketed text as trees, and says in which order a tree's tokens are merged.

A tree is a token, or the tuple of its parts, brackets included: `[MAX 2 [MIN 4 7 ] ]` is
("[MAX", "2", ("[MIN", "4", "7", "]"), "]"). As binary trees they branch to the left.
"""

Tree = str | tuple


def parse(text: str) -> Tree:
    """Returns the tree of tokens with spaces between them; "[" or "(" opens a part of it."""
    open_parts: list[list] = [[]]
    for token in text.split():
        if token[0] in "[(":
            open_parts.append([])
        open_parts[-1].append(token)
        if token in ("]", ")"):
            part = tuple(open_parts.pop())
            open_parts[-1].append(part)
    ((tree,),) = open_parts
    return tree


def flatten(tree: Tree) -> list[str]:
    """Returns the tokens from left to right."""
    if isinstance(tree, str):
        return [tree]
    return [token for part in tree for token in flatten(part)]


def merges(tree: Tree, place: int = 0) -> list[int]:
    """Returns the places of the left partners of all merges, from the leaves to the root.

    Each merge makes one item of two neighbours, so that places are those of a sequence that
    shrinks; n tokens have n - 1 merges.

    Args:
      place: how many items stand to the left of the tree.
    """
    if isinstance(tree, str):
        return []
    steps = merges(tree[0], place)
    for part in tree[1:]:
        steps += [*merges(part, place + 1), place]
    return steps
