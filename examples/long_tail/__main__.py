"""Learns the destinations of flights, of which some are rare, by losses of one guess and of k.

    python -m examples.data flights
    python -m examples.long_tail

Train on January to September, choose widths on October by macro accuracy (each destination counts
alike), test on November and December. Arms:

  table                  how often flights of that carrier, airport and hour went there: no learning
  cross_entropy, focal   losses of one guess
  cross_entropy_cosine   the same with the head of angles that losses with margins have
  ldam                   cross-entropy with margins by the classes' numbers (Cao et al. 2019)
  fenchel_young          the partial Fenchel-Young loss of k guesses, `routers.sparse_topk_loss`
  hinge, hinge_margins   the stochastic top-k hinge, balanced, and with margins and the head of
                         angles (Garcin et al. 2022)
"""

import pathlib
from collections.abc import Sequence

from examples import columns, command, data, report
from examples.long_tail import flights
from examples.long_tail.losses import NAMES, WITHOUT_WIDTH
from examples.long_tail.training import TABLE, Settings, train
from moe.errors import UsageError

ARMS = (TABLE, *NAMES)


def main(argv: Sequence[str]) -> None:
    """Trains every arm at every width with every seed; prints and writes the table."""
    flags, settings = parse(argv)
    arrays = data.load("flights", flags.data_dir)
    if flags.limit:
        arrays = {name: column[:: flags.limit] for name, column in arrays.items()}
    made, out = flights.make(arrays), pathlib.Path(flags.out)
    if not settings.k < len(made.counts):
        raise UsageError(f"--k={settings.k} guesses of {len(made.counts)} destinations: take fewer")
    if settings.batch > len(made.train.labels):
        raise UsageError(f"--batch={settings.batch}: there are {len(made.train.labels)} flights")
    jobs = command.jobs(flags, (TABLE, *WITHOUT_WIDTH))
    shared = {**settings._asdict(), "limit": flags.limit}
    results = command.run_all(jobs, lambda job: train(job, made, settings), out, shared)
    results = report.choose_widths(results, "validation")
    k = settings.k
    titles = {
        "macro": f"{k} guesses, macro",
        "validation": "the same in validation",
        "topk": f"{k} guesses",
        "top1": "one guess",
    }
    metrics = [report.Metric(key, title, percent=True) for key, title in titles.items()]
    parts = (made.train, made.validation, made.test)
    note = (
        f"Flights: {', '.join(f'{len(part.labels):,}' for part in parts)} for training, validation "
        f"and test, {made.unseen} to places without one in training left out; {len(made.counts)} "
        f"destinations, of {made.counts.min():,} to {made.counts.max():,} flights. "
        f"{settings.epochs} epochs; validation chose the widths by macro accuracy. Differences to "
        f"{flags.reference}."
    )
    names = {result["arm"]: _named(result) for result in results}
    columns.show(results, metrics, flags.reference, names, note, out)


def _named(result: dict) -> str:
    width = f", width {result['width']:g}" if result["width"] else ""
    return f"`{result['arm']}`{width}"


def parse(argv: Sequence[str]):
    """Returns the flags, with lists in place of their text, and the settings."""
    parser, usual = command.parser("long_tail", __doc__), Settings()
    command.add_common(parser, ARMS, "cross_entropy", "0.01,0.1,1,4")
    add = parser.add_argument
    helps = {
        "k": "guesses that are allowed",
        "epochs": "of training",
        "batch": "flights in a step",
        "hidden": "units of each layer",
        "embedding": "numbers of each category",
    }
    command.add_numbers(parser, usual, helps)
    add("--learning_rate", type=float, default=usual.learning_rate, help="%(default)s")
    add("--limit", type=int, default=0, help="every N-th flight alone, to try it out; 0: all")
    return command.parse(parser, argv, ARMS, usual)


if __name__ == "__main__":
    command.run(main)
