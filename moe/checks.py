"""Checks that the settings of a config are in their ranges and fit each other."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from moe.config import check_ranges
from moe.errors import UsageError, check_all, raise_all
from moe.models.build import moe_layers
from moe.nn.skip import SKIPS
from moe.tasks import task_of
from moe.train.optimizer import warmup_steps


def check(config: ConfigDict) -> None:
    """Looks for all that is wrong with a config whatever the data and the devices.

    Raises:
      UsageError: values are outside their range, or do not fit each other; it says all that is.
    """
    check_ranges(config)
    task = task_of(config)
    checks = (_check_warmup, task.check, _check_layers, _check_depth, _check_k, _check_batches)
    checks += (_check_mesh, _check_prune)
    check_all(lambda check=check: check(config) for check in checks)


def _check_warmup(config: ConfigDict) -> None:
    warmup_steps(config.optimizer, config.num_steps)


def _check_layers(config: ConfigDict) -> None:
    moe_layers(config.moe.layers, task_of(config).shape(config).depth)


def _check_depth(config: ConfigDict) -> None:
    """Looks whether the blocks that tokens skip are there, and fit the others' settings."""
    depth, task = config.depth, task_of(config)
    blocks = task.shape(config).depth
    if moe_layers(depth.layers, blocks, "depth.layers"):
        raise_all(_depth_misfits(config, blocks))


def _depth_misfits(config: ConfigDict, blocks: int) -> Iterator[str]:
    depth, moe, causal = config.depth, config.moe, task_of(config).causal
    if causal and not SKIPS[depth.router].causal:
        yield (
            f"config.depth.router={depth.router!r} looks ahead in a text: it compares each token "
            "with later ones; threshold does not"
        )
    if causal and depth.eval_bound != 1:
        yield (
            f"config.depth.eval_bound={depth.eval_bound} must be 1 in a causal model: evaluation "
            "drops nothing there"
        )
    if depth.router == "topk" and (depth.bound, depth.eval_bound) != (0, 1):
        yield (
            "config.depth.bound and eval_bound are of sparse and threshold: topk takes exactly its "
            "capacity; leave them at 0 and 1"
        )
    experts = frozenset() if moe.dense else moe_layers(moe.layers, blocks)
    if both := sorted(experts & moe_layers(depth.layers, blocks, "depth.layers")):
        yield (
            f"config.depth.layers={depth.layers!r} has blocks with experts in it "
            f"({', '.join(map(str, both))}): skip others, or say --config.moe.layers=none"
        )


def _check_k(config: ConfigDict) -> None:
    k, experts = config.router[config.router.name].k, config.moe.num_experts
    if k > experts:
        raise UsageError(
            f"config.router.{config.router.name}.k={k} is above moe.num_experts={experts}"
        )


def _check_batches(config: ConfigDict) -> None:
    group = config.moe.group_size
    sizes = (
        ("batch_size", config.batch_size, group * config.optimizer.accumulate),
        ("eval.batch_size", config.eval.batch_size, group),
    )
    raise_all(
        f"config.{key}={size} must be a multiple of {step}: groups of "
        f"moe.group_size={group} examples, times optimizer.accumulate in training"
        for key, size, step in sizes
        if size % step
    )


def _check_mesh(config: ConfigDict) -> None:
    if list(config.mesh.values()).count(-1) > 1:
        raise UsageError("config.mesh has -1 (all that the others leave) twice; expected it once")


def _check_prune(config: ConfigDict) -> None:
    if config.prune.one_shot and config.prune.straight_through:
        raise UsageError(
            "config.prune.one_shot=True prunes nothing while it trains, so that nothing passes "
            "config.prune.straight_through: choose one of them"
        )
