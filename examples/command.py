"""Runs an example as a command: common flags, errors of one line, and runs that are kept."""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from moe.errors import UsageError


class Job(NamedTuple):
    """Names one training run; `width` is that of its top-k mask, 0 where it has none."""

    arm: str
    width: float
    seed: int


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Calls `main` with the arguments and exits: 2 with one line where it was asked wrongly."""
    try:
        main(sys.argv[1:])
    except UsageError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Returns a parser whose errors are `UsageError`."""
    made = argparse.ArgumentParser(
        prog=f"python -m examples.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def refuse(message: str):
        raise UsageError(f"{message}; python -m examples.{name} --help shows all")

    made.error = refuse
    return made


def add_common(
    made: argparse.ArgumentParser, arms: Sequence[str], reference: str, widths: str = "0.1,0.3,1"
) -> None:
    """Adds the flags that every example with arms, seeds and widths has."""
    name = made.prog.rpartition(".")[2]
    add = made.add_argument
    add("--arms", default=",".join(arms), help="some of: %(default)s (the default: all)")
    add("--seeds", type=positive, default=3, help="how many (default %(default)s)")
    add("--widths", default=widths, help="of masks; validation chooses (default %(default)s)")
    add("--reference", default=reference, help="arm of the differences (default %(default)s)")
    add("--out", default=f"runs/{name}", help="folder of the results (default %(default)s)")
    add("--data_dir", help="where python -m examples.data wrote its files")


def add_numbers(made: argparse.ArgumentParser, usual: NamedTuple, helps: dict[str, str]) -> None:
    """Adds a flag for a whole number of at least 1 for each of these fields of the settings."""
    for name, help in helps.items():
        default = getattr(usual, name)
        made.add_argument(f"--{name}", type=positive, default=default, help=f"{help} ({default})")


def add_overrides(
    made: argparse.ArgumentParser, whole: Sequence[str], real: dict[str, str]
) -> None:
    """Adds a flag for each of these settings, in the place of a size's own.

    Args:
      whole: names of whole numbers of at least 1.
      real: names of numbers above 0, with what they are.
    """
    for name in whole:
        made.add_argument(f"--{name}", type=positive, help=f"in the place of the size's own {name}")
    for name, help in real.items():
        made.add_argument(f"--{name}", help=help)


def override(
    flags: argparse.Namespace, settings: NamedTuple, whole: Sequence[str], real: dict[str, str]
):
    """Returns the settings with what was given by the flags of `add_overrides`."""
    given = {name: getattr(flags, name) for name in whole}
    texts = {name: getattr(flags, name) for name in real}
    given |= {name: number(text, f"--{name}") for name, text in texts.items() if text}
    return settings._replace(**{name: value for name, value in given.items() if value})


def parse(
    made: argparse.ArgumentParser, argv: Sequence[str], arms: Sequence[str], usual: NamedTuple
):
    """Returns the flags, with lists in place of their text, and the settings with their values.

    Args:
      made: with the flags of `add_common`, and one for each field of the settings `usual`.
      arms: those that there are.
    """
    flags = made.parse_args(argv)
    flags.arms = names(flags.arms, arms, "--arms")
    names(flags.reference, arms, "--reference")
    flags.widths = numbers(flags.widths, "--widths")
    return flags, usual._replace(**{name: getattr(flags, name) for name in usual._fields})


def positive(text: str) -> int:
    """Reads a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def names(text: str, known: Sequence[str], flag: str) -> list[str]:
    """Reads `a,b,c`, all of them known."""
    found = [name for name in text.split(",") if name]
    if wrong := [name for name in found if name not in known]:
        raise UsageError(f"{flag}: {wrong[0]!r} is none of {', '.join(known)}")
    if not found or len(set(found)) < len(found):
        raise UsageError(f"{flag}={text}: expected different names of {', '.join(known)}")
    return found


def numbers(text: str, flag: str) -> list[float]:
    """Reads `0.1,1`, all of them above 0."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < number < float("inf") for number in found):
        raise UsageError(f"{flag}={text}: expected numbers above 0, such as {flag}=0.1,1")
    return found


def number(text: str, flag: str) -> float:
    """Reads `0.1`, above 0."""
    found = numbers(text, flag)
    if len(found) > 1:
        raise UsageError(f"{flag}={text}: expected one number, such as {flag}={found[0]:g}")
    return found[0]


def counts(text: str, flag: str) -> list[int]:
    """Reads `40,160`, whole numbers of at least 1."""
    try:
        return [positive(part) for part in text.split(",")]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UsageError(f"{flag}={text}: expected whole numbers, as {flag}=40,160") from error


def jobs(flags: argparse.Namespace, without_width: Sequence[str]) -> list[Job]:
    """Returns the runs, seed by seed, so that what was ended early has pairs."""
    return [
        Job(arm, width, seed)
        for seed in range(flags.seeds)
        for arm in flags.arms
        for width in ([0.0] if arm in without_width else flags.widths)
    ]


def run_all(
    jobs: Sequence[Job], train: Callable[[Job], dict], out: pathlib.Path, settings: dict
) -> list[dict]:
    """Trains what is not in `out`/runs.jsonl yet, adds it there, and returns the results.

    A run is there if a line has its job and the same settings; the same command goes on where it
    was ended.
    """
    file = out / "runs.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with file.open("a+") as stream:
            stream.seek(0)
            lines = stream.read().split("\n")
            if lines[-1]:  # cut when the run was killed
                stream.write("\n")
    except OSError as error:
        raise UsageError(f"cannot write --out={out}: {error.strerror}; name another") from error
    done = {}
    for line in lines:
        try:
            record = json.loads(line)
            if record["settings"] == settings:
                done[Job(**record["job"])] = record["result"]
        except (ValueError, KeyError, TypeError):
            continue  # a line that was cut
    for number, job in enumerate(jobs, 1):
        if job not in done:
            start = time.perf_counter()
            result = {**train(job), "seconds": round(time.perf_counter() - start, 2)}
            done[job] = result
            record = {"job": job._asdict(), "settings": settings, "result": result}
            with file.open("a") as stream:
                stream.write(json.dumps(record) + "\n")
        shown = ", ".join(f"{key} {value:.4g}" for key, value in done[job].items())
        width = f" width {job.width:g}" if job.width else ""
        print(f"{number}/{len(jobs)} {job.arm}{width} seed {job.seed}: {shown}", flush=True)
    return [{**job._asdict(), **done[job]} for job in jobs]
