"""The images per second count every step, and no pause."""

import types

import pytest

import moe.train.progress
from moe.store.checkpoint import Checkpoints
from moe.store.records import read
from moe.tasks import TASKS
from moe.train.progress import Progress
from moe.train.run import Run
from moe.train.trainer import train

ROW = {"train/loss": 1.0, "train/accuracy": 0.5}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until `clock.now` is moved."""
    clock = types.SimpleNamespace(now=100.0)
    fake = types.SimpleNamespace(perf_counter=lambda: clock.now, monotonic=lambda: clock.now)
    monkeypatch.setattr(moe.train.progress, "time", fake)
    return clock


@pytest.mark.slow
def test_pauses_are_left_out_at_any_cadence(clock, tiny, tmp_path, monkeypatch):
    """A step takes a second, a batch of an evaluation 50, a checkpoint 100."""

    def slow(function, seconds):
        def batches(*arguments):
            for batch in function(*arguments):
                clock.now += seconds
                yield batch

        return batches

    def save(*arguments):
        clock.now += 100
        return real(*arguments)

    monkeypatch.setattr(Run, "train_batches", slow(Run.train_batches, 1))
    monkeypatch.setattr(Run, "eval_batches", slow(Run.eval_batches, 50))
    real = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", save)
    train(tiny(log__every="4", eval__every="6", checkpoint__every="5"), tmp_path)
    rows = [row for row in read(tmp_path / "metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 24]
    assert [row["train/images_per_second"] for row in rows] == [16.0] * 6


def test_a_step_that_compiled_is_no_measure(clock, capsys):
    progress = Progress(0, 10, TASKS["images"], 16)
    clock.now += 30
    progress.restart(1)
    assert progress.update(1, ROW) == {}
    clock.now += 1
    assert progress.update(2, ROW) == {"train/images_per_second": 16.0}
    clock.now += 100
    assert progress.update(10, ROW) == {"train/images_per_second": 8 * 16 / 100}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step     1/10  loss 1.0000  accuracy 50.00%"
    assert lines[1].endswith("16 images/s  0:08 left") and lines[2].endswith("0:00 left")


@pytest.mark.parametrize("jump", [-1e9, 0.0, 1e308, float("inf"), float("nan"), 5e-324])
def test_a_clock_that_jumps(jump, clock, capsys):
    progress = Progress(0, 10**9, TASKS["images"], 16)
    clock.now = clock.now + jump if jump != 5e-324 else jump
    progress.update(1, ROW)
    with progress.pause():
        clock.now = 7.0
    progress.update(2, ROW)
    clock.now = 9.0
    progress.restart(2)
    clock.now = 10.0
    assert progress.update(3, ROW) == {"train/images_per_second": 16.0}
