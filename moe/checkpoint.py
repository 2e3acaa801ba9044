"""Checkpoints of a run: saved in the background by Orbax, complete or not there at all.

A checkpoint has an item for the parameters, one for their average where the run keeps it, and one
for all else that training needs; each is a flat dictionary of named arrays
("params.blocks.0.norm.scale", ...), to be read without the classes that made it. Restoring executes
no code.
"""

import contextlib
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from moe.distributed import AgreedError, by_first, first_text
from moe.errors import UsageError
from moe.faults import is_lost_peer

BEST_METRIC = "eval/accuracy"


class Checkpoints:
    """The checkpoints in one directory: the newest `keep`, and the one of the best evaluation."""

    def __init__(self, directory: pathlib.Path, keep: int = 1, read_only: bool = False):
        self.directory = directory

        def score(metrics):
            return metrics[BEST_METRIC]

        best = managers.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
        policy = managers.AnyPreservationPolicy([managers.LatestN(keep), best])
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=score,  # without it Orbax does not write the metrics down
                read_only=read_only,
                create=not read_only,
            ),
        )

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def best(self) -> float:
        """The best evaluation accuracy among the checkpoints, -inf without any."""
        metrics = (self._manager.metrics(step) for step in self.steps())
        return max((m[BEST_METRIC] for m in metrics if m), default=-float("inf"))

    def save(self, step: int, state: dict[str, Any], metrics: dict[str, float]) -> None:
        """Copies the state to the host and returns; the files are written meanwhile.

        Raises:
          UsageError: this one, or the one before, cannot be written.
        """
        items = {key: ocp.args.StandardSave(named(tree)) for key, tree in _items(state).items()}
        best = {BEST_METRIC: metrics[BEST_METRIC]} if BEST_METRIC in metrics else None
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=best)

    def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the result of an evaluation to a checkpoint that was saved before it was made."""

        def write():
            with self._writing():
                directory = self.directory / str(step) / "metrics"
                directory.mkdir(exist_ok=True)
                fresh = directory / "metrics.new"
                fresh.write_text(json.dumps({BEST_METRIC: metrics[BEST_METRIC]}))
                os.replace(fresh, directory / "metrics")

        by_first(write)
        self.reload()

    def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """What `like` has of the state of `step`, with its structure, shapes and shardings."""
        arrays = {}
        for item, tree in _items(like).items():
            # Not the manager's restore: it waits for the other processes, also for one that found
            # its part damaged and is not coming.
            arrays |= ocp.StandardCheckpointHandler().restore(
                self.directory.absolute() / str(step) / item,
                args=ocp.args.StandardRestore(named(tree)),
            )
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in named(like)])

    def restore_newest(self, like: dict[str, Any], step: int | None = None):
        """The newest state that can be read, its step, and the damaged steps passed over.

        With `step`, that one or an error.

        Raises:
          UsageError: no checkpoint can be read.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise AgreedError(f"no checkpoint of step {step} in {self.directory}; it has {steps}")
        damaged, reason = [], "there is none"
        for candidate in [step] if step is not None else reversed(steps):
            state, wrong = None, ""
            try:
                state = self.restore(candidate, like)
            except Exception as error:  # whatever tensorstore, json or orbax found wrong
                wrong = str(error)[:200] or type(error).__name__
            wrong = first_text(wrong)  # damaged for one process is damaged for all
            if not wrong:
                return state, candidate, damaged
            damaged.append(candidate)
            reason = wrong
        raise AgreedError(f"no checkpoint in {self.directory} can be read (of {steps}): {reason}")

    def aside(self, step: int) -> pathlib.Path:
        """Where a damaged checkpoint is moved to."""
        return self.directory.with_name(f"{self.directory.name}.damaged") / str(step)

    def set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint out of the way of the one that will be saved in its place."""
        aside = self.aside(step)
        aside.parent.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.move(self.directory / str(step), aside)

    def reload(self) -> None:
        """Looks again at what is there."""
        self._manager.reload()

    def wait(self) -> None:
        """Until all that was saved so far is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until all that was saved is on disk."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self):
        """Turns what Orbax raises where a disk is full or gone, also late, into one line."""
        try:
            yield
        except Exception as error:
            if is_lost_peer(error):
                raise
            where = self.directory
            complete = sorted(int(d.name) for d in where.glob("[0-9]*") if d.name.isdigit())
            last = (
                f"the last complete one is of step {complete[-1]}" if complete else "none is there"
            )
            reason = " ".join(str(error).split())
            reason = reason if len(reason) < 200 else f"{reason[:60]} ... {reason[-120:]}"
            raise UsageError(
                f"cannot save a checkpoint in {where} ({reason}): {last}; when the disk is well "
                "again, the same command continues"
            ) from error


def _items(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The state by checkpoint item; evaluation reads the first two without the rest."""
    items = {key: {key: state[key]} for key in ("params", "ema") if key in state}
    rest = {key: tree for key, tree in state.items() if key not in items}
    return items | ({"training": rest} if rest else {})


def named(tree: Any) -> dict[str, Any]:
    """{path: leaf}, in the order of the leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
