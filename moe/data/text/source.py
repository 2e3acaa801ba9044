"""Holds one split of a text as tokens: what every kind of text set is opened as.

A document begins with the token `begin`; where the tokenizer has another token `end`, it ends with
that one. With one token for both (bytes, GPT-2), the `begin` of the next document is also what the
end of this one looks like, so a model learns to end. Text itself never holds `begin`.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from moe.errors import DataError, UsageError

_BLOCK = 1 << 24
_SLICE = re.compile(r"(\w+)(?:\[(\d+%?)?:(\d+%?)?\])?")


class Tokens(Protocol):
    """Gives tokens by slice, from one array or from several files."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: slice) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, eq=False)
class TextSource:
    """Holds the tokens of one split of a set.

    Attributes:
        name: the set, as it was asked for.
        split: the split, as it was asked for.
        tokens: unsigned integers [N]. The last one is the `begin` of what would follow: it is a
            target and never an input.
        token_bytes: int32 [V], the UTF-8 bytes of each token; 0 for special ones, and for all
            where a set does not tell.
        begin: the token before each document.
        end: the token after each document; equal to `begin` where there is no other.
        tokenizer: the content of tokenizer.json; empty where a set has none.
        fingerprint: a hash that two sets share only if they hold the same.
        offsets: where the documents begin, and where the last one ends, int64 [documents + 1];
            None where they have to be looked for.
    """

    name: str
    split: str
    tokens: Tokens
    token_bytes: np.ndarray
    begin: int
    end: int
    tokenizer: bytes
    fingerprint: str
    offsets: np.ndarray | None = None

    @property
    def vocabulary(self) -> int:
        return len(self.token_bytes)

    @property
    def parts(self) -> tuple["TextSource", ...]:
        """Returns the sets of which this is a mixture: itself alone."""
        return (self,)

    @property
    def shares(self) -> tuple[float, ...]:
        return (1.0,)

    def windows(self, seq_len: int) -> int:
        """Returns how many windows of `seq_len` targets there are; the last may be shorter."""
        return -(-(len(self.tokens) - 1) // seq_len)

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """Finds where the documents begin, and where the last one ends: int64 [documents + 1]."""
        if self.offsets is not None:
            return self.offsets
        found = [
            np.flatnonzero(self.tokens[start : start + _BLOCK] == self.begin) + start
            for start in range(0, len(self.tokens), _BLOCK)
        ]
        closed = int(self.tokens[len(self.tokens) - 1 :][0]) == self.begin
        edges = [0] if closed else [0, len(self.tokens)]
        return np.unique(np.concatenate([edges, *found]))

    def document(self, index: int) -> np.ndarray:
        """Returns the tokens of a document without those that begin and end it."""
        piece = self.tokens[int(self.documents[index]) : int(self.documents[index + 1])]
        return piece[(piece != self.begin) & (piece != self.end)]


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Holds several sets of one tokenizer, and how often each is shown in training.

    Attributes:
        name: "A:0.7,B:0.3", as it was asked for.
        split: the split, as it was asked for.
        parts: the sets.
        shares: the weight of each; only their ratios count.
    """

    name: str
    split: str
    parts: tuple[TextSource, ...]
    shares: tuple[float, ...]

    def __post_init__(self):
        first = self.parts[0]
        for part in self.parts[1:]:
            if _tokenizer(part) != _tokenizer(first):
                raise UsageError(
                    f"'{first.name}' ({first.vocabulary} tokens) and '{part.name}' "
                    f"({part.vocabulary}) of the mixture have different tokenizers: prepare them "
                    f"with one, --tokenizer=DIR/tokenizer.json of the other set"
                )

    @property
    def token_bytes(self) -> np.ndarray:
        return self.parts[0].token_bytes

    @property
    def vocabulary(self) -> int:
        return self.parts[0].vocabulary

    @property
    def begin(self) -> int:
        return self.parts[0].begin

    @property
    def end(self) -> int:
        return self.parts[0].end

    @property
    def tokenizer(self) -> bytes:
        return self.parts[0].tokenizer

    @property
    def fingerprint(self) -> str:
        pairs = zip(self.parts, self.shares, strict=True)
        text = ",".join(f"{part.fingerprint}:{share!r}" for part, share in pairs)
        return hashlib.sha256(text.encode()).hexdigest()


def _tokenizer(source: TextSource) -> tuple:
    return source.tokenizer, source.vocabulary, source.begin, source.end


def choose_documents(name: str, split: str, counts: Mapping[str, int]) -> range:
    """Returns the documents of a split, or of a slice of one: "train", "train[:90%]", "test[5:]".

    Args:
        name: the set, for the error.
        split: what was asked for.
        counts: how many documents each split has, in the order in which they lie.

    Raises:
        UsageError: there is no such split, or nothing is in it.
    """
    match = _SLICE.fullmatch(split)
    if not match or match[1] not in counts:
        raise UsageError(
            f"text set '{name}' has no split '{split}': expected one of {', '.join(counts)}, or a "
            "slice of its documents such as train[:90%]"
        )
    names = list(counts)
    first = sum(counts[other] for other in names[: names.index(match[1])])
    count = counts[match[1]]

    def place(text: str | None, default: int) -> int:
        if text is None:
            return default
        number = int(text.rstrip("%"))
        return min(count, count * number // 100 if text.endswith("%") else number)

    chosen = range(first + place(match[2], 0), first + place(match[3], count))
    if not chosen:
        raise UsageError(
            f"split '{split}' of text set '{name}' is empty ({match[1]} has {count} documents): "
            "pass a longer slice"
        )
    return chosen


def from_documents(
    whole: TextSource, split: str, counts: Mapping[str, int], tokens: np.ndarray
) -> TextSource:
    """Returns one split of a set whose documents lie one after the other, split by split.

    Args:
        whole: the set; its `offsets` are of all its documents.
        split: what was asked for.
        counts: how many documents each split has.
        tokens: of all documents, and a last `begin`.

    Raises:
        UsageError: there is no such split, or nothing is in it.
    """
    chosen = choose_documents(whole.name, split, counts)
    offsets = whole.offsets[chosen.start : chosen.stop + 1]
    return dataclasses.replace(
        whole,
        split=split,
        tokens=tokens[int(offsets[0]) : int(offsets[-1]) + 1],
        offsets=offsets - offsets[0],
    )


def check_tokens(source: TextSource, tokens: np.ndarray) -> None:
    """Raises where a token is none of the vocabulary.

    Raises:
        DataError: the set was made with another tokenizer.
    """
    largest = int(tokens.max(initial=0))
    if largest >= source.vocabulary:
        raise DataError(
            f"text set '{source.name}' holds the token {largest}, and its tokenizer has "
            f"{source.vocabulary}: its tokens are of another tokenizer; prepare it again"
        )
