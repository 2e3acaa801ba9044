"""Trains a config in a directory, from where the directory's last checkpoint left off."""

import pathlib

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moe import workdir as workdirs
from moe.agreement import agree
from moe.checkpoint import Checkpoints
from moe.distributed import AgreedError, by_first, together
from moe.loop import loop
from moe.model import check, count_parameters
from moe.progress import say
from moe.run import Run, open_source, set_up
from moe.upcycle import start_from_checkpoint


def train(config: ConfigDict, workdir: pathlib.Path) -> dict[str, float]:
    """Runs the config to its last step and returns the last evaluation's scalars.

    Interrupted by Ctrl-C, SIGTERM or SIGHUP, saves a checkpoint and exits with 128 + the signal's
    number; the same call then continues, and ends bit-identical to a run that was never
    interrupted.

    Raises:
      UsageError: before any file is touched, if the config cannot run or `workdir` holds another.
    """
    run, step_fn, train_source, eval_source = together(lambda: _prepare(config, workdir))
    agree(run.config, train_source, eval_source)
    zeros = _zeros(run, step_fn)
    like = run.initial_state() | {"totals": zeros()}
    by_first(lambda: workdirs.open_(run.config, workdir))
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    state, start = workdirs.resume(checkpoints, like)
    if config.init.workdir and not start:
        state = start_from_checkpoint(run, state, workdir)
    _announce(run, workdir, start)
    try:
        results = loop(
            run, step_fn, zeros, state, start, checkpoints, workdir, train_source, eval_source
        )
    except Exception as error:
        # Closing waits for the other processes, which may be why this one is here.
        if jax.process_count() == 1 or isinstance(error, AgreedError):
            checkpoints.close()
        raise
    checkpoints.close()
    return results


def _prepare(config: ConfigDict, workdir: pathlib.Path):
    """All that can be found wrong before an array is made or a file touched."""
    check(config)  # before a data set is read, or prepared
    train_source = open_source(config, config.data.train_split)
    eval_source = open_source(config, config.data.eval_split)
    run = set_up(config, train_source)
    step_fn = run.train_step
    sums = _sums(run, step_fn)
    workdirs.check(run.config, workdir)
    workdirs.check_space(run.config, workdir, (run.abstract_state(), sums))
    return run, step_fn, train_source, eval_source


def _sums(run: Run, step_fn):
    """Returns what a step sums up, as shapes, which tells that the step can be traced."""
    with jax.set_mesh(run.mesh):
        return jax.eval_shape(step_fn, run.abstract_state(), run.abstract_batch())[1]


def _zeros(run: Run, step_fn):
    """A function: the totals of no step."""
    sums = _sums(run, step_fn)
    return run.jit(
        lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums),
        out_shardings=run.replicated,
    )


def _announce(run: Run, workdir: pathlib.Path, start: int) -> None:
    config, moe = run.config, run.config.moe
    k = config.router[config.router.name].k
    sparse = moe.layers not in ("none", "") and not moe.dense
    total = count_parameters(run.params)
    active = count_parameters(run.params, min(1, k / moe.num_experts)) if sparse else total
    router = f"router {config.router.name}, {moe.num_experts} experts" if sparse else "dense"
    where = f"continuing {workdir} at step {start}" if start else f"training in {workdir}"
    say(
        f"{where}: {config.data.name}, {router}, {total:,} parameters ({active:,} active), "
        f"{config.num_steps} steps of {config.batch_size} on {run.mesh.size} device(s)"
    )
