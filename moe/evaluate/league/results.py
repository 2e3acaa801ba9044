"""Reads what a run left in its directory: its last evaluation, its curve, its FLOPs, its layers."""

import dataclasses
import itertools
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence

from ml_collections import ConfigDict

from moe import config as configs
from moe.errors import UsageError
from moe.models.build import moe_layers
from moe.nn.pruning import Pruning
from moe.store import workdir as workdirs
from moe.store.records import read
from moe.tasks import Metric, Task, task_of
from moe.tasks.flops import Flops
from moe.train.pruned import PHASE, judged


@dataclasses.dataclass(frozen=True)
class Result:
    """Holds what a complete run came to.

    Attributes:
      value, loss: the metric and the loss of the last evaluation; of a pruned run those of
        the hardened weights.
      rate: median units a second of training; None where none was timed.
      units: of the task, in a step.
      flops: of training, in all.
      curve: (step, value, FLOPs of training so far) of each evaluation.
      experts: of a token in training, over all steps and layers; None without experts.
      layers: of the last evaluation, for each layer by its block's number.
      kept: share of the matrices' entries that hardening left; None where nothing is pruned.
      nonzero, trained: what training ended with before it was hardened: its share of entries that
        are not 0, and the metric.
    """

    seed: int
    value: float
    loss: float
    rate: float | None
    units: int
    flops: float
    curve: Sequence[Sequence[float]]
    experts: float | None
    layers: Mapping[str, Mapping[str, float]]
    kept: float | None = None
    nonzero: float | None = None
    trained: float | None = None


def find(config: ConfigDict, workdir: pathlib.Path, metric: Metric | None = None) -> Result | None:
    """Returns the result of the run in `workdir`, None where it is not complete; builds nothing.

    Args:
      config: that the run should have; what it leaves to the data counts as equal.
      metric: of `Task.metrics`; None for the task's best.

    Raises:
      UsageError: the run is of another config, its files are damaged, or it has no such metric.
    """
    saved = workdirs.saved_config(workdir)
    if saved is None:
        return None
    workdirs.check_config(_filled(config, saved), workdir)
    rows = read(workdir / "metrics.jsonl")
    last = [row for row in rows if row["step"] == saved.num_steps]
    if not any(row.get(_judged(saved).key) is not None for row in last):
        return None
    if metric and not any(row.get(_judged(saved, metric).key) is not None for row in last):
        raise UsageError(
            f"--metric={metric.name}: the evaluations of {workdir} have none; leave --metric out, "
            "or train these rows anew in another --out"
        )
    return result(saved, rows, metric)


def settings(config: ConfigDict) -> dict[str, object]:
    """Returns the keys of a run that rows should share but for their own."""
    return {
        key: value
        for key, value in configs.used(config).items()
        if not configs.is_free(key) and key != "seed"
    }


def _filled(config: ConfigDict, saved: ConfigDict) -> ConfigDict:
    """Returns the config with the sizes that it leaves to the data, as the saved one has them."""
    known, wanted = configs.flatten(saved), configs.flatten(config)
    sizes = (*task_of(config).sizes, "data.tokenizer", "data.class_counts")
    gaps = {key: known[key] for key in sizes if key in known and not wanted.get(key)}
    filled = ConfigDict(config.to_dict())
    filled.update_from_flattened_dict(gaps)
    return filled.lock()


