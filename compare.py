"""Compare routers, and the dense model of equal FLOPs, over several seeds: a table, CSV, a plot.

python compare.py --config=configs/digits.py --routers=topk,soft_moe,dense --seeds=5 --out=DIR

The program is in moe/commands/compare.py; an installed permoe has it as `permoe compare`.
"""

import functools
import sys

from moe import commands

main = functools.partial(commands.call, "compare")

if __name__ == "__main__":
    commands.start("compare", sys.argv[1:])
