"""Compare routers, and dense models, over several seeds: tables, curves, what seeds can tell.

permoe compare --config=digits --rows=topk,sparse_topk:p=1.5,dense --seeds=5 --out=DIR
                  [--baseline=ROW] [--metric=NAME] [--jobs=N] [--tune=KEY:VALUE,VALUE]
                  [--config.KEY=VALUE ...]
permoe compare --merge=DIR,DIR --out=DIR [--baseline=ROW]

A row is a router with settings of its own, or of any key: NAME:KEY=VALUE:KEY=VALUE; `dense`, an MLP
of the experts' FLOPs, or `dense_params`, one of their parameters. The rows set router.name,
moe.dense and seed; any other key is the same for all of them. Settings that do not fit a row are
refused before the first is trained. Each run lives in DIR/ROW/SEED and can be evaluated by itself;
the same command continues, and only reads where all runs are complete. docs/compare.md says what
the columns mean.
"""

import argparse
import re

from moe import cli
from moe.errors import UsageError


def main(argv) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", help=cli.CONFIG_HELP)
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--rows", help="rows with commas, or 'all' (the default)")
    rows.add_argument("--routers", help="the same, by its older name")
    parser.add_argument("--seeds", default="3", help="N for the seeds 0 .. N-1, or FIRST-LAST")
    parser.add_argument("--out", required=True, help="the directory of the comparison")
    parser.add_argument(
        "--baseline", default="", help="compare with this row (dense, or the first)"
    )
    parser.add_argument(
        "--metric", default="", help="of an evaluation, in place of the task's best"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument(
        "--tune", action="append", default=[], help="KEY:VALUE,VALUE, chosen on a validation split"
    )
    parser.add_argument("--tune_seeds", type=int, default=1, help="seeds by which it is chosen")
    parser.add_argument("--validation", default="", help="a split of its own to choose by")
    parser.add_argument("--merge", help="directories of comparisons, to make one of them")
    flags, overrides = cli.parse(parser, argv)
    out = cli.local_path(flags.out, "--out")
    if flags.merge is not None:
        return _merge(flags, overrides, out)
    if flags.config is None:
        raise UsageError("the following arguments are required: --config (or --merge=DIR,DIR)")
    text, seeds = flags.rows if flags.routers is None else flags.routers, _seeds(flags.seeds)
    # Late: a misspelt flag should not wait for JAX.
    from moe.evaluate.comparison import compare
    from moe.evaluate.league.plan import Tuning
    from moe.evaluate.league.rows import split

    names = None if text in (None, "all") else split(text)
    tuned = Tuning(flags.tune, flags.tune_seeds, flags.validation)
    options = {"baseline": flags.baseline, "jobs": flags.jobs, "tuned": tuned}
    options |= {"metric": flags.metric}
    compare(flags.config, names, seeds, out, overrides, **options)


def _merge(flags, overrides, out) -> None:
    taken = {"config": flags.config, "rows": flags.rows, "routers": flags.routers}
    taken |= {
        "tune": flags.tune,
        "validation": flags.validation,
        "metric": flags.metric,
        "config.KEY": overrides,
    }
    for name, value in taken.items():
        if value:
            raise UsageError(f"--merge reads tables alone: leave --{name} out")
    folders = [cli.local_path(text, "--merge") for text in flags.merge.split(",")]
    from moe.evaluate.comparison import merge

    merge(folders, out, flags.baseline)


def _seeds(text: str) -> range:
    """Reads "5" as the seeds 0 to 4, "3-5" as 3, 4 and 5."""
    match = re.fullmatch(r"(?:(\d{1,9})-)?(-?\d{1,9})", text.strip())
    if not match or (match[1] and int(match[2]) < int(match[1])):
        raise UsageError(f"--seeds={text}: expected a number of seeds, or FIRST-LAST")
    return range(int(match[1]), int(match[2]) + 1) if match[1] else range(int(match[2]))
