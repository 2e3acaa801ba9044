"""Train a config; run the same command again to continue.

python train.py --config=configs/digits.py --workdir=DIR [--config.KEY=VALUE ...]

The program is in moe/commands/train.py; an installed permoe has it as `permoe train`.
"""

import functools
import sys

from moe import commands

main = functools.partial(commands.call, "train")

if __name__ == "__main__":
    commands.start("train", sys.argv[1:])
