"""Checkpoints of a run: saved in the background by Orbax, complete or not there at all.

A checkpoint has an item for the parameters, one for their average where the run keeps it, and one
for all else that training needs; each is a flat dictionary of named arrays
("params.blocks.0.norm.scale", ...), to be read without the classes that made it. Restoring executes
no code.
"""

import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from moe.errors import UsageError

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
        """Copies the state to the host and returns; the files are written meanwhile."""
        items = {key: ocp.args.StandardSave(_named(tree)) for key, tree in _items(state).items()}
        best = {BEST_METRIC: metrics[BEST_METRIC]} if BEST_METRIC in metrics else None
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=best)

    def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """What `like` has of the state of `step`, with its structure, shapes and shardings."""
        items = {key: ocp.args.StandardRestore(_named(t)) for key, t in _items(like).items()}
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        arrays = {name: array for item in found.values() for name, array in item.items()}
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in _named(like)])

    def restore_newest(self, like: dict[str, Any], step: int | None = None):
        """The newest state that can be read, its step, and the damaged steps passed over.

        With `step`, that one or an error.

        Raises:
          UsageError: no checkpoint can be read.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise UsageError(f"no checkpoint of step {step} in {self.directory}; it has {steps}")
        damaged, reason = [], "there is none"
        for candidate in [step] if step is not None else reversed(steps):
            try:
                return self.restore(candidate, like), candidate, damaged
            except Exception as error:  # whatever tensorstore, json or orbax found wrong
                damaged.append(candidate)
                reason = str(error)[:200]
        raise UsageError(f"no checkpoint in {self.directory} can be read (of {steps}): {reason}")

    def set_aside(self, step: int) -> pathlib.Path:
        """Moves a damaged checkpoint out of the way of the one that will be saved in its place."""
        aside = self.directory.with_name(f"{self.directory.name}.damaged") / str(step)
        aside.parent.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.move(self.directory / str(step), aside)
        self._manager.reload()
        return aside

    def close(self) -> None:
        """Waits until all that was saved is on disk."""
        self._manager.close()


def _items(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The state by checkpoint item; evaluation reads the first two without the rest."""
    items = {key: {key: state[key]} for key in ("params", "ema") if key in state}
    rest = {key: tree for key, tree in state.items() if key not in items}
    return items | ({"training": rest} if rest else {})


def _named(tree: Any) -> dict[str, Any]:
    """{path: leaf}, in the order of the leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
