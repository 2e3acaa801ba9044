"""Reads documents from text files: .txt and source code, .jsonl with a field, .gz of each.

Nothing is held whole but one document of a .jsonl line or between separators: a file that is one
document comes in pieces of a mebibyte, cut at the ends of lines and never within a character.
"""

import glob
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

from moe.errors import UsageError

PIECE = 1 << 20
_LOOKED_AT = 8192  # bytes of a document, where no text has a zero
_LINES = (".jsonl", ".ndjson")


class Piece(NamedTuple):
    """Holds a document or a part of one.

    Attributes:
        name: the file, and for one of several documents in it the line.
        first: whether a document begins here.
        text: at least one byte; UTF-8, but where the file is not.
        read: how many bytes of files on the disk were read since the piece before.
    """

    name: str
    first: bool
    text: bytes
    read: int


def find_files(patterns: Sequence[str]) -> list[str]:
    """Returns the files that match one of the patterns, in order of their names.

    Raises:
        UsageError: there are none.
    """
    found = set()
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        if os.path.isdir(pattern):
            raise UsageError(
                f"--files={pattern} is a folder: pass a pattern of its files, such as "
                f"--files='{os.path.join(pattern, '**', '*.txt')}'"
            )
        found |= {path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}
    if not found:
        raise UsageError(
            f"--files={' '.join(patterns)} matches no file: pass a pattern in quotes, such as "
            "--files='DIR/**/*.txt'"
        )
    return sorted(found)


def read_pieces(
    files: Sequence[str],
    *,
    field: str = "text",
    separator: str | None = None,
    utf8: bool,
    replace: bool,
) -> Iterator[Piece]:
    """Yields the documents of files in pieces; those without text are left out.

    Args:
        files: their names.
        field: of a line of a .jsonl file: its text.
        separator: the line between two documents of any other file; None for one each.
        utf8: whether bytes that are no UTF-8 are an error; else they are kept.
        replace: whether they are replaced by U+FFFD instead.

    Raises:
        UsageError: a file cannot be read, or does not hold what its name says.
    """
    for path in files:
        kind = os.path.splitext(path.removesuffix(".gz"))[1]
        done = 0
        try:
            with open(path, "rb") as raw, _decompressed(path, raw) as file:
                if kind in _LINES:
                    documents = _json_lines(path, file, field, replace)
                elif separator is None:
                    documents = [(path, _pieces(file))]
                else:
                    documents = _separated(path, file, separator.encode())
                for name, texts in documents:
                    texts = _checked(name, texts, utf8, replace)
                    for number, text in enumerate(texts):
                        before, done = done, raw.tell()
                        yield Piece(name, number == 0, text, done - before)
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"cannot read {path} ({reason}): mend it, or pass --files without it"
            ) from error


def _decompressed(path: str, raw: BinaryIO) -> BinaryIO:
    return gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """Yields a file in pieces, cut at the end of a line, else at the end of a character."""
    rest = b""
    while len(block := file.read(PIECE)) == PIECE:
        block = rest + block
        cut = block.rfind(b"\n") + 1 or _character(block)
        yield block[:cut]
        rest = block[cut:]
    yield rest + block


def _character(block: bytes) -> int:
    """Returns the end of the last character that is surely whole: before the last first byte."""
    end = len(block) - 1
    while end > max(0, len(block) - 4) and block[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _separated(path: str, file: BinaryIO, separator: bytes) -> Iterator[tuple[str, Iterable]]:
    """Yields what lies between lines that hold the separator alone, without lines around it."""
    lines, start = [], 1
    for number, line in enumerate(itertools.chain(file, [separator]), 1):
        if line.strip() != separator:
            lines.append(line)
            continue
        if text := b"".join(lines).strip(b"\r\n"):
            yield f"{path}:{start}", [text]
        lines, start = [], number + 1


def _json_lines(path: str, file: BinaryIO, field: str, replace: bool) -> Iterator:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        name = f"{path}:{number}"
        try:
            row = json.loads(line.decode(errors="replace") if replace else line)
        except ValueError as error:  # of JSON, or of UTF-8
            raise UsageError(
                f"{name} is no line of JSON ({error}): mend it, or pass --files without it"
            ) from error
        text = row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UsageError(
                f"{name} has no text under '{field}', only {keys[:200] or 'nothing'}: pass the "
                "name of its text as --field=NAME"
            )
        try:
            yield name, [text.encode(errors="replace" if replace else "strict")]
        except UnicodeEncodeError as error:
            raise UsageError(
                f"{name} holds half a character ({error.reason}): pass --errors=replace"
            ) from error


def _checked(name: str, pieces: Iterable[bytes], utf8: bool, replace: bool) -> Iterator[bytes]:
    """Yields the pieces that are not empty; looks at the first whether it is text at all."""
    offset = 0
    for piece in pieces:
        if offset < _LOOKED_AT and b"\0" in piece[: _LOOKED_AT - offset]:
            raise UsageError(
                f"{name} is no text (it has a zero byte): pass a --files pattern that leaves it "
                "out, or convert it to UTF-8"
            )
        offset += len(piece)
        if utf8 or replace:
            try:
                piece.decode()
            except UnicodeDecodeError as error:
                if not replace:
                    raise UsageError(
                        f"{name} is not UTF-8 (byte {offset - len(piece) + error.start}): convert "
                        "it, pass --errors=replace, or --tokenizer=bytes, which keeps any byte"
                    ) from error
                piece = piece.decode(errors="replace").encode()
        if piece:
            yield piece
