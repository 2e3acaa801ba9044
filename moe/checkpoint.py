"""Checkpoints of a run: saved in the background by Orbax, complete or not there at all.

A state is saved as a flat dictionary of named arrays ("params.blocks.0.norm.scale", ...), so that
a checkpoint can be read without the classes that made it. Restoring executes no code.
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
        best = managers.BestN(
            get_metric_fn=lambda metrics: metrics[BEST_METRIC],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        policy = managers.AnyPreservationPolicy([managers.LatestN(keep), best])
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy, read_only=read_only, create=not read_only
            ),
        )

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def best(self) -> float:
        """The best evaluation accuracy among the checkpoints, -inf without any."""
        metrics = (self._manager.metrics(step) for step in self.steps())
        return max((m[BEST_METRIC] for m in metrics if m and BEST_METRIC in m), default=-float("inf"))

    def save(self, step: int, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Copies the state to the host and returns; the files are written meanwhile."""
        metrics = {k: v for k, v in (metrics or {}).items() if k == BEST_METRIC}
        names, _ = _named(state)
        self._manager.save(step, args=ocp.args.StandardSave(names), metrics=metrics or None)

    def restore(self, step: int, like: Any) -> Any:
        """The state saved at `step`, with the structure, shapes and shardings of `like`."""
        names, structure = _named(like)
        names = self._manager.restore(step, args=ocp.args.StandardRestore(names))
        return jax.tree.unflatten(structure, [names[name] for name in _named(like)[0]])

    def restore_newest(self, like: Any, step: int | None = None) -> tuple[Any, int, list[int]]:
        """The newest state that can be read, its step, and the damaged steps passed over.

        With `step`, that one or an error.

        Raises:
          UsageError: no checkpoint can be read.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise UsageError(f"no checkpoint of step {step} in {self.directory}; it has {steps}")
        damaged = []
        for candidate in [step] if step is not None else reversed(steps):
            try:
                return self.restore(candidate, like), candidate, damaged
            except Exception as error:  # whatever tensorstore, json or orbax found wrong
                damaged.append(candidate)
                reason = str(error).splitlines()[0][:100]
        if not damaged:
            raise UsageError(f"no complete checkpoint in {self.directory}")
        raise UsageError(f"no checkpoint in {self.directory} can be read: step {candidate}: {reason}")

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
        self._manager.wait_until_finished()
        self._manager.close()


def _named(tree: Any) -> tuple[dict[str, Any], Any]:
    """{path: leaf} and the structure of a tree."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    return names, structure
