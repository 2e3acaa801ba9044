"""Evaluate a checkpoint of a run: a table, DIR/eval.json, and pictures of the routing.

python eval.py --workdir=DIR [--step=N] [--split=SPLIT] [--config.KEY=VALUE ...]

Overrides may change the data (--config.data.name, .data_dir) and the evaluation
(--config.moe.eval_capacity_factor=4); everything else is the run's own saved config.
"""

import argparse

from moe import cli, cluster, distributed


def main(argv) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="the directory of a run")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    parser.add_argument("--split", help="of the data set; default: config.data.eval_split")
    cluster.add_flags(parser)
    flags, overrides = cli.parse(parser, argv)
    workdir = cli.local_path(flags.workdir)
    with distributed.processes(flags):
        from moe.evaluation import evaluate_run  # late: a misspelt flag should not wait for JAX

        evaluate_run(workdir, step=flags.step, split=flags.split, overrides=overrides)


if __name__ == "__main__":
    cli.run(main)
