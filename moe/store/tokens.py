"""Keeps the tokenizer of a run of text in the run's directory, so that generation needs no data."""

import json
import pathlib

from moe import outputs
from moe.data.text import tokenizer
from moe.data.text.tokenizer import FILE, MARKS
from moe.errors import UsageError


def write(workdir: pathlib.Path, content: bytes, begin: int, end: int) -> None:
    """Writes a tokenizer.json and its marks."""
    outputs.write(workdir / FILE, lambda fresh: fresh.write_bytes(content))
    outputs.write_json(workdir / MARKS, {"begin": begin, "end": end})


def read(workdir: pathlib.Path) -> tokenizer.Tokenizer | None:
    """Returns the tokenizer of a run, None where its directory has none.

    Raises:
      UsageError: it is damaged, or the library that reads it is missing.
    """
    if not (workdir / FILE).is_file() or not (workdir / MARKS).is_file():
        return None
    try:
        marks = json.loads((workdir / MARKS).read_bytes())
        begin, end = int(marks["begin"]), int(marks["end"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{workdir / MARKS} is damaged ({error}): expected "
            '{"begin": NUMBER, "end": NUMBER}, the tokens around a document'
        ) from error
    return tokenizer.read(workdir / FILE, begin, end)
