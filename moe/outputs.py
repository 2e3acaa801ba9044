"""Checks, before the work, files that a program writes at its end; and writes them whole."""

import json
import os
import pathlib
import shutil
from collections.abc import Callable

from moe.errors import UsageError

ROOM = 1_000_000  # bytes; more than any of these files has


def check(file: pathlib.Path, name: str = "") -> None:
    """Looks whether `file` can be written, or made with its directories; touches nothing.

    Args:
      name: what the user typed, for the error; "" for the path.

    Raises:
      UsageError: a directory, a file in the way, a permission or a full disk forbids it.
    """
    name = name or str(file)
    try:
        exists = file.exists()
    except OSError as error:  # a name too long, a directory that may not be looked at
        raise UsageError(f"cannot write {name}: {error.strerror}") from None
    if exists and not file.is_file():
        what = "a directory" if file.is_dir() else "no regular file"
        raise UsageError(f"cannot write {name}: {file} is {what}; move it away or name another")
    parent = standing(file.parent)
    if not parent.is_dir():
        raise UsageError(f"cannot write {name}: {parent} is no directory; move it away")
    if not os.access(file if exists else parent, os.W_OK) or not os.access(parent, os.W_OK):
        raise UsageError(f"cannot write {name}: no permission to write in {parent}; grant it")
    if shutil.disk_usage(parent).free < ROOM:
        raise UsageError(f"cannot write {name}: the disk of {parent} is full; free some space")


def standing(place: pathlib.Path) -> pathlib.Path:
    """Returns a directory, or the one above it, at any height, that exists."""
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return place


def write(file: pathlib.Path, save: Callable[[pathlib.Path], None]) -> None:
    """Makes the file's directory and calls `save` with a path whose file then takes its place.

    Raises:
      UsageError: the system refuses; what was there before still is.
    """
    fresh = file.with_name(f"new.{file.name}")  # matplotlib knows the format by the ending
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save(fresh)
        os.replace(fresh, file)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise UsageError(f"cannot write {file}: {error.strerror or error}") from error


def write_json(file: pathlib.Path, content: dict | list) -> None:
    """Writes `content` as indented JSON; errors as in `write`."""
    text = json.dumps(content, indent=2) + "\n"
    write(file, lambda fresh: fresh.write_text(text))
