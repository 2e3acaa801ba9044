"""Writes a token set: a folder that appears whole under its name, or not at all.

    tokens.bin       the tokens, uint16 or, with more than 65,536 of them, uint32, little-endian
    documents.npy    where each document begins in it, and where the last one ends, int64
    token_bytes.npy  the UTF-8 bytes of each token, 0 for special ones, int32 [V]
    tokenizer.json   what made them
    manifest.json    sizes, splits, and a hash of each file

The splits lie one after the other. A document is `begin`, its text, and `end` where that is another
token; after the last one of all stands one more `begin`, which the last is to predict.
"""

import array
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping

import numpy as np

from moe.data.staging import sync
from moe.data.text.tokenizer import FILE, Tokenizer
from moe.errors import UsageError

FORMAT = "permoe tokens 1"
MANIFEST = "manifest.json"
TOKENS, DOCUMENTS, BYTES = "tokens.bin", "documents.npy", "token_bytes.npy"
FILES = (TOKENS, DOCUMENTS, BYTES, FILE)
# Where the tokens of each split are gathered; the first file is the beginning of the whole.
PARTS = {"train": TOKENS, "validation": "validation.part", "test": "test.part"}


def token_type(vocabulary: int) -> np.dtype:
    """Returns how tokens lie in the file."""
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")


class Writer:
    """Adds documents to the splits of a set in a folder of its own."""

    def __init__(self, folder: pathlib.Path, tokenizer: Tokenizer):
        self._folder, self._tokenizer = folder, tokenizer
        self._type = token_type(tokenizer.vocabulary)
        self._files = {split: open(folder / PARTS[split], "wb") for split in PARTS}  # noqa: SIM115
        self._begins = {split: array.array("q") for split in PARTS}
        self.tokens = dict.fromkeys(PARTS, 0)
        self.bytes = dict.fromkeys(PARTS, 0)

    def documents(self, split: str) -> int:
        """Returns how many documents a split has so far."""
        return len(self._begins[split])

    def add(self, split: str, name: str, tokens: np.ndarray, *, first: bool, size: int) -> None:
        """Adds a document, or where it is not the first piece of one, more of the last document.

        Args:
            split: one of train, validation, test.
            name: of the document, for the error.
            tokens: of its text.
            first: whether a document begins.
            size: of the text in bytes.

        Raises:
            UsageError: the text holds the token that begins documents.
        """
        if (tokens == self._tokenizer.begin).any():
            raise UsageError(
                f"{name} holds token {self._tokenizer.begin}, which begins documents: pass a token "
                "that no text has as --begin=TOKEN"
            )
        if first:
            self._close(split)
            self._begins[split].append(self.tokens[split])
            self._write(split, np.array([self._tokenizer.begin]))
        self._write(split, tokens)
        self.bytes[split] += size

    def _close(self, split: str) -> None:
        """Ends the last document of a split, where a token of its own does."""
        if self._begins[split] and self._tokenizer.end != self._tokenizer.begin:
            self._write(split, np.array([self._tokenizer.end]))

    def _write(self, split: str, tokens: np.ndarray) -> None:
        self._files[split].write(tokens.astype(self._type).tobytes())
        self.tokens[split] += len(tokens)

    def finish(self, made: Mapping[str, object]) -> dict:
        """Writes the other files of the set; returns its manifest.

        Args:
            made: what the manifest says of where the set comes from.
        """
        begins, before = [], 0
        for split, file in self._files.items():
            self._close(split)
            file.close()
            begins.append(np.frombuffer(self._begins[split], np.int64) + before)
            before += self.tokens[split]
        with open(self._folder / TOKENS, "ab") as whole:
            for split in list(PARTS)[1:]:
                with open(self._folder / PARTS[split], "rb") as part:
                    shutil.copyfileobj(part, whole, 1 << 20)
                os.unlink(self._folder / PARTS[split])
            whole.write(np.array([self._tokenizer.begin], self._type).tobytes())
        np.save(self._folder / DOCUMENTS, np.concatenate([*begins, [before]]).astype("<i8"))
        np.save(self._folder / BYTES, self._tokenizer.token_bytes.astype("<i4"))
        (self._folder / FILE).write_bytes(self._tokenizer.content)
        manifest = {
            "format": FORMAT,
            "vocabulary": self._tokenizer.vocabulary,
            "begin": self._tokenizer.begin,
            "end": self._tokenizer.end,
            "splits": {
                split: {
                    "documents": self.documents(split),
                    "tokens": self.tokens[split],
                    "bytes": self.bytes[split],
                }
                for split in PARTS
                if self.documents(split)
            },
            "files": {name: describe(self._folder / name) for name in FILES},
            "made": dict(made),
        }
        (self._folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for name in (*FILES, MANIFEST):
            sync(self._folder / name)
        return manifest


def describe(path: pathlib.Path) -> dict[str, int | str]:
    """Returns the size of a file and the hash of its content."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
