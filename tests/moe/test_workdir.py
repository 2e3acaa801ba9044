"""The directory of a run: whose it is, what may lie in it, and who writes there."""

import re

import pytest

from moe.errors import UsageError
from moe.workdir import saved_config


@pytest.mark.parametrize(
    "text", ["", "[]", "[1]", "3", "null", '{"seed": "x"}', '{"moe": 3}', '{"seed": 0', "\x00"]
)
def test_a_file_that_is_no_config_is_named(text, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=f"^{re.escape(str(file))} is no config of a run"):
        saved_config(tmp_path)
    assert file.read_text() == text


def test_a_directory_in_place_of_the_config(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UsageError, match=r"is no config of a run \(Is a directory\)"):
        saved_config(tmp_path)


def test_no_run(tmp_path):
    assert saved_config(tmp_path) is None and saved_config(tmp_path / "nowhere") is None
