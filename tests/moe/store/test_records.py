"""Records are whole rows of JSON, whatever the disk does; events may be lost, a run may not."""

import contextlib
import json
import math
import os
import resource
import struct
import sys
import threading

import pytest
from tensorboardX.proto.event_pb2 import Event

from moe.errors import UsageError
from moe.screen import say
from moe.store.records import Records, read


@contextlib.contextmanager
def room_for(size: int):
    """No file of this process grows beyond `size` bytes: it ends there, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def events(directory) -> list[Event]:
    """Every event of the newest file."""
    data, result = max(directory.iterdir()).read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        result.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return result


def test_a_full_disk_leaves_whole_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Records(tmp_path, 0) as records:
        records.write(1, {"train/loss": 2.5})
        with room_for(path.stat().st_size + 10), pytest.raises(UsageError) as error:
            records.write(2, {"train/loss": 2.25})
        assert f"cannot write {path} (" in str(error.value)
        assert path.read_text() == '{"step": 1, "train/loss": 2.5}\n'
        records.write(2, {"train/loss": 2.25})  # there is room again
    assert read(path) == [{"step": 1, "train/loss": 2.5}, {"step": 2, "train/loss": 2.25}]


def test_events_that_cannot_be_written_lose_nothing_else(tmp_path, capsys):
    with Records(tmp_path, 0) as records:
        records.write(1, {"train/loss": 2.5})
        (file,) = tmp_path.joinpath("events").iterdir()
        with room_for(file.stat().st_size + 10):
            for step in range(2, 40):  # more than any queue holds
                records._events.add(step, {"train/loss": 2.25})
        records.write(40, {"train/loss": 2.0})
    written = [event for event in events(tmp_path / "events") if event.summary.value]
    assert [event.step for event in written] == [1, 40]
    assert written[1].summary.value[0].simple_value == 2.0
    assert capsys.readouterr().out.count("events for TensorBoard are missing") == 1


def test_a_file_in_the_place_of_the_events(tmp_path, capsys):
    (tmp_path / "events").write_text("in the way")
    with Records(tmp_path, 0) as records:
        records.write(1, {"train/loss": 2.5})
    assert len(read(tmp_path / "metrics.jsonl")) == 1
    assert (tmp_path / "events").read_text() == "in the way"
    assert "events for TensorBoard are missing" in capsys.readouterr().out


def test_no_thread_writes(tmp_path):
    before = threading.active_count()
    with Records(tmp_path, 0) as records:
        records.write(1, {"train/loss": 2.5})
        assert threading.active_count() == before


def test_rows_are_json_without_nan(tmp_path):
    with Records(tmp_path, 0) as records:
        records.write(1, {"a": math.nan, "b": math.inf, "c": 1.0})

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=refuse)
    assert row == {"step": 1, "a": None, "b": None, "c": 1.0}
    (event,) = (event for event in events(tmp_path / "events") if event.summary.value)
    assert [value.tag for value in event.summary.value] == ["c"]


def test_opened_again_it_forgets_later_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Records(tmp_path, 0) as records:
        for step in (4, 8, 12):
            records.write(step, {"a": float(step)})
        records.write(8, {"b": 1.0})
    os.truncate(path, path.stat().st_size - 3)  # a kill
    with Records(tmp_path, 8) as records:
        assert records.last == {"step": 8, "a": 8.0}
        records.write(12, {"a": 0.5})
    assert [row["a"] for row in read(path)] == [4.0, 8.0, 0.5]
    start = [event for event in events(tmp_path / "events") if event.HasField("session_log")]
    assert start[-1].step == 9


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"a": 1}', b'{"step": "x"}', b"\xff", b""])
def test_a_line_that_is_no_record(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1}\n' + line + b'\n{"step": 3}\n'
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"metrics.jsonl, line 2, is no record of a run: delete"):
        Records(tmp_path, 3)
    assert path.read_bytes() == content and not (tmp_path / "events").exists()


def test_a_directory_in_the_place_of_the_records(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UsageError, match=r"cannot read .*metrics.jsonl \(Is a directory\)"):
        Records(tmp_path, 0)


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "Input/output error")])
def test_a_screen_that_is_gone(error, monkeypatch):
    class Gone:
        def write(self, text):
            raise error

    monkeypatch.setattr(sys, "stdout", Gone())
    say("nobody reads this")
    say("nor this")
    assert sys.stdout.name == os.devnull
