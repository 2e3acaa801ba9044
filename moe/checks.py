"""Checks that the settings of a config are in their ranges and fit each other."""

from ml_collections import ConfigDict

from moe.config import check_ranges
from moe.data import Augment
from moe.errors import UsageError
from moe.models.build import model_sizes, moe_layers
from moe.train.optimizer import warmup_steps


def check(config: ConfigDict) -> None:
    """Looks for all that is wrong with a config whatever the data and the devices.

    Raises:
      UsageError: a value is outside its range, or values do not fit each other.
    """
    check_ranges(config)
    Augment.from_mapping(config.data.augment)
    warmup_steps(config)
    _check_model(config)
    k, experts = config.router[config.router.name].k, config.moe.num_experts
    if k > experts:
        raise UsageError(
            f"config.router.{config.router.name}.k={k} is above moe.num_experts={experts}"
        )
    group = config.moe.group_size
    for key, size, step in (
        ("batch_size", config.batch_size, group * config.optimizer.accumulate),
        ("eval.batch_size", config.eval.batch_size, group),
    ):
        if size % step:
            raise UsageError(
                f"config.{key}={size} must be a multiple of {step}: groups of "
                f"moe.group_size={group} examples, times optimizer.accumulate in training"
            )
    if list(config.mesh.values()).count(-1) > 1:
        raise UsageError("config.mesh has -1 (all that the others leave) twice; expected it once")


def _check_model(config: ConfigDict) -> None:
    model, size = config.model, config.data.image_size
    width, depth, _, heads = model_sizes(config)
    moe_layers(config.moe.layers, depth)
    if width % heads:
        raise UsageError(f"config.model.num_heads={heads} does not divide the width {width}")
    if model.position == "sincos" and width % 4:
        raise UsageError(f"config.model.position='sincos' needs a width of 4 N, not {width}")
    if not size:
        return  # the data set will say it
    if size % model.patch_size:
        raise UsageError(
            f"config.model.patch_size={model.patch_size} does not divide the image size {size}"
        )
    for key in ("crop", "cutout"):
        pixels = config.data.augment[key]
        if pixels > size:
            raise UsageError(f"config.data.augment.{key}={pixels} is above the image size {size}")
