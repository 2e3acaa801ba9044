"""Runs the steps with their log, evaluations and checkpoints, to the last step or to a signal."""

import contextlib
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moe.errors import DataError
from moe.hosts.distributed import first_text, is_first
from moe.nn.memory import join
from moe.screen import say
from moe.store.checkpoint import Checkpoints
from moe.store.records import Records
from moe.tasks.task import Source
from moe.train import nonfinite, pruned
from moe.train.measure import evaluate, evaluation_scalars, named, training_scalars
from moe.train.progress import Progress
from moe.train.run import Run
from moe.train.step import State, root_key
from moe.train.stopping import Signals, Votes, with_vote

Scalars = dict[str, float]


def loop(
    run: Run,
    step_fn: Callable,
    zeros: Callable,
    state: State,
    start: int,
    checkpoints: Checkpoints,
    workdir: pathlib.Path,
    train_source: Source,
    eval_source: Source,
) -> Scalars:
    """Trains from step `start` to the last; returns the scalars of the last evaluation.

    Args:
      step_fn: state, batch, halted -> state, sums; see `moe.train.step`.
      zeros: makes the sums of no step.
      state: of step `start`, with the sums since the last line of the log as "totals".
    """
    config, last = run.config, run.config.num_steps
    with (
        Signals() as signals,
        Records(workdir, start) as records,
        Progress(start, last, run.task, run.units) as progress,
    ):
        votes = Votes(run, signals)
        looks = Looks(run, checkpoints, records, progress, votes, eval_source)
        results = looks.catch_up(start, state)
        advance, halted = _advance(run, step_fn, state)
        batches = run.train_batches(train_source, start)
        for step in range(start + 1, last + 1):
            with looks.kept(state, halted):
                batch = next(batches)
            (state, halted), asked = advance(state, halted, votes.add(batch))
            if step == start + 1:  # it compiled: no measure of those to come, and nothing to save
                jax.block_until_ready(state)
                progress.restart(step)
                signals.listen()
            stop = votes.count(asked)
            if stop or looks.any_due(step):
                nonfinite.check(run, state, halted, checkpoints, train_source)
            if looks.due(step, config.log):
                row = training_scalars(run.task, jax.device_get(state["totals"]))
                state = state | {"totals": zeros()}
                records.write(step, row | progress.update(step, row))
            results = {}
            if looks.due(step, config.eval) and not stop:
                results, stop = looks.evaluate(step, state)
            if stop or looks.is_better(results) or looks.due(step, config.checkpoint):
                looks.save(step, state, results)
            if stop:
                checkpoints.close()
                say(f"stopped at step {step}, checkpoint saved; the same command continues")
                sys.exit(128 + stop)
        checkpoints.wait()
    return results


