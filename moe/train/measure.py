"""Measures a model: what the log and an evaluation say, from the sums of `moe.train.step`."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from moe.hosts.distributed import AgreedError
from moe.tasks import Task

DEAD = 0.01  # an expert with less than this part of its fair share is dead


def evaluate(eval_step: Callable, params: Any, batches: Iterable, put: Callable) -> dict[str, Any]:
    """Adds up `eval_step` over all batches (numpy), with "seconds" and "timed" weight after
    the first batch, which may have compiled; `put` places a batch on the devices.

    Raises:
      UsageError: on every process, the model's outputs are not finite.
    """
    total, start, before = None, 0.0, 0.0
    for batch in batches:
        sums = jax.device_get(eval_step(params, put(batch)))
        if total is None:
            total, start, before = sums, time.perf_counter(), sums["weight"]
        else:
            total = jax.tree.map(np.add, total, sums)
    if not np.isfinite(total["loss"]):  # so is the loss of any example with such an output
        raise AgreedError(
            f"the loss of the evaluation is {total['loss']}: the parameters, or what they compute, "
            "are not finite; use an earlier checkpoint, or train again with a smaller learning rate"
        )
    total["seconds"] = time.perf_counter() - start
    total["timed"] = total["weight"] - before
    return total


def routing_table(total: dict[str, Any]) -> dict[int, dict[str, float]]:
    """Returns, for each layer of experts, how evenly it used them and what it dropped; a block that
    tokens may skip counts as one expert.

    load_entropy: entropy of the experts' loads over log E, 1 when all are equal; largest_share: the
    busiest expert's part of all tokens; max_over_mean_load: that in fair shares; dead_experts:
    experts with under 1 % of a fair share; drop_rate: part of the routing weight that found no
    slot; experts_per_token: the mean number that a token was sent to; margin: the mean of the
    K-th score less the next, where the router has one; budget: what the layer has of the budget
    that all share, experts per token, where they do.
    """
    table = {}
    for layer, load in sorted(total["load"].items(), key=lambda item: int(item[0])):
        share = np.asarray(load, np.float64) / max(float(np.sum(load)), 1e-30)
        logs = np.log(np.where(share > 0, share, 1))
        tokens = max(float(total["tokens"][layer]), 1e-30)
        row = {
            "load_entropy": abs(float((share * logs).sum() / np.log(max(len(share), 2)))),
            "largest_share": float(share.max()),
            "max_over_mean_load": float(share.max() * len(share)),
            "dead_experts": int((share < DEAD / len(share)).sum()),
            "drop_rate": float(total["dropped"][layer] / max(total["routed"][layer], 1e-30)),
            "experts_per_token": float(total["chosen"][layer]) / tokens,
        }
        for name, field in (("margin", "margin"), ("budget", "share")):
            if layer in total.get(field, {}):
                row[name] = float(total[field][layer]) / tokens
        table[int(layer)] = row
    return table


def training_scalars(task: Task, totals: dict[str, Any]) -> dict[str, float]:
    """Returns the log's row from the sums of some training steps (numpy).

    It has the count of the skipped steps; where all were skipped it has nothing else.
    """
    skipped = {"train/skipped": float(totals["skipped"])}
    if not totals["steps"] or not totals["weight"]:
        return skipped
    row = task.scalars(totals) | {
        "aux_loss": float(totals["aux_loss"] / totals["weight"]),
        "grad_norm": float(totals["grad_norm"] / totals["steps"]),
    }
    if "nonzero_share" in totals:  # of a pruned run
        row["nonzero_share"] = float(totals["nonzero_share"] / totals["steps"])
    return named("train", row) | skipped | layer_scalars(totals, "train")


def evaluation_scalars(
    task: Task, total: dict[str, Any], own: dict[str, float]
) -> dict[str, float]:
    """Returns the log's row from the sums of an evaluation, and from scalars of its `own`."""
    return named("eval", task.scalars(total) | own) | layer_scalars(total, "eval")


def layer_scalars(totals: dict[str, Any], phase: str) -> dict[str, float]:
    """Returns `routing_table` as scalars with names."""
    table = routing_table(totals)
    return {f"{phase}/layer_{i}/{k}": v for i, row in table.items() for k, v in row.items()}


def named(phase: str, row: dict[str, float]) -> dict[str, float]:
    """Returns scalars by their names in the records."""
    return {f"{phase}/{name}": value for name, value in row.items()}
