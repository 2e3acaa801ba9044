"""Evaluate a checkpoint of a run: a table, DIR/eval.json, and pictures of the routing.

python eval.py --workdir=DIR [--step=N] [--split=SPLIT] [--config.KEY=VALUE ...]

The program is in moe/commands/eval.py; an installed permoe has it as `permoe eval`.
"""

import functools
import sys

from moe import commands

main = functools.partial(commands.call, "eval")

if __name__ == "__main__":
    commands.start("eval", sys.argv[1:])