def result(
    config: ConfigDict, rows: Sequence[Mapping[str, float]], metric: Metric | None = None
) -> Result:
    """Returns the result of a run's records, by the task's best metric or another."""
    task = task_of(config)
    counted, metric = _count(config, task, rows), metric or task.best
    key, rate = _judged(config, metric).key, f"train/{task.unit}s_per_second"
    curve = [
        (row["step"], row[key], _at(counted, row["step"]))
        for row in rows
        if row.get(key) is not None
    ]
    rates = [row[rate] for row in rows if row.get(rate)]
    final = next(row for row in reversed(rows) if row.get(key) is not None)
    return Result(
        seed=config.seed,
        value=final[key],
        loss=final[key.removesuffix(metric.name) + "loss"],
        rate=statistics.median(rates) if rates else None,
        units=config.batch_size * task.units(config),
        flops=counted[-1][1],
        curve=curve,
        experts=_mean_experts(rows, _sparse_layers(config)),
        layers=_layers(final),
        kept=final.get(f"{PHASE}/nonzero_share"),
        nonzero=final.get("eval/nonzero_share"),
        trained=final[metric.key] if config.prune.keep < 1 else None,
    )


def _judged(config: ConfigDict, metric: Metric | None = None) -> Metric:
    return judged(metric or task_of(config).best, Pruning(**config.prune))


def _count(config: ConfigDict, task: Task, rows) -> list[tuple[int, float]]:
    """Returns (step, FLOPs of training up to it) at the lines of the log.

    Slots are computed whether they are full or not. Without slots (dropless) the experts that
    tokens were sent to are, which a router may choose to be more or less than K: the log has them.
    """
    flops = task.flops(config)
    counted = [(0, 0.0)]
    for row in rows:
        step, before = row["step"], counted[-1][0]
        if step > before and "train/skipped" in row:
            one = flops.training(flops.computed - _unused(config, flops, row))
            total = counted[-1][1] + (step - before) * config.batch_size * one
            counted.append((step, total))
    step, total = counted[-1]
    if step < config.num_steps:  # of a run without a log
        one = config.batch_size * flops.training(flops.computed)
        counted.append((config.num_steps, total + (config.num_steps - step) * one))
    return counted


def _unused(config: ConfigDict, flops: Flops, row: Mapping[str, float]) -> float:
    """Returns the FLOPs of an example that a router saved by choosing fewer experts than K; less
    than 0 where it chose more."""
    moe, router = config.moe, config.router[config.router.name]
    layers = _sparse_layers(config)
    chosen = _experts(row, "train", layers)
    if moe.dense or moe.dispatch != "dropless" or not chosen or flops.slots != flops.experts:
        return 0.0
    k = min(router.k, moe.num_experts)
    bound = max(1, moe.dropless_bound) * k  # what is above it finds no room
    return sum(flops.experts / len(layers) * (1 - min(each, bound) / k) for each in chosen)


def _at(counted: Sequence[tuple[int, float]], step: int) -> float:
    """Returns the FLOPs up to a step, along the line between two lines of the log."""
    for (a, low), (b, high) in itertools.pairwise(counted):
        if a <= step <= b:
            return low + (high - low) * (step - a) / (b - a)
    return counted[-1][1]


def _sparse_layers(config: ConfigDict) -> frozenset[int]:
    """Returns the numbers of the blocks with experts: others that report are skipped by tokens."""
    moe = config.moe
    depth = task_of(config).shape(config).depth
    return frozenset() if moe.dense else moe_layers(moe.layers, depth)


def _experts(row: Mapping[str, float], phase: str, layers: Iterable[int]) -> list[float]:
    found = (row.get(f"{phase}/layer_{layer}/experts_per_token") for layer in sorted(layers))
    return [value for value in found if value]


def _mean_experts(rows, layers: Iterable[int]) -> float | None:
    """Returns the experts of a token, the mean over the layers and all steps of training."""
    total, steps, before = 0.0, 0, 0
    for row in rows:
        if chosen := _experts(row, "train", layers):
            total += statistics.fmean(chosen) * (row["step"] - before)
            steps += row["step"] - before
            before = row["step"]
    return total / steps if steps else None


def _layers(row: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Returns the scalars of each layer of experts in an evaluation's row."""
    layers: dict[str, dict[str, float]] = {}
    for key, value in row.items():
        if key.startswith("eval/layer_") and value is not None:
            layer, name = key.removeprefix("eval/layer_").split("/", 1)
            layers.setdefault(layer, {})[name] = value
    return layers
