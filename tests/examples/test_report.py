"""Tables, pictures, kept runs and the flags that the examples share."""

import csv
import subprocess
import sys

import pytest

from examples import command, report
from examples.command import Job
from moe.errors import UsageError

METRIC = report.Metric("test", "accuracy", percent=True)


def result(arm, seed, test, width=0.0, validation=0.0):
    found = {"arm": arm, "width": width, "seed": seed, "test": test}
    return {**found, "validation": validation, "seconds": 1.0}


def test_rows_have_paired_differences(tmp_path):
    results = [result("a", seed, value) for seed, value in enumerate((0.5, 0.6, 0.7))]
    results += [result("b", seed, value) for seed, value in enumerate((0.52, 0.61, 0.73))]
    text = report.show(results, METRIC, "a", tmp_path, "A note.")
    lines = text.splitlines()
    assert lines[0] == "A note." and "| `a` |  | 3 | 60.00 % ± 10.00 % |  |  | 1.0 |" in lines
    # d = .02, .01, .03: mean .02, s = .01, t(2) = 4.3027, half = .02484.
    assert "| `b` |  | 3 | 62.00 % ± 10.54 % | +2.00 % (-0.48 % to +4.48 %) |" in lines[-1]
    assert "not told apart" in lines[-1]
    with (tmp_path / "results.csv").open() as stream:
        assert [row["test"] for row in csv.DictReader(stream)][:2] == ["0.5", "0.6"]
    assert (tmp_path / "picture.png").read_bytes()[1:4] == b"PNG"
    assert (tmp_path / "table.md").read_text() == text


def test_one_seed_and_no_reference():
    rows = report.rows([result("b", 0, 0.5)], METRIC, "a")
    assert "| `b` |  | 1 | 50.00 % |  |  | 1.0 |" in report.markdown(rows, METRIC, "a")


def test_validation_chooses_the_width():
    results = [result("a", 0, 0.9, 0.1, 0.1), result("a", 1, 0.9, 0.1, 0.5)]
    results += [result("a", 0, 0.1, 0.3, 0.4), result("a", 1, 0.1, 0.3, 0.4)]
    results += [result("b", 0, 0.2)]
    chosen = report.choose_widths(results, "validation")
    assert [(row["arm"], row["width"]) for row in chosen] == [("a", 0.3), ("a", 0.3), ("b", 0)]


def test_the_same_command_goes_on(tmp_path):
    trained = []

    def train(job):
        trained.append(job)
        return {"test": job.seed / 2}

    jobs = [Job("a", 0.5, seed) for seed in range(3)]
    command.run_all(jobs[:2], train, tmp_path, {"steps": 1})
    with (tmp_path / "runs.jsonl").open("a") as stream:
        stream.write('{"job": {"arm"')  # killed here
    results = command.run_all(jobs, train, tmp_path, {"steps": 1})
    assert trained == jobs and [row["test"] for row in results] == [0, 0.5, 1]
    assert command.run_all(jobs, train, tmp_path, {"steps": 1}) == results
    assert trained == jobs
    command.run_all(jobs[:1], train, tmp_path, {"steps": 2})
    assert len(trained) == 4
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write --out"):
        command.run_all(jobs, train, tmp_path / "file", {})


@pytest.mark.parametrize(
    "read, text",
    [(command.numbers, "0"), (command.numbers, "a"), (command.numbers, "1,inf")],
)
def test_numbers_are_above_0(read, text):
    with pytest.raises(UsageError, match="--widths"):
        read(text, "--widths")


def test_names_are_known_and_different():
    assert command.names("b,a", ("a", "b"), "--arms") == ["b", "a"]
    for text in ("c", "a,a", ""):
        with pytest.raises(UsageError, match="--arms"):
            command.names(text, ("a", "b"), "--arms")


def test_a_command_ends_with_one_line():
    program = [sys.executable, "-m", "examples.data", "unknown"]
    ended = subprocess.run(program, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
