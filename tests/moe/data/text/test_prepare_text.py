"""Files to a token set and back; a preparation that is killed, or given what it cannot use."""

import gzip
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moe.data import prepare
from moe.data.staging import staging
from moe.data.text import documents, open_text, open_tokenizer, writer
from moe.errors import UsageError
from tests.moe.data.text.sources import needs_tokenizers

ALL = ("--test_share=0",)


def run(*arguments) -> int:
    return prepare.main(["text", *map(str, arguments)])


def texts(folder, split: str = "train") -> list[str]:
    source, tokenizer = open_text(str(folder), split), open_tokenizer(folder)
    count = len(source.documents) - 1
    return [tokenizer.decode(source.document(i)) for i in range(count)]


@pytest.fixture
def files(tmp_path):
    """A text of each kind."""
    folder = tmp_path / "files"
    folder.mkdir()
    rows = [{"text": "één"}, {"text": ""}, {"text": "two\nlines", "id": 3}]
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    (folder / "a.txt").write_text("plain text")
    (folder / "b.py").write_text("x = 1\n")
    (folder / "c.jsonl").write_text(lines)
    (folder / "d.txt.gz").write_bytes(gzip.compress(b"packed"))
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "f.py").touch()
    return folder


EXPECTED = ["plain text", "x = 1\n", "één", "two\nlines", "packed", "één", "two\nlines"]


@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("train:300", marks=needs_tokenizers)])
def test_every_kind_of_file(files, tmp_path, tokenizer, capsys):
    out = tmp_path / "sets" / "out"
    assert run(f"--files={files}/*", f"--out={out}", f"--tokenizer={tokenizer}", *ALL) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{out}\n" and "train 7 documents, 50 bytes" in shown.err
    assert texts(out) == EXPECTED
    assert sorted(os.listdir(out)) == sorted((*writer.FILES, writer.MANIFEST))
    assert os.listdir(tmp_path / "sets") == ["out"]
    assert run(f"--check={out}") == 0
    source = open_text(str(out), "train")
    assert source.token_bytes[source.tokens[:].astype(int)].sum() == 50


