"""The records of a run: metrics.jsonl, and the same scalars as TensorBoard events."""

import contextlib
import json
import math
import os
import pathlib
import socket
import struct
import time

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from moe.errors import UsageError
from moe.hosts.distributed import is_first
from moe.screen import say


class Records:
    """Appends scalars; opened again at `step`, forgets what came after it.

    A run that was killed after its last checkpoint repeats some steps, whose records would
    otherwise stand twice. Of several processes only the first writes. Everything is written in the
    caller's thread: a writer's thread that dies on a full disk would let the caller wait for ever.

    Raises:
      UsageError: metrics.jsonl cannot be read or written, or holds what is no record.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        self._writes = is_first()
        self.last = {}  # every scalar that stands at `step`
        if not self._writes:
            return
        self._path = workdir / "metrics.jsonl"
        keep = 0  # bytes
        for row, end in _rows(self._path):
            if row["step"] > step:
                break
            keep = end
            if row["step"] == step:
                self.last |= row
        try:
            self._metrics = _Appended(self._path, keep)
        except OSError as error:
            raise _unwritable(self._path, error) from error
        self._events = _Events(workdir / "events", step)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._writes:
            self._metrics.close()
            self._events.close()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Adds a row; what is not finite, and no number of JSON, stands as null.

        Raises:
          UsageError: the disk is full or gone; the file has then no part of the row.
        """
        if not self._writes:
            return
        row = {name: v if math.isfinite(v) else None for name, v in scalars.items()}
        line = json.dumps({"step": step, **row}, allow_nan=False) + "\n"
        try:
            self._metrics.append(line.encode())
        except OSError as error:
            raise _unwritable(self._path, error) from error
        self._events.add(step, {name: v for name, v in row.items() if v is not None})


class _Events:
    """TensorBoard's file of events; what cannot be written to it is given up with one line."""

    def __init__(self, directory: pathlib.Path, step: int):
        self._directory, self._file, self._told = directory, None, False
        try:
            directory.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
            self._file = _Appended(directory / name)
        except OSError as error:
            self._give_up(error)
        self._append(Event(file_version="brain.Event:2"))
        # TensorBoard forgets the events of later steps, which will be repeated.
        self._append(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, scalars: dict[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=v) for name, v in scalars.items()]
        self._append(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _append(self, event: Event) -> None:
        if not self._file:
            return
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        parts = [length, _checksum(length), data, _checksum(data)]
        try:
            self._file.append(b"".join(parts))
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if not self._told:
            say(f"events for TensorBoard are missing, {self._directory}: {error.strerror}")
        self._told = True


class _Appended:
    """A file to which each piece is added whole or not at all, however full the disk is."""

    def __init__(self, path: pathlib.Path, size: int | None = None):
        """Opens `path`, cut to its first `size` bytes; None for all of them."""
        self._file = path.open("ab", buffering=0)
        if size is not None:
            self._file.truncate(size)
        self._size = self._file.seek(0, os.SEEK_END)

    def append(self, data: bytes) -> None:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise
        self._size += len(data)

    def close(self) -> None:
        self._file.close()


def read(path: pathlib.Path) -> list[dict]:
    """Returns the rows of a metrics.jsonl; a last line cut off by a kill is left out.

    Raises:
      UsageError: it cannot be read, or a line is no record.
    """
    return [row for row, _ in _rows(path)]


def _rows(path: pathlib.Path) -> list[tuple[dict, int]]:
    """Returns each row of a metrics.jsonl, and the size of the file up to its end."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(
            f"cannot read {path} ({error.strerror}): a run keeps its records there; move it away"
        ) from error
    rows, end = [], 0
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        end += len(line)
        rows.append((_parse(line, f"{path}, line {number}"), end))
    return rows


def _parse(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row["step"], int):
            return row
    except (ValueError, KeyError):
        pass
    raise UsageError(f"{where}, is no record of a run: delete this line, or put back a copy")


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))


def _unwritable(path: pathlib.Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot write {path} ({error.strerror}): when there is room and permission, the same "
        "command continues from the last checkpoint"
    )
