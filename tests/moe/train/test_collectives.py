"""Tests that the collectives of a program follow one another by what they need of each other.

What nothing orders could run in another order on another process, and gloo would mix them up.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import pytest

from moe.train.run import set_up
from moe.train.stopping import with_vote
from tests.moe.conftest import QUICK, open_source

COLLECTIVE = re.compile(r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)\(")
CALLED = re.compile(r"(?:body|condition|to_apply|calls)=%?([\w.-]+)|branch_computations={(.*?)}")


def computations(text: str) -> dict[str, dict[str, str]]:
    """Returns {computation: {instruction: its line}} of an HLO module; the entry is ENTRY."""
    found, name = {}, None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*{$", line):
            name = "ENTRY" if head[1] else head[2]
            found[name] = {}
        elif name and (parts := re.match(r"\s+(?:ROOT )?%([\w.-]+) = (.*)", line)):
            found[name][parts[1]] = re.sub(r", metadata={.*", "", parts[2])
    return found


def unordered(text: str) -> list[tuple[str, str]]:
    """Returns the loops with collectives and the collectives that need nothing of each other."""
    modules = computations(text)

    def called(line):
        names = itertools.chain(*CALLED.findall(line))
        return [name for group in names for name in re.findall(r"[\w.-]+", group)]

    def communicates(line):
        inner = (other for name in called(line) for other in modules.get(name, {}).values())
        return bool(COLLECTIVE.search(line)) or any(map(communicates, inner))

    pairs = []
    for lines in modules.values():
        needs, users = {}, [name for name, line in lines.items() if communicates(line)]
        for name, line in lines.items():
            operands = [other for other in re.findall(r"%([\w.-]+)", line) if other in needs]
            needs[name] = set(operands).union(*(needs[other] for other in operands))
        for first, second in itertools.combinations(users, 2):
            loop = any(not COLLECTIVE.search(lines[name]) for name in (first, second))
            if loop and first not in needs[second]:
                pairs.append((first, second))
    return pairs


@pytest.mark.slow
def test_a_vote_waits_for_the_loops_of_the_routers(tiny):
    config = tiny(router__name="sparse_expert_choice")
    source = open_source(config, config.data.eval_split)
    run = set_up(config, source)
    batch = run.abstract_batch() | {"mask": jax.ShapeDtypeStruct((16,), jnp.float32)}
    batch["vote"] = jax.ShapeDtypeStruct((8,), jnp.int32)
    where = batch["image"].sharding
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=where) for k, v in batch.items()}
    step = with_vote(run.eval_step)
    with jax.set_mesh(run.mesh):
        compiled = jax.jit(step, out_shardings=run.replicated).lower(run.params, batch)
    text = compiled.compile(compiler_options=QUICK).as_text()
    assert " while(" in text and COLLECTIVE.search(text)
    assert not unordered(text)
