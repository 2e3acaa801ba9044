"""A checkpoint evaluates alone: the numbers of training, tables, files, and damaged checkpoints."""

import functools
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import eval as eval_script
from moe import outputs
from moe.errors import UsageError
from moe.evaluate.evaluation import evaluate_run
from moe.models.vit import Output
from moe.store.records import read
from moe.tasks import TASKS
from moe.tasks.images import Images
from moe.train.measure import evaluate, routing_table
from moe.train.step import make_eval_step
from moe.train.trainer import train
from routers import ROUTERS


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
    for word in ("top5 accuracy", "calibration error", "images per second", "margin"):
        assert word in screen
    for picture in ("load.png", "patches.png"):
        assert (run_copy / "pictures" / picture).read_bytes().startswith(b"\x89PNG")


def test_every_evaluation_but_the_plain_one_has_its_own_files(run_copy, capsys):
    (run_copy / "eval.json").write_text("of a plain evaluation")
    (run_copy / "pictures").mkdir()
    small = evaluated(run_copy, overrides={"moe.eval_capacity_factor": "0.25"})
    ample = evaluated(run_copy, overrides={"moe.eval_capacity_factor": "4"})
    assert small["layers"][1]["drop_rate"] > 0.2 > ample["layers"][1]["drop_rate"]
    assert "test, 359 examples, moe.eval_capacity_factor=0.25\n" in capsys.readouterr().out
    early = evaluated(run_copy, step=16, split="train[:100]")
    assert early["examples"] == 100 and early["step"] == 16
    expected = {
        "": None,
        "-moe.eval_capacity_factor=0.25": small,
        "-moe.eval_capacity_factor=4.0": ample,
        "-train__100_-16": early,
    }
    assert {file.name for file in run_copy.glob("eval*")} == {f"eval{x}.json" for x in expected}
    assert {file.name for file in run_copy.glob("pict*")} == {f"pictures{x}" for x in expected}
    assert (run_copy / "eval.json").read_text() == "of a plain evaluation"
    assert not list((run_copy / "pictures").iterdir())
    for suffix, result in list(expected.items())[1:]:
        assert json.loads((run_copy / f"eval{suffix}.json").read_text())["loss"] == result["loss"]


@pytest.mark.parametrize("name", ["eval.json", "pictures/load.png", "pictures"])
def test_what_is_in_the_way_is_told_before_the_work(name, run_copy, monkeypatch):
    monkeypatch.setattr("moe.evaluate.evaluation.evaluate", None)  # not reached
    if name == "pictures":
        (run_copy / name).write_text("no directory")
    else:
        (run_copy / name).mkdir(parents=True)
    with pytest.raises(UsageError, match=rf"cannot write .*{name.split('/')[0]}.* move it away"):
        evaluated(run_copy)


def test_a_full_disk_is_told_before_the_work(run_copy, monkeypatch):
    usage = shutil.disk_usage(run_copy)
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr("moe.evaluate.evaluation.evaluate", None)
    with pytest.raises(UsageError, match=r"cannot write .*eval.json: the disk of .* is full"):
        evaluated(run_copy)


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(UsageError, match=r"cannot write .*: File name too long"):
        outputs.check(tmp_path / ("x" * 300))


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    file = tmp_path / "eval.json"
    outputs.write_json(file, {"a": 1})

    def fail(fresh):
        fresh.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match=r"cannot write .*eval.json: No space left on device"):
        outputs.write(file, fail)
    assert json.loads(file.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [file]


def test_a_run_whose_config_file_registers_a_router(run_copy, tmp_path, monkeypatch):
    """As in a new process: the router is known only once the file is named."""
    file = tmp_path / "own.py"
    file.write_text(
        "from moe.config import default as get_config\n"
        "from routers import ROUTERS\n"
        "ROUTERS['own'] = ROUTERS['topk']\n"
    )
    saved = json.loads((run_copy / "config.json").read_text())
    saved["router"]["own"] = saved["router"].pop(saved["router"]["name"])
    saved["router"]["name"] = "own"
    (run_copy / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UsageError, match=r"config.json.* router 'own' is none of .*--config=FILE"):
        evaluated(run_copy)
    monkeypatch.setattr(Images, "draw", lambda *_: None)
    try:
        eval_script.main([f"--workdir={run_copy}", f"--config={file}"])
    finally:
        ROUTERS.pop("own", None)
    assert json.loads((run_copy / "eval.json").read_text())["examples"] == 359


def damage(checkpoint):
    """Cuts every file of the item that both training and evaluation read."""
    for file in (checkpoint / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.slow
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


class Constant(nnx.Module):
    """Answers every image with the same logits."""

    def __init__(self, logits):
        self.logits = nnx.Param(jnp.asarray(logits, jnp.float32))

    def __call__(self, images, mask):
        return Output(jnp.tile(self.logits.get_value(), (len(images), 1)), {})


def sums_of(logits, tiny):
    """The evaluation of twelve images, of which ten count: one of each class."""
    graphdef, params = nnx.split(Constant(logits))
    batch = {"image": jnp.zeros((12, 8, 8, 1)), "label": jnp.arange(12) % 10}
    batch["mask"] = (jnp.arange(12) < 10).astype(jnp.float32)
    return evaluate(
        make_eval_step(functools.partial(TASKS["images"].sums, tiny()), graphdef),
        params,
        [batch],
        lambda batch: batch,
    )


def test_ties_are_broken_by_position(tiny):
    values = TASKS["images"].scalars(sums_of(np.zeros(10), tiny))
    assert values["accuracy"] == pytest.approx(0.1) and values["top5_accuracy"] == 0.5
    # Classes 9, 8 and 7 lead, and of the seven that follow in a tie the first two count.
    total = sums_of([0, 0, 0, 0, 0, 0, 0, 1, 2, 3], tiny)
    assert total["correct"] == 1 and total["top5"] == 5


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_an_error(wrong, tiny):
    with pytest.raises(UsageError, match=r"the loss of the evaluation is .* not finite"):
        sums_of([wrong] + [0] * 9, tiny)


def strip(rows):
    """Rows without the one number that is a time."""
    return [{k: v for k, v in row.items() if "per_second" not in k} for row in rows]


def test_scalars_and_routing_against_a_plain_computation():
    total = {
        "examples": np.float32(4),
        "weight": np.float32(4),
        "correct": np.float32(3),
        "top5": np.float32(4),
        "loss": np.float32(2),
        "bin_confidence": np.array([0.5, 2.4]),
        "bin_correct": np.array([1.0, 2.0]),
        "load": {"2": np.array([4.0, 4.0, 0.0, 0.0])},
        "dropped": {"2": np.float32(1)},
        "routed": {"2": np.float32(5)},
        "tokens": {"2": np.float32(5)},
        "chosen": {"2": np.float32(10)},
        "margin": {"2": np.float32(1)},
    }
    values = TASKS["images"].scalars(total)
    assert values == pytest.approx(
        {"accuracy": 0.75, "top5_accuracy": 1, "loss": 0.5, "calibration_error": 0.9 / 4}
    )
    assert routing_table(total)[2] == pytest.approx(
        {"load_entropy": 0.5, "largest_share": 0.5, "dead_experts": 2, "drop_rate": 0.2}
        | {"max_over_mean_load": 2, "experts_per_token": 2, "margin": 0.2}
    )
