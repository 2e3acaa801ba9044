"""Keeps the directory of a run: whether it can hold this one, its config, where it left off."""

import contextlib
import math
import os
import pathlib
import shutil

import jax
from ml_collections import ConfigDict

from moe import config as configs
from moe import outputs
from moe.data.text import tokenizer
from moe.errors import UsageError
from moe.hosts.distributed import by_first, first_text, is_first
from moe.screen import say
from moe.store import lock
from moe.store.checkpoint import Checkpoints
from moe.store.records import read

# What else may lie in the directory of a run is nobody's business.
FILES = ("config.json", "config.json.new", "metrics.jsonl", "init.json", lock.FILE)
FILES += (tokenizer.FILE, tokenizer.MARKS)
DIRECTORIES = ("checkpoints", "checkpoints.damaged", "events")


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
    except configs.UnknownPart as error:
        raise UsageError(f"{file} cannot be used here: {error}") from error
    except (OSError, ValueError, TypeError, AttributeError, KeyError, UsageError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)[:200]
        raise UsageError(
            f"{file} is no config of a run ({reason or type(error).__name__}): put back a copy of "
            "it, or move it away and give the run's own train command again, which writes it anew"
        ) from error


def check_place(workdir: pathlib.Path) -> None:
    """Looks whether any run can go on, or begin, in `workdir`; touches nothing.

    Raises:
      UsageError: it is not writable, another process trains there, or something is in the way of
        what a run writes.
    """
    place = workdir.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UsageError(f"cannot write to --workdir={workdir}: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write to --workdir={workdir}: no permission for {place}")
    for name in (*FILES, *DIRECTORIES):
        path, kind = workdir / name, "directory" if name in DIRECTORIES else "file"
        if not os.path.lexists(path):
            continue
        if not (path.is_dir() if name in DIRECTORIES else path.is_file()):
            raise UsageError(f"{path} is in the way: a run keeps a {kind} there; move it away")
        if not os.access(path, os.R_OK | os.W_OK):
            raise UsageError(f"{path} cannot be read and written: a run needs permission for it")
    lock.check(workdir)
    saved_config(workdir)
    read(workdir / "metrics.jsonl")


def check_config(config: ConfigDict, workdir: pathlib.Path, extend: bool = False) -> None:
    """Compares a config with that of the run in `workdir`, if there is one.

    Args:
      extend: whether the run may become longer.

    Raises:
      UsageError: it makes another run.
    """
    saved = saved_config(workdir)
    if saved is None:
        return
    longer, steps = config.num_steps > saved.num_steps, saved.num_steps
    if longer:
        saved = saved.copy_and_resolve_references()
        saved.num_steps = config.num_steps
    changed = configs.differences(saved, config)
    if changed:
        raise UsageError(
            f"{workdir} holds a run of another config ({'; '.join(changed[:4])}"
            f"{' ...' if len(changed) > 4 else ''}); choose another --workdir to start anew"
        )
    if longer and not extend:
        raise UsageError(
            f"{workdir} holds a run of {steps} steps: add --extend to train it on to step "
            f"{config.num_steps}, or choose another --workdir to start anew"
        )


def check_trained(workdir: pathlib.Path) -> None:
    """Looks whether training can go on from what is in `workdir`, if anything is.

    Raises:
      UsageError: it holds parameters alone, as an import makes it.
    """
    steps = saved_steps(workdir)
    newest = workdir / "checkpoints" / str(steps[-1]) if steps else None
    if newest and (newest / "params").is_dir() and not (newest / "training").exists():
        raise UsageError(
            f"{workdir} holds imported parameters and no state of training: start another run from "
            f"it by --workdir=NEW --config={workdir} --config.init.workdir={workdir}"
        )


def check_space(workdir: pathlib.Path, keep: int, state) -> None:
    """Checks that the disk holds the checkpoints that are kept, and one more while it is written.

    Args:
      keep: `checkpoint.keep`.
      state: what a checkpoint has, as shapes.

    Raises:
      UsageError: there is less room than that.
    """
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state))
    kept = keep + 2  # the newest, the best, and the one being written
    saved = len(saved_steps(workdir))
    needed = size * max(1, kept - saved)
    free = shutil.disk_usage(outputs.standing(workdir)).free
    if free < needed:
        raise UsageError(
            f"--workdir={workdir} has {free / 1e9:.3g} GB of free space, and checkpoints of "
            f"{size / 1e9:.3g} GB each need {needed / 1e9:.3g} GB there: free some, choose another "
            f"disk, or keep fewer with --config.checkpoint.keep (now {keep})"
        )


@contextlib.contextmanager
def opened(config: ConfigDict, workdir: pathlib.Path, extend: bool = False):
    """Makes the directory, writes its config.json, and keeps other processes out inside the block.

    Raises:
      UsageError: it cannot be written to, or another process has come first.
    """
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.held(workdir))
            check_config(config, workdir, extend)
            fresh = workdir / "config.json.new"
            fresh.write_text(configs.to_json(config))
            os.replace(fresh, workdir / "config.json")
        except OSError as error:
            raise UsageError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
        yield


def keep(files: dict[str, bytes], workdir: pathlib.Path) -> None:
    """Writes what a run keeps of its data."""
    for name, content in files.items():
        outputs.write(workdir / name, lambda fresh, content=content: fresh.write_bytes(content))


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Tells whether there is a checkpoint to go on from; all processes get process 0's answer."""
    return bool(first_text("yes" if saved_steps(workdir) and is_first() else ""))


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps that have a checkpoint, as this process sees them."""
    names = (place.name for place in (workdir / "checkpoints").glob("[0-9]*"))
    return sorted(int(name) for name in names if name.isdigit())


def last_evaluation(workdir: pathlib.Path, step: int) -> dict[str, float]:
    """Returns the recorded evaluation of a step on process 0; {} where there is none."""
    rows = read(workdir / "metrics.jsonl") if is_first() else []
    results = (
        {name: value for name, value in row.items() if name.startswith("eval/")}
        for row in rows
        if row["step"] == step
    )
    return next(filter(None, results), {})


def resume(checkpoints: Checkpoints, like):
    """Returns the newest readable state and its step; damaged newer ones are moved out of the way.

    Raises:
      UsageError: none can be read.
    """
    state, step, damaged = checkpoints.restore_newest(like)
    for bad in damaged:
        by_first(lambda bad=bad: checkpoints.set_aside(bad))
        checkpoints.reload()
        aside = checkpoints.aside(bad)
        say(f"checkpoint {bad} is damaged and was moved to {aside}; using step {step}")
    return state, step
