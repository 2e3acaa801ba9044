"""What a run is made of: data, model and functions, set up from a config before anything starts."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from moe import seeds
from moe.checks import check
from moe.config import flatten
from moe.errors import check_all, raise_all
from moe.hosts import mesh as meshes
from moe.nn import memory as memories
from moe.nn.pruning import Pruning
from moe.tasks import Metric, Task, task_of
from moe.tasks.task import Batch, Source
from moe.train import pruned
from moe.train.compressed import Compressor, Kept, make_compressor
from moe.train.optimizer import build_optimizer, optimizer_shardings
from moe.train.step import (
    State,
    initial_state,
    make_eval_step,
    make_gradient,
    make_train_step,
)


@dataclasses.dataclass
class Run:
    """Holds the parts of a run; no array of the model exists yet.

    `config` has the sizes that come from the data filled in. `params` is the parameters' pure
    dictionary as shapes with shardings, `memory` that of what the routers remember, {} where they
    do not. What the parts need of the config they get from here.
    """

    config: ConfigDict
    graphdef: Any
    params: Any
    memory: memories.Memory
    optimizer: optax.GradientTransformation
    mesh: Mesh

    @property
    def task(self) -> Task:
        """Returns what the run learns."""
        return task_of(self.config)

    @property
    def units(self) -> int:
        """Returns the units of the task that a step takes, over all processes."""
        return self.config.batch_size * self.task.units(self.config)

    @property
    def pruning(self) -> Pruning:
        """Returns which entries of the matrices are kept, and how."""
        return Pruning(**self.config.prune)

    @property
    def best(self) -> Metric:
        """Returns what an evaluation is judged by."""
        return pruned.judged(self.task.best, self.pruning)

    def effective(self, params, step):
        """Returns the parameters that the model computes with at a step, from those of a state."""
        return self.pruning.effective(params, self._progress(step), self.params)

    def hardened(self, params):
        """Returns the parameters of the model that a pruned run ends with, from a state's."""
        return self.pruning.hardened(params, self.params)

    @property
    def gradient(self) -> Callable:
        """Returns (params, batch, key, memory, step) -> (gradient, sums), see `step`; where workers
        keep something of gradients, it is one more argument and one more result."""
        parts, group_size = self.config.optimizer.accumulate, self.config.moe.group_size
        gradient = make_gradient(self._sums, self.graphdef, parts, group_size)
        if self.compressor:
            gradient = self.compressor.gradient(gradient)
        if self.pruning.trains:
            return pruned.through(self.effective, gradient)
        return lambda params, batch, key, memory, step, *kept: gradient(
            params, batch, key, memory, *kept
        )

    @functools.cached_property
    def compressor(self) -> Compressor | None:
        """Returns what sends parts of gradients alone; None where they are summed as they are."""
        section = self.config.optimizer.compress
        return make_compressor(section, self.graphdef, self.params, self.memory)

    @property
    def train_step(self) -> Callable:
        """Returns (state, batch) -> (state, sums), see `step`; to be compiled by `jit`."""
        skip, decay = self.config.nonfinite == "skip", self.config.optimizer.ema_decay
        seed, advance = self.config.seed, self._advance
        return make_train_step(self.gradient, self.optimizer, seed, advance, skip, decay)

    def _advance(self, params, memory, statistics, done):
        progress = self._progress(done)
        return memories.advance(self.graphdef, params, memory, statistics, progress)

    def _progress(self, done):
        """Returns the share of the run's steps that `done` of them are."""
        return jnp.float32(done) / self.config.num_steps

    @property
    def eval_step(self) -> Callable:
        """Returns (variables, batch) -> sums, see `step`; to be compiled by `jit`."""
        return make_eval_step(self._sums, self.graphdef)

    @property
    def _sums(self) -> Callable:
        return functools.partial(self.task.sums, self.config)

    def jit(self, f: Callable, **options) -> Callable:
        """Returns `jax.jit` of f, with the run's mesh in context whenever it traces."""
        compiled = jax.jit(f, **options)

        def call(*args):
            with jax.set_mesh(self.mesh):
                return compiled(*args)

        return call

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def initial_state(self) -> State:
        """Makes the state of step 0 where it belongs: no device holds more than its part."""
        shardings = jax.tree.map(lambda a: a.sharding, self.abstract_state())

        def init():
            rngs = nnx.Rngs(seeds.key(self.config.seed, "parameters"))
            model = self.task.build(self.config, rngs)
            _, params, memory = memories.split(model)
            return self._initial_state(nnx.to_pure_dict(params), nnx.to_pure_dict(memory))

        return self.jit(init, out_shardings=shardings)()

    def abstract_state(self) -> State:
        """Returns the state's shapes and shardings."""
        state = jax.eval_shape(self._initial_state, self.params, self.memory)
        own = jax.tree.map(lambda a: a.sharding, self.params)
        known = {"params": own, "ema": own}
        known["compress"] = jax.tree.map(lambda a: a.sharding, self._kept())
        known["opt_state"] = optimizer_shardings(self.optimizer, state["opt_state"], self.params)

        def place(key: str, tree):
            where = known.get(key) or jax.tree.map(lambda _: self.replicated, tree)
            return jax.tree.map(
                lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, where
            )

        return {key: place(key, tree) for key, tree in state.items()}

    def _initial_state(self, params, memory) -> State:
        average = self.config.optimizer.ema_decay > 0
        state = initial_state(params, memory, self.optimizer, average)
        kept = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self._kept())
        return state | ({"compress": kept} if kept else {})

    def _kept(self) -> Kept:
        return self.compressor.kept() if self.compressor else {}

    @property
    def variables(self):
        """Returns the shapes of all that the model is merged from."""
        return memories.join(self.params, self.memory)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns a training batch's shapes and shardings."""
        return {
            key: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self._examples)
            for key, a in self.task.batch(self.config, self.config.batch_size).items()
        }

    @property
    def _examples(self) -> NamedSharding:
        return NamedSharding(self.mesh, meshes.spec("batch"))

    def rows(self, batch_size: int) -> np.ndarray:
        """Returns the positions in a batch of the examples that this process's devices hold."""
        held = self._examples.addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))

    def put(self, batch: Batch) -> dict[str, jax.Array]:
        """Places this process's rows of a batch on the devices that hold them."""
        shards = self._examples.num_devices // self.mesh.shape["tensor"]

        def place(local: np.ndarray) -> jax.Array:
            size = len(local) * shards // len(self.rows(shards))  # JAX infers no uneven spread
            return jax.make_array_from_process_local_data(
                self._examples, local, (size, *local.shape[1:])
            )

        return {key: place(local) for key, local in batch.items()}

    def train_batches(self, source: Source, start_step: int) -> Iterator[Batch]:
        """Yields this process's rows of the batches from `start_step` on."""
        rows = self.rows(self.config.batch_size)
        return self.task.train_batches(self.config, source, start_step, rows)

    def eval_batches(self, source: Source) -> Iterator[Batch]:
        return self.task.eval_batches(self.config, source, self.rows(self.config.eval.batch_size))


