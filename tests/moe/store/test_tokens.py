"""The tokenizer that a run of text keeps."""

import pytest

from moe.data.text.tokenizer import Bytes
from moe.errors import UsageError
from moe.store import tokens


def test_a_trained_run_keeps_its_tokenizer(finished_text_run, tmp_path):
    found = tokens.read(finished_text_run)
    assert isinstance(found, Bytes) and tokens.read(tmp_path) is None


def test_damaged_marks(tmp_path):
    tokens.write(tmp_path, Bytes().content, 256, 256)
    assert tokens.read(tmp_path).begin == 256
    (tmp_path / tokens.MARKS).write_text("[]")
    with pytest.raises(UsageError, match=r"tokenizer_marks.json is damaged"):
        tokens.read(tmp_path)
