"""Makes the optax chain and the learning-rate schedule of a config's `optimizer` section."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from moe.errors import UsageError
from moe.train import muon

SCHEDULES = ("cosine", "linear", "rsqrt", "constant")


def warmup_steps(section: ConfigDict, steps: int) -> int:
    """Returns the length of the warm-up of a run of `steps`: as it was set, or a share of them.

    Raises:
      UsageError: it was set to no fewer steps than the run has.
    """
    if section.warmup_steps >= steps:
        raise UsageError(
            f"config.optimizer.warmup_steps={section.warmup_steps} must be below "
            f"num_steps={steps}; -1 takes a share of the run, --config.optimizer.warmup"
        )
    share = min(round(section.warmup * steps), steps - 1)
    return share if section.warmup_steps == -1 else section.warmup_steps


def build_schedule(section: ConfigDict, steps: int) -> optax.Schedule:
    """Returns a linear warmup, then cosine or linear decay to 0, 1/sqrt(step) or the peak."""
    peak, warmup = section.learning_rate, warmup_steps(section, steps)
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


def build_optimizer(section: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Returns global-norm clipping, the optimizer's direction, weight decay and the learning rate.

    Weight decay has one meaning for all of them, AdamW's (Loshchilov and Hutter 2019): a matrix W
    becomes (1 - learning_rate * weight_decay) W minus learning_rate times the direction.

    Args:
      section: `optimizer` of a config.
      steps: of the run, for the schedule.
    """
    parts = [
        DIRECTIONS[section.name](section),
        optax.add_decayed_weights(section.weight_decay, decayed),
        optax.scale_by_learning_rate(build_schedule(section, steps)),
    ]
    if section.grad_clip > 0:
        return optax.chain(optax.clip_by_global_norm(section.grad_clip), optax.chain(*parts))
    return optax.chain(*parts)


def adam(section: ConfigDict) -> optax.GradientTransformation:
    """Returns Adam's direction (Kingma and Ba 2015): b1 and b2 are the decays of its moments."""
    return optax.scale_by_adam(section.b1, section.b2)


def momentum(section: ConfigDict) -> optax.GradientTransformation:
    """Returns the gradient with Nesterov's momentum b1."""
    return optax.trace(section.b1, nesterov=True)


def adafactor(section: ConfigDict) -> optax.GradientTransformation:
    """Returns Adafactor's direction (Shazeer and Stern 2018), relative to a parameter's size.

    It has no momentum, and its second moment's decay is a schedule of its own: b1 and b2 are not
    used.
    """
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )


def orthogonal(section: ConfigDict) -> optax.GradientTransformation:
    """Returns Muon's direction of matrices, and Adam's of all other parameters (`moe.train.muon`).

    The matrices' momentum is a key of its own, since its custom is another than that of b1.
    """
    return muon.muon(section.momentum, adam(section))


DIRECTIONS = {"adamw": adam, "sgd": momentum, "adafactor": adafactor, "muon": orthogonal}


def decayed(params):
    """Returns True for matrices, which the code names kernels, and False for all else."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any("kernel" in str(getattr(k, "key", k)) for k in path), params
    )


def optimizer_shardings(optimizer: optax.GradientTransformation, opt_state, params):
    """Returns where each array of the optimizer's state lies: with its parameter, or everywhere.

    `opt_state` and `params` are shapes, the latter with shardings. Adafactor's moments are a
    parameter's without one of its axes.
    """
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    absent = lambda moment: isinstance(moment, optax.MaskedNode)  # noqa: E731

    def beside(moment, param) -> NamedSharding | optax.MaskedNode:
        if absent(moment):  # of a parameter that has another direction
            return moment
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
        optimizer, beside, opt_state, params, transform_non_params=everywhere, is_leaf=absent
    )
