"""Compare routers, and the dense model of equal FLOPs, over several seeds: a table, CSV, a plot.

permoe compare --config=digits --routers=topk,soft_moe,dense --seeds=5 --out=DIR
                  [--config.KEY=VALUE ...]

The rows set router.name, moe.dense and seed; any other key is the same for all of them. Settings
that do not fit a row are refused before the first is trained. Each run lives in DIR/ROUTER/SEED and
can be evaluated by itself; the same command continues.
"""

import argparse

from moe import cli


def main(argv) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", required=True, help=cli.CONFIG_HELP)
    parser.add_argument("--routers", default="all", help="names with commas, 'dense', or 'all'")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. SEEDS-1")
    parser.add_argument("--out", required=True, help="the directory of the comparison")
    flags, overrides = cli.parse(parser, argv)
    out = cli.local_path(flags.out, "--out")
    from moe.evaluate.comparison import compare  # late: a misspelt flag should not wait for JAX

    names = None if flags.routers == "all" else flags.routers.split(",")
    compare(flags.config, names, flags.seeds, out, overrides)
