"""A signal saves first and ends an evaluation; what was left is made up, as if none had come."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moe.store.checkpoint import Checkpoints
from moe.tasks import TASKS
from moe.train.run import Run
from moe.train.stopping import STOPS, Signals
from moe.train.trainer import train
from tests.moe import launch


@pytest.fixture
def send(monkeypatch):
    """Returns a function: from its call on, a signal comes before the N-th batch of a kind."""
    real = {name: getattr(Run, name) for name in ("train_batches", "eval_batches")}

    def before(name, number, count):
        def batches(self, source, start=0):
            arguments = (source, start) if name == "train_batches" else (source,)
            for i, batch in enumerate(real[name](self, *arguments), start + 1):
                if i == count:
                    os.kill(os.getpid(), number)
                batches.made = i
                yield batch

        for other in real:
            monkeypatch.setattr(Run, other, real[other])
        monkeypatch.setattr(Run, name, batches)
        return batches

    return before


@pytest.fixture(autouse=True)
def no_signal_is_ignored():
    """What runs the tests may ignore some (nohup does, and pytest's workers), which stays so."""
    old = {number: signal.signal(number, signal.SIG_DFL) for number in STOPS}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


def assert_same(workdir, unbroken):
    assert launch.rows(workdir) == launch.rows(unbroken)
    ours, theirs = launch.arrays(workdir, 24), launch.arrays(unbroken, 24)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), name
    for directory in (workdir, unbroken):
        best = TASKS["images"].best
        kept = Checkpoints(directory / "checkpoints", read_only=True, best=best)
        assert kept.best() == max(r.get("eval/accuracy", 0) for r in launch.rows(directory))


@pytest.mark.slow
def test_signals_around_evaluations(send, finished_run, tiny, tmp_path, capsys):
    """In the middle of one, and at the last step before one: each saves first."""
    evaluation = send("eval_batches", signal.SIGTERM, 2)
    with pytest.raises(SystemExit) as exit_:
        train(tiny(), tmp_path)
    assert exit_.value.code == 128 + signal.SIGTERM
    assert evaluation.made == 2  # of 6
    assert "stopped at step 12, checkpoint saved" in capsys.readouterr().out
    assert launch.rows(tmp_path)[-1]["step"] == 10
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == [4, 8, 12]

    send("train_batches", signal.SIGHUP, 24)  # the last step, and its evaluation's
    with pytest.raises(SystemExit) as exit_:
        train(tiny(), tmp_path)
    assert exit_.value.code == 128 + signal.SIGHUP
    assert [row["step"] for row in launch.rows(tmp_path) if "eval/loss" in row] == [12]

    send("train_batches", signal.SIGHUP, 0)
    results = train(tiny(), tmp_path)
    assert results["eval/accuracy"] == launch.rows(finished_run)[-1]["eval/accuracy"]
    assert_same(tmp_path, finished_run)
    assert train(tiny(), tmp_path) == results  # complete: nothing is made again
    assert_same(tmp_path, finished_run)


@pytest.mark.slow
def test_other_cadences_on_the_way(send, finished_run, tiny, tmp_path):
    send("train_batches", signal.SIGTERM, 9)
    with pytest.raises(SystemExit):
        train(tiny(), tmp_path)
    send("train_batches", signal.SIGTERM, 0)
    train(tiny(log__every="4", eval__every="8", checkpoint__every="7"), tmp_path)
    ours, theirs = launch.arrays(tmp_path, 24), launch.arrays(finished_run, 24)
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), name
    rows = launch.rows(tmp_path)
    assert [row["step"] for row in rows if "train/loss" in row] == [5, 12, 16, 20, 24]
    assert [row["step"] for row in rows if "eval/loss" in row] == [16, 24]
    assert rows[-1] == launch.rows(finished_run)[-1]


@pytest.mark.slow
def test_no_descriptor_stays_open(tiny, tmp_path):
    train(tiny(num_steps="3"), tmp_path / "first")  # some are opened once for the process
    before = len(os.listdir("/proc/self/fd"))
    train(tiny(num_steps="3"), tmp_path / "second")
    assert len(os.listdir("/proc/self/fd")) <= before


def test_signals_that_were_ignored_stay_so():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with Signals() as signals:
            signals.listen()
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.number == 0
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)  # with it, as some senders do
            assert signals.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_later_signal_ends_at_once_unless_a_terminal_sent_it(second, monkeypatch):
    raised = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    with Signals() as signals:
        signals.listen()
        os.kill(os.getpid(), signal.SIGTERM)
        now = time.monotonic()
        monkeypatch.setattr("moe.train.stopping.time.monotonic", lambda: now + 5)
        os.kill(os.getpid(), second)
        assert signals.number == signal.SIGTERM
    assert raised == ([] if second == signal.SIGHUP else [second])


@pytest.mark.parametrize("library", ["_multiarray_umath", "libjax_common"])
def test_ctrl_c_before_the_first_step(library, data_dir, tmp_path):
    """While Python imports, or later: no traceback, and the end that a shell expects."""
    (process,) = (run := launch.train(1, tmp_path / "run", data_dir)).processes
    maps = pathlib.Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and library not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    (code,), (screen,) = run.finish(60)
    assert code == -signal.SIGINT and "Traceback" not in screen, screen


@pytest.mark.slow
def test_a_closed_terminal(data_dir, tmp_path):
    """Its signal saves a checkpoint, although nothing can be printed any more."""
    screen, terminal = os.openpty()
    settings = {"num_steps": "100000", "checkpoint.every": "100000", "log.every": "5"}
    settings |= {"eval.every": "100000", "data.data_dir": str(data_dir)}
    settings = launch.TINY | settings
    own = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    own += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", own, "train.py"]
    command += ["--config=configs/digits.py", f"--workdir={tmp_path}"]
    process = subprocess.Popen(
        command + [f"--config.{key}={value}" for key, value in settings.items()],
        cwd=launch.ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TERM": "xterm"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,  # whose terminal is its own
    )
    os.close(terminal)
    while process.poll() is None and not launch.rows(tmp_path):
        os.read(screen, 1 << 16)
    os.close(screen)
    assert process.wait(60) == 128 + signal.SIGHUP
    (step,) = Checkpoints(tmp_path / "checkpoints", read_only=True).steps()
    assert step > 5 and np.isfinite(launch.rows(tmp_path)[-1]["train/loss"])
