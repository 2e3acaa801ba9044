"""A checkpoint evaluates alone: the numbers of training, tables, files, and damaged checkpoints."""

import json
import shutil

import numpy as np
import pytest

from moe.errors import UsageError
from moe.evaluate import routing_table, scalars
from moe.evaluation import evaluate_run
from moe.records import read
from moe.trainer import train


def evaluated(workdir, **arguments):
    defaults = {"step": None, "split": None, "overrides": {}}
    return evaluate_run(workdir, **(defaults | arguments))


@pytest.fixture
def run_copy(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def test_repeats_the_numbers_of_training(run_copy, capsys):
    result = evaluated(run_copy)
    row = [row for row in read(run_copy / "metrics.jsonl") if "eval/accuracy" in row][-1]
    assert result["step"] == row["step"] == 24
    assert result["examples"] == 359
    for name in ("accuracy", "top5_accuracy", "loss", "calibration_error"):
        assert result[name] == row[f"eval/{name}"]
    for name, value in result["layers"][1].items():
        assert value == row[f"eval/layer_1/{name}"]
    saved = json.loads((run_copy / "eval.json").read_text())
    assert saved["accuracy"] == result["accuracy"] and saved["layers"]["1"] == result["layers"][1]
    screen = capsys.readouterr().out
    for word in ("top5 accuracy", "calibration error", "examples per second", "dead experts"):
        assert word in screen
    for picture in ("load.png", "patches.png"):
        assert (run_copy / "pictures" / picture).read_bytes().startswith(b"\x89PNG")


def test_overrides(run_copy):
    at_once = evaluated(run_copy, overrides={"moe.eval_capacity_factor": "0.25"})
    ample = evaluated(run_copy, overrides={"moe.eval_capacity_factor": "4"})
    assert at_once["layers"][1]["drop_rate"] > 0.2 > ample["layers"][1]["drop_rate"]
    early = evaluated(run_copy, step=16, split="train[:100]")
    assert early["examples"] == 100 and early["step"] == 16


def damage(checkpoint):
    """Cuts every file of the item that both training and evaluation read."""
    for file in (checkpoint / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_the_newest_good_checkpoint_is_used(run_copy, tiny, capsys):
    reference = evaluated(run_copy, step=20)
    damage(run_copy / "checkpoints" / "24")
    capsys.readouterr()
    result = evaluated(run_copy)
    assert "checkpoint 24 is damaged; using step 20" in capsys.readouterr().out
    assert result["accuracy"] == reference["accuracy"]
    with pytest.raises(UsageError, match="can be read"):
        evaluated(run_copy, step=24)

    before = read(run_copy / "metrics.jsonl")
    train(tiny(), run_copy)
    screen = capsys.readouterr().out
    assert "checkpoint 24 is damaged and was moved to" in screen and "using step 20" in screen
    assert strip(read(run_copy / "metrics.jsonl")) == strip(before)
    assert (run_copy / "checkpoints.damaged" / "24").is_dir()
    assert evaluated(run_copy)["step"] == 24


def test_a_finished_run_stays_finished(run_copy, tiny):
    before = read(run_copy / "metrics.jsonl")
    results = train(tiny(), run_copy)
    assert read(run_copy / "metrics.jsonl") == before
    assert results["eval/accuracy"] == before[-1]["eval/accuracy"]


def strip(rows):
    """Rows without the one number that is a time."""
    return [{k: v for k, v in row.items() if "per_second" not in k} for row in rows]


def test_scalars_and_routing_against_a_plain_computation():
    total = {
        "examples": np.float32(4),
        "correct": np.float32(3),
        "top5": np.float32(4),
        "loss": np.float32(2),
        "bin_confidence": np.array([0.5, 2.4]),
        "bin_correct": np.array([1.0, 2.0]),
        "load": {"2": np.array([4.0, 4.0, 0.0, 0.0])},
        "dropped": {"2": np.float32(1)},
    }
    values = scalars(total)
    assert values == pytest.approx(
        {"accuracy": 0.75, "top5_accuracy": 1, "loss": 0.5, "calibration_error": 0.9 / 4}
    )
    assert routing_table(total, 4)[2] == pytest.approx(
        {"load_entropy": 0.5, "largest_share": 0.5, "dead_experts": 2, "drop_rate": 0.25}
    )
