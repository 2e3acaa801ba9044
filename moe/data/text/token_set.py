"""Opens a token set that `python -m moe.data.prepare text` made, or says what is wrong with it."""

import hashlib
import json
import pathlib
import shlex
from typing import Any

import numpy as np

from moe.data.text.source import TextSource, check_tokens, from_documents
from moe.data.text.tokenizer import FILE
from moe.data.text.writer import BYTES, DOCUMENTS, FORMAT, MANIFEST, TOKENS, describe, token_type
from moe.errors import DataError

SMALL = 1 << 26  # bytes of a file that is hashed, and looked through, whenever it is opened


def open_set(folder: pathlib.Path, name: str, split: str, *, whole: bool = False) -> TextSource:
    """Opens one split of a prepared set.

    Args:
        folder: of the set.
        name: the set, as it was asked for.
        split: a split or a slice of one, "train[:90%]".
        whole: whether to compare the hash of large files too, which reads all of them.

    Raises:
        DataError: the set is damaged, or its files do not belong together.
        UsageError: it has no such split.
    """
    manifest = read_manifest(folder)
    for file, facts in manifest["files"].items():
        _check_file(folder / file, facts, whole, manifest)
    tokens = _map(folder / TOKENS, token_type(manifest["vocabulary"]))
    offsets = np.load(folder / DOCUMENTS)
    facts = json.dumps([manifest[key] for key in ("files", "splits", "begin", "end")])
    source = TextSource(
        name=name,
        split=split,
        tokens=tokens,
        token_bytes=np.load(folder / BYTES).astype(np.int32),
        begin=manifest["begin"],
        end=manifest["end"],
        tokenizer=(folder / FILE).read_bytes(),
        fingerprint=hashlib.sha256(facts.encode()).hexdigest(),
        offsets=offsets,
    )
    counts = {split: facts["documents"] for split, facts in manifest["splits"].items()}
    _check_parts(folder, source, counts, manifest)
    if whole or tokens.nbytes <= SMALL:
        check_tokens(source, tokens)
    return from_documents(source, split, counts, tokens)


def check_set(folder: pathlib.Path) -> dict[str, Any]:
    """Compares all hashes of a set, and looks at every token; returns its manifest.

    Raises:
        DataError: the set is damaged, or its files do not belong together.
    """
    manifest = read_manifest(folder)
    for split in manifest["splits"]:
        open_set(folder, str(folder), split, whole=True)
    return manifest


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        kind = manifest.get("format")
        if kind == FORMAT:
            for key in ("vocabulary", "begin", "end", "splits", "made"):
                manifest[key]
            for file in (TOKENS, DOCUMENTS, BYTES, FILE):
                manifest["files"][file]["bytes"], manifest["files"][file]["sha256"]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise _wrong(path, f"is damaged ({type(error).__name__}: {error})") from error
    if kind != FORMAT:
        raise _wrong(path, f"is of the format {kind!r}, not {FORMAT!r}")
    return manifest


def _check_file(path: pathlib.Path, facts: dict, whole: bool, manifest: dict) -> None:
    """Compares a file with what the manifest says of it: its size, and its hash where cheap."""
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise _wrong(path, f"has {size} bytes, and {facts['bytes']} in {MANIFEST}", manifest)
        if (whole or size <= SMALL) and describe(path)["sha256"] != facts["sha256"]:
            raise _wrong(path, f"does not have the hash of {MANIFEST}", manifest)
    except OSError as error:
        raise _wrong(path, f"cannot be read ({error.strerror})", manifest) from error


def _check_parts(folder: pathlib.Path, source: TextSource, counts: dict, manifest: dict) -> None:
    """Looks whether the files belong together, where each is as it was written."""
    if source.vocabulary != manifest["vocabulary"]:
        raise _wrong(folder / BYTES, f"is of {source.vocabulary} tokens", manifest)
    offsets = source.offsets
    right = len(offsets) == sum(counts.values()) + 1 and offsets[-1] + 1 == len(source.tokens)
    if not right or offsets[0] or (np.diff(offsets) < 1).any():
        raise _wrong(folder / DOCUMENTS, f"does not fit {TOKENS} and {MANIFEST}", manifest)


def _map(path: pathlib.Path, kind: np.dtype) -> np.ndarray:
    """Returns the numbers in a file, of which the system reads what is looked at."""
    return np.asarray(np.memmap(path, kind, "r"))


def _wrong(path: pathlib.Path, what: str, manifest: dict | None = None) -> DataError:
    arguments = (manifest or {}).get("made", {}).get("arguments") or ["text", "..."]
    command = f"python -m moe.data.prepare {shlex.join(arguments)}"
    return DataError(f"{path} {what}: delete {path.parent} and prepare it again with `{command}`")
