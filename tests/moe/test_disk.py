"""Disks that are full, gone or not writable: an error line, before training where it can be."""

import shutil

import pytest

from moe import workdir as workdirs
from moe.errors import UsageError
from moe.trainer import train
from tests.moe import hosts


def test_a_disk_too_small_for_the_checkpoints(tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(workdirs.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    workdir = tmp_path / "deep" / "run"
    with pytest.raises(UsageError, match=r"0.0001 GB of free space.*checkpoint.keep \(now 3\)"):
        train(tiny(), workdir)
    assert not workdir.parent.exists()


def test_a_directory_that_cannot_be_made(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write to --workdir=.*Not a directory"):
        train(tiny(), tmp_path / "file" / "run")


def test_a_disk_that_fails_on_the_way(data_dir, tmp_path):
    """The checkpoints' directory is lost during training: one line, code 2."""
    workdir = tmp_path / "run"
    run = hosts.train(1, workdir, data_dir, num_steps="3000", checkpoint__every="200")
    run.wait_for(workdir, 30)
    shutil.move(workdir / "checkpoints", workdir / "gone")
    (workdir / "checkpoints").write_text("no directory any more")
    (code,), (screen,) = run.finish(120)
    assert code == 2, screen
    assert f"\nerror: cannot save a checkpoint in {workdir}" in screen
    # TensorStore's threads may print what they could not tell a loop that has ended; we do not.
    assert "/moe/" not in screen.replace(str(tmp_path), "")
