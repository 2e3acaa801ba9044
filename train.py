"""Train a config; run the same command again to continue.

python train.py --config=configs/digits.py --workdir=DIR [--config.KEY=VALUE ...]
"""

import argparse
import pathlib

from moe import cli


def main(argv) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a file of configs/")
    parser.add_argument("--workdir", required=True, help="the directory of the run")
    flags, overrides = cli.parse(parser, argv)
    config = cli.load_config(flags.config, overrides)
    from moe.trainer import train  # late: a misspelt key should not wait for JAX

    train(config, pathlib.Path(flags.workdir))


if __name__ == "__main__":
    cli.run(main)
