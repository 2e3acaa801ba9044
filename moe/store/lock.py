"""One writer in the directory of a run: a lock that ends with the process that holds it.

The kernel keeps the lock (flock) and not the file, whose text only says who holds it: a process
that is killed leaves none behind. NFS, Lustre and other shared file systems keep it for all hosts;
FUSE, by which buckets are mounted, often for one host alone, and some have no locks: a line says
so, and the run goes on.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import time

from moe.errors import UsageError
from moe.screen import say

FILE = "lock"
PATIENCE = 1.0  # seconds for which a lock may be held by one who only looks
ALONE = "make sure that no other host trains in it meanwhile"


@contextlib.contextmanager
def held(workdir: pathlib.Path):
    """Holds the lock of a run inside the block.

    Raises:
      UsageError: another process holds it.
    """
    file = os.open(workdir / FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        end = time.monotonic() + PATIENCE
        while not (taken := _take(file, fcntl.LOCK_EX, workdir)) and time.monotonic() < end:
            time.sleep(0.05)
        if not taken:
            raise _busy(file, workdir)
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        text = f"process {os.getpid()} on {socket.gethostname()} since {now}".encode()
        os.ftruncate(file, os.pwrite(file, text, 0))
        if (kind := _file_system(workdir)).startswith("fuse"):
            say(f"{workdir} is mounted by {kind}, whose locks may hold on one host only: {ALONE}")
        yield
        os.ftruncate(file, 0)
    finally:
        os.close(file)


def check(workdir: pathlib.Path) -> None:
    """Looks whether a process trains in the directory, and touches nothing.

    Raises:
      UsageError: one does.
    """
    with contextlib.suppress(FileNotFoundError):
        file = os.open(workdir / FILE, os.O_RDONLY)
        try:
            if not _take(file, fcntl.LOCK_SH, None):
                raise _busy(file, workdir)
        finally:
            os.close(file)


def _take(file: int, kind: int, workdir: pathlib.Path | None) -> bool:
    """Takes the lock unless another has it; where there are no locks, says so if asked to."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        if workdir:
            say(f"the file system of {workdir} has no locks ({error.strerror}): {ALONE}")
    return True


def _busy(file: int, workdir: pathlib.Path) -> UsageError:
    holder = os.pread(file, 1000, 0).decode(errors="replace") or "another process"
    return UsageError(
        f"--workdir={workdir} is in use: {holder} trains there; wait until it has ended, stop it, "
        "or choose another --workdir"
    )


def _file_system(place: pathlib.Path) -> str:
    """Returns the type of the file system that a path is on, "" where Linux does not tell."""
    place, best, kind = place.resolve(), "", ""
    with contextlib.suppress(OSError), open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            fields = line.split()
            mount = fields[4]
            if place.is_relative_to(mount) and len(mount) >= len(best):
                best, kind = mount, fields[fields.index("-") + 1]
    return kind
