"""Continue a text with a trained language model; the text streams to the screen as it comes.

python generate.py --workdir=DIR --prompt=TEXT [--temperature=T ...]

The program is in moe/commands/generate.py; an installed permoe has it as `permoe generate`.
"""

import functools
import sys

from moe import commands

main = functools.partial(commands.call, "generate")

if __name__ == "__main__":
    commands.start("generate", sys.argv[1:])
