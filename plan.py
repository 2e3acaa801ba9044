"""Plan a run on hardware that is not at hand: print whether it fits, how fast it is, and why.

python plan.py --config=configs/vmoe_15b.py --topology=v5p:4x4x8 [--sweep] [--json=FILE]

The program is in moe/commands/plan.py; an installed permoe has it as `permoe plan`.
"""

import functools
import sys

from moe import commands

main = functools.partial(commands.call, "plan")

if __name__ == "__main__":
    commands.start("plan", sys.argv[1:])
