"""The .bin files of nanoGPT-like speedruns, as one stream."""

import shutil

import numpy as np
import pytest

from moe.data.text import Mixture, eval_batches, open_text, open_tokenizer, shards
from moe.data.text.shards import BEGIN, Shards
from moe.errors import DataError, UsageError
from tests.moe.data.text.sources import needs_tokenizers


def write(path, tokens, magic=shards.MAGIC, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    documents = [[BEGIN, *rng.integers(0, BEGIN, rng.integers(1, 30))] for _ in range(30)]
    stream = np.concatenate(documents)
    for i, piece in enumerate(np.split(stream, [100, 101, 250])):  # documents run on
        write(tmp_path / f"set_train_{i:06}.bin", piece)
    write(tmp_path / "set_val_000000.bin", documents[3])
    np.save(tmp_path / "stream.npy", stream)
    return tmp_path


def test_files_are_one_stream(folder):
    source, stream = open_text(str(folder), "train"), np.load(folder / "stream.npy")
    np.testing.assert_array_equal(source.tokens[:], stream)
    for start in (0, 99, 100, 101, 249, 250, len(stream) - 1, len(stream)):
        for stop in (start, start + 1, start + 3, start + 300):
            np.testing.assert_array_equal(source.tokens[start:stop], stream[start:stop])
    batches = list(eval_batches(source, batch_size=4, seq_len=16))
    targets = np.concatenate([b["targets"][b["segments"] > 0] for b in batches])
    np.testing.assert_array_equal(targets, stream[1:])
    assert len(source.documents) == 31
    assert source.documents[-1] == len(stream)
    assert open_text(str(folder), "validation").fingerprint != source.fingerprint
    assert open_text(str(folder), "val").tokens[0] == BEGIN
    assert source.vocabulary == 50257 and not source.token_bytes.any()


def test_one_array_is_itself():
    array = np.arange(10)
    np.testing.assert_array_equal(Shards([array])[3:20], array[3:])


def test_without_its_tokenizer_no_text(folder):
    with pytest.raises(UsageError, match=r"has no tokenizer\.json: put GPT-2's into its folder"):
        open_tokenizer(open_text(str(folder), "train"))
    with pytest.raises(UsageError, match="different tokenizers"):
        Mixture(
            "", "train", (open_text(str(folder), "train"), open_text("stdlib", "train")), (1, 1)
        )


def test_another_tokenizer_is_one_line(folder):
    (folder / "tokenizer.json").write_bytes(open_text("stdlib", "train").tokenizer)
    with pytest.raises(DataError, match="has 257 tokens, not GPT-2's 50257"):
        open_text(str(folder), "train")


@needs_tokenizers
def test_gpt2s_tokenizer_tells_the_bytes(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = pre_tokenizers.ByteLevel.alphabet()
    words = [*letters, *(f"{i:x}\u0120" for i in range(BEGIN - len(letters)))]
    vocabulary = {word: i for i, word in enumerate([*words, "<|endoftext|>"])}
    model = Tokenizer(models.BPE(vocabulary, []))
    model.add_special_tokens(["<|endoftext|>"])
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    (folder / "tokenizer.json").write_text(model.to_str())
    source = open_text(str(folder), "train")
    expected = [len(word) for word in words] + [0]
    assert source.token_bytes.tolist() == expected
    (batch,) = eval_batches(open_text(str(folder), "val"), batch_size=1, seq_len=40)
    assert batch["bytes"].sum() == sum(expected[t] for t in batch["targets"][0] if t)
    assert open_tokenizer(source).decode(open_tokenizer(folder).encode("a b")) == "a b"


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"magic": 20240801}, r"is no file of tokens .\[20240801, 1\] in front.: expected magic"),
        ({"version": 2}, "is no file of tokens"),
        ({"count": 9}, "has 1030 bytes, and its 9 tokens need 1042: fetch it again"),
        ({"count": -1}, "fetch it again"),
    ],
)
def test_damage_is_one_line(tmp_path, wrong, message):
    write(tmp_path / "x_train_0.bin", [1, 2, 3], **wrong)
    with pytest.raises(DataError, match=message):
        open_text(str(tmp_path), "train")


def test_splits_are_by_name(folder, tmp_path):
    with pytest.raises(UsageError, match="no split 'test': expected one of train, validation"):
        open_text(str(folder), "test")
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(folder / "set_val_000000.bin", other / "x.bin")
    with pytest.raises(UsageError, match=r"the \.bin files with train or val in their name"):
        open_text(str(other), "train")
    (other / "x_train.bin").write_bytes(b"")
    with pytest.raises(DataError, match="is no file of tokens"):
        open_text(str(other), "train")
