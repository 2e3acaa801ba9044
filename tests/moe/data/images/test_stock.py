"""The one command that needs TensorFlow says so when it is missing."""

import importlib.util

import pytest

from moe.data import prepare
from moe.data.images import damage


def test_digits_needs_no_tensorflow(tmp_path, capsys):
    assert prepare.main(["digits", f"--data_dir={tmp_path}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/digits/1.0.0\n"


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="has TensorFlow")
def test_stock_set_without_tensorflow(tmp_path, capsys):
    assert prepare.main(["cifar100", f"--data_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err == (
        "error: preparing 'cifar100' needs TensorFlow, which is not installed: type "
        "`pip install 'permoe[prepare]' && python -m moe.data.prepare cifar100 "
        f"--data_dir={tmp_path}`\n"
    )


def test_unknown_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert prepare.main(["no_such_set", f"--data_dir={tmp_path}"]) == 2
    assert "TFDS knows no data set 'no_such_set'" in capsys.readouterr().err


def test_arguments_with_spaces_are_quoted():
    assert damage.prepare_command("mnist", "my data").endswith("mnist --data_dir='my data'")
