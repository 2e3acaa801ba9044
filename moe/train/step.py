"""One training step and one evaluation step, as pure functions of a state and a batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe import seeds
from moe.nn.memory import Memory, join, statistics
from moe.tasks.task import Reports

# step, params, opt_state, and ema where an average is kept, routers where these remember something,
# compress where workers keep what they have not sent.
State = dict[str, Any]
NOTHING: Memory = {}  # what routers without a memory remember


def initial_state(
    params, memory: Memory, optimizer: optax.GradientTransformation, average: bool
) -> State:
    """Returns the state before the first step, with an `average` of the parameters or without."""
    step = jnp.zeros((), jnp.int32)
    state = {"step": step, "params": params, "opt_state": optimizer.init(params)}
    if average:
        state["ema"] = jax.tree.map(jnp.copy, params)
    if memory:
        state["routers"] = memory
    return state


def make_gradient(task_sums: Callable, graphdef, parts: int = 1, group_size: int = 1) -> Callable:
    """Returns a function: params, batch, key, memory -> the gradient of the mean loss, and sums.

    `memory` is what the routers remember, {} where they do not; "statistics" among the sums are
    what they learn from.

    The loss is sum("loss") / sum("weight") of the task over the whole global batch, also of
    micro-batches of unequal weight; so is a task's "penalty". An auxiliary loss of the batch's
    statistics (load balance, importance, load) is not linear in them: it is then the mean of the
    micro-batches' own losses, each over its own tokens and by its own weight. Noise and dropout
    have a key of their own in each micro-batch.

    Args:
      task_sums: the task's `sums` of a model and a batch.
      parts: micro-batches, `optimizer.accumulate`.
      group_size: examples that are routed together: a micro-batch has whole groups.
    """

    def split(a):
        """Splits [B, ...] to [parts, B/parts, ...]: whole groups, of every device its share."""
        groups = a.reshape(-1, parts, group_size, *a.shape[1:])
        return groups.swapaxes(0, 1).reshape(parts, -1, *a.shape[1:])

    def losses(params, batch, key, memory):
        """Returns the loss summed over the batch, the auxiliary loss of the batch, and all sums."""
        model = nnx.merge(graphdef, join(params, memory))
        sums, reports = task_sums(model, batch, train=True, key=key)
        aux_loss = sum((report.aux_loss for report in reports.values()), jnp.zeros(()))
        sums = sums | {"aux_loss": aux_loss * sums["weight"]} | traffic(reports)
        sums["statistics"] = statistics(reports)
        return sums["loss"] + sums.get("penalty", 0.0), aux_loss, sums

    @functools.partial(jax.grad, has_aux=True)
    def gradient(params, batch, key, memory=NOTHING):
        loss, aux_loss, sums = losses(params, batch, key, memory)
        return loss / _or_one(sums["weight"]) + aux_loss, sums

    @functools.partial(jax.grad, has_aux=True)
    def summed_gradient(params, batch, key, memory):
        loss, aux_loss, sums = losses(params, batch, key, memory)
        return loss + aux_loss * sums["weight"], sums

    def gradient_in_parts(params, batch, key, memory=NOTHING):
        """Adds up micro-batches, computed one after the other to save memory; divides once."""
        batches = jax.tree.map(split, batch)
        keys = jax.random.split(key, parts)

        def add(total, part):
            return jax.tree.map(jnp.add, total, summed_gradient(params, *part, memory)), None

        first = jax.tree.map(lambda a: a[0], (batches, keys))
        shapes = jax.eval_shape(summed_gradient, params, *first, memory)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (grads, sums), _ = jax.lax.scan(add, zeros, (batches, keys))
        return jax.tree.map(lambda g: g / _or_one(sums["weight"]).astype(g.dtype), grads), sums

    return gradient if parts == 1 else gradient_in_parts


def _or_one(weight):
    """Returns the weight, 1 where it is 0: a batch of padding has the loss 0."""
    return jnp.where(weight > 0, weight, 1.0)


def finite(tree) -> jax.Array:
    """Returns whether every number of the tree is finite, as one boolean.

    Arrays of one kind, a parameter of each block and its moments, are looked at together: they have
    one shape and lie alike. A reduction for each array makes a step three times as long to compile.
    """
    kinds: dict[tuple, list[jax.Array]] = {}
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        kind = (*(name for name in names[1:] if not name.isdigit()), array.shape)
        kinds.setdefault(kind, []).append(jnp.isfinite(array))
    return jnp.stack(
        [functools.reduce(jnp.logical_and, kind).all() for kind in kinds.values()]
    ).all()


def root_key(seed: int) -> jax.Array:
    """Returns the key that those of all steps derive from."""
    return seeds.key(seed, "steps")


def step_key(root: jax.Array, step) -> jax.Array:
    """Returns the key of all chance within a step: dropout, and the router's noise."""
    return jax.random.fold_in(root, step)


