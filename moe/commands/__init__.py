"""Lists the programs of permoe and starts them: `permoe NAME ...`, and the scripts at the top.

Nothing here imports JAX, or what training alone needs: a program that does not exist, or a package
that is missing, is said at once.
"""

import importlib
import importlib.metadata
import signal
import sys
from collections.abc import Sequence

from moe.errors import UsageError
from moe.extras import need

# A new program: a file of this folder with `main(argv)`, and a line here.
COMMANDS = {
    "train": "train a config; the same command continues",
    "eval": "evaluate a checkpoint of a run: a table, eval.json, pictures",
    "generate": "continue a text with a run of the task text",
    "compare": "train several routers and seeds: a table, CSV, a plot",
    "plan": "say whether a run fits hardware that is not at hand, and how fast it is",
}


def main() -> None:
    """Runs `permoe NAME ARGUMENT...`; without a name it lists the programs."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_help())
    elif name == "--version":
        print("permoe", importlib.metadata.version("permoe"))
    elif name in COMMANDS:
        start(name, arguments)
    else:
        _end(f"permoe has no program {name!r}; expected {', '.join(COMMANDS)}")


def start(name: str, arguments: Sequence[str]) -> None:
    """Runs a program as a shell does and exits: 2 with one line where it was asked wrongly."""
    # Until there is something to save, Ctrl-C ends without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        need(f"permoe {name}")
    except UsageError as error:
        _end(str(error))
    sys.argv = [f"permoe {name}", *arguments]  # the name that --help shows
    from moe import cli

    cli.run(lambda argv: call(name, argv))


def call(name: str, argv: Sequence[str]) -> None:
    """Runs a program inside this process; what it raises passes."""
    importlib.import_module(f"moe.commands.{name}").main(argv)


def _help() -> str:
    width = max(map(len, COMMANDS))
    programs = (f"  {name:{width}}  {does}" for name, does in COMMANDS.items())
    return "\n".join(["usage: permoe PROGRAM ...; permoe PROGRAM --help", "", *programs])


def _end(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
