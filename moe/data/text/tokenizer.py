"""Turns text into tokens and back: bytes, or a tokenizer.json of the library `tokenizers`.

Bytes need no vocabulary and no library: 0..255, and 256 before each document. Their tokenizer.json
is one line of ours.
"""

import codecs
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from moe.data.text.token_bytes import count_bytes
from moe.errors import UsageError

BYTES = "bytes"
FILE = "tokenizer.json"
MARKS = "tokenizer_marks.json"  # in a run's directory: the tokens that begin and end a document
INSTALL = "type `pip install tokenizers` (the extra permoe[text])"
# The tokens that begin and end a document, in the tokenizers that people use.
_MARKS = (
    ("<|endoftext|>", "<|endoftext|>"),
    ("<s>", "</s>"),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<bos>", "<eos>"),
)
_HELD = 8  # tokens that may wait for the rest of a character, which has at most 4 bytes


class Tokenizer(Protocol):
    """Encodes text and decodes tokens.

    Attributes:
        content: of its tokenizer.json; equal for equal tokenizers.
        token_bytes: int32 [V], the UTF-8 bytes of each token; 0 for special ones.
        begin: the token before a document.
        end: the token after it; equal to `begin` where one does for both.
    """

    content: bytes
    token_bytes: np.ndarray
    begin: int
    end: int

    @property
    def vocabulary(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...
    def encode_pieces(self, pieces: Sequence[bytes]) -> list[np.ndarray]: ...
    def stream(self) -> "Stream": ...


class Stream(Protocol):
    """Decodes token by token, and holds back a character until all of its bytes are there."""

    def push(self, token: int) -> str: ...
    def finish(self) -> str: ...


class Bytes:
    """Encodes text as its UTF-8 bytes."""

    begin = end = 256
    vocabulary = 257

    def __init__(self):
        self.content = json.dumps({"permoe": BYTES, "begin": 256, "vocabulary": 257}).encode()
        self.token_bytes = np.ones(self.vocabulary, np.int32)
        self.token_bytes[self.begin] = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return _raw(tokens).decode(errors="replace")

    def encode_pieces(self, pieces: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(piece, np.uint8) for piece in pieces]

    def stream(self) -> Stream:
        return _ByteStream()


class _ByteStream:
    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(_raw([token]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def _raw(tokens: Iterable[int]) -> bytes:
    return bytes(int(token) for token in tokens if token < 256)


class Library:
    """Encodes by a tokenizer of the library `tokenizers`."""

    def __init__(self, content: bytes, begin: int, end: int, tokenizer: Any):
        self.content, self.begin, self.end = content, begin, end
        self.token_bytes = count_bytes(json.loads(content), special=(begin, end))
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # A document that quotes "<|endoftext|>" does not end there.
        tokenizer.encode_special_tokens = True

    @property
    def vocabulary(self) -> int:
        return len(self.token_bytes)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)

    def encode_pieces(self, pieces: Sequence[bytes]) -> list[np.ndarray]:
        texts = [piece.decode() for piece in pieces]
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in found]

    def stream(self) -> Stream:
        return _LibraryStream(self.decode)


class _LibraryStream:
    """Shows what the newest tokens add to the text of those before, which decide about spaces."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode, self._shown, self._held = decode, [], []

    def push(self, token: int) -> str:
        self._held.append(token)
        before = self._decode(self._shown)
        text = self._decode(self._shown + self._held)[len(before) :]
        if not text or (text.endswith("\ufffd") and len(self._held) < _HELD):
            return ""
        self._shown, self._held = self._held, []
        return text

    def finish(self) -> str:
        return self._decode(self._shown + self._held)[len(self._decode(self._shown)) :]


def parse(
    content: bytes, place: str, begin: int | str | None = None, end: int | str | None = None
) -> Tokenizer:
    """Returns the tokenizer that the content of a tokenizer.json describes.

    Args:
        content: of the file.
        place: its name, for errors.
        begin: the token before a document, its number or its text; None for `end`, or if that is
            None too, for a known one of the file.
        end: the token after a document, as `begin`.

    Raises:
        UsageError: it is no such file, has no such token, or a library is missing.
    """
    try:
        parsed = json.loads(content)
        if isinstance(parsed, dict) and parsed.get("permoe") == BYTES:
            return Bytes()
        if not isinstance(parsed, dict) or "model" not in parsed:
            raise ValueError("it has no 'model'")
        from tokenizers import Tokenizer as Read

        tokenizer = Read.from_str(content.decode())
    except ImportError as error:
        raise UsageError(f"reading {place} needs the package tokenizers: {INSTALL}") from error
    except Exception as error:  # the library raises bare ones
        raise UsageError(
            f"{place} is no tokenizer.json ({' '.join(str(error).split())[:200]}): expected a file "
            "that the library tokenizers saved"
        ) from error
    marks = (end if begin is None else begin, begin if end is None else end)
    return Library(content, *_find_marks(tokenizer, place, marks), tokenizer)


def fingerprint(content: bytes) -> str:
    """Returns what a config keeps of a tokenizer.json, `data.tokenizer`; "none" of an empty one."""
    return hashlib.sha256(content).hexdigest()[:16] if content else "none"


def _find_marks(tokenizer: Any, place: str, marks: tuple) -> tuple[int, int]:
    """Returns the numbers of the tokens that begin and end a document."""
    for pair in _MARKS if marks == (None, None) else (marks,):
        found = [tokenizer.token_to_id(mark) if isinstance(mark, str) else mark for mark in pair]
        if None not in found:
            return tuple(found)
    known = ", ".join(mark for pair in _MARKS for mark in dict.fromkeys(pair))
    raise UsageError(
        f"{place} has no token {' or '.join(dict.fromkeys(map(str, pair)))} to begin and end a "
        f"document with: pass its own as --begin=TOKEN and --end=TOKEN (known are {known})"
    )


def read(
    path: pathlib.Path, begin: int | str | None = None, end: int | str | None = None
) -> Tokenizer:
    """Reads a tokenizer.json; `begin` and `end` are as in `parse`, and so are the errors."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read the tokenizer {path} ({error.strerror}): pass bytes, "
            "PATH/tokenizer.json, or train:VOCABULARY such as train:8192"
        ) from error
    return parse(content, str(path), begin, end)
