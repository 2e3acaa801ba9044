"""Starts real processes on loopback, each like one host of a pod, for tests."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp

from moe.store.records import read
from tests.moe.conftest import TINY, TINY_TEXT

ROOT = pathlib.Path(__file__).parents[2]
HEARTBEAT = 10  # seconds


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Hosts:
    """Runs `count` processes of one script, with one CPU device each; one starts as on a laptop.

    `own[i]` are more arguments of process i, `roots[i]` is the checkout that it runs.
    """

    def __init__(
        self,
        count: int,
        script: str,
        arguments: list[str],
        start_timeout: int = 120,
        own: dict[int, list[str]] | None = None,
        roots: dict[int, pathlib.Path] | None = None,
    ):
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
        address, self.processes = f"127.0.0.1:{free_port()}", []
        for i in range(count):
            flags = [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={i}"]
            flags += [f"--heartbeat_timeout={HEARTBEAT}", f"--start_timeout={start_timeout}"]
            flags += (own or {}).get(i, [])
            self.processes.append(
                subprocess.Popen(
                    # Of a shell's background Ctrl-C is ignored, under nohup SIGHUP too.
                    [
                        "env",
                        "--default-signal=INT,HUP",
                        sys.executable,
                        script,
                        *arguments,
                        *(flags if count > 1 else []),
                    ],
                    cwd=(roots or {}).get(i, ROOT),
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )

    def finish(self, timeout: float = 600) -> tuple[list[int], list[str]]:
        """Returns exit codes and screens; kills what is left after `timeout` and fails."""
        end = time.monotonic() + timeout
        try:
            screens = [
                process.communicate(timeout=max(end - time.monotonic(), 1))[0]
                for process in self.processes
            ]
        finally:
            for process in self.processes:
                process.kill()
        return [process.returncode for process in self.processes], screens

    def wait_for(self, workdir: pathlib.Path, step: int) -> None:
        """Waits until the log has reached `step`, or a process has ended."""
        while all(process.poll() is None for process in self.processes):
            rows = read(workdir / "metrics.jsonl")
            if rows and rows[-1]["step"] >= step:
                return
            time.sleep(0.01)


def train(count: int, workdir: pathlib.Path, data_dir, own=None, roots=None, **settings) -> Hosts:
    """Starts train.py of the tiny config; settings with __ for dots."""
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    keys = TINY | {"data.data_dir": str(data_dir)} | changed
    arguments = [f"--config.{key}={value}" for key, value in keys.items()]
    arguments = ["--config=configs/digits.py", f"--workdir={workdir}", *arguments]
    return Hosts(count, "train.py", arguments, own=own, roots=roots)


def train_text(count: int, workdir: pathlib.Path, **settings) -> Hosts:
    """Starts train.py of the tiny config of a text; settings with __ for dots."""
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    arguments = [f"--config.{key}={value}" for key, value in (TINY_TEXT | changed).items()]
    return Hosts(
        count, "train.py", ["--config=configs/stdlib.py", f"--workdir={workdir}", *arguments]
    )


def succeed(hosts: Hosts) -> list[str]:
    codes, screens = hosts.finish()
    assert codes == [0] * len(codes), "\n".join(screens)
    return screens


def rows(workdir: pathlib.Path) -> list[dict]:
    """Returns the records of a run, all but the times."""
    records = read(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if "per_second" not in k} for row in records]


def losses(workdir: pathlib.Path) -> np.ndarray:
    return np.array([row["train/loss"] for row in rows(workdir) if "train/loss" in row])


def arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Returns all arrays of a checkpoint, whole, whoever wrote them."""
    whole = {}
    for item in ("params", "ema", "training"):
        directory = (workdir / "checkpoints" / str(step) / item).absolute()
        if directory.exists():
            handler = ocp.StandardCheckpointHandler()
            like = {n: np.empty(m.shape, m.dtype) for n, m in handler.metadata(directory).items()}
            whole |= handler.restore(directory, args=ocp.args.StandardRestore(like))
    return whole
