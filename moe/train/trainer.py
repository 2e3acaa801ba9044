"""Trains a config in a directory, from where the directory's last checkpoint left off."""

import contextlib
import pathlib

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moe.checks import check
from moe.hosts.distributed import AgreedError, by_first, first_text, together
from moe.models.build import count_parameters
from moe.screen import say
from moe.store import workdir as workdirs
from moe.store.checkpoint import Checkpoints
from moe.tasks import task_of
from moe.tasks.task import Source, line
from moe.train.agreement import agree
from moe.train.calibration import calibrate
from moe.train.loop import loop
from moe.train.origins import find_source, is_new, start_from_checkpoint, write_origin
from moe.train.run import Run, set_up


def train(config: ConfigDict, workdir: pathlib.Path, extend: bool = False) -> dict[str, float]:
    """Runs the config to its last step and returns the last evaluation's scalars.

    Interrupted by Ctrl-C, SIGTERM or SIGHUP, saves a checkpoint and exits with 128 + the signal's
    number; the same call then continues, and ends bit-identical to a run that was never
    interrupted.

    Args:
      extend: whether a run that is in `workdir` may get more steps than it was started with.

    Raises:
      UsageError: before any file is touched, if the config cannot run or `workdir` holds another.
    """
    run, step_fn, sums, train_source, eval_source = together(
        lambda: _prepare(config, workdir, extend)
    )
    agree(run.config, train_source, eval_source, **{"--extend": extend})
    zeros = _zeros(run, sums)
    fresh = None if workdirs.has_checkpoint(workdir) else _fresh(run, train_source)
    with contextlib.ExitStack() as stack:
        by_first(lambda: stack.enter_context(workdirs.opened(run.config, workdir, extend)))
        by_first(lambda: workdirs.keep(run.task.files(train_source), workdir))
        checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep, best=run.best)
        if checkpoints.steps():
            fresh = None  # another process was first: no state is held beside the restored one
            state, start = workdirs.resume(checkpoints, _like(run, sums))
        else:
            (state, origin), start, fresh = fresh or _fresh(run, train_source), 0, None
            by_first(lambda: write_origin(origin, workdir))
        state = {"totals": zeros()} | state
        if (
            start == run.config.num_steps
            and (results := _complete(run, workdir, start)) is not None
        ):
            checkpoints.close()
            return results
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


def _prepare(config: ConfigDict, workdir: pathlib.Path, extend: bool):
    """Finds what can be found wrong before an array is made or a file touched."""
    check(config)  # before a data set is read, or prepared
    workdirs.check_place(workdir)
    train_source = task_of(config).open(config, config.data.train_split)
    eval_source = task_of(config).open(config, config.data.eval_split)
    run = set_up(config, train_source)
    workdirs.check_config(run.config, workdir, extend)
    workdirs.check_trained(workdir)
    if config.init.workdir and not workdirs.saved_steps(workdir):
        find_source(run)
    step_fn = run.train_step
    sums = _sums(run, step_fn)
    workdirs.check_space(workdir, config.checkpoint.keep, (run.abstract_state(), sums))
    return run, step_fn, sums, train_source, eval_source


def _fresh(run: Run, source: Source):
    """Returns the state of step 0, and where its parameters came from; nothing is written yet."""
    state, origin = run.initial_state(), None
    if run.config.init.workdir:
        state, origin = start_from_checkpoint(run, state)
    if run.memory and (origin is None or is_new(run, origin)):
        state = calibrate(run, state, source)
    return state, origin


def _like(run: Run, sums):
    """Returns a checkpoint's shapes and shardings: making a state to know them would hold two."""
    totals = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=run.replicated), sums
    )
    return run.abstract_state() | {"totals": totals}


def _complete(run: Run, workdir: pathlib.Path, step: int) -> dict[str, float] | None:
    """Says that a run which has been evaluated at its last step is complete, and returns how."""
    results = workdirs.last_evaluation(workdir, step)
    if not first_text("complete" if results else ""):
        return None
    say(
        f"{workdir} is complete: {step} steps, {line(run.task, 'eval', results)}; "
        f"`python eval.py --workdir={workdir}` evaluates it, and the same command with more steps "
        "(--config.num_steps=N) and --extend trains it further"
    )
    return results


def _sums(run: Run, step_fn):
    """Returns what a step sums up, as shapes, which tells that the step can be traced."""
    with jax.set_mesh(run.mesh):
        return jax.eval_shape(step_fn, run.abstract_state(), run.abstract_batch())[1]


def _zeros(run: Run, sums):
    """Returns a function that makes the totals of no step."""
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
    if (skipped := config.depth.layers) not in ("none", ""):
        router += f", blocks {skipped} for tokens by {config.depth.router}"
    where = f"continuing {workdir} at step {start}" if start else f"training in {workdir}"
    say(
        f"{where}: {config.data.name}, {router}, {total:,} parameters ({active:,} active), "
        f"{config.num_steps} steps of {config.batch_size} on {run.mesh.size} device(s)"
    )