def set_up(
    config: ConfigDict,
    source: Source | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Run:
    """Builds the parts of a run; nothing is computed.

    Args:
      config: of the run.
      source: examples like those it will see; None if the config says what they are like.
      devices: None for all there are; also those of a topology that one can only compile for.

    Raises:
      UsageError: a setting is unknown, out of range, or does not fit the others.
    """
    if source is not None:
        config = task_of(config).resolve(config, source)
    made: list[Mesh] = []

    def fit_devices() -> None:
        made.append(meshes.make_mesh(config.mesh, devices))
        raise_all(_misfits(config, made[0]))

    check_all([lambda: check(config), fit_devices])
    (mesh,) = made
    with jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: task_of(config).build(config, nnx.Rngs(0)))  # shapes alone
    graphdef, state, memory = memories.split(model)
    params = jax.tree.map(
        lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
        nnx.to_pure_dict(state),
        meshes.parameter_shardings(mesh, state),
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    memory = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
        nnx.to_pure_dict(memory),
    )
    optimizer = build_optimizer(config.optimizer, config.num_steps)
    return Run(config, graphdef, params, memory, optimizer, mesh)


def _misfits(config: ConfigDict, mesh: Mesh) -> Iterator[str]:
    """Yields which sizes do not fit the devices, or are not known."""
    shards = mesh.size // mesh.shape["tensor"]
    for key, size, group in (
        ("batch_size", config.batch_size, config.optimizer.accumulate * config.moe.group_size),
        ("eval.batch_size", config.eval.batch_size, config.moe.group_size),
    ):
        step = shards * group
        if size % step:
            yield (
                f"config.{key}={size} must be a multiple of {step}: {shards} devices"
                f" times groups and micro-batches of {group}"
            )
    values = flatten(config)
    compress = config.optimizer.compress
    if compress.keep < 1 and compress.feedback and mesh.shape["data"] == 1:
        yield (
            f"config.optimizer.compress.keep={compress.keep} with feedback needs several shards of "
            "the axis data, which exchange gradients, and mesh.data is 1: more devices there, or "
            "--config.optimizer.compress.keep=1"
        )
    missing = [f"config.{key}" for key in task_of(config).sizes if values[key] < 1]
    if missing:
        yield f"{', '.join(missing)} must be set where no data is read"
    sparse = config.moe.layers not in ("none", "") and not config.moe.dense
    if sparse and config.moe.num_experts % mesh.shape["expert"]:
        yield (
            f"config.mesh.expert={mesh.shape['expert']} must divide "
            f"moe.num_experts={config.moe.num_experts}"
        )
