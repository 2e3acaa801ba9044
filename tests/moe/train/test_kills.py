"""Forty kills at any moment, each answered by the same command: the end is that of no kill at all.

    python -m pytest -m slow -n 2 tests/moe/train/test_kills.py

KILLS_SEED=N chooses the moments; the seed and every kill are printed.
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from moe.store.checkpoint import Checkpoints
from moe.tasks import TASKS
from tests.moe import launch

SEED = int(os.environ.get("KILLS_SEED", "0"))
CHAINS, KILLS = 4, 10
STEPS, EVERY = 240, 20
SETTINGS = launch.TINY | {
    "num_steps": str(STEPS),
    "log.every": "5",
    "checkpoint.every": "10",
    "eval.every": str(EVERY),
    "eval.batch_size": "1",  # many batches: an evaluation that can be hit
    # All that could make a resumed run differ: augmentation, noise, dropout, averaging.
    "router.name": "topk",
    "data.augment.crop": "1",
    "data.augment.mixup": "0.2",
    "model.dropout": "0.1",
    "optimizer.ema_decay": "0.9",
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@pytest.fixture(scope="module")
def start(data_dir, tmp_path_factory):
    """Returns a function that starts a run in a directory; programs are compiled once."""
    cache = tmp_path_factory.mktemp("compiled")
    settings = SETTINGS | {"data.data_dir": str(data_dir)}
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(workdir):
        command = ["env", "--default-signal=INT,HUP", sys.executable, "train.py"]
        command += ["--config=configs/digits.py", f"--workdir={workdir}"]
        return subprocess.Popen(
            command + [f"--config.{key}={value}" for key, value in settings.items()],
            cwd=launch.ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    """The directory of a run that nobody stopped, and the seconds until its first record."""
    workdir = tmp_path_factory.mktemp("unbroken")
    finish(start(workdir))  # compiles
    again = tmp_path_factory.mktemp("again")
    process, begin = start(again), time.monotonic()
    wait_until(process, lambda: launch.rows(again))
    seconds = time.monotonic() - begin
    finish(process)
    assert_same(again, workdir)
    return workdir, seconds


def finish(process) -> None:
    screen, _ = process.communicate(timeout=600)
    assert process.returncode == 0, screen


def wait_until(process, condition) -> bool:
    """Returns whether the condition came true before the process ended."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.001)
    return False


def come_to(moment, process, workdir, seconds, rng) -> bool:
    """Waits for the moment of a kill; returns whether the process still runs then."""
    if moment == "start":
        time.sleep(rng.uniform(0, seconds))
        return process.poll() is None
    left = {*workdir.glob("checkpoints/*tmp*")}  # by an earlier kill
    counts = [len(launch.rows(workdir))]  # which shrink first, where steps are repeated

    def trains():
        counts.append(len(launch.rows(workdir)))
        return counts[-1] > counts[-2]

    if not wait_until(process, trains):
        return False
    if moment == "checkpoint":
        return wait_until(process, lambda: {*workdir.glob("checkpoints/*tmp*")} - left)
    if moment == "evaluation":

        def evaluates():
            row = launch.rows(workdir)[-1]
            return row["step"] % EVERY == 0 and "train/loss" in row

        if not wait_until(process, evaluates):
            return False
    time.sleep(rng.uniform(0, 0.2))
    return process.poll() is None


def assert_same(workdir, unbroken) -> None:
    assert launch.rows(workdir) == launch.rows(unbroken)
    ours, theirs = launch.arrays(workdir, STEPS), launch.arrays(unbroken, STEPS)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), name
    options = {"read_only": True, "best": TASKS["images"].best}
    best = [Checkpoints(d / "checkpoints", **options).best() for d in (workdir, unbroken)]
    assert best[0] == best[1]


@pytest.mark.slow
@pytest.mark.parametrize("chain", range(CHAINS))
def test_killed_and_started_again(chain, start, unbroken, tmp_path):
    rng = random.Random(f"{SEED} {chain}")
    every = list(itertools.product(("start", "step", "checkpoint", "evaluation"), SIGNALS))
    plan = rng.sample([*every, *every], KILLS) if chain else rng.sample(every, KILLS)
    print(f"KILLS_SEED={SEED}, chain {chain}")
    run = 0
    while plan:
        run += 1
        workdir = tmp_path / str(run)
        while plan:
            moment, number = plan[0]
            process = start(workdir)
            if not come_to(moment, process, workdir, unbroken[1], rng):
                break  # it came to its end first: the next kills are another run's
            process.send_signal(number)
            screen, _ = process.communicate(timeout=120)
            last = [row["step"] for row in launch.rows(workdir)[-1:]]
            print(f"{number.name} in {moment}, {process.returncode}, recorded to {last}")
            if process.returncode == 128 + number:
                assert "checkpoint saved; the same command continues" in screen
            elif process.returncode == 0:
                break
            else:  # nothing to save yet
                assert process.returncode == -number, screen
            assert "Traceback" not in screen and "error" not in screen, screen
            plan.pop(0)
        finish(process if process.returncode is None else start(workdir))
        assert_same(workdir, unbroken[0])
