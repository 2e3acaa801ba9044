"""Small texts for the tests."""

import importlib.util

import numpy as np
import pytest

from moe.data.text import TextSource
from moe.data.text.tokenizer import Bytes

needs_tokenizers = pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None, reason="needs permoe[text]"
)


def random_documents(count: int = 40, longest: int = 30, seed: int = 0) -> list[list[int]]:
    """Returns documents of 1..longest bytes; the first token of each tells its number."""
    rng = np.random.default_rng(seed)
    return [
        [number, *rng.integers(0, 256, rng.integers(0, longest)).tolist()]
        for number in range(count)
    ]


def make_source(documents, name: str = "made", end: int = 256, begin: int = 256) -> TextSource:
    """Returns a source of these documents."""
    marks = [end] if end != begin else []
    whole = [[begin, *document, *marks] for document in documents]
    token_bytes = np.ones(258, np.int32)
    token_bytes[256:] = 0
    return TextSource(
        name=name,
        split="train",
        tokens=np.array([token for document in whole for token in document] + [begin], np.uint16),
        token_bytes=token_bytes,
        begin=begin,
        end=end,
        tokenizer=Bytes().content,
        fingerprint=name,
        offsets=np.cumsum([0, *map(len, whole)]),
    )
