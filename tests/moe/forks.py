"""The programs' commands, each in a process of its own that need not import anything again.

A server imports the programs and forks for every command, before JAX starts its devices.
"""

import json
import os
import pathlib
import subprocess
import sys
import time
import traceback
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 180  # seconds; a command that takes longer is killed


class Ended(NamedTuple):
    """How a command ended: its exit code (None: killed), its screen, and what it computed."""

    code: int | None
    out: str
    error: str
    seconds: float  # of the processor: the machine may be busy with other things


class Forks:
    """Runs commands, one after the other, in the directory `cwd`; `screen` holds what they say."""

    def __init__(self, cwd: pathlib.Path, screen: pathlib.Path, **environ: str):
        self._screen = screen
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.moe.forks", str(cwd), str(screen)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, program: str, arguments: list[str]) -> Ended:
        """Runs `python PROGRAM.py ARGUMENTS`."""
        self._server.stdin.write(json.dumps([program, arguments]) + "\n")
        self._server.stdin.flush()
        code, seconds = json.loads(self._server.stdout.readline())
        out, error = ((self._screen / name).read_text(errors="replace") for name in ("out", "err"))
        return Ended(code, out, error, seconds)

    def close(self) -> None:
        """Ends the server."""
        self._server.stdin.close()
        self._server.wait(timeout=LIMIT)


def serve(cwd: str, screen: str) -> None:
    """Answers each line of the input, [program, arguments], with [exit code, seconds]."""
    import compare
    import eval as evaluate
    import generate
    import moe.evaluate.comparison
    import moe.evaluate.evaluation
    import moe.evaluate.generation
    import moe.plan.answer  # noqa: F401
    import plan
    import train

    programs = {"train": train, "eval": evaluate, "compare": compare, "plan": plan}
    programs["generate"] = generate
    for line in sys.stdin:
        program, arguments = json.loads(line)
        child = os.fork()
        if not child:
            _become(programs[program].main, arguments, cwd, screen)
        print(json.dumps(_wait(child)), flush=True)


def _become(main, arguments: list[str], cwd: str, screen: str) -> None:
    """Runs a program in this process and ends it."""
    from moe import cli

    os.chdir(cwd)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{screen}/{name}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    sys.argv, code = ["program.py", *arguments], 1
    try:
        cli.run(main)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(child: int) -> tuple[int | None, float]:
    end, killed = time.monotonic() + LIMIT, False
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            code = None if killed else os.waitstatus_to_exitcode(status)
            return code, usage.ru_utime + usage.ru_stime
        if time.monotonic() > end and not killed:
            os.kill(child, 9)
            killed = True
        time.sleep(0.005)


if __name__ == "__main__":
    serve(*sys.argv[1:])
