"""Opens the text of the running Python's own standard library: real text without a download.

About 10 MB in some 600 files, as bytes, one document a file; of these about one in twenty is held
out, chosen by the hash of its name. What it holds follows from the Python version (and from what a
distribution changed in it); the fingerprint tells two texts apart.
"""

import functools
import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Iterator

import numpy as np

from moe.data.text.source import TextSource, from_documents
from moe.data.text.tokenizer import Bytes
from moe.errors import UsageError

NAME = "stdlib"
HELD_OUT = 20  # one file in so many
# Tests are half of the text and say little; encodings are tables that differ from one another in a
# few lines: one held out would not be new. The others are no part of the library.
_SKIPPED = {"test", "tests", "idle_test", "encodings"}
_SKIPPED |= {"__pycache__", "site-packages", "dist-packages"}
_LARGEST = 1 << 18  # bytes of a file that is held out: pydoc's topics would be most of the test
# Of the names' hashes under several salts, this holds out a twentieth of the bytes, too.
_SALT = "text "
_FEWEST = 100  # files, below which this is no standard library


def open_stdlib(split: str) -> TextSource:
    """Opens "train" or "test", or a slice of one.

    Raises:
        UsageError: there is no such split, or this Python came without its text.
    """
    source, counts, tokens = _read(sysconfig.get_path("stdlib"))
    return from_documents(source, split, counts, tokens)


@functools.lru_cache(maxsize=1)
def _read(folder: str) -> tuple[TextSource, dict[str, int], np.ndarray]:
    """Returns the whole text, how many documents each split has, and the tokens."""
    splits: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    digest = hashlib.sha256()
    tokenizer = Bytes()
    begin = np.array([tokenizer.begin], np.uint16)
    for name, text in _files(pathlib.Path(folder)):
        digest.update(f"{name}\0{len(text)}\0".encode() + text)
        held_out = _share(name) < 1 / HELD_OUT and len(text) <= _LARGEST
        split = "test" if held_out else "train"
        splits[split].append(np.concatenate([begin, np.frombuffer(text, np.uint8)]))
    documents = [document for split in splits.values() for document in split]
    if len(documents) < _FEWEST or not splits["test"]:
        raise UsageError(
            f"this Python came without the text of its standard library ({len(documents)} files "
            f"in {folder}): prepare text of your own with `python -m moe.data.prepare text "
            "--files='DIR/**/*.txt' --out=DIR` and pass --config.data.name=DIR"
        )
    tokens = np.concatenate([*documents, begin])
    tokens.flags.writeable = False
    source = TextSource(
        name=NAME,
        split="all",
        tokens=tokens,
        token_bytes=tokenizer.token_bytes,
        begin=tokenizer.begin,
        end=tokenizer.end,
        tokenizer=tokenizer.content,
        fingerprint=digest.hexdigest(),
        offsets=np.cumsum([0, *map(len, documents)]),
    )
    return source, {split: len(those) for split, those in splits.items()}, tokens


def _files(folder: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Yields the name and text of each file, in order of the names; empty files are left out."""
    found = []
    for place, inner, files in os.walk(folder):
        # A build's own settings (config-3.x-PLATFORM) differ from machine to machine.
        inner[:] = [sub for sub in inner if sub not in _SKIPPED and not sub.startswith("config-")]
        found += [
            pathlib.Path(place, file)
            for file in files
            if file.endswith(".py") and not file.startswith("_sysconfigdata")
        ]
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in found):
        if text := path.read_bytes().replace(b"\r\n", b"\n"):
            yield name, text


def _share(name: str) -> float:
    """Returns a number in [0, 1) that is the name's own."""
    return int.from_bytes(hashlib.sha256((_SALT + name).encode()).digest()[:8]) / 2**64
