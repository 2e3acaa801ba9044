"""Plan a run on hardware that is not at hand: print whether it fits, how fast it is, and why.

permoe plan --config=vmoe_15b --topology=v5p:4x4x8 [--sweep] [--json=FILE]
               [--config.KEY=VALUE ...]

Topologies: v4, v5e, v5p, v6e with the shape of a slice (v5e:16x16; 2xv5e:16x16 for two of them),
a100, h100, h200 with hosts x GPUs (h100:4x8), and cpu:N. TPUs need their compiler, and no TPU:
pip install 'permoe[plan]'.
"""

import argparse

from moe import cli


def main(argv) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", required=True, help=cli.CONFIG_HELP)
    parser.add_argument("--topology", required=True, help="CHIP:SHAPE, for example v5p:4x4x8")
    parser.add_argument("--json", help="a file for all the numbers")
    parser.add_argument(
        "--sweep",
        type=int,
        nargs="?",
        const=8,
        metavar="N",
        help="compile the N most promising meshes and remat policies and rank them; default 8",
    )
    flags, overrides = cli.parse(parser, argv)
    config = cli.load_config(flags.config, overrides)
    file = None if flags.json is None else cli.local_path(flags.json, "--json")
    from moe.plan.answer import answer  # late: a misspelt key should not wait for JAX

    answer(config, flags.topology, flags.sweep, file)
