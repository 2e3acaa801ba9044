"""Saves the checkpoints of a run in the background, each complete or not there at all.

A checkpoint has an item for the parameters, one for their average where the run keeps it, one for
what the routers remember where they do, one for the sums since the last line of the log, and one
for all else that training needs; each is a flat
dictionary of named arrays ("params.blocks.0.norm.scale", ...), to be read without the classes that
made it. Beside them stand the arrays' checksums, which every restore compares, and the task's
metric of an evaluation. Restoring executes no code.
"""

import contextlib
import json
import math
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from moe import outputs
from moe.errors import UsageError
from moe.hosts.distributed import AgreedError, by_first, first_text
from moe.hosts.faults import is_lost_peer
from moe.store import stored, workers
from moe.store.checksums import checksums
from moe.tasks import Metric

# Evaluation reads one of the first two, and what the routers remember, without the rest.
OWN_ITEMS = ("params", "ema", "routers", "totals")
ARRAYS = (*OWN_ITEMS, "training")
TABLES = ("metrics", "checksums")  # each a file of its name, as JSON


class DamagedError(Exception):
    """Is raised by every process where one of them cannot read a checkpoint."""


class Checkpoints:
    """Keeps the newest `keep` checkpoints in one directory, and that of the best evaluation."""

    def __init__(
        self,
        directory: pathlib.Path,
        keep: int = 1,
        read_only: bool = False,
        best: Metric | None = None,
    ):
        """`best` is the metric by which one checkpoint is the best; None: none is."""
        self.directory, self._keep, self._read_only = directory, keep, read_only
        self._best = best
        self._open()

    def _open(self) -> None:
        handlers = {name: ocp.StandardCheckpointHandler() for name in ARRAYS}
        self._manager = ocp.CheckpointManager(
            self.directory.absolute(),
            item_handlers=handlers | {name: ocp.JsonCheckpointHandler(name) for name in TABLES},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self,
                lightweight_initialize=True,  # leaves the metrics to us, who expect damage
                read_only=self._read_only,
                create=not self._read_only,
            ),
        )
        self._scores = {step: self._score(step) for step in self.steps()}

    def steps(self) -> list[int]:
        """Returns the steps that have a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def best(self) -> float:
        """Returns the best evaluation's score among the checkpoints, -inf without any."""
        return max((self._scores[step] for step in self.steps()), default=-math.inf)

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Tells Orbax which checkpoints stay, by their order."""
        steps = sorted(info.step for info in checkpoints)
        scored = [step for step in steps if self._scores.get(step, -math.inf) > -math.inf]
        kept = {*steps[-self._keep :], max(scored, key=lambda s: (self._scores[s], s), default=-1)}
        return [info.step in kept for info in checkpoints]

    def _score(self, step: int) -> float:
        """Returns the score that a checkpoint was saved with; -inf without one, or a damaged."""
        try:
            value = self.score(self._table(step, "metrics"))
        except (OSError, ValueError, TypeError, AttributeError):
            return -math.inf
        return value if math.isfinite(value) else -math.inf

    def score(self, metrics: dict[str, float]) -> float:
        """Returns what grows as an evaluation gets better, -inf of none."""
        scores = [self._best.score(float(value)) for value in self._kept(metrics).values()]
        return max(scores, default=-math.inf)

    def _kept(self, metrics: dict[str, float]) -> dict[str, float]:
        """Returns what is kept of an evaluation."""
        return {k: v for k, v in metrics.items() if self._best and k == self._best.key}

    def _table(self, step: int, name: str):
        return json.loads((self.directory / str(step) / name / name).read_text())

    def save(self, step: int, state: dict[str, Any], metrics: dict[str, float]) -> None:
        """Copies the state to the host and returns; the files are written meanwhile.

        Raises:
          UsageError: this one, or the one before, cannot be written.
        """
        arrays = {item: named(tree) for item, tree in _items(state).items()}
        items = {item: ocp.args.StandardSave(tree) for item, tree in arrays.items()}
        sums = {name: a for tree in arrays.values() for name, a in tree.items()}
        items["checksums"] = ocp.args.JsonSave(checksums(sums))
        if kept := self._kept(metrics):
            items["metrics"] = ocp.args.JsonSave(kept)
        self._scores[step] = self.score(metrics)
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the result of an evaluation to a checkpoint that was saved before it was made."""
        file = self.directory / str(step) / "metrics" / "metrics"
        by_first(lambda: outputs.write_json(file, self._kept(metrics)))
        self._scores[step] = self.score(metrics)

    def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Returns what `like` has of the state of `step`, with its structure, shapes and shardings.

        "totals" are left out where the checkpoint has sums of other quantities. What workers keep
        moves to another number of them.

        Raises:
          DamagedError: an array cannot be read, or has not the checksum that it was saved with.
        """
        directory = self.directory / str(step)
        arrays, saved, wrong = {}, None, ""
        try:
            like = _without_other_totals(like, directory)
            # Not the manager's restore: it waits for the other processes, also for one that found
            # its part damaged and is not coming.
            for item, tree in _items(like).items():
                place = _place(directory, item)
                arrays |= stored.read(place, workers.as_saved(place, named(tree)))
            if (directory / "checksums").exists():  # the first version wrote none
                table = self._table(step, "checksums")
                saved = {name: table[name] for name in arrays}
        except Exception as error:  # whatever tensorstore, json or the disk found wrong
            wrong = str(error)[:200] or type(error).__name__
        if wrong := first_text(wrong):  # damaged for one process is damaged for all
            raise DamagedError(wrong)
        if saved is not None and (now := checksums(arrays)) != saved:
            changed = [name for name in now if now[name] != saved[name]]
            raise DamagedError(f"{', '.join(changed[:4])} is not as it was saved, by its checksum")
        arrays = workers.moved(arrays, named(like))
        leaves = [_without_views(arrays[name]) for name in named(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def restore_newest(self, like: dict[str, Any], step: int | None = None):
        """Returns the newest state that can be read, its step, and the damaged steps passed over.

        With `step`, that one or an error.

        Raises:
          UsageError: no checkpoint can be read.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise AgreedError(f"no checkpoint of step {step} in {self.directory}; it has {steps}")
        damaged, reason = [], "there is none"
        for candidate in [step] if step is not None else reversed(steps):
            try:
                return self.restore(candidate, like), candidate, damaged
            except DamagedError as error:
                damaged.append(candidate)
                reason = str(error)
        raise AgreedError(f"no checkpoint in {self.directory} can be read (of {steps}): {reason}")

    def aside(self, step: int) -> pathlib.Path:
        """Returns where a damaged checkpoint is moved to."""
        return self.directory.with_name(f"{self.directory.name}.damaged") / str(step)

    def set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint out of the way of the one that will be saved in its place."""
        aside = self.aside(step)
        aside.parent.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.move(self.directory / str(step), aside)

    def reload(self) -> None:
        """Looks again at what is there."""
        self._manager.close()
        self._open()

    def wait(self) -> None:
        """Waits until all that was saved so far is on disk."""
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
    """Returns the state by checkpoint item."""
    items = {key: {key: state[key]} for key in OWN_ITEMS if key in state}
    rest = {key: tree for key, tree in state.items() if key not in items}
    return items | ({"training": rest} if rest else {})


def _place(directory: pathlib.Path, item: str) -> pathlib.Path:
    """Returns where an item of a checkpoint is; the first version kept the totals with the rest."""
    old = item == "totals" and not (directory / item).exists()
    return directory / ("training" if old else item)


def _without_other_totals(like: dict[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns `like` without its totals if the checkpoint has sums of other quantities."""
    totals = named({key: like[key] for key in ("totals",) if key in like})
    if stored.fits(_place(directory, "totals"), totals):
        return like
    return {key: tree for key, tree in like.items() if key != "totals"}


def _without_views(a: jax.Array) -> jax.Array:
    """Returns the array without the views of its shards that JAX keeps once they were looked at."""
    shards = [shard.data for shard in a.addressable_shards]
    return jax.make_array_from_single_device_arrays(a.shape, a.sharding, shards)


def named(tree: Any) -> dict[str, Any]:
    """Returns {path: leaf}, in the order of the leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
