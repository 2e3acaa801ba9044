"""The optax chain and the learning-rate schedule of a config."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from moe.errors import UsageError

SCHEDULES = ("cosine", "linear", "rsqrt", "constant")
OPTIMIZERS = ("adamw", "sgd", "adafactor")


def warmup_steps(config: ConfigDict) -> int:
    """Returns the length of the warm-up: as it was set, or a share of the run.

    Raises:
      UsageError: it was set to no fewer steps than the run has.
    """
    section, steps = config.optimizer, config.num_steps
    if section.warmup_steps >= steps:
        raise UsageError(
            f"config.optimizer.warmup_steps={section.warmup_steps} must be below "
            f"num_steps={steps}; -1 takes a share of the run, --config.optimizer.warmup"
        )
    share = min(round(section.warmup * steps), steps - 1)
    return share if section.warmup_steps == -1 else section.warmup_steps


def build_schedule(config: ConfigDict) -> optax.Schedule:
    """Linear warmup to the peak, then cosine or linear decay to 0, 1/sqrt(step), or constant."""
    section = config.optimizer
    peak, warmup, steps = section.learning_rate, warmup_steps(config), config.num_steps
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps - warmup),
        "linear": lambda: optax.linear_schedule(peak, 0.0, steps - warmup),
        "rsqrt": lambda: (
            lambda count: peak * jax.lax.rsqrt(1 + jnp.maximum(count, 0) / max(warmup, 1))
        ),
        "constant": lambda: optax.constant_schedule(peak),
    }[section.schedule]()
    ramp = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([ramp, after], [warmup]) if warmup else after


def build_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Global-norm clipping, then adamw, sgd with momentum, or adafactor."""
    section = config.optimizer
    rate, decay = build_schedule(config), section.weight_decay
    optimizer = {
        "adamw": lambda: optax.adamw(
            rate, section.b1, section.b2, weight_decay=decay, mask=decayed
        ),
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(decay, decayed),
            optax.sgd(rate, momentum=section.b1, nesterov=True),
        ),
        "adafactor": lambda: optax.adafactor(
            rate, weight_decay_rate=decay or None, weight_decay_mask=decayed
        ),
    }[section.name]()
    if section.grad_clip > 0:
        optimizer = optax.chain(optax.clip_by_global_norm(section.grad_clip), optimizer)
    return optimizer


def decayed(params):
    """True for matrices, which the code names kernels; biases, norms and embeddings are not."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any("kernel" in str(getattr(k, "key", k)) for k in path), params
    )


def optimizer_shardings(optimizer: optax.GradientTransformation, opt_state, params):
    """Where each array of the optimizer's state lies: with its parameter, or everywhere.

    `opt_state` and `params` are shapes, the latter with shardings. Adafactor's moments are a
    parameter's without one of its axes.
    """
    mesh = jax.tree.leaves(params)[0].sharding.mesh

    def beside(moment, param) -> NamedSharding:
        spec = (*param.sharding.spec, *[None] * (param.ndim - len(param.sharding.spec)))
        if moment.shape == param.shape:
            return param.sharding
        for axis in range(param.ndim):
            rest = [i for i in range(param.ndim) if i != axis]
            if moment.shape == tuple(param.shape[i] for i in rest):
                return NamedSharding(mesh, PartitionSpec(*(spec[i] for i in rest)))
        return NamedSharding(mesh, PartitionSpec())

    everywhere = lambda _: NamedSharding(mesh, PartitionSpec())  # noqa: E731
    return optax.tree.map_params(
        optimizer, beside, opt_state, params, transform_non_params=everywhere
    )
