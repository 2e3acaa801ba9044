"""A run stopped anywhere and started again ends bit-identical to one that was not stopped."""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from moe.store.records import read
from tests.moe.conftest import TINY

ROOT = pathlib.Path(__file__).parents[3]
STEPS = 120
SETTINGS = TINY | {"num_steps": str(STEPS), "checkpoint.every": "9", "eval.every": "40"}
# All that could make a resumed run differ: augmentation, noise, dropout, averaging.
SETTINGS |= {
    "router.name": "topk",
    "data.augment.crop": "1",
    "data.augment.mixup": "0.2",
    "model.dropout": "0.1",
    "optimizer.ema_decay": "0.9",
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A cache that the run which nobody stops fills: a kill would leave half of a file in it."""
    return str(tmp_path_factory.mktemp("compiled"))


def start(workdir, data_dir, compiled) -> subprocess.Popen:
    settings = [f"--config.{k}={v}" for k, v in (SETTINGS | {"data.data_dir": data_dir}).items()]
    command = [
        "env",
        "--default-signal=INT,HUP",
        sys.executable,
        "train.py",
        "--config=configs/digits.py",
        f"--workdir={workdir}",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.Popen(
        command + settings,
        cwd=ROOT,
        env=environment
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": compiled,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process) -> str:
    screen, _ = process.communicate(timeout=300)
    assert process.returncode == 0, screen
    return screen


def stop_at(process, workdir, step, number) -> None:
    """Sends the signal once the log has reached `step`, and a checkpoint is complete."""
    while process.poll() is None:
        rows = read(workdir / "metrics.jsonl")
        complete = [d for d in workdir.glob("checkpoints/*") if d.name.isdigit()]
        if rows and rows[-1]["step"] >= step and complete:
            break
        time.sleep(0.002)
    process.send_signal(number)


def outcome(workdir):
    """All arrays of the last checkpoint, and all records but the times."""
    manager = ocp.CheckpointManager(workdir / "checkpoints")
    items = {key: ocp.args.StandardRestore() for key in ("params", "ema", "training")}
    found = manager.restore(STEPS, args=ocp.args.Composite(**items))
    arrays = {name: np.asarray(a) for item in found.values() for name, a in item.items()}
    rows = read(workdir / "metrics.jsonl")
    return arrays, [{k: v for k, v in r.items() if "per_second" not in k} for r in rows]


@pytest.fixture(scope="module")
def unbroken(data_dir, compiled, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    finish(start(workdir, data_dir, compiled))
    return outcome(workdir)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_stopped_and_started_again(number, unbroken, data_dir, compiled, tmp_path):
    step = random.Random(number.name).randrange(1, STEPS - 20)
    process = start(tmp_path, data_dir, compiled)
    stop_at(process, tmp_path, step, number)
    screen, _ = process.communicate(timeout=300)
    if number == signal.SIGKILL:
        assert process.returncode == -number, f"was to be stopped at {step}:\n{screen}"
    else:
        assert process.returncode == 128 + number
        assert "checkpoint saved; the same command continues" in screen
    screen = finish(start(tmp_path, data_dir, compiled))
    continued = re.search(rf"continuing {re.escape(str(tmp_path))} at step (\d+)", screen)
    assert continued and int(continued[1]) > 0, screen
    arrays, rows = outcome(tmp_path)
    assert rows == unbroken[1]
    assert arrays.keys() == unbroken[0].keys()
    for name, array in arrays.items():
        assert array.tobytes() == unbroken[0][name].tobytes(), f"{name}, stopped at {step}"
