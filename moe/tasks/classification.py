"""Measures a classifier: its losses, and how often and how surely it is right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe.tasks.task import Sums

LOSSES = ("softmax", "sigmoid")
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


def main_label(batch) -> jax.Array:
    """Returns the label of each example, [B]; under mixup the heavier of the two."""
    if "mix" not in batch:
        return batch["label"]
    return jnp.where(batch["mix"] >= 0.5, batch["label"], batch["label_mixed"])


def sums(logits, label, losses, mask) -> Sums:
    """Returns the sums over the real images of a batch, those where `mask` is 1."""
    correct = (logits.argmax(-1) == label) * mask
    own = jnp.take_along_axis(logits, label[:, None], 1)
    # Ties go to the lower class, as argmax has it.
    earlier = jnp.arange(logits.shape[-1])[None, :] < label[:, None]
    ahead = (logits > own) | ((logits == own) & earlier)
    probs = jax.nn.softmax(logits).max(-1)
    bins = jnp.clip((probs * CALIBRATION_BINS).astype(int), 0, CALIBRATION_BINS - 1)
    in_bin = jax.nn.one_hot(bins, CALIBRATION_BINS) * mask[:, None]
    return {
        "examples": mask.sum(),
        "weight": mask.sum(),
        "loss": (losses * mask).sum(),
        "correct": correct.sum(),
        "top5": ((ahead.sum(-1) < 5) * mask).sum(),
        # Not products of matrices, which TPUs round to bfloat16 first.
        "bin_confidence": (probs[:, None] * in_bin).sum(0),
        "bin_correct": (correct[:, None] * in_bin).sum(0),
    }


def scalars(totals: Sums) -> dict[str, float]:
    """Returns loss and accuracy, of an evaluation also top-5 accuracy and calibration error.

    Calibration error (Guo et al. 2017) is expected: the mean distance between confidence and
    accuracy over equal bins of confidence.
    """
    n = float(totals["weight"])
    values = {"loss": totals["loss"] / n, "accuracy": totals["correct"] / n}
    if "top5" in totals:
        gaps = np.abs(totals["bin_confidence"] - totals["bin_correct"])
        values = {"accuracy": values["accuracy"], "top5_accuracy": totals["top5"] / n} | values
        values["calibration_error"] = gaps.sum() / n
    return {name: float(value) for name, value in values.items()}
