"""Trains a config in a directory, from where the directory's last checkpoint left off."""

import contextlib
import os
import pathlib
import signal
import sys

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moe import config as configs
from moe.checkpoint import BEST_METRIC, Checkpoints
from moe.errors import UsageError
from moe.evaluate import evaluate, routing_table, scalars
from moe.model import check_names, count_parameters
from moe.progress import Progress
from moe.records import Records, read
from moe.run import Run, open_source, set_up
from moe.upcycle import start_from_checkpoint


def train(config: ConfigDict, workdir: pathlib.Path) -> dict[str, float]:
    """Runs the config to its last step and returns the last evaluation's scalars.

    Interrupted by Ctrl-C or SIGTERM, saves a checkpoint and exits with 128 + the signal's number;
    the same call then continues, and ends bit-identical to a run that was never interrupted.

    Raises:
      UsageError: before any file is touched, if the config cannot run or `workdir` holds another.
    """
    check_names(config)  # before a data set is read, or prepared
    train_source = open_source(config, config.data.train_split)
    eval_source = open_source(config, config.data.eval_split)
    run = set_up(config, train_source)
    _check_workdir(run.config, workdir)
    step_fn = run.train_step
    like = _initial(run, step_fn)
    _open_workdir(run.config, workdir)
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    state, start = _resume(checkpoints, like)
    if config.init.workdir and not start:
        state = start_from_checkpoint(run, state, workdir)
    _announce(run, workdir, start)
    try:
        return _loop(run, step_fn, state, start, checkpoints, workdir, train_source, eval_source)
    finally:
        checkpoints.close()


def _loop(run, step_fn, state, start, checkpoints, workdir, train_source, eval_source):
    """Steps, log, evaluations and checkpoints from step `start` to the end."""
    config, last = run.config, run.config.num_steps
    layout = jax.tree.map(lambda a: a.sharding, state)
    advance = run.jit(_accumulating(step_fn), donate_argnums=0, out_shardings=layout)
    eval_step, best, results = run.eval_step(), checkpoints.best(), {}
    zeros = jax.tree.map(jnp.zeros_like, state["totals"])
    records = Records(workdir, start)
    batches = run.train_batches(train_source, start)
    with Progress(start, last, config.batch_size) as progress, _stop_signal() as stopped:
        for step in range(start + 1, last + 1):
            state = advance(state, run.put(next(batches)))
            if step == start + 1:  # it compiled: no measure of those to come
                jax.block_until_ready(state["step"])
                progress.restart(step)
            if step % config.log.every == 0 or step == last:
                row = _training_scalars(jax.device_get(state["totals"]), config.batch_size)
                state = state | {"totals": jax.tree.map(jnp.copy, zeros)}
                _check_finite(row, step, checkpoints)
                records.write(step, row | {"train/images_per_second": progress.update(step, row)})
            results = {}
            if step % config.eval.every == 0 or step == last:
                total = evaluate(
                    eval_step, _averaged(state), run.eval_batches(eval_source), run.put
                )
                results = {f"eval/{k}": v for k, v in scalars(total).items()}
                records.write(step, results | _layer_scalars(total, total["examples"], "eval"))
                progress.note(step, results)
            better = results.get(BEST_METRIC, best) > best
            best = max(best, results.get(BEST_METRIC, best))
            stop = stopped()
            if better or stop or step % config.checkpoint.every == 0 or step == last:
                checkpoints.save(step, state, results)
            if stop:
                checkpoints.close()
                records.close()
                print(f"stopped at step {step}, checkpoint saved; the same command continues")
                sys.exit(128 + stop)
    records.close()
    return results or _last_evaluation(workdir)


def _accumulating(step_fn):
    """`step_fn` on a state that also carries the sums since the last line of the log."""

    def advance(state, batch):
        totals = state["totals"]
        rest = {name: value for name, value in state.items() if name != "totals"}
        new, sums = step_fn(rest, batch)
        return new | {"totals": jax.tree.map(jnp.add, totals, sums)}

    return advance


def _initial(run: Run, step_fn) -> dict:
    """The state of step 0, totals included; tracing the step finds every misfit of the config."""
    try:
        with jax.set_mesh(run.mesh):
            _, sums = jax.eval_shape(step_fn, run.abstract_state(), run.abstract_batch())
    except ValueError as error:
        raise UsageError(str(error)) from error
    zeros = run.jit(
        lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums),
        out_shardings=run.replicated,
    )
    return run.initial_state() | {"totals": zeros()}


def _resume(checkpoints: Checkpoints, like):
    """The newest readable state and its step; the state of step 0 where there is no checkpoint."""
    if not checkpoints.steps():
        return like, 0
    state, step, damaged = checkpoints.restore_newest(like)
    for bad in damaged:
        aside = checkpoints.set_aside(bad)
        print(f"checkpoint {bad} is damaged and was moved to {aside}; using step {step}")
    return state, step


def _check_workdir(config: ConfigDict, workdir: pathlib.Path) -> None:
    file = workdir / "config.json"
    if file.exists():
        changed = configs.differences(configs.from_json(file.read_text()), config)
        if changed:
            raise UsageError(
                f"{workdir} holds a run of another config ({'; '.join(changed[:4])}"
                f"{' ...' if len(changed) > 4 else ''}); choose another --workdir to start anew"
            )
    elif workdir.exists() and not workdir.is_dir():
        raise UsageError(f"--workdir={workdir} is a file; expected a directory")


def _open_workdir(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Makes the directory and writes its config.json, whole or not at all."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        fresh = workdir / "config.json.new"
        fresh.write_text(configs.to_json(config))
        os.replace(fresh, workdir / "config.json")
    except OSError as error:
        raise UsageError(f"cannot write to --workdir={workdir}: {error.strerror}") from error


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


def _training_scalars(totals, batch_size: int) -> dict[str, float]:
    examples = float(totals["steps"]) * batch_size
    row = {
        "train/loss": totals["loss"] / examples,
        "train/accuracy": totals["correct"] / examples,
        "train/aux_loss": totals["aux_loss"] / examples,
        "train/grad_norm": totals["grad_norm"] / totals["steps"],
    }
    return {k: float(v) for k, v in row.items()} | _layer_scalars(totals, examples, "train")


def _layer_scalars(totals, examples: float, phase: str) -> dict[str, float]:
    table = routing_table(totals, examples)
    return {f"{phase}/layer_{i}/{k}": v for i, row in table.items() for k, v in row.items()}


def _check_finite(row: dict[str, float], step: int, checkpoints: Checkpoints) -> None:
    if not all(map(_is_finite, (row["train/loss"], row["train/grad_norm"]))):
        raise UsageError(
            f"the loss is not finite at step {step}; the last good checkpoints are of steps "
            f"{checkpoints.steps()}: lower --config.optimizer.learning_rate"
        )


def _is_finite(value: float) -> bool:
    return value - value == 0


def _averaged(state):
    return state.get("ema", state["params"])


def _last_evaluation(workdir: pathlib.Path) -> dict[str, float]:
    rows = [row for row in read(workdir / "metrics.jsonl") if BEST_METRIC in row]
    return rows[-1] if rows else {}


@contextlib.contextmanager
def _stop_signal():
    """Yields a function: the number of the SIGINT or SIGTERM that came, or 0.

    The first one lets the step end and a checkpoint be saved; a second one ends at once.
    """
    received = []

    def handle(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
