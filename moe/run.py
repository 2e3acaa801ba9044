"""What a run is made of: data, model and functions, set up from a config before anything starts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from moe.data import ImageSource, eval_batches, open_split, train_batches
from moe.errors import UsageError
from moe.model import build_model
from moe.optimizer import build_optimizer
from moe.step import State, initial_state, make_eval_step


@dataclasses.dataclass
class Run:
    """The parts of a run. `config` has the sizes that come from the data filled in."""

    config: ConfigDict
    graphdef: Any
    params: Any
    optimizer: optax.GradientTransformation
    mesh: Mesh

    def initial_state(self) -> State:
        state = initial_state(self.config, self.params, self.optimizer)
        return jax.device_put(state, NamedSharding(self.mesh, PartitionSpec()))

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Places this process's part of a batch, split over the devices."""
        split = NamedSharding(self.mesh, PartitionSpec("data"))
        return {k: jax.make_array_from_process_local_data(split, v) for k, v in batch.items()}

    def train_batches(self, source: ImageSource, start_step: int):
        return train_batches(
            source,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start_step=start_step,
            image_size=self.config.data.image_size,
            augment=self.config.data.augment,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def eval_batches(self, source: ImageSource):
        return eval_batches(
            source,
            batch_size=self.config.eval.batch_size,
            image_size=self.config.data.image_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def eval_step(self) -> Callable:
        return jax.jit(make_eval_step(self.config, self.graphdef))


def open_source(config: ConfigDict, split: str) -> ImageSource:
    return open_split(config.data.name, split, config.data.data_dir or None)


def set_up(config: ConfigDict, source: ImageSource) -> Run:
    """Builds the parts of a run over images like those of `source`.

    Raises:
      UsageError: a setting is unknown, out of range, or does not fit the others.
    """
    config = fill_in(config, source)
    devices = jax.devices()
    for key, size, group in (
        ("batch_size", config.batch_size, config.optimizer.accumulate * config.moe.group_size),
        ("eval.batch_size", config.eval.batch_size, config.moe.group_size),
    ):
        step = len(devices) * group
        if size < 1 or size % step:
            raise UsageError(
                f"config.{key}={size} must be a positive multiple of {step}: {len(devices)} devices"
                f" times groups and micro-batches of {group}"
            )
    for key in ("num_steps", "eval.every", "log.every", "checkpoint.every", "checkpoint.keep"):
        section, _, name = key.rpartition(".")
        if (config[section] if section else config)[name] < 1:
            raise UsageError(f"config.{key} must be 1 or more")
    model = build_model(config, nnx.Rngs(config.seed))
    graphdef, params = nnx.split(model, nnx.Param)
    mesh = Mesh(np.array(devices), ("data",))
    return Run(config, graphdef, nnx.to_pure_dict(params), build_optimizer(config), mesh)


def fill_in(config: ConfigDict, source: ImageSource) -> ConfigDict:
    """Returns a copy whose `data` has the image size, channels and classes of the source."""
    height, width, channels = source[0]["image"].shape
    found = {
        "image_size": min(height, width),
        "channels": channels,
        "num_classes": source.num_classes,
    }
    config = ConfigDict(config.to_dict())
    for key, value in found.items():
        asked = config.data[key]
        if asked and asked != value and key != "image_size":
            raise UsageError(
                f"config.data.{key}={asked}, but data set {config.data.name!r} has {value}"
            )
        config.data[key] = asked or value
    return config.lock()
