"""Reads nested lists or formulas by trees that are found by beams while the reader is trained.

    python -m examples.beam_trees [--task=listops|logic] [--size=small|published]

The arms have the same cell and differ in how training chooses merges; all beams are searched in
the same, hard way when they are tested. `gold` is told the tree, `greedy` has one beam,
`commonest` always names the class that training had most. Tests beyond the training's lengths,
arguments and operators. --size=small is for two cores and has lists of MAX and MIN alone, as
medians and sums take more than its epochs to learn even with the gold tree; --size=published is
for a GPU: Chowdhury and Caragea 2023.

Writes runs.jsonl, from which the same command goes on, table.md, results.csv and picture.png.
"""

import functools
import pathlib
from collections.abc import Sequence

import numpy as np

from examples import command
from examples.beam_trees import data, listops, report, training
from examples.beam_trees.data import Task
from examples.beam_trees.training import Settings
from moe.errors import UsageError

NAMES = {"commonest": "the commonest class", **training.ARMS}
WHOLE = ("beams", "width", "epochs", "batch")
REAL = {
    "rate": "of learning",
    "strength": "of the relaxed selections, in units of log-probability",
}
PUBLISHED = Settings(width=128, beams=5, epochs=100, rate=1e-3)
# How a model is trained, on how many examples, and on how many it is tested.
SIZES = {
    ("listops", "small"): (Settings(), 20_000, 1_000),
    ("logic", "small"): (Settings(epochs=3), 20_000, 1_000),
    ("listops", "published"): (PUBLISHED, 90_000, 2_000),
    ("logic", "published"): (PUBLISHED._replace(width=200), 135_529, 2_000),
}


def commonest(task: Task) -> dict[str, float]:
    """Returns the accuracies of always naming the class that most training examples have."""
    label = np.bincount(task.sets["train"].labels).argmax()
    return {name: float((task.sets[name].labels == label).mean()) for name in task.tests}


def _operators(flags) -> tuple[str, ...] | None:
    """Returns the operators of lists; None where the task has none."""
    known = [name.removeprefix("[") for name in listops.OPERATORS]
    if flags.task == "logic":
        if flags.operators:
            raise UsageError(f"--operators={flags.operators} is of --task=listops")
        return None
    usual = "MAX,MIN" if flags.size == "small" else ",".join(known)
    found = command.names(flags.operators or usual, known, "--operators")
    return tuple(f"[{name}" for name in known if name in found)


def main(argv: Sequence[str]) -> None:
    """Trains every arm with every seed, and shows the table."""
    made = command.parser("beam_trees", __doc__)
    add = made.add_argument
    add("--task", choices=("listops", "logic"), default="listops")
    add("--size", choices=("small", "published"), default="small")
    add("--operators", help="of listops: some of MAX,MIN,MED,SM, in the place of the size's own")
    add("--arms", default=",".join(NAMES), help="some of: %(default)s (the default: all)")
    add("--seeds", type=command.positive, default=3, help="how many (default %(default)s)")
    add("--reference", default="hard", help="arm of the differences (default %(default)s)")
    add("--train", type=command.positive, help="examples to train on")
    add("--test", type=command.positive, help="examples of each set to test on")
    command.add_overrides(made, WHOLE, REAL)
    add("--out", help="folder of the results (default runs/beam_trees/TASK)")
    flags = made.parse_args(argv)
    settings, train, test = SIZES[flags.task, flags.size]
    settings = command.override(flags, settings, WHOLE, REAL)
    train, test = flags.train or train, flags.test or test
    arms = command.names(flags.arms, list(NAMES), "--arms")
    command.names(flags.reference, list(NAMES), "--reference")
    if settings.beams < 2:
        raise UsageError("--beams=1: one beam is --arms=greedy; expected 2 or more")
    operators = _operators(flags)
    out = pathlib.Path(flags.out or f"runs/beam_trees/{flags.task}").expanduser()

    @functools.lru_cache(maxsize=1)
    def task(seed: int) -> Task:
        return data.make(flags.task, flags.size, train, test, seed, operators)

    def fit(job: command.Job) -> dict[str, float]:
        if job.arm == "commonest":
            return commonest(task(job.seed))
        say = functools.partial(print, flush=True)
        return training.train(job.arm, settings, task(job.seed), job.seed, say)

    jobs = [command.Job(arm, 0.0, seed) for seed in range(flags.seeds) for arm in arms]
    made_of = {"task": flags.task, "size": flags.size, "train": train, "test": test}
    if operators:
        made_of["operators"] = [*operators]
    results = command.run_all(jobs, fit, out, made_of | settings._asdict())
    tests = [name for name in results[0] if name not in ("arm", "width", "seed", "seconds")]
    title = (
        f"{flags.task}, {train} examples, width {settings.width}, {settings.beams} beams; "
        f"differences to {flags.reference}"
    )
    report.show(results, tests, flags.reference, NAMES, title, out)


if __name__ == "__main__":
    command.run(main)
