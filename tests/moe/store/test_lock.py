"""One process trains in a directory: the next ones say who does, and none leaves a lock behind."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from moe.errors import UsageError
from moe.store import lock
from tests.moe import launch

HOLDER = """
import pathlib, sys, time
from moe.store import lock
with lock.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
OWN = rf"is in use: process {os.getpid()} on {re.escape(socket.gethostname())} since "


def test_the_second_is_told_who_holds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    with lock.held(tmp_path):
        with pytest.raises(UsageError, match=OWN):
            lock.check(tmp_path)
        with pytest.raises(UsageError, match=OWN), lock.held(tmp_path):
            pass
    lock.check(tmp_path)
    with lock.held(tmp_path):
        pass


def test_looking_touches_nothing(tmp_path):
    lock.check(tmp_path)
    lock.check(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_a_killed_process_leaves_none_behind(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=launch.ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=f"is in use: process {holder.pid} on "):
            lock.check(tmp_path)
        holder.send_signal(signal.SIGKILL)
    lock.check(tmp_path)
    with lock.held(tmp_path):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def flock(file, kind):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    lock.check(tmp_path)
    with lock.held(tmp_path):
        pass
    assert "has no locks (No locks available): make sure that" in capsys.readouterr().out


def test_a_mounted_bucket_is_said(tmp_path, monkeypatch, capsys):
    assert lock._file_system(tmp_path)
    monkeypatch.setattr(lock, "_file_system", lambda place: "fuse.gcsfuse")
    with lock.held(tmp_path):
        pass
    assert "fuse.gcsfuse, whose locks may hold on one host only" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_starts_at_once(count, data_dir, tmp_path):
    """One trains to its end as if it were alone; the others end with 2 and say who trains."""
    settings = {"num_steps": "200", "eval__every": "100", "checkpoint__every": "50"}
    launch.succeed(launch.train(1, tmp_path / "alone", data_dir, **settings))
    runs = [launch.train(1, tmp_path / "run", data_dir, **settings) for _ in range(count)]
    ends = [run.finish() for run in runs]
    codes = [code for (code,), _ in ends]
    assert sorted(codes) == [0] + [2] * (count - 1), ends
    winner = runs[codes.index(0)].processes[0].pid
    for (code,), (screen,) in ends:
        holder = f"is in use: process {winner} on {socket.gethostname()}"
        assert code == 0 or (holder in screen and screen.count("\n") == 1), screen
    assert launch.rows(tmp_path / "run") == launch.rows(tmp_path / "alone")
    ours, theirs = (launch.arrays(tmp_path / name, 200) for name in ("run", "alone"))
    assert all(a.tobytes() == theirs[name].tobytes() for name, a in ours.items())


@pytest.mark.slow
def test_the_first_of_two_processes_holds_it(data_dir, tmp_path):
    run = launch.train(2, tmp_path / "run", data_dir, num_steps="400", checkpoint__every="50")
    run.wait_for(tmp_path / "run", 5)
    (code,), (screen,) = launch.train(1, tmp_path / "run", data_dir, num_steps="400").finish()
    assert code == 2 and f"is in use: process {run.processes[0].pid} on " in screen, screen
    launch.succeed(run)
