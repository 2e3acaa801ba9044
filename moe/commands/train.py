"""Train a config; run the same command again to continue.

permoe train --config=digits --workdir=DIR [--config.KEY=VALUE ...]

On several hosts, the same command on each; docs/hosts.md.
"""

import argparse

from moe import cli
from moe.hosts import cluster, distributed


def main(argv) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", required=True, help=cli.CONFIG_HELP)
    parser.add_argument("--workdir", required=True, help="the directory of the run")
    parser.add_argument(
        "--extend", action="store_true", help="a run that is there may get more steps than it had"
    )
    cluster.add_flags(parser)
    flags, overrides = cli.parse(parser, argv)
    workdir = cli.local_path(flags.workdir)
    config = cli.load_config(flags.config, overrides)
    with distributed.processes(flags):
        from moe.train.trainer import train  # late: a misspelt key should not wait for JAX

        train(config, workdir, flags.extend)
