"""Plans one config on one topology."""

import dataclasses
import math
import sys
from typing import Any

import jax
from ml_collections import ConfigDict

from moe.config import flatten
from moe.errors import UsageError
from moe.models.build import count_parameters
from moe.plan import hlo, links, memory
from moe.plan.collectives import Collective, expert_weights_moved, find, table
from moe.plan.compiled import Compiled, compile_step
from moe.plan.compression import Compression, measure
from moe.plan.memory import Memory
from moe.plan.roofline import Roofline, roofline
from moe.plan.topology import Topology, coordinates
from moe.plan.work import Work, read_work
from moe.tasks import task_of
from moe.tasks.flops import Flops
from moe.train.run import Run, set_up


@dataclasses.dataclass
class Plan:
    """Holds what is known of a training step of a config on a topology.

    `work` and `collectives` are empty, and `time` None, where the step did not fit; `unknown` says
    in sentences what the other fields leave out; `compression` is None where gradients are sent
    whole.
    """

    config: ConfigDict
    topology: Topology
    mesh: dict[str, int]
    parameters: int
    active: int
    flops: Flops
    memory: Memory
    program: Compiled
    work: list[Work]
    collectives: list[Collective]
    moved_experts: list[Collective]
    unknown_loops: list[str]
    time: Roofline | None
    unknown: list[str]
    compression: Compression | None = None

    @property
    def chips(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def model_flops(self) -> float:
        """Returns the FLOPs that the model asks of one chip in one step."""
        examples = self.config.batch_size / self.chips
        return self.flops.training(self.flops.model) * examples

    @property
    def unit(self) -> str:
        """Returns what is counted: "image", "token"."""
        return task_of(self.config).unit

    @property
    def units(self) -> int:
        """Returns how many of them one example has."""
        return task_of(self.config).units(self.config)


def make_plan(config: ConfigDict, topology: Topology) -> Plan:
    """Sets up the run, compiles its step and reads the program.

    Raises:
      UsageError: the config does not fit itself or the topology.
    """
    run = set_up(with_sizes(config), devices=topology.devices)
    tpu = topology.chip.kind == "tpu"
    # For others the CPU's compiler stands in: its code is not run, so none of it need be fast.
    program = compile_step(run, None if tpu else {"xla_backend_optimization_level": 0})
    module = hlo.parse(program.text)
    runs = hlo.executions(module)
    mesh = dict(run.mesh.shape)
    collectives = find(module, runs, mesh, topology.slices) if module.entry else []
    collectives = [each._replace(network=_network(each, topology)) for each in collectives]
    plan = Plan(
        config=run.config,
        topology=topology,
        mesh=mesh,
        parameters=count_parameters(run.params),
        active=count_parameters(run.params, _active_share(run.config)),
        flops=run.task.flops(run.config),
        memory=memory.measure(run, program, topology.chip),
        program=program,
        work=read_work(module, runs) if module.entry else [],
        collectives=collectives,
        moved_experts=expert_weights_moved(collectives, expert_kernels(run), mesh),
        unknown_loops=runs.unknown_loops,
        time=None,
        unknown=_unknown(topology, run),
        compression=run.compressor and measure(run.compressor, run.config.model.dtype),
    )
    plan.time = _time(plan, run) if module.entry else None
    return plan


def with_sizes(config: ConfigDict) -> ConfigDict:
    """Returns the config with the sizes that it leaves to the data, where that is at hand."""
    task, values = task_of(config), flatten(config)
    missing = [f"--config.{key}" for key in task.sizes if not values[key]]
    if not missing:
        return config
    try:
        return task.resolve(config, task.open(config, config.data.train_split))
    except UsageError as error:
        raise UsageError(
            f"data set {config.data.name!r} is not at hand: say what it is like by "
            f"{' '.join(f'{key}=N' for key in missing)} ({error})"
        ) from error


def expert_kernels(run: Run) -> set[tuple[int, int, int]]:
    """Returns (E, D, F) of the layers of experts."""
    return {
        leaf.shape[-3:]
        for path, leaf in jax.tree_util.tree_leaves_with_path(run.params)
        if jax.tree_util.keystr(path).endswith("['experts']['kernel_wide']")
    }


def _active_share(config: ConfigDict) -> float:
    k = config.router[config.router.name].k
    sparse = config.moe.layers not in ("none", "") and not config.moe.dense
    return min(1.0, k / config.moe.num_experts) if sparse else 1.0


def _network(collective: Collective, topology: Topology) -> str:
    """Returns "network" where a group's GPUs are on several hosts, else what it was."""
    if topology.chip.kind != "gpu":
        return collective.network
    hosts = collective.members // topology.shape[-1]
    return "network" if (hosts != hosts[:, :1]).any() else "links"


def _time(plan: Plan, run: Run) -> Roofline | None:
    chip = plan.topology.chip
    if chip.kind == "cpu":
        return None
    places = coordinates(plan.topology, list(run.mesh.devices.flat))
    spent = {"links": 0.0, "network": 0.0}
    for collective in plan.collectives:
        spent[collective.network] += links.seconds(collective, chip, places)
    return roofline(
        chip,
        plan.work,
        spent["links"],
        spent["network"],
        dtype=run.config.model.dtype,
        model_flops=plan.model_flops,
        units=run.units,
    )


def _unknown(topology: Topology, run: Run) -> list[str]:
    kind = topology.chip.kind
    if kind == "tpu":
        return []
    said = [
        "compiled for CPU devices: parameters, FLOPs, the state's memory and the kinds of"
        " collectives hold",
        "not known: temporary memory, and so whether it fits",
    ]
    if kind == "gpu":
        said.append("not known: main memory's traffic, and so how much longer a step may be")
    else:
        said.append("not known: times; nothing is assumed of a CPU")
    if run.config.model.dtype == "bfloat16":
        said.append("a CPU computes bfloat16 in float32: what it exchanges is up to twice a GPU's")
    return said


def to_json(plan: Plan) -> dict[str, Any]:
    """Returns all numbers of a plan, for other programs."""
    program = plan.program._asdict()
    del program["text"]
    total = plan.memory.total  # infinite where the compiler said no number; JSON has no word for it
    total = None if total == math.inf else total
    time = plan.time and plan.time._asdict() | {"bound": plan.time.bound}
    compression = plan.compression
    if compression:
        compression = compression._asdict() | {"saves": compression.saves}
    return {
        "topology": plan.topology.name,
        "chip": dataclasses.asdict(plan.topology.chip),
        "chips": plan.chips,
        "mesh": plan.mesh,
        "batch_size": plan.config.batch_size,
        "remat": plan.config.model.remat,
        "jax": jax.__version__,
        "python": sys.version.split()[0],
        "parameters": {"total": plan.parameters, "active": plan.active},
        f"flops_per_{plan.unit}": {
            name: value / plan.units
            for name, value in (
                plan.flops._asdict()
                | {"model": plan.flops.model, "training": plan.flops.training(plan.flops.model)}
            ).items()
        },
        "flops_per_chip": {
            "model": plan.model_flops,
            "program": sum(work.count * work.flops for work in plan.work),
            "program_loops_once": sum(work.flops for work in plan.work),
            "xla_loops_once": plan.program.xla_flops,
        },
        "bytes_per_chip": {
            "program": sum(work.count * work.bytes for work in plan.work),
            "program_loops_once": sum(work.bytes for work in plan.work),
            "xla_loops_once": plan.program.xla_bytes,
        },
        "memory": plan.memory._asdict() | {"total": total, "fits": plan.memory.fits},
        "collectives": [row._asdict() for row in table(plan.collectives)],
        "compression": compression,
        "expert_weights_moved": [f"{moved.kind} {moved.name}" for moved in plan.moved_experts],
        "unknown_loops": plan.unknown_loops,
        "program": program,
        "time": time,
        "unknown": plan.unknown,
    }
