"""Trains a config in a directory, from where the directory's last checkpoint left off."""

import pathlib
import sys

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moe import nonfinite
from moe import workdir as workdirs
from moe.agreement import agree
from moe.checkpoint import BEST_METRIC, Checkpoints
from moe.distributed import AgreedError, by_first, together
from moe.evaluate import evaluate, layer_scalars, scalars, training_scalars
from moe.model import check, count_parameters
from moe.progress import Progress
from moe.records import Records, read
from moe.run import Run, open_source, set_up
from moe.stopping import Votes, stop_signal
from moe.upcycle import start_from_checkpoint


def train(config: ConfigDict, workdir: pathlib.Path) -> dict[str, float]:
    """Runs the config to its last step and returns the last evaluation's scalars.

    Interrupted by Ctrl-C or SIGTERM, saves a checkpoint and exits with 128 + the signal's number;
    the same call then continues, and ends bit-identical to a run that was never interrupted.

    Raises:
      UsageError: before any file is touched, if the config cannot run or `workdir` holds another.
    """
    run, step_fn, train_source, eval_source = together(lambda: _prepare(config, workdir))
    agree(run.config, train_source, eval_source)
    like = run.initial_state() | {"totals": _zeros(run, step_fn)()}
    by_first(lambda: workdirs.open_(run.config, workdir))
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    state, start = workdirs.resume(checkpoints, like)
    if config.init.workdir and not start:
        state = start_from_checkpoint(run, state, workdir)
    _announce(run, workdir, start)
    try:
        results = _loop(run, step_fn, state, start, checkpoints, workdir, train_source, eval_source)
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


def _loop(run, step_fn, state, start, checkpoints, workdir, train_source, eval_source):
    """Steps, log, evaluations and checkpoints from step `start` to the end."""
    config, last = run.config, run.config.num_steps
    layout = jax.tree.map(lambda a: a.sharding, state)
    advance = run.jit(
        _accumulating(config, step_fn), donate_argnums=0, out_shardings=(layout, run.replicated)
    )
    eval_step, best, results = run.eval_step(), checkpoints.best(), {}
    zeros, votes = _zeros(run, step_fn), Votes(run)
    looks = (config.log, config.eval, config.checkpoint)  # none may show a state that was refused
    records = Records(workdir, start)
    batches = run.train_batches(train_source, start)
    with Progress(start, last, config.batch_size) as progress, stop_signal() as stopped:
        for step in range(start + 1, last + 1):
            own = stopped()
            state, asked = advance(state, votes.add(next(batches), own))
            if step == start + 1:  # it compiled: no measure of those to come
                jax.block_until_ready(state["step"])
                progress.restart(step)
            stop = votes.count(asked, stopped())
            if stop or step == last or any(step % section.every == 0 for section in looks):
                nonfinite.check(run, state, checkpoints, train_source)
            if step % config.log.every == 0 or step == last:
                row = training_scalars(jax.device_get(state["totals"]), config.batch_size)
                state = state | {"totals": zeros()}
                records.write(step, row | {"train/images_per_second": progress.update(step, row)})
            results = {}
            if step % config.eval.every == 0 or step == last:
                total = evaluate(
                    eval_step, _averaged(state), run.eval_batches(eval_source), run.put
                )
                results = {f"eval/{k}": v for k, v in scalars(total).items()}
                records.write(step, results | layer_scalars(total, total["examples"], "eval"))
                progress.note(step, results)
            better = results.get(BEST_METRIC, best) > best
            best = max(best, results.get(BEST_METRIC, best))
            if better or stop or step % config.checkpoint.every == 0 or step == last:
                checkpoints.save(step, state, results)
            if stop:
                checkpoints.close()
                records.close()
                print(f"stopped at step {step}, checkpoint saved; the same command continues")
                sys.exit(128 + stop)
    records.close()
    return results or _last_evaluation(workdir)


def _accumulating(config: ConfigDict, step_fn):
    """`step_fn` on a state that also carries the sums since the last line of the log.

    Returns the state, and the largest vote of the batch where it has votes (`moe.stopping`).
    """

    def advance(state, batch):
        batch = dict(batch)
        vote = batch.pop("vote", None)
        totals = state["totals"]
        rest = {name: value for name, value in state.items() if name != "totals"}
        halted = (totals["skipped"] > 0) & (config.nonfinite == "stop")
        new, sums = step_fn(rest, batch, halted)
        new["totals"] = jax.tree.map(jnp.add, totals, sums)
        return new, None if vote is None else vote.max()

    return advance


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
    print(
        f"{where}: {config.data.name}, {router}, {total:,} parameters ({active:,} active), "
        f"{config.num_steps} steps of {config.batch_size} on {run.mesh.size} device(s)",
        flush=True,
    )


def _averaged(state):
    return state.get("ema", state["params"])


def _last_evaluation(workdir: pathlib.Path) -> dict[str, float]:
    rows = [row for row in read(workdir / "metrics.jsonl") if BEST_METRIC in row]
    return rows[-1] if rows else {}
