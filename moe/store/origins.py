"""Says which array a parameter comes from: the tables of names of upcycling, import and export.

A `Rule` names a parameter of one block and the array of another program, or of another run, that it
is made of, with `{n}` for the block and `{e}` for an expert. Blocks that are stacked for a loop
count as single ones: `places` says where each of them is.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from moe.store.checkpoint import named


class Place(NamedTuple):
    """Where a parameter of one block is: a leaf's name, and its turn in a loop (None outside)."""

    leaf: str
    turn: int | None


def places(graphdef, variables) -> dict[str, Place]:
    """Returns where each variable of each block is, also where blocks are stacked for a loop."""
    model = nnx.merge(graphdef, variables)
    loops = {
        str(loop.start + i): loop
        for loop in model.blocks.runs
        if loop.repeats > 1
        for i in range(loop.period)
    }
    where = {}
    for leaf in named(variables):
        head, _, rest = leaf.partition(".")
        number, _, rest = rest.partition(".")
        if head != "blocks" or number not in loops:
            where[leaf] = Place(leaf, None)
            continue
        for turn in range(loops[number].repeats):
            where[f"blocks.{int(number) + turn * loops[number].period}.{rest}"] = Place(leaf, turn)
    return where


class Layout(NamedTuple):
    """Says how an array of another program holds what a parameter holds.

    Attributes:
      theirs: the parameter's shape -> the array's.
      read: (array, the parameter's shape) -> the parameter.
      write: the parameter -> the array; None where there is no way back.
    """

    theirs: Callable
    read: Callable
    write: Callable | None


SAME = Layout(lambda shape: shape, lambda a, shape: a, lambda a: a)
FLAT = Layout(
    lambda shape: (math.prod(shape),), lambda a, shape: a.reshape(shape), lambda a: a.reshape(-1)
)
# Each expert a copy of a dense network's array; biases of experts have one axis more.
COPIES = Layout(
    lambda shape: tuple(n for n in shape[1:] if n != 1),
    lambda a, shape: jnp.broadcast_to(a.reshape(1, *shape[1:]), shape),
    None,
)


def linear(inputs: int = 1) -> Layout:
    """Returns the layout of torch's linear maps, [outputs, inputs], of kernels whose first `inputs`
    axes are those of the inputs."""
    return Layout(
        lambda shape: (math.prod(shape[inputs:]), math.prod(shape[:inputs])),
        lambda a, shape: a.T.reshape(shape),
        lambda a: a.reshape(math.prod(a.shape[:inputs]), -1).T,
    )


def permuted(*axes: int) -> Layout:
    """Returns the layout in which axis i of the array is axis `axes[i]` of the parameter."""
    back = sorted(range(len(axes)), key=axes.__getitem__)
    return Layout(
        lambda shape: tuple(shape[i] for i in axes),
        lambda a, shape: a.transpose(back),
        lambda a: a.transpose(axes),
    )


class Rule(NamedTuple):
    """Says where a parameter comes from.

    With `{e}` in `theirs`, each expert of the parameter's first axis has an array of its own, of
    `layout`. With `share` = (i, N), one array has all experts, and of each N parameters of one
    shape along its outputs, of which this is number i.
    """

    ours: str
    theirs: str
    layout: Layout
    share: tuple[int, int] | None = None


class Part(NamedTuple):
    """Holds a part of a parameter, and what it is read from."""

    ours: str
    expert: int | None  # of the parameter's first axis; None: all of it
    shape: tuple[int, ...]
    theirs: str
    index: tuple  # within their array; (): all of it
    whole: tuple[int, ...]  # their array's shape
    layout: Layout


def find(rules: Iterable[Rule], name: str) -> Iterator[tuple[Rule, str]]:
    """Yields the rules of a parameter, and its block's number, "" outside of blocks."""
    for rule in rules:
        pattern = re.escape(rule.ours).replace(r"\{n\}", r"(?P<n>\d+)")
        if found := re.fullmatch(pattern, name):
            yield rule, found.groupdict().get("n", "")


def parts(rule: Rule, number: str, name: str, shape: tuple[int, ...]) -> list[Part]:
    """Returns the parts of a parameter by a rule: one, or one for each expert."""
    theirs, layout = rule.theirs.replace("{n}", number), rule.layout
    if "{e}" not in theirs and rule.share is None:
        return [Part(name, None, shape, theirs, (), layout.theirs(shape), layout)]
    experts, inner = shape[0], shape[1:]
    one = layout.theirs(inner)
    if rule.share is None:
        return [
            Part(name, e, inner, theirs.replace("{e}", str(e)), (), one, layout)
            for e in range(experts)
        ]
    place, count = rule.share
    rows, whole = slice(place * one[0], (place + 1) * one[0]), (experts, count * one[0], *one[1:])
    return [Part(name, e, inner, theirs, (e, rows), whole, layout) for e in range(experts)]
