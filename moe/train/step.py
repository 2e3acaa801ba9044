"""One training step and one evaluation step, as pure functions of a state and a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from moe import seeds
from moe.errors import UsageError
from moe.models.vit import Output

LOSSES = ("softmax", "sigmoid")
CALIBRATION_BINS = 15
State = dict[str, Any]  # step, params, opt_state, and ema where the config asks for it


def example_losses(config: ConfigDict, logits, batch, smoothing: float = 0.0) -> jax.Array:
    """Returns each example's softmax or sigmoid cross-entropy, [B], with mixup's second label."""
    classes = logits.shape[-1]
    targets = jax.nn.one_hot(batch["label"], classes)
    if "mix" in batch:
        weight = batch["mix"][:, None]
        targets = weight * targets + (1 - weight) * jax.nn.one_hot(batch["label_mixed"], classes)
    targets = optax.smooth_labels(targets, smoothing)
    if config.loss == "sigmoid":
        return optax.sigmoid_binary_cross_entropy(logits, targets).sum(-1)
    return optax.softmax_cross_entropy(logits, targets)


def main_label(batch) -> jax.Array:
    """Returns the label of each example, [B]; under mixup the heavier of the two."""
    if "mix" not in batch:
        return batch["label"]
    return jnp.where(batch["mix"] >= 0.5, batch["label"], batch["label_mixed"])


def initial_state(config: ConfigDict, params, optimizer: optax.GradientTransformation) -> State:
    """Returns the state before the first step."""
    step = jnp.zeros((), jnp.int32)
    state = {"step": step, "params": params, "opt_state": optimizer.init(params)}
    if config.optimizer.ema_decay:
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state


def make_gradient(config: ConfigDict, graphdef) -> Callable:
    """Returns a function: params, batch, key -> the gradient of the mean loss, and sums.

    With `optimizer.accumulate` micro-batches the gradient of the examples' losses, and of the
    z-loss, is that of the whole batch. An auxiliary loss of the batch's statistics (load balance,
    importance, load) is not linear in them: it is then the mean of the micro-batches' own losses,
    each over its own tokens. Noise and dropout have a key of their own in each micro-batch.
    """
    parts = config.optimizer.accumulate
    if parts < 1 or config.batch_size % parts:
        raise UsageError(
            f"config.optimizer.accumulate={parts} must divide batch_size={config.batch_size}"
        )

    def split(a):
        """Splits [B, ...] to [parts, B/parts, ...]: whole groups, of every device its share."""
        groups = a.reshape(-1, parts, config.moe.group_size, *a.shape[1:])
        return groups.swapaxes(0, 1).reshape(parts, -1, *a.shape[1:])

    def loss(params, batch, key):
        out: Output = nnx.merge(graphdef, params)(batch["image"], train=True, key=key)
        losses = example_losses(config, out.logits, batch, config.optimizer.label_smoothing)
        correct = (out.logits.argmax(-1) == main_label(batch)).sum().astype(jnp.float32)
        sums = {"loss": losses.sum(), "correct": correct, "aux_loss": out.aux_loss * len(losses)}
        return losses.mean() + out.aux_loss, sums | traffic(out, len(losses))

    def gradient(params, batch, key):
        return jax.grad(loss, has_aux=True)(params, batch, key)

    def gradient_in_parts(params, batch, key):
        """Returns the means over micro-batches, computed one after the other to save memory."""
        batches = jax.tree.map(split, batch)
        keys = jax.random.split(key, parts)

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(params, *part)), None

        first = jax.tree.map(lambda a: a[0], (batches, keys))
        shapes = jax.eval_shape(gradient, params, *first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (grads, sums), _ = jax.lax.scan(add, zeros, (batches, keys))
        return jax.tree.map(lambda g: g / parts, grads), sums

    return gradient if parts == 1 else gradient_in_parts


def finite(tree) -> jax.Array:
    """Returns whether every number of the tree is finite, as one boolean."""
    leaves = [jnp.isfinite(a).all() for a in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all()


def step_key(config: ConfigDict, step) -> jax.Array:
    """Returns the key of all chance within a step: dropout, and the router's noise."""
    return jax.random.fold_in(seeds.key(config.seed, "steps"), step)


def make_train_step(config: ConfigDict, graphdef, optimizer) -> Callable:
    """Returns a function: state, batch, halted=False -> the next state, and sums over the batch.

    All randomness comes from (seed, step). An update that is not finite, and any that is `halted`,
    is refused: the state stays as it was and the sums count a skipped step only. Under
    `nonfinite="skip"` the step number advances all the same, so that the next one has another key.
    """
    compute = make_gradient(config, graphdef)

    def train_step(state: State, batch, halted=False):
        key = step_key(config, state["step"])
        grads, sums = compute(state["params"], batch, key)
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = {"params": params, "opt_state": opt_state}
        # What is kept is checked, not the gradients: finite ones too can lead to an update that is
        # not (moments that overflow, a learning rate of 1e38), or to moments that stop all others.
        good = finite(new) & jnp.isfinite(norm) & jnp.isfinite(sums["loss"]) & ~jnp.asarray(halted)
        if "ema" in state:
            new["ema"] = optax.incremental_update(
                params, state["ema"], 1 - config.optimizer.ema_decay
            )
        # Elementwise, so fused into the update: the old state is read there anyway.
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, {k: state[k] for k in new})
        passed = 1 if config.nonfinite == "skip" else good.astype(jnp.int32)
        sums = sums | {"steps": jnp.ones(()), "grad_norm": norm}
        sums = jax.tree.map(lambda a: jnp.where(good, a, jnp.zeros_like(a)), sums)
        skipped = 1.0 - good.astype(jnp.float32)
        return {"step": state["step"] + passed} | new, sums | {"skipped": skipped}

    return train_step


def make_eval_step(config: ConfigDict, graphdef) -> Callable[[Any, dict], dict]:
    """Returns a function: params, batch -> sums over the real examples of the batch."""

    def eval_step(params, batch):
        mask = batch["mask"]
        out: Output = nnx.merge(graphdef, params)(batch["image"], mask=mask > 0)
        label, logits = batch["label"], out.logits
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
            "loss": (example_losses(config, logits, batch) * mask).sum(),
            "correct": correct.sum(),
            "top5": ((ahead.sum(-1) < 5) * mask).sum(),
            # Not products of matrices, which TPUs round to bfloat16 first.
            "bin_confidence": (probs[:, None] * in_bin).sum(0),
            "bin_correct": (correct[:, None] * in_bin).sum(0),
        } | traffic(out, mask.sum())

    return eval_step


def traffic(out: Output, examples) -> dict:
    """Returns each layer's expert loads, and its share of dropped weight times the examples."""
    return {
        "load": {str(i): report.load_E for i, report in out.reports.items()},
        "dropped": {str(i): report.dropped * examples for i, report in out.reports.items()},
    }
