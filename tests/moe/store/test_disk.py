"""Disks that are full, gone or not writable: an error line, before training where it can be."""

import contextlib
import shutil
import subprocess
import time

import pytest

from moe.errors import UsageError
from moe.store import workdir as workdirs
from moe.train.trainer import train
from tests.moe import launch


def test_a_disk_too_small_for_the_checkpoints(tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(workdirs.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    workdir = tmp_path / "deep" / "run"
    with pytest.raises(UsageError, match=r"0.0001 GB of free space.*checkpoint.keep \(now 3\)"):
        train(tiny(), workdir)
    assert not workdir.parent.exists()


def test_a_directory_that_cannot_be_made(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write to --workdir=.*/file is a file"):
        train(tiny(), tmp_path / "file" / "run")


@pytest.mark.slow
def test_a_disk_that_fails_on_the_way(data_dir, tmp_path):
    """The checkpoints' directory is lost during training: one line, code 2."""
    workdir = tmp_path / "run"
    run = launch.train(1, workdir, data_dir, num_steps="3000", checkpoint__every="20")
    run.wait_for(workdir, 30)
    shutil.move(workdir / "checkpoints", workdir / "gone")
    (workdir / "checkpoints").write_text("no directory any more")
    (code,), (screen,) = run.finish(120)
    assert code == 2, screen
    assert f"\nerror: cannot save a checkpoint in {workdir}" in screen
    # TensorStore's threads may print what they could not tell a loop that has ended; we do not.
    assert "/moe/" not in screen.replace(str(tmp_path), "")


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a disk")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextlib.contextmanager
def full(workdir):
    filler = workdir.parent / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    yield
    filler.unlink()


@contextlib.contextmanager
def read_only(workdir):
    places = [str(path) for path in (workdir, workdir / "checkpoints", workdir / "events")]
    subprocess.run(["chattr", "+i", *places], check=True)
    yield
    subprocess.run(["chattr", "-i", *places], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("trouble", [full, read_only])
def test_a_disk_that_is_well_again(trouble, disk, data_dir):
    """One line and code 2 in seconds; the same command then continues with whole records."""
    settings = {"num_steps": "600", "checkpoint__every": "50", "eval__every": "600"}
    run = launch.train(1, disk / "run", data_dir, **settings)
    run.wait_for(disk / "run", 60)
    with trouble(disk / "run"):
        begin = time.monotonic()
        (code,), (screen,) = run.finish(120)
        assert code == 2 and time.monotonic() - begin < 30, screen
        assert screen.count("\nerror: cannot ") == 1 and "Traceback" not in screen, screen
    launch.succeed(launch.train(1, disk / "run", data_dir, **settings))
    assert [row["step"] for row in launch.rows(disk / "run") if "train/loss" in row] == [
        *range(5, 601, 5)
    ]
