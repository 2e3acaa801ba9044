"""Makes a folder that appears whole under its name, or not at all."""

import contextlib
import fcntl
import os
import pathlib
import shutil

from moe.errors import UsageError


@contextlib.contextmanager
def staging(out: pathlib.Path):
    """Gives a folder beside `out` which takes that name when the block ends without an error.

    What a killed process left is removed by the next one: the kernel's lock on it tells it from the
    folder of a process that still writes.

    Raises:
        UsageError: there is such a folder already, another process makes one, or it cannot be
            written.
    """
    out = pathlib.Path(os.path.abspath(out))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"--out={out} exists: delete it, or name another folder")
    made = out.with_name(f"{out.name}.incomplete")
    try:
        made.mkdir(parents=True, exist_ok=True)
        lock = os.open(made, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in made.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            try:
                yield made
                sync(made)
                os.rename(made, out)
                sync(out.parent)
            except BaseException:
                shutil.rmtree(made, ignore_errors=True)
                raise
        finally:
            os.close(lock)
    except BlockingIOError as error:
        raise UsageError(
            f"another process prepares {out}: wait until it has ended, or name another --out"
        ) from error
    except OSError as error:
        raise UsageError(
            f"cannot write {out} ({error.strerror or error}): pass a folder that can be written as "
            "--out=DIR, and look whether its disk is full"
        ) from error


def sync(path: pathlib.Path) -> None:
    """Waits until a file or a folder is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