class Looks:
    """Looks at the state between steps: evaluates, records and saves, off the training clock."""

    def __init__(
        self,
        run: Run,
        checkpoints: Checkpoints,
        records: Records,
        progress: Progress,
        votes: Votes,
        eval_source: Source,
    ):
        self._run, self._checkpoints, self._records = run, checkpoints, records
        self._progress, self._votes, self._source = progress, votes, eval_source
        self._best = checkpoints.best()
        self._eval_step = run.jit(with_vote(run.eval_step), out_shardings=run.replicated)
        self._check_finite = nonfinite.state_check(run)
        self._pruned, self._pruning = pruned.Views(run), run.pruning

    def due(self, step: int, section) -> bool:
        """Tells whether a section of the config (log, eval, checkpoint) has its turn at `step`."""
        return step % section.every == 0 or step == self._run.config.num_steps

    def any_due(self, step: int) -> bool:
        config = self._run.config
        return any(
            self.due(step, section) for section in (config.log, config.eval, config.checkpoint)
        )

    def is_better(self, results: Scalars) -> bool:
        """Tells whether an evaluation is the best so far; no results are none."""
        return bool(results) and self._checkpoints.score(results) > self._best

    def catch_up(self, start: int, state: State) -> Scalars:
        """Makes the evaluation of step `start` that a signal prevented; returns its scalars.

        The checkpoint gets them too, so that both are as if no signal had come. Of a step that was
        evaluated, the recorded scalars are returned.
        """
        if not start or not self.due(start, self._run.config.eval):
            return {}
        recorded = {k: v for k, v in self._records.last.items() if k.startswith("eval/")}
        if first_text("recorded" if is_first() and recorded else ""):
            return recorded
        results = self._measure(start, state)
        self._checkpoints.add_metrics(start, results)
        self._best = self._checkpoints.best()
        self._record(start, results)
        return results

    def evaluate(self, step: int, state: State) -> tuple[Scalars, int]:
        """Returns the scalars and 0, or nothing and the signal that ended the evaluation."""
        try:
            with self.kept(state):
                results = self._measure(step, state)
        except _Stopped as stopped:
            return {}, stopped.number
        self._record(step, results)
        return results, 0

    def save(self, step: int, state: State, results: Scalars) -> None:
        """Saves a checkpoint; `results` are those of the evaluation of this step, if it had one."""
        self._check_finite(step, state, self._checkpoints)
        self._best = max(self._best, self._checkpoints.score(results))
        with self._pause(state):
            self._checkpoints.save(step, state, results)

    @contextlib.contextmanager
    def kept(self, state: State, halted=False):
        """Saves the state where the block finds data that cannot be read: no step is lost by it.

        Of several processes none can: the others are in a collective by then.
        """
        try:
            yield
        except DataError:
            step = int(state["step"])
            saved = step in (0, *self._checkpoints.steps())
            if jax.process_count() == 1 and not saved and not jax.device_get(halted):
                self.save(step, state, {})
            raise

    def _measure(self, step: int, state: State) -> Scalars:
        """Evaluates the parameters, or their average where the run keeps one.

        Of a pruned run twice: as it trains, and hardened.
        """
        params, task, pruning = state.get("ema", state["params"]), self._run.task, self._pruning
        with self._pause(state):
            looked, own = self._pruned.effective(params, step)
            results = evaluation_scalars(task, self._evaluate(state, looked), own)
            del looked  # no two copies at once
            if pruning.is_hard:
                results |= pruned.as_hardened(results)
            elif pruning.prunes:
                looked, own = self._pruned.hardened(params)
                total = self._evaluate(state, looked)
                results |= named(pruned.PHASE, task.scalars(total) | own)
        return results

    def _evaluate(self, state: State, params):
        """Returns the sums over all examples, with what the state's routers remember."""

        def eval_step(variables, batch):
            sums, asked = self._eval_step(variables, batch)
            if number := self._votes.count(asked, lag=0):
                raise _Stopped(number)
            return sums

        variables = join(params, state.get("routers", {}))
        batches = self._run.eval_batches(self._source)
        return evaluate(eval_step, variables, batches, self._votes.add)

    def _record(self, step: int, results: Scalars) -> None:
        self._records.write(step, results)
        self._progress.note(step, results)

    @contextlib.contextmanager
    def _pause(self, state: State):
        jax.block_until_ready(state)  # what the devices still compute is training time
        with self._progress.pause():
            yield


class _Stopped(Exception):
    """Ends an evaluation for the signal `number`."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def _advance(run: Run, step_fn: Callable, state: State):
    """Returns a compiled step that adds its sums to the state's totals, and its first `halted`.

    Under `nonfinite="stop"` a refused step halts: all later ones are refused too. The flag is no
    part of the state, since no halted state is ever saved.
    """
    config = run.config

    def advance(state, halted, root, batch):
        rest = {name: value for name, value in state.items() if name != "totals"}
        new, sums = step_fn(rest, batch, halted, jax.random.wrap_key_data(root))
        new["totals"] = jax.tree.map(jnp.add, state["totals"], sums)
        if config.nonfinite == "stop":
            halted = halted | (sums["skipped"] > 0)
        return new, halted

    layout = jax.tree.map(lambda a: a.sharding, state), run.replicated
    compiled = run.jit(with_vote(advance), donate_argnums=0, out_shardings=(layout, run.replicated))
    # An argument, not a constant of the program: a cache has one program for the seeds of a league.
    root = np.asarray(jax.random.key_data(root_key(config.seed)))

    def call(state, halted, batch):
        return compiled(state, halted, root, batch)

    return call, run.jit(lambda: jnp.zeros((), bool), out_shardings=run.replicated)()
