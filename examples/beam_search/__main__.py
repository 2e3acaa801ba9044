"""Spells words out in sounds by a model that is trained further through its own beam search.

    pip install 'permoe[examples]' && python -m examples.data cmudict
    python -m examples.beam_search [--seeds=N] [--words=N] [--steps=N] [--further=N]

A GRU that attends to the letters is trained by likelihood. From there each arm goes on for as many
steps: by likelihood (the control), through soft beams (SOFT, Xie et al. 2020), by the mean of
both. All are tested by hard beams on words that none has seen. --size=published trains longer, and
on longer words too, for a GPU.

Writes runs.jsonl, from which the same command goes on, table.md, results.csv and picture.png.
"""

import functools
import pathlib
from collections.abc import Sequence

from examples import columns, command, data
from examples.beam_search import training, words
from examples.beam_search.training import ARMS, Settings
from examples.report import Metric

WHOLE = ("beams", "width", "batch", "steps", "further")
REAL = {
    "rate": "of learning at first",
    "further_rate": "of learning after that",
    "strength": "of the soft selection, in units of log-probability",
}
CONTROL = "likelihood, further"
METRICS = (
    Metric("word", "word error", higher=False, percent=True),
    Metric("phoneme", "phoneme error", higher=False, percent=True),
    Metric("greedy", "word error, greedy", higher=False, percent=True),
)
# How a model is trained, on how many words, of how many letters at most, and tested on how many.
SIZES = {
    "small": (Settings(), 100_000, 12, 2_000),
    "published": (Settings(steps=40_000, further=4_000, rate=1e-3), 100_000, 20, 12_000),
}


def main(argv: Sequence[str]) -> None:
    """Trains every arm with every seed, and shows the table."""
    made = command.parser("beam_search", __doc__)
    add = made.add_argument
    add("--size", choices=list(SIZES), default="small")
    add("--seeds", type=command.positive, default=3, help="how many (default %(default)s)")
    add("--words", type=command.positive, help="to train on")
    add("--test", type=command.positive, help="words to test on")
    command.add_overrides(made, WHOLE, REAL)
    add("--out", default="runs/beam_search", help="folder of the results (default %(default)s)")
    add("--data_dir", help="where python -m examples.data wrote its files")
    flags = made.parse_args(argv)
    settings, train, longest, test = SIZES[flags.size]
    settings = command.override(flags, settings, WHOLE, REAL)
    train, test = flags.words or train, flags.test or test
    said = words.parse(data.load("cmudict", flags.data_dir))
    out = pathlib.Path(flags.out).expanduser()

    def fit(job: command.Job) -> dict[str, float]:
        own = words.split(said, train, test, longest, job.seed)
        say = functools.partial(print, flush=True)
        found = training.measure(settings, list(ARMS), own, job.seed, say)
        return {f"{arm}: {key}": x for arm, one in found.items() for key, x in one.items()}

    jobs = [command.Job("all", 0.0, seed) for seed in range(flags.seeds)]
    made_of = {"words": train, "longest": longest, "test": test}
    runs = command.run_all(jobs, fit, out, made_of | settings._asdict())
    results = [
        {"arm": arm, "width": 0.0, "seed": run["seed"]}
        | {key: run[f"{arm}: {key}"] for key in ("word", "phoneme", "greedy", "loss", "seconds")}
        for run in runs
        for arm in ARMS
    ]
    title = (
        f"{train} words, {settings.steps} steps, then {settings.further}; "
        f"{settings.beams} beams; differences to {CONTROL}"
    )
    columns.show(results, METRICS, CONTROL, {arm: arm for arm in ARMS}, title, out)


if __name__ == "__main__":
    command.run(main)
