"""Text to tokens and back, whole and token by token."""

import json
import sys

import numpy as np
import pytest

from moe.data.text import bpe, open_text, open_tokenizer, tokenizer
from moe.data.text.token_bytes import count_bytes
from moe.errors import UsageError
from tests.moe.data.text.sources import needs_tokenizers

TEXT = "def naïve(x):\n    return '日本語 😀 e\u0301'  # <|endoftext|>\n" * 3


@pytest.fixture(scope="module")
def trained():
    pytest.importorskip("tokenizers")
    return bpe.train([TEXT, "hello there, hello world\n" * 9], 320)


@pytest.fixture(params=["bytes", "trained"])
def made(request):
    return tokenizer.Bytes() if request.param == "bytes" else request.getfixturevalue("trained")


def test_there_and_back(made):
    tokens = made.encode(TEXT)
    assert made.decode(tokens) == TEXT
    assert max(tokens) < made.vocabulary
    assert made.begin not in tokens, "text that quotes the mark is no mark"
    assert made.decode([made.begin, *tokens, made.end]) == TEXT


def test_bytes_of_tokens_add_up_to_the_text(made):
    assert made.token_bytes[made.encode(TEXT)].sum() == len(TEXT.encode())
    assert made.token_bytes[made.begin] == 0 and made.token_bytes.dtype == np.int32
    assert len(made.token_bytes) == made.vocabulary


def test_pieces_are_encoded_like_text(made):
    arrays = made.encode_pieces([TEXT.encode(), b"hello"])
    assert [array.tolist() for array in arrays] == [made.encode(TEXT), made.encode("hello")]


def test_a_stream_shows_whole_characters(made):
    stream, shown = made.stream(), []
    for token in [*made.encode(TEXT), made.end]:
        shown.append(stream.push(token))
        assert "\ufffd" not in shown[-1]
    assert "".join(shown) + stream.finish() == TEXT
    assert sum(map(bool, shown)) > len(shown) / 2, "it is shown as it comes"


def test_a_stream_goes_on_after_what_is_no_text(made):
    """A model that has learned little writes bytes that belong to no character."""
    tokens = np.random.default_rng(0).integers(1, made.vocabulary, 200).tolist()
    stream = made.stream()
    shown = [stream.push(token) for token in tokens]
    assert sum(map(bool, shown)) > 20
    if isinstance(made, tokenizer.Bytes):
        assert "".join(shown) + stream.finish() == made.decode(tokens)


def test_saved_and_read_again(made, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(made.content)
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        again = open_tokenizer(place)
        assert (again.begin, again.end, again.vocabulary) == (made.begin, made.end, made.vocabulary)
        assert again.encode(TEXT) == made.encode(TEXT)


def test_of_a_source():
    assert open_tokenizer(open_text("stdlib", "test")).vocabulary == 257


def test_training_is_deterministic(trained):
    assert bpe.train([TEXT, "hello there, hello world\n" * 9], 320).content == trained.content


def test_sentencepiece_counts_its_bytes():
    """A mark of a space is a byte, a fallback is one, a special token none."""
    vocabulary = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581the", "é", "<pad>"]
    parsed = {
        "model": {"vocab": {token: i for i, token in enumerate(vocabulary)}},
        "added_tokens": [
            {"id": 0, "content": "<unk>", "special": True},
            {"id": 6, "content": "<pad>", "special": False},
            {"id": 9, "content": "ab", "special": False},
        ],
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    }
    assert count_bytes(parsed, (1, 2)).tolist() == [0, 0, 0, 1, 4, 2, 5, 0, 0, 2]
    pairs = {**parsed, "model": {"vocab": [[token, -1.0] for token in vocabulary]}}
    assert count_bytes(pairs, (1, 2)).tolist() == [0, 0, 0, 1, 4, 2, 5, 0, 0, 2]
    with pytest.raises(UsageError, match="the decoder WordPiece, whose tokens have no bytes"):
        count_bytes({**parsed, "decoder": {"type": "WordPiece"}}, (1, 2))


def write(path, trained, **changes):
    path.write_text(json.dumps(json.loads(trained.content) | changes))
    return path


def test_marks_are_found_or_given(trained, tmp_path):
    entry = json.loads(trained.content)["added_tokens"][0]
    vocabulary = json.loads(trained.content)["model"]
    renamed = json.loads(json.dumps(vocabulary).replace("<|endoftext|>", "<|im|>"))
    path = write(
        tmp_path / "t.json", trained, added_tokens=[entry | {"content": "<|im|>"}], model=renamed
    )
    with pytest.raises(UsageError, match="pass its own as --begin=TOKEN"):
        tokenizer.read(path)
    with pytest.raises(UsageError, match="has no token no such"):
        tokenizer.read(path, "no such")
    assert tokenizer.read(path, end="<|im|>").begin == 0
    both = tokenizer.read(path, "<|im|>", "he")
    assert (both.begin, both.end) == (0, both.encode("he")[0])


@needs_tokenizers
@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"model": 3}', b"\xff\xfe"])
def test_what_is_no_tokenizer_is_one_line(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UsageError, match="is no tokenizer") as caught:
        open_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_library_is_one_line(trained, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_bytes(trained.content)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match="needs the package tokenizers: type `pip install"):
        open_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="train:300 needs the package tokenizers"):
        bpe.train([TEXT], 300)


def test_too_small_a_vocabulary():
    with pytest.raises(UsageError, match="train:256: expected 257 or more"):
        bpe.train([TEXT], 256)
