"""A set whose files were changed, cut or exchanged is one line that says what to type."""

import json
import shutil

import numpy as np
import pytest

from moe.data import prepare
from moe.data.text import open_text, token_set, train_batches, writer
from moe.errors import DataError, UsageError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"text number {number}")
    arguments = [f"--files={folder}/*.txt", f"--out={folder}/set", "--test_share=0.3"]
    assert prepare.main(["text", *arguments]) == 0
    return folder / "set"


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "set")


def change(manifest, *keys, value):
    content = json.loads(manifest.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    manifest.write_text(json.dumps(content))


def fit(folder, file):
    """Makes the manifest believe a file that was changed."""
    change(folder / writer.MANIFEST, "files", file, value=writer.describe(folder / file))


def cut(folder):
    path = folder / writer.TOKENS
    path.write_bytes(path.read_bytes()[:-7])


def flip(folder):
    path = folder / writer.TOKENS
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)


def empty(folder):
    (folder / writer.TOKENS).write_bytes(b"")


def other_tokens(folder):
    path = folder / writer.TOKENS
    path.write_bytes((np.fromfile(path, "<u2") + 7000).astype("<u2").tobytes())
    fit(folder, writer.TOKENS)


def other_documents(folder):
    np.save(folder / writer.DOCUMENTS, np.arange(21))
    fit(folder, writer.DOCUMENTS)


def other_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"permoe": "others", "begin": 256, "vocabulary": 257}')


def other_vocabulary(folder):
    np.save(folder / writer.BYTES, np.ones(300, np.int32))
    fit(folder, writer.BYTES)


DAMAGE = {
    cut: r"tokens.bin has \d+ bytes, and \d+ in manifest.json",
    empty: "tokens.bin has 0 bytes",
    flip: "tokens.bin does not have the hash of manifest.json",
    other_tokens: "holds the token 7256, and its tokenizer has 257",
    other_documents: "documents.npy does not fit tokens.bin and manifest.json",
    other_tokenizer: "tokenizer.json ",
    other_vocabulary: "token_bytes.npy is of 300 tokens",
    lambda f: (f / writer.DOCUMENTS).unlink(): "documents.npy cannot be read .No such file",
    lambda f: (f / writer.MANIFEST).write_text("{"): "manifest.json is damaged",
    lambda f: (f / writer.MANIFEST).write_text("[]"): "manifest.json is damaged",
    lambda f: change(f / writer.MANIFEST, "format", value="permoe tokens 9"): "'permoe tokens 9'",
    lambda f: change(f / writer.MANIFEST, "files", value={}): "manifest.json is damaged",
}


@pytest.mark.parametrize("damage, message", DAMAGE.items())
def test_damage_is_one_line(copy, damage, message):
    damage(copy)
    with pytest.raises(DataError, match=message) as caught:
        open_text(str(copy), "train")
    assert "\n" not in str(caught.value) and "prepare it again" in str(caught.value)


@pytest.mark.parametrize("damage", [flip, other_tokens])
def test_large_files_are_compared_when_asked(copy, damage, monkeypatch, capsys):
    damage(copy)
    monkeypatch.setattr(token_set, "SMALL", 10)
    source = open_text(str(copy), "train")
    assert prepare.main(["text", f"--check={copy}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    if damage is other_tokens:  # then the first batch finds it
        with pytest.raises(DataError, match="holds the token"):
            next(train_batches(source, batch_size=2, seed=0, start_step=0, seq_len=8))


def test_it_says_what_to_type(copy):
    flip(copy)
    with pytest.raises(DataError, match=r"again with `python -m moe.data.prepare text '--files="):
        open_text(str(copy), "train")


def test_splits_and_places(made, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no split 'validation': expected one of train, test"):
        open_text(str(made), "validation")
    monkeypatch.chdir(tmp_path)
    assert open_text("set", "test", str(made.parent)).split == "test"
    with pytest.raises(UsageError, match="there is no text set 'sett' here, nor in"):
        open_text("sett", "train", str(made.parent))
    with pytest.raises(UsageError, match=r"no text set .it has neither manifest.json nor .bin"):
        open_text(str(made.parent), "train")
