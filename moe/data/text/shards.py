"""Opens a folder of the .bin files that nanoGPT-like speedruns train from, as they are.

Each begins with 256 int32 (a magic number, the version 1, how many tokens follow), then come uint16
tokens of GPT-2, with 50256 before each document. A document may run on in the next file. Files with
`train` in their name are the split "train", those with `val` are "validation".
"""

import bisect
import hashlib
import itertools
import pathlib
from collections.abc import Sequence

import numpy as np

from moe.data.text import tokenizer
from moe.data.text.source import TextSource
from moe.errors import DataError, UsageError

MAGIC, VERSION = 20240520, 1
HEADER = 1024  # bytes
VOCABULARY = 50257  # of GPT-2
BEGIN = 50256
SPLITS = {"train": "train", "validation": "val", "val": "val"}
_SAMPLE = 1 << 16  # bytes at each end of a file, by which the set is known again


class Shards:
    """Gives tokens by slice from several arrays, as if they were one."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self._arrays = arrays
        self._ends = list(itertools.accumulate(map(len, arrays)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, _ = index.indices(len(self))
        pieces = []
        for place in range(bisect.bisect_right(self._ends, start), len(self._arrays)):
            array = self._arrays[place]
            before = self._ends[place] - len(array)
            if before >= stop:
                break
            pieces.append(array[max(start - before, 0) : stop - before])
        if not pieces:
            return self._arrays[0][:0]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def open_shards(folder: pathlib.Path, name: str, split: str) -> TextSource:
    """Opens one split of a folder of .bin files.

    GPT-2's tokenizer.json, if it lies in the folder, tells the bytes of each token, without which
    there are no bits per byte, and lets a model that was trained on the set write text.

    Raises:
        DataError: a file is none of this kind, or cut short.
        UsageError: there is no such split.
    """
    marks = {mark: [] for mark in SPLITS.values()}
    for path in sorted(folder.glob("*.bin")):
        for mark, paths in marks.items():
            if mark in path.name:
                paths.append(path)
    there = [key for key, mark in SPLITS.items() if key != "val" and marks[mark]]
    if split not in SPLITS or not marks[SPLITS[split]]:
        raise UsageError(
            f"text set '{name}' has no split '{split}': expected one of {', '.join(there)} (of "
            f"the .bin files with train or val in their name in {folder})"
        )
    arrays, digest = [], hashlib.sha256()
    for path in marks[SPLITS[split]]:
        arrays.append(_open(path))
        digest.update(f"{path.name} {len(arrays[-1])}".encode())
        digest.update(arrays[-1][: _SAMPLE // 2].tobytes() + arrays[-1][-_SAMPLE // 2 :].tobytes())
    content, token_bytes = _tokenizer(folder)
    return TextSource(
        name=name,
        split=split,
        tokens=arrays[0] if len(arrays) == 1 else Shards(arrays),
        token_bytes=token_bytes,
        begin=BEGIN,
        end=BEGIN,
        tokenizer=content,
        fingerprint=digest.hexdigest(),
    )


def _open(path: pathlib.Path) -> np.ndarray:
    """Returns the tokens of one file."""
    try:
        size = path.stat().st_size
        header = np.fromfile(path, "<i4", 256)
        if len(header) < 256 or header[0] != MAGIC or header[1] != VERSION:
            raise DataError(
                f"{path} is no file of tokens ({header[:2].tolist()} in front): expected magic "
                f"number {MAGIC} and version {VERSION}; move it away, or prepare text of your own "
                "with `python -m moe.data.prepare text`"
            )
        count = int(header[2])
        if count < 1 or size != HEADER + 2 * count:
            raise DataError(
                f"{path} has {size} bytes, and its {count} tokens need {HEADER + 2 * count}: "
                "fetch it again"
            )
        return np.asarray(np.memmap(path, "<u2", "r", HEADER))
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}): allow it") from error


def _tokenizer(folder: pathlib.Path) -> tuple[bytes, np.ndarray]:
    path = folder / tokenizer.FILE
    if not path.exists():
        return b"", np.zeros(VOCABULARY, np.int32)
    read = tokenizer.read(path)
    if (read.vocabulary, read.begin) != (VOCABULARY, BEGIN):
        raise DataError(
            f"{path} has {read.vocabulary} tokens, not GPT-2's {VOCABULARY}: put GPT-2's there"
        )
    return read.content, read.token_bytes
