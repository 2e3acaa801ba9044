"""Counts the bytes that each token of a tokenizer.json stands for, for bits per byte."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moe.errors import UsageError

_SPACE = "\u2581"  # SentencePiece's mark of a space


def count_bytes(parsed: Mapping[str, Any], special: tuple[int, ...]) -> np.ndarray:
    """Returns the UTF-8 bytes of each token, int32 [V]; V is the largest number plus one.

    Args:
        parsed: a tokenizer.json.
        special: tokens that stand for no text, beside those that the file calls special.

    Raises:
        UsageError: the tokenizer is of a kind whose tokens have no bytes of their own.
    """
    vocabulary = parsed["model"].get("vocab", {})
    if isinstance(vocabulary, list):  # of a unigram model: pairs of a token and its score
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    added = {entry["id"]: entry for entry in parsed.get("added_tokens") or ()}
    count = _counter(parsed)
    counts = np.zeros(max([*vocabulary.values(), *added, *special]) + 1, np.int32)
    for token, number in vocabulary.items():
        counts[number] = count(token)
    for number, entry in added.items():
        counts[number] = 0 if entry.get("special") else len(entry["content"].encode())
    counts[list(special)] = 0
    return counts


def _counter(parsed: Mapping[str, Any]):
    kinds = set(_kinds(parsed.get("decoder")))
    if "ByteLevel" in kinds:
        return len  # a character stands for a byte
    if kinds & {"Metaspace", "ByteFallback"}:
        return _sentencepiece
    found = ", ".join(sorted(kinds)) or "none"
    raise UsageError(
        f"the tokenizer has the decoder {found}, whose tokens have no bytes of their own: expected "
        "byte-level pairs (GPT-2, Llama 3, Qwen) or SentencePiece's (Llama 2, Mixtral, Gemma)"
    )


def _kinds(decoder: Any) -> Iterator[str]:
    """Yields the kinds of a decoder and of those within it."""
    if isinstance(decoder, Mapping):
        yield decoder.get("type", "")
        for inner in decoder.get("decoders", ()):
            yield from _kinds(inner)


def _sentencepiece(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace(_SPACE, " ").encode())
