"""Learns an embedding through a differentiable vote of the k nearest neighbours (SOFT).

    python -m examples.nearest_neighbours             scikit-learn's digits: nothing to fetch
    python -m examples.nearest_neighbours --dataset=fashion_mnist --steps=5000 --dim=500

A convnet embeds 100 queries and 100 labelled candidates a step; a top-k mask of their distances
weighs the candidates' votes, and the loss flows through it. The test is the plain majority of the
9 nearest among *all* training images. Arms: every mask of `routers`, beside controls:

  head        the same network with a linear head and cross-entropy
  head_votes  the vote of the neighbours in the embedding that this learned
  softmax     votes weighed by a softmax of all distances: neighbourhood components, without a k
  pixels      the vote of the neighbours in the images themselves

Protocol of Grover et al. 2019 (NeuralSort), which Xie et al. 2020 follow: SGD and 200 epochs there,
Adam and fewer steps here, and embeddings of length 1.
"""

import pathlib
from collections.abc import Sequence

from examples import command, report
from examples.nearest_neighbours import sets
from examples.nearest_neighbours.training import ARMS, WITHOUT_WIDTH, Settings, train
from examples.nearest_neighbours.voting import LOSSES
from moe.errors import UsageError

METRIC = report.Metric("test", "test accuracy", percent=True)


def main(argv: Sequence[str]) -> None:
    """Trains every arm at every width with every seed; prints and writes the table."""
    flags, settings = parse(argv)
    images = sets.load(settings.dataset, flags.data_dir, settings.limit)
    check(settings, images)
    out = pathlib.Path(flags.out)
    shared = settings._asdict()
    jobs = command.jobs(flags, WITHOUT_WIDTH)
    results = command.run_all(jobs, lambda job: train(job, images, settings), out, shared)
    parts = ", ".join(f"{len(part.labels):,} {name}" for name, part in images._asdict().items())
    note = (
        f"{settings.dataset}: {parts}; k = {settings.k}, {settings.steps} steps of "
        f"{settings.queries} queries and {settings.candidates} candidates. Mean and standard "
        "deviation over seeds, at the width that validation chose."
    )
    report.show(report.choose_widths(results, "validation"), METRIC, flags.reference, out, note)


def parse(argv: Sequence[str]):
    """Returns the flags, with lists in place of their text, and the settings."""
    parser, usual = command.parser("nearest_neighbours", __doc__), Settings()
    command.add_common(parser, ARMS, "head", "0.03,0.1,0.3")
    add = parser.add_argument
    add("--dataset", choices=sets.SETS, default=usual.dataset, help="default %(default)s")
    add("--loss", choices=LOSSES, default=usual.loss, help="default %(default)s")
    helps = {
        "k": "neighbours that vote",
        "steps": "of training",
        "queries": "in a step",
        "candidates": "in a step",
        "dim": "of the embedding",
    }
    command.add_numbers(parser, usual, helps)
    add("--learning_rate", type=float, default=usual.learning_rate, help="%(default)s")
    add("--limit", type=int, default=0, help="images of each part, to try it out; 0: all")
    return command.parse(parser, argv, ARMS, usual)


def check(settings: Settings, images: sets.Images) -> None:
    """Raises UsageError where the sizes do not fit the images or each other."""
    known = len(images.train.labels)
    if settings.k > settings.candidates:
        raise UsageError(
            f"--k={settings.k} neighbours of --candidates={settings.candidates}: expected no more"
        )
    if settings.queries + settings.candidates > known:
        raise UsageError(
            f"--queries={settings.queries} and --candidates={settings.candidates} of {known} "
            "training images: expected no more together"
        )


if __name__ == "__main__":
    command.run(main)