@needs_tokenizers
def test_a_tokenizer_of_another_set(files, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(f"--files={files}/*", f"--out={first}", "--tokenizer=train:300", *ALL) == 0
    tokenizer = f"--tokenizer={first}/tokenizer.json"
    assert run(f"--files={files}/a*", f"--out={second}", tokenizer, *ALL) == 0
    mixture = open_text(f"{first}:2,{second}:1", "train")
    assert len(mixture.parts) == 2 and mixture.vocabulary == len(mixture.token_bytes)
    assert open_tokenizer(mixture).encode("text") == open_tokenizer(first).encode("text")
    with pytest.raises(UsageError, match="different tokenizers"):
        open_text(f"{first}:2,stdlib:1", "train")


@needs_tokenizers
def test_a_mark_of_its_own_at_the_end(files, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(f"--files={files}/*", f"--out={first}", "--tokenizer=train:300", *ALL) == 0
    vocabulary = json.loads((first / "tokenizer.json").read_text())["model"]["vocab"]
    # A token that no text has: "\xff" as byte-level pairs write it.
    marks = ("--begin=<|endoftext|>", "--end=ÿ")
    tokenizer = f"--tokenizer={first}/tokenizer.json"
    assert run(f"--files={files}/*", f"--out={second}", tokenizer, *marks, *ALL) == 0
    source = open_text(str(second), "train")
    assert (source.begin, source.end) == (0, vocabulary["ÿ"])
    assert source.tokens[0] == source.tokens[-1] == 0 and source.tokens[-2] == source.end
    assert texts(second) == EXPECTED
    assert open_tokenizer(second).end == source.end == open_tokenizer(source).end


def test_splits_are_whole_documents_by_their_text(tmp_path):
    rows = [f"document {i} " * (i % 7 + 1) for i in range(400)]
    for name, order in (("a", rows), ("b", rows[::-1])):
        lines = "".join(json.dumps({"body": row}) + "\n" for row in order)
        (tmp_path / f"{name}.jsonl").write_text(lines)
        shares = ("--test_share=0.2", "--validation_share=0.1", "--field=body")
        assert run(f"--files={tmp_path}/{name}.jsonl", f"--out={tmp_path}/{name}", *shares) == 0
    split = {s: texts(tmp_path / "a", s) for s in ("train", "validation", "test")}
    assert sorted(itertools.chain(*split.values())) == sorted(rows)
    assert 60 < len(split["test"]) < 100 and 25 < len(split["validation"]) < 55
    for name, expected in split.items():
        assert sorted(texts(tmp_path / "b", name)) == sorted(expected)


def test_the_same_files_give_the_same_set(files, tmp_path):
    for name in ("one", "two"):
        assert run(f"--files={files}/*", f"--out={tmp_path}/{name}", *ALL) == 0
    one, two = (open_text(str(tmp_path / name), "train") for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint


@pytest.mark.parametrize("separator, expected", [("<|end|>", 2), ("", 3)])
def test_a_separator_cuts_files_into_documents(tmp_path, separator, expected):
    (tmp_path / "a.txt").write_text("one\nmore\n\nof it\n<|end|>\n\ntwo\n<|end|>\n")
    cut = f"--separator={separator}"
    assert run(f"--files={tmp_path}/a.txt", f"--out={tmp_path}/o", cut, *ALL) == 0
    found = texts(tmp_path / "o")
    assert len(found) == expected and found[0].startswith("one\nmore")


def test_long_documents_come_in_pieces(tmp_path, monkeypatch):
    """Cut at lines, and where there are none, between characters."""
    monkeypatch.setattr(documents, "PIECE", 64)
    lines = "".join(f"line {i} é日😀\n" for i in range(100))
    for name, text in (("lines", lines), ("characters", "é日😀" * 300), ("bytes", "a" * 1000)):
        path = tmp_path / f"{name}.txt"
        path.write_text(text)
        pieces = list(documents.read_pieces([str(path)], utf8=True, replace=False))
        assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        assert len(pieces) > 10 and b"".join(piece.text for piece in pieces).decode() == text
        assert sum(piece.read for piece in pieces) == len(text.encode())
        for piece in pieces:
            piece.text.decode()
        assert run(f"--files={path}", f"--out={tmp_path}/{name}", *ALL) == 0
        assert texts(tmp_path / name) == [text]


def test_short_documents_come_whole(tmp_path):
    """Else the tokens at the cut would be others."""
    (tmp_path / "a.txt").write_text("one\n\ntwo\nthree")
    (piece,) = documents.read_pieces([str(tmp_path / "a.txt")], utf8=True, replace=False)
    assert piece.text == b"one\n\ntwo\nthree"


def test_bytes_keep_what_is_no_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    assert run(f"--files={tmp_path}/a.txt", f"--out={tmp_path}/kept", *ALL) == 0
    source = open_text(str(tmp_path / "kept"), "train")
    assert bytes(source.document(0).tolist()) == b"caf\xe9 au lait"
    assert run(f"--files={tmp_path}/a.txt", f"--out={tmp_path}/r", "--errors=replace", *ALL) == 0
    assert texts(tmp_path / "r") == ["caf\ufffd au lait"]


def test_large_vocabularies_take_four_bytes():
    assert writer.token_type(65536) == np.uint16 and writer.token_type(65537) == np.uint32


BAD = {  # name of the file, its content, arguments, what is said
    "empty": ("a.txt", b"", (), "are empty: pass some with text"),
    "image": ("a.png", b"\x89PNG\r\n\x1a\n\0\0", (), "a.png is no text .it has a zero byte."),
    "not utf-8": ("a.txt", b"abc\xe9", ("--tokenizer=train:300",), "not UTF-8 .byte 3.: convert"),
    "field": ("a.jsonl", b'{"body": "x"}', (), "a.jsonl:1 has no text under 'text', only body"),
    "list": ("a.jsonl", b"[1]", (), "only list"),
    "json": ("a.jsonl", b'{"text": "x"}\n{"te', (), "a.jsonl:2 is no line of JSON"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}', (), "a.jsonl:1 holds half a character"),
    "gzip": ("a.txt.gz", gzip.compress(b"abc" * 999)[:-9], (), "cannot read .*a.txt.gz"),
    "no gzip": ("a.txt.gz", b"abc", (), "cannot read .*a.txt.gz .Not a gzipped file"),
    "one document": ("a.txt", b"abc", ("--test_share=0.05",), "none of the 1 documents fell to"),
    "shares": ("a.txt", b"abc", ("--test_share=0.9", "--validation_share=0.2"), "together at most"),
    "size": ("a.txt", b"abc", ("--tokenizer=train:x",), "expected a size, such as train:8192"),
    "small": ("a.txt", b"abc", ("--tokenizer=train:3",), "expected 257 or more"),
    "no file": ("a.txt", b"abc", ("--tokenizer=no/t.json",), "cannot read the tokenizer no/t.json"),
    "marks": ("a.txt", b"abc", ("--begin=x",), "pass no --begin"),
}


@pytest.mark.parametrize("name, content, arguments, message", BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_one_line(name, content, arguments, message, tmp_path, capsys):
    if "train:300" in str(arguments):
        pytest.importorskip("tokenizers")
    (tmp_path / name).write_bytes(content)
    before = os.listdir(tmp_path)
    command = (f"--files={tmp_path}/*", f"--out={tmp_path}/out", "--test_share=0", *arguments)
    assert run(*command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert re.search(message, error), error
    assert os.listdir(tmp_path) == before


def test_wrong_places_are_one_line(files, tmp_path, capsys):
    assert run(f"--files={files}", f"--out={tmp_path}/out") == 2
    assert "is a folder: pass a pattern of its files" in capsys.readouterr().err
    assert run(f"--files={files}/*.none", f"--out={tmp_path}/out") == 2
    assert "matches no file" in capsys.readouterr().err
    assert run(f"--files={files}/*", f"--out={files}", *ALL) == 2
    assert "exists: delete it, or name another folder" in capsys.readouterr().err
    assert run(f"--files={files}/*", f"--out={files}/a.txt/out", *ALL) == 2
    assert "cannot write" in capsys.readouterr().err
    assert run(f"--files={files}/*") == 2
    assert "expected --files='DIR/**/*.txt' and --out=DIR" in capsys.readouterr().err


def test_killed_it_leaves_nothing_that_opens(tmp_path):
    (tmp_path / "a.txt").write_text("some text that goes on\n" * 4_000_000)
    out, made = tmp_path / "out", tmp_path / "out.incomplete"
    arguments = (f"--files={tmp_path}/a.txt", f"--out={out}", *ALL)
    process = subprocess.Popen(
        [sys.executable, "-m", "moe.data.prepare", "text", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        tokens = made / writer.TOKENS
        while not (tokens.exists() and tokens.stat().st_size) and process.poll() is None:
            time.sleep(0.005)
        with pytest.raises(UsageError, match="another process prepares"), staging(out):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL and not out.exists() and made.exists()
    for folder in (out, made):
        with pytest.raises(UsageError):
            open_text(str(folder), "train")
    (tmp_path / "a.txt").write_text("another text")
    assert run(*arguments) == 0
    assert texts(out) == ["another text"] and not made.exists()
