"""Trains a cascade of two rankers, per stage or jointly through top-k masks (DFTopK, LCRON).

    python -m examples.data movielens
    python -m examples.cascade [--time=40,160,640]

40 films are shown to a person; retrieval keeps 30 of them, ranking 20 of those, and what counts is
how many of the 10 that the person liked best are still there: Recall@10@20. Arms:

  random, popularity, item_mean   scores that nothing is trained for
  bce, lambda, fenchel_young      a loss of each stage alone: cross-entropy, LambdaLoss, and the
                                  loss whose gradient is the sparse mask less the truth
  sparse, lapsum, sigmoid, ...    the joint loss, with every mask of `routers`; sigmoid is DFTopK

The item mean and popularity are of the ratings before each impression, and both stages are told
them as well. The masks select 10 in both stages, as in DFTopK's code; `--quotas=kept` has them
select what the stages keep, 30 and 20, and asks only that the truths are among these.
`--time=N,N` trains nothing and times a step of each loss with impressions of N films.
"""

import pathlib
from collections.abc import Sequence

from examples import command, data, report
from examples.cascade import impressions, timing
from examples.cascade.training import ARMS, BASELINES, WITHOUT_WIDTH, Settings, train
from moe.errors import UsageError

METRIC = report.Metric("test", "Recall@10@20")


def main(argv: Sequence[str]) -> None:
    """Trains every arm at every width with every seed; prints and writes the table."""
    flags, settings = parse(argv)
    ratings = data.load("movielens", flags.data_dir)
    if flags.limit:
        ratings = {name: column[: flags.limit] for name, column in ratings.items()}
    made = impressions.make(ratings)
    if len(made.train) < settings.batch:
        raise UsageError(
            f"--batch={settings.batch} of {len(made.train)} impressions to train with: "
            "expected no more"
        )
    out, shared = pathlib.Path(flags.out), {**settings._asdict(), "limit": flags.limit}
    if flags.time:
        arms = [arm for arm in flags.arms if arm not in BASELINES]
        found = timing.compare(arms, flags.time, flags.widths[0], made, settings)
        timing.show(found, flags.time, flags.reference, out)
        return
    jobs = command.jobs(flags, WITHOUT_WIDTH)
    results = command.run_all(jobs, lambda job: train(job, made, settings), out, shared)
    note = (
        f"MovieLens: {len(made.train):,} impressions of 40 films to train with, "
        f"{len(made.validation):,} for validation, {len(made.test):,} for the test; up to "
        f"{settings.epochs} epochs. Mean and standard deviation over seeds, at the width and the "
        "epoch that validation chose."
    )
    report.show(report.choose_widths(results, "validation"), METRIC, flags.reference, out, note)


def parse(argv: Sequence[str]):
    """Returns the flags, with lists in place of their text, and the settings."""
    parser, usual = command.parser("cascade", __doc__), Settings()
    command.add_common(parser, ARMS, "bce", "0.3,1,3")
    add = parser.add_argument
    command.add_numbers(parser, usual, {"epochs": "at most", "batch": "impressions in a step"})
    add("--learning_rate", type=float, default=usual.learning_rate, help="%(default)s")
    add("--quotas", choices=("truths", "kept"), default=usual.quotas, help="default %(default)s")
    add("--limit", type=int, default=0, help="ratings to read, to try it out; 0: all")
    add("--time", help="films, as 40,160: time a step of each loss, at the first width")
    flags, settings = command.parse(parser, argv, ARMS, usual)
    flags.time = command.counts(flags.time, "--time") if flags.time else []
    if flags.time and min(flags.time) < impressions.ITEMS:
        raise UsageError(f"--time: an impression has {impressions.ITEMS} films; take no fewer")
    if flags.time and (flags.reference in BASELINES or flags.reference not in flags.arms):
        raise UsageError("--time compares with --reference: expected one of --arms that is trained")
    return flags, settings


if __name__ == "__main__":
    command.run(main)
