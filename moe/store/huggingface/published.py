"""Reads the config.json of a published model, whose values may be anything."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NoReturn

from moe.errors import UsageError

FILE = "config.json"


def read(directory: pathlib.Path) -> dict[str, Any]:
    """Returns a directory's config.json.

    Raises:
      UsageError: there is none, or it is no table.
    """
    file = directory / FILE
    try:
        found = json.loads(file.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it is no table")
        return found
    except OSError as error:
        raise UsageError(
            f"cannot read {file} ({error.strerror}): pass the directory of a model, with "
            "config.json and safetensors, as --from=DIR"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is no config.json ({error}): fetch it again") from error


def count(p: Mapping[str, Any], key: str) -> int:
    """Returns a whole number above 0.

    Raises:
      UsageError: it is something else, or not there.
    """
    value = p.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        refuse(key, value, "a whole number above 0")
    return value


def number(p: Mapping[str, Any], key: str) -> float:
    """Returns a number.

    Raises:
      UsageError: it is something else, or not there.
    """
    value = p.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        refuse(key, value, "a number")
    return float(value)


def refuse(key: str, value: Any, expected: str) -> NoReturn:
    """Raises UsageError: a value of config.json is none that can be computed here."""
    said = format(json.dumps(value), ".80")
    raise UsageError(f"config.json says {key}={said}: expected {expected}, no other is known here")
