"""The directory of a run: whether it can hold this run, its config.json, and where it left off."""

import math
import os
import pathlib
import shutil

import jax
from ml_collections import ConfigDict

from moe import config as configs
from moe.checkpoint import Checkpoints
from moe.distributed import by_first
from moe.errors import UsageError


def saved_config(workdir: pathlib.Path) -> ConfigDict | None:
    """Returns the config of the run in `workdir`, None where there is none.

    Raises:
      UsageError: its config.json cannot be read, or holds something else than a config.
    """
    file = workdir / "config.json"
    try:
        return configs.from_json(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, AttributeError, KeyError, UsageError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)[:200]
        raise UsageError(
            f"{file} is no config of a run ({reason or type(error).__name__}): put back a copy of "
            "it, or move it away and give the run's own train command again, which writes it anew"
        ) from error


def check(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Looks and touches nothing.

    Raises:
      UsageError: `workdir` is a file, or holds a run of another config.
    """
    saved = saved_config(workdir)
    if saved is not None:
        changed = configs.differences(saved, config)
        if changed:
            raise UsageError(
                f"{workdir} holds a run of another config ({'; '.join(changed[:4])}"
                f"{' ...' if len(changed) > 4 else ''}); choose another --workdir to start anew"
            )
    elif workdir.exists() and not workdir.is_dir():
        raise UsageError(f"--workdir={workdir} is a file; expected a directory")


def check_space(config: ConfigDict, workdir: pathlib.Path, state) -> None:
    """Whether the disk holds the checkpoints that are kept, and one more while it is written.

    Args:
      state: what a checkpoint has, as shapes.

    Raises:
      UsageError: there is less room than that.
    """
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state))
    kept = config.checkpoint.keep + 2  # the newest, the best, and the one being written
    there = len(list((workdir / "checkpoints").glob("[0-9]*")))
    needed = size * max(1, kept - there)
    place = workdir.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UsageError(
            f"--workdir={workdir} has {free / 1e9:.3g} GB of free space, and checkpoints of "
            f"{size / 1e9:.3g} GB each need {needed / 1e9:.3g} GB there: free some, choose another "
            f"disk, or keep fewer with --config.checkpoint.keep (now {config.checkpoint.keep})"
        )


def open_(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Makes the directory and writes its config.json, whole or not at all.

    Raises:
      UsageError: it cannot be written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        fresh = workdir / "config.json.new"
        fresh.write_text(configs.to_json(config))
        os.replace(fresh, workdir / "config.json")
    except OSError as error:
        raise UsageError(f"cannot write to --workdir={workdir}: {error.strerror}") from error


def resume(checkpoints: Checkpoints, like):
    """The newest readable state and its step; the state of step 0 where there is no checkpoint."""
    if not checkpoints.steps():
        return like, 0
    state, step, damaged = checkpoints.restore_newest(like)
    for bad in damaged:
        by_first(lambda bad=bad: checkpoints.set_aside(bad))
        checkpoints.reload()
        aside = checkpoints.aside(bad)
        print(f"checkpoint {bad} is damaged and was moved to {aside}; using step {step}")
    return state, step