def make_train_step(
    gradient: Callable,
    optimizer: optax.GradientTransformation,
    seed: int,
    advance: Callable,
    skip: bool = False,
    ema_decay: float = 0.0,
) -> Callable:
    """Returns a function: state, batch, halted, root -> the next state, and sums over the batch.

    All randomness comes from the root key, by default that of the seed, and the step. With it as
    an argument the program is the same for all seeds, and a cache of compiled programs has it once.
    An update that is not finite, and any that is `halted`, is refused: the state stays as it was
    and the sums count a skipped step only. Under `skip` the step number advances all the same, so
    that the next one has another key.

    Args:
      gradient: as `make_gradient` returns it, but for the number of the step, a last argument; of a
        state with "compress", as of a `moe.train.compressed.Compressor`, with that after the step.
      advance: (params, memory, statistics, steps that are then done) -> the routers' new memory.
      ema_decay: of the average of the parameters, in states that have one.
    """

    def train_step(state: State, batch, halted=False, root=None):
        root = root_key(seed) if root is None else root
        memory, key = state.get("routers", NOTHING), step_key(root, state["step"])
        kept = [state["compress"]] if "compress" in state else []
        arguments = state["params"], batch, key, memory, state["step"], *kept
        grads, sums, *kept = gradient(*arguments)
        seen = sums.pop("statistics", NOTHING)
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = {"params": params, "opt_state": opt_state}
        if kept:
            (new["compress"],) = kept
        if memory:
            new["routers"] = advance(state["params"], memory, seen, state["step"] + 1)
        # What is kept is checked, not the gradients: finite ones too can lead to an update that is
        # not (moments that overflow, a learning rate of 1e38), or to moments that stop all others.
        good = finite(new) & jnp.isfinite(norm) & jnp.isfinite(sums["loss"]) & ~jnp.asarray(halted)
        if "ema" in state:
            new["ema"] = optax.incremental_update(params, state["ema"], 1 - ema_decay)
        # Elementwise, so fused into the update: the old state is read there anyway.
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, {k: state[k] for k in new})
        passed = 1 if skip else good.astype(jnp.int32)
        sums = sums | {"steps": jnp.ones(()), "grad_norm": norm}
        sums = jax.tree.map(lambda a: jnp.where(good, a, jnp.zeros_like(a)), sums)
        skipped = 1.0 - good.astype(jnp.float32)
        return {"step": state["step"] + passed} | new, sums | {"skipped": skipped}

    return train_step


def make_eval_step(task_sums: Callable, graphdef) -> Callable[[Any, dict], dict]:
    """Returns a function: variables, batch -> sums over the real examples of the batch.

    The variables are the parameters, joined with what the routers remember.
    """

    def eval_step(variables, batch):
        sums, reports = task_sums(nnx.merge(graphdef, variables), batch, train=False)
        return sums | traffic(reports)

    return eval_step


def traffic(reports: Reports) -> dict:
    """Returns sums of the layers' reports over tokens, "dropped" of the "routed" weight."""
    routed = {str(i): jnp.float32(report.weights_BTE.sum()) for i, report in reports.items()}

    def where_any(field: str) -> dict:
        values = {str(i): getattr(report, field) for i, report in reports.items()}
        return {number: value for number, value in values.items() if value is not None}

    return {
        "load": {str(i): report.load_E for i, report in reports.items()},
        "routed": routed,
        "dropped": {str(i): report.dropped * routed[str(i)] for i, report in reports.items()},
        "tokens": {str(i): report.tokens for i, report in reports.items()},
        "chosen": {str(i): report.chosen for i, report in reports.items()},
        "margin": where_any("margin"),
        "share": where_any("share"),
    }
