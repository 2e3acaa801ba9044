"""The text that every Python brings: real, split by file, the same at every start."""

import pathlib
import subprocess
import sys
import sysconfig

import numpy as np
import pytest

from moe.data.text import open_text, open_tokenizer, stdlib
from moe.errors import UsageError


def texts(source) -> list[bytes]:
    return [bytes(source.document(i).tolist()) for i in range(len(source.documents) - 1)]


def test_documents_are_the_files_of_the_library():
    train, test = open_text("stdlib", "train"), open_text("stdlib", "test")
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    for name in ("argparse.py", "json/decoder.py"):
        text = (folder / name).read_bytes()
        assert (text in texts(train)) + (text in texts(test)) == 1
    assert not set(texts(train)) & set(texts(test)) - {b""}
    assert (folder / "test" / "__init__.py").exists() is False or b"test_support" not in texts(
        train
    )
    assert 5e6 < len(train.tokens) < 30e6
    assert 0.02 < len(test.tokens) / len(train.tokens) < 0.1
    assert train.fingerprint == test.fingerprint
    assert train.vocabulary == 257


def test_it_is_the_same_in_another_process():
    code = (
        "from moe.data.text import open_text\n"
        "s = open_text('stdlib', 'test'); print(s.fingerprint, len(s.tokens))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    test = open_text("stdlib", "test")
    assert out.stdout.split() == [test.fingerprint, str(len(test.tokens))]


def test_slices_are_whole_documents():
    train = open_text("stdlib", "train")
    first, rest = open_text("stdlib", "train[:90%]"), open_text("stdlib", "train[90%:]")
    assert len(first.documents) + len(rest.documents) == len(train.documents) + 1
    together = np.concatenate([first.tokens[:-1], rest.tokens])
    np.testing.assert_array_equal(together, train.tokens)
    assert texts(open_text("stdlib", "train[3:5]")) == texts(train)[3:5]


@pytest.mark.parametrize(
    "split, message",
    [
        ("validation", "has no split 'validation': expected one of train, test"),
        ("train[", "has no split"),
        ("test[5:5]", r"split 'test\[5:5\]' of text set 'stdlib' is empty"),
        ("test[99999:]", "is empty"),
    ],
)
def test_splits_that_are_not_there(split, message):
    with pytest.raises(UsageError, match=message):
        open_text("stdlib", split)


def test_a_python_without_its_library_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match="without the text of its standard library"):
        open_text("stdlib", "train")


def test_generated_files_and_tests_are_left_out(tmp_path):
    for name in ("b.py", "a/c.py", "test/t.py", "_sysconfigdata_x.py", "config-3/p.py", "e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x = 1\r\n")
    (tmp_path / "empty.py").touch()
    assert list(stdlib._files(tmp_path)) == [("a/c.py", b"x = 1\n"), ("b.py", b"x = 1\n")]


def test_its_tokenizer_reads_its_bytes():
    test = open_text("stdlib", "test")
    tokenizer = open_tokenizer(test)
    assert tokenizer.decode(test.tokens[:100]) == texts(test)[0][:99].decode()
