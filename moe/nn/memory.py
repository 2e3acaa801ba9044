"""Finds the routers of a model's blocks, and takes what they remember from step to step.

What a router remembers are values: its `RouterState` variables, which are no parameters. A model's
form one nested dictionary, named and stacked for loops as its parameters are; the step passes
the two side by side and `join` makes one of them, which is what the model is merged from.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe.nn.layer import LayerReport
from routers import Router, RouterState

Memory = dict[str, Any]


class Found(NamedTuple):
    """Holds a router of a layer, or of all turns of a loop over blocks."""

    path: tuple[str, ...]  # of its variables
    router: Router
    numbers: tuple[int, ...]  # of its reports; more than one where its variables are stacked


def routers(model: nnx.Module) -> list[Found]:
    """Returns the routers of a model, with the numbers of their reports.

    They are the numbers of its `blocks`; of a model without, those from 0 in the order of its
    layers, by their attributes' names.
    """
    if hasattr(model, "blocks"):
        return [f._replace(path=("blocks", *f.path)) for f in in_blocks(model.blocks)]
    found = {path: m for path, m in nnx.iter_modules(model) if isinstance(m, Router)}
    return [Found(path, found[path], (i,)) for i, path in enumerate(sorted(found))]


def in_blocks(blocks) -> Iterator[Found]:
    """Yields the routers of a `moe.nn.blocks.Blocks`; paths begin there."""
    for run in blocks.runs:
        for number in range(run.start, run.start + run.period):
            numbers = tuple(number + i * run.period for i in range(run.repeats))
            for path, module in nnx.iter_modules(getattr(blocks, str(number))):
                if isinstance(module, Router):
                    yield Found((str(number), *path), module, numbers)


def split(model: nnx.Module):
    """Returns the model's structure, its parameters' and its routers' state, as NNX states."""
    return nnx.split(model, nnx.Param, RouterState)


def join(params: Mapping, memory: Mapping) -> dict:
    """Returns one nested dictionary of two that have no leaf in common."""
    joined = dict(params)
    for name, inner in memory.items():
        joined[name] = join(joined[name], inner) if name in joined else inner
    return joined


def part(variables: Mapping, like: Mapping) -> dict:
    """Returns what has the names of `like` in a nested dictionary: the reverse of `join`."""
    return {
        name: part(variables[name], inner) if isinstance(inner, Mapping) else variables[name]
        for name, inner in like.items()
    }


def statistics(reports: Mapping[int, LayerReport]) -> dict[str, Any]:
    """Returns the sums that the routers learn from, by block; {} where none does."""
    return {
        str(number): report.statistics
        for number, report in reports.items()
        if report.statistics is not None
    }


def advance(graphdef, params, memory: Memory, sums: Mapping[str, Any], progress) -> Memory:
    """Returns what the routers remember after a step, from `statistics` of the whole batch.

    Args:
      progress: share of the run's steps that are then done.
    """
    return _each(
        graphdef, params, memory, sums, lambda r: functools.partial(r.advance, progress=progress)
    )


def calibrate(graphdef, params, memory: Memory, sums: Mapping[str, Any]) -> Memory:
    """Returns what the routers remember before the first step, from one batch's `statistics`."""
    return _each(graphdef, params, memory, sums, lambda router: router.calibrate)


def _each(graphdef, params, memory, sums, change: Callable[[Router], Callable]) -> Memory:
    """Applies change(router)(state, sums) to each router that remembers, turn by turn of loops."""
    new = memory
    for found in routers(nnx.merge(graphdef, join(params, memory))):
        path = found.path
        state = functools.reduce(lambda tree, name: tree.get(name, {}), path, memory)
        if not state:
            continue
        seen = [sums[str(number)] for number in found.numbers]
        f = change(found.router)
        if len(seen) == 1:
            state = f(state, seen[0])
        else:
            state = jax.vmap(f)(state, jax.tree.map(lambda *a: jnp.stack(a), *seen))
        new = _with(new, path, state)
    return new


def _with(tree: dict, path: tuple[str, ...], value) -> dict:
    """Returns the nested dictionary with another value at the path."""
    if not path:
        return value
    return tree | {path[0]: _with(tree[path[0]], path[1:], value)}
