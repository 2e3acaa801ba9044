"""Measures a classifier: its losses, and how often and how surely it is right."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe.tasks import topk
from moe.tasks.task import Metric, Sums

LOSSES = ("softmax", "sigmoid", *topk.LOSSES)
CALIBRATION_BINS = 15


def losses(loss: str, logits, batch, smoothing: float = 0.0) -> jax.Array:
    """Returns each example's softmax or sigmoid cross-entropy, [B], with mixup's second label."""
    classes = logits.shape[-1]
    targets = jax.nn.one_hot(batch["label"], classes)
    if "mix" in batch:
        weight = batch["mix"][:, None]
        targets = weight * targets + (1 - weight) * jax.nn.one_hot(batch["label_mixed"], classes)
    targets = optax.smooth_labels(targets, smoothing)
    if loss == "sigmoid":
        return optax.sigmoid_binary_cross_entropy(logits, targets).sum(-1)
    return optax.softmax_cross_entropy(logits, targets)


def losses_of_labels(of_label: Callable, batch) -> jax.Array:
    """Returns each example's loss, [B], of a loss that knows one label; mixup's mean of two."""
    if "mix" not in batch:
        return of_label(batch["label"])
    mix = batch["mix"]
    return mix * of_label(batch["label"]) + (1 - mix) * of_label(batch["label_mixed"])


def main_label(batch) -> jax.Array:
    """Returns the label of each example, [B]; under mixup the heavier of the two."""
    if "mix" not in batch:
        return batch["label"]
    return jnp.where(batch["mix"] >= 0.5, batch["label"], batch["label_mixed"])


def sums(logits, label, losses, mask, k: int = 5) -> Sums:
    """Returns the sums over the real images of a batch, those where `mask` is 1.

    Beside top-5 accuracy there is that of k, and of each class by itself.
    """
    correct = (logits.argmax(-1) == label) * mask
    own = jnp.take_along_axis(logits, label[:, None], 1)
    # Ties go to the lower class, as argmax has it.
    earlier = jnp.arange(logits.shape[-1])[None, :] < label[:, None]
    ahead = (logits > own) | ((logits == own) & earlier)
    ahead = ahead.sum(-1)
    classes = jax.nn.one_hot(label, logits.shape[-1]) * mask[:, None]
    probs = jax.nn.softmax(logits).max(-1)
    bins = jnp.clip((probs * CALIBRATION_BINS).astype(int), 0, CALIBRATION_BINS - 1)
    in_bin = jax.nn.one_hot(bins, CALIBRATION_BINS) * mask[:, None]
    return {
        "examples": mask.sum(),
        "weight": mask.sum(),
        "loss": (losses * mask).sum(),
        "correct": correct.sum(),
        **{f"top{n}": ((ahead < n) * mask).sum() for n in {5, k}},
        "class_examples": classes.sum(0),
        "class_correct": (classes * correct[:, None]).sum(0),
        f"class_top{k}": (classes * (ahead < k)[:, None]).sum(0),
        # Not products of matrices, which TPUs round to bfloat16 first.
        "bin_confidence": (probs[:, None] * in_bin).sum(0),
        "bin_correct": (correct[:, None] * in_bin).sum(0),
    }


def metrics(k: int) -> tuple[Metric, ...]:
    """Returns the scalars of every evaluation beside loss and accuracy."""
    tops = [f"top{n}_accuracy" for n in sorted({5, k})]
    names = [*tops, "macro_accuracy", f"macro_top{k}_accuracy"]
    found = [Metric(name, higher=True, form=".2%") for name in names]
    return (*found, Metric("calibration_error", higher=False, form=".4f"))


def scalars(totals: Sums) -> dict[str, float]:
    """Returns loss and accuracy, of an evaluation also top-k accuracies and calibration error.

    A macro accuracy is the mean over the classes that have examples: a rare one counts as much.
    Calibration error (Guo et al. 2017) is expected: the mean distance between confidence and
    accuracy over equal bins of confidence.
    """
    n = float(totals["weight"])
    values = {"loss": totals["loss"] / n, "accuracy": totals["correct"] / n}
    if "top5" in totals:
        gaps = np.abs(totals["bin_confidence"] - totals["bin_correct"])
        tops = [name for name in totals if re.fullmatch(r"top\d+", name)]
        tops = {f"{name}_accuracy": totals[name] / n for name in sorted(tops)}
        values = {"accuracy": values["accuracy"]} | tops | values
        values["calibration_error"] = gaps.sum() / n
        there = totals.get("class_examples", np.zeros(1)) > 0
        for name in totals:
            if name.startswith("class_") and name != "class_examples" and there.any():
                mean = (totals[name][there] / totals["class_examples"][there]).mean()
                part = name.removeprefix("class_").removeprefix("correct")
                values[f"macro_{part}_accuracy" if part else "macro_accuracy"] = mean
    return {name: float(value) for name, value in values.items()}
