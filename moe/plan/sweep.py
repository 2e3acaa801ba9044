"""Ranks meshes, and what to compute again in the backward pass: the likeliest are compiled."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from moe.errors import UsageError
from moe.hosts.mesh import AXES
from moe.models.build import moe_layers
from moe.nn.blocks import REMATS
from moe.plan import memory
from moe.plan.planner import Plan, make_plan, with_sizes
from moe.plan.topology import Topology
from moe.tasks import task_of
from moe.train.run import set_up

LARGEST_TENSOR = 8  # its all-reduces carry all activations; more has never been worth it


class Candidate(NamedTuple):
    """Holds a config to compile, and what is guessed of it: bytes and seconds of a chip."""

    config: ConfigDict
    bytes: float
    seconds: float


def sweep(
    config: ConfigDict, topology: Topology, count: int, tell: Callable[[str], None] = print
) -> list[Plan]:
    """Returns plans of the `count` candidates that should fit and be fastest, the best first.

    Those that fit come first, by the step's time if nothing overlaps.

    Raises:
      UsageError: the topology is no TPU, or no candidate can be.
    """
    if topology.chip.kind != "tpu":
        raise UsageError("--sweep must know what fits, which only a TPU's compiler says")
    if count < 1:
        raise UsageError(f"--sweep={count}: expected 1 or more")
    guesses = sorted(
        candidates(with_sizes(config), topology), key=lambda candidate: candidate.seconds
    )
    if not guesses:
        raise UsageError(f"no mesh of {topology.name} suits the config's sizes and batch_size")
    roomy = [candidate for candidate in guesses if candidate.bytes <= topology.chip.hbm]
    chosen = (roomy or sorted(guesses, key=lambda candidate: candidate.bytes))[:count]
    tell(f"{len(guesses)} candidates, {len(roomy)} of which may fit; compiling {len(chosen)}")
    plans = []
    for number, candidate in enumerate(chosen, 1):
        plans.append(make_plan(candidate.config, topology))
        tell(f"{number}/{len(chosen)} {describe(plans[-1])}")
    return sorted(plans, key=rank)


def rank(plan: Plan) -> tuple[bool, float]:
    return not plan.memory.fits, plan.time.slowest if plan.time else plan.memory.total


def describe(plan: Plan) -> str:
    """Returns one line: mesh, remat, and the answer."""
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    verdict = "fits" if plan.memory.fits else "does not fit"
    time = f", {1e3 * plan.time.slowest:.1f} ms" if plan.time else ""
    return f"{mesh} remat={plan.config.model.remat}: {verdict}{time}"


def candidates(config: ConfigDict, topology: Topology) -> Iterator[Candidate]:
    """Yields every mesh that the sizes allow with every policy, its memory and time guessed."""
    chips, kept = len(topology.devices), None
    for mesh in meshes(config, topology):
        placed = changed(config, {f"mesh.{axis}": size for axis, size in mesh.items()})
        try:
            run = set_up(placed, devices=topology.devices)
        except UsageError:  # the batch does not divide so
            continue
        if kept is None:  # of all chips together: the same for every mesh
            kept = {}
            for remat in REMATS:
                other = set_up(changed(placed, {"model.remat": remat}), devices=topology.devices)
                kept[remat] = memory.activations(other) * chips / mesh["tensor"]
        state = run.abstract_state()
        parameters = memory.chip_bytes(state["params"])
        handed = memory.chip_bytes(state) + parameters  # gradients are as big as these
        for remat in REMATS:
            choice = changed(placed, {"model.remat": remat})
            held = kept[remat] * mesh["tensor"] / chips
            spent = guess_seconds(choice, topology, mesh, parameters)
            spent += 2 * held / topology.chip.hbm_bandwidth  # written, and read once
            yield Candidate(choice, handed + held, spent)


def meshes(config: ConfigDict, topology: Topology) -> Iterator[dict[str, int]]:
    """Yields sizes of the four axes that divide what they split."""
    dim, depth, hidden, heads = task_of(config).shape(config)
    chips, moe = len(topology.devices), config.moe
    sparse = bool(moe_layers(moe.layers, depth)) and not moe.dense
    for fsdp, expert, tensor in itertools.product(divisors(chips), repeat=3):
        data, rest = divmod(chips, fsdp * expert * tensor)
        splits = [
            not rest,
            data % topology.slices == 0,
            dim % fsdp == 0,
            moe.num_experts % expert == 0 if sparse else expert == 1,
            math.gcd(heads, hidden, moe.expert_dim or hidden) % tensor == 0,
            tensor <= LARGEST_TENSOR,
        ]
        if data and all(splits):
            yield dict(zip(AXES, (data, fsdp, expert, tensor), strict=True))


def guess_seconds(config, topology: Topology, mesh: dict[str, int], parameters: float) -> float:
    """Guesses a step: products at the peak, and what crosses chips over two links each."""
    task, chip, moe = task_of(config), topology.chip, config.moe
    flops = task.flops(config)
    dim, depth, _, _ = task.shape(config)
    examples = config.batch_size / len(topology.devices)
    scores = flops.slots + flops.attention / 4
    again = {"full": flops.computed, "exchange": flops.computed - flops.slots / 2}
    again["dots_no_batch"] = scores
    products = flops.training(flops.computed) + again.get(config.model.remat, 0.0)

    width = 2 if config.model.dtype == "bfloat16" else 4
    tokens = examples * mesh["tensor"] * task.tokens(config)
    token = dim * width
    k = config.router[config.router.name].k * moe.capacity_factor
    layers = 0 if moe.dense else len(moe_layers(moe.layers, depth))
    share = {axis: (size - 1) / size for axis, size in mesh.items()}
    crossings = 6 if config.model.remat == "full" else 4
    exchanged = crossings * layers * tokens * k * token * share["expert"]
    summed = 8 * depth * tokens * token * share["tensor"]
    gathered = 4 * parameters * mesh["fsdp"] * share["fsdp"]
    reduced = 2 * parameters * share["data"]
    sent = exchanged + summed + gathered + reduced
    return products * examples / chip.flops(config.model.dtype) + sent / (2 * chip.link)


def changed(config: ConfigDict, values: dict) -> ConfigDict:
    """Returns a locked copy with these keys set."""
    copy = ConfigDict(config.to_dict())
    copy.update_from_flattened_dict(values)
    return copy.lock()


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
