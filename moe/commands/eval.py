"""Evaluate a checkpoint of a run: a table, DIR/eval.json, and pictures of the routing.

permoe eval --workdir=DIR [--step=N] [--split=SPLIT] [--harden] [--config.KEY=VALUE ...]

The model is the one that was trained, by the run's own saved config. Overrides may change what is
measured (data.name, data.image_size, model.dtype, model.attention, moe.eval_capacity_factor,
moe.dispatch and moe.dropless_*) and where (data.data_dir, eval.batch_size, mesh.*); without mesh.*
the devices at hand are used, however many had trained it. What was changed stands in the table's
title.

The newest checkpoint on the config's data.eval_split is written to DIR/eval.json and DIR/pictures.
Any other evaluation has files of its own: DIR/eval-SPLIT-STEP.json and DIR/pictures-SPLIT-STEP
where --step or another --split is given, and -KEY=VALUE after that for what is measured.

A pruned run is evaluated as it computed at that step; with --harden exactly config.prune.keep of
each matrix stays (docs/pruning.md), which makes of any run the one-shot pruned model.

A run whose config file registers a router of its own needs that file too, --config=FILE; nothing
else is taken from it.
"""

import argparse

from moe import cli
from moe.hosts import cluster, distributed


def main(argv) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="the directory of a run")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    parser.add_argument("--split", help="of the data set; default: config.data.eval_split")
    parser.add_argument(
        "--harden", action="store_true", help="keep exactly config.prune.keep of each matrix"
    )
    parser.add_argument("--config", help="a config file, for the routers that it registers")
    cluster.add_flags(parser)
    flags, overrides = cli.parse(parser, argv)
    workdir = cli.local_path(flags.workdir)
    if flags.config is not None:
        cli.read_config(flags.config)
    with distributed.processes(flags):
        from moe.evaluate.evaluation import (
            evaluate_run,  # late: a misspelt flag should not wait for JAX
        )

        asked = {"step": flags.step, "split": flags.split, "harden": flags.harden}
        evaluate_run(workdir, overrides=overrides, **asked)
