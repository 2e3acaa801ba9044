"""Measures a model: what an evaluation says, from the sums that `moe.train.step` collects."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from moe.hosts.distributed import AgreedError

DEAD = 0.01  # an expert with less than this part of its fair share is dead


def evaluate(eval_step: Callable, params: Any, batches: Iterable, put: Callable) -> dict[str, Any]:
    """Adds up `eval_step` over all batches (numpy), with "seconds" and "timed_examples" after the
    first batch, which may have compiled; `put` places a batch on the devices.

    Raises:
      UsageError: on every process, the model's outputs are not finite.
    """
    total, start, before = None, 0.0, 0.0
    for batch in batches:
        sums = jax.device_get(eval_step(params, put(batch)))
        if total is None:
            total, start, before = sums, time.perf_counter(), sums["examples"]
        else:
            total = jax.tree.map(np.add, total, sums)
    if not np.isfinite(total["loss"]):  # so is the loss of any example with such an output
        raise AgreedError(
            f"the loss of the evaluation is {total['loss']}: the parameters, or what they compute, "
            "are not finite; use an earlier checkpoint, or train again with a smaller learning rate"
        )
    total["seconds"] = time.perf_counter() - start
    total["timed_examples"] = total["examples"] - before
    return total


def scalars(total: dict[str, Any]) -> dict[str, float]:
    """Returns accuracy, top-5 accuracy, mean loss and expected calibration error.

    Calibration error (Guo et al. 2017): the mean distance between confidence and accuracy
    over equal bins of confidence.
    """
    n = float(total["examples"])
    gaps = np.abs(total["bin_confidence"] - total["bin_correct"])
    values = {
        "accuracy": total["correct"] / n,
        "top5_accuracy": total["top5"] / n,
        "loss": total["loss"] / n,
        "calibration_error": gaps.sum() / n,
    }
    return {name: float(value) for name, value in values.items()}


def routing_table(total: dict[str, Any], examples: float) -> dict[int, dict[str, float]]:
    """Returns, for each layer of experts, how evenly it used them and what it dropped.

    load_entropy: entropy of the experts' loads over log E, 1 when all are equal; largest_share: the
    busiest expert's part of all tokens; dead_experts: experts with under 1 % of a fair share;
    drop_rate: part of the routing weight that found no slot.
    """
    table = {}
    for layer, load in sorted(total["load"].items(), key=lambda item: int(item[0])):
        share = np.asarray(load, np.float64) / max(float(np.sum(load)), 1e-30)
        logs = np.log(np.where(share > 0, share, 1))
        table[int(layer)] = {
            "load_entropy": float(-(share * logs).sum() / np.log(max(len(share), 2))),
            "largest_share": float(share.max()),
            "dead_experts": int((share < DEAD / len(share)).sum()),
            "drop_rate": float(total["dropped"][layer] / examples),
        }
    return table


def training_scalars(totals: dict[str, Any], batch_size: int) -> dict[str, float]:
    """Returns the log's row from the sums of some training steps (numpy).

    It has the count of the skipped steps; where all were skipped it has nothing else.
    """
    examples = float(totals["steps"]) * batch_size
    skipped = {"train/skipped": float(totals["skipped"])}
    if not examples:
        return skipped
    row = {
        "train/loss": totals["loss"] / examples,
        "train/accuracy": totals["correct"] / examples,
        "train/aux_loss": totals["aux_loss"] / examples,
        "train/grad_norm": totals["grad_norm"] / totals["steps"],
    }
    row = {k: float(v) for k, v in row.items()} | skipped
    return row | layer_scalars(totals, examples, "train")


def layer_scalars(totals: dict[str, Any], examples: float, phase: str) -> dict[str, float]:
    """Returns `routing_table` as scalars with names."""
    table = routing_table(totals, examples)
    return {f"{phase}/layer_{i}/{k}": v for i, row in table.items() for k, v in row.items()}
