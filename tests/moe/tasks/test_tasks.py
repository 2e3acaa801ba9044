"""The seam: what the trainer asks of a task, and the task that docs/tasks.md makes."""

import json
import pathlib
import re

import jax
import pytest

from moe import cli, config
from moe.evaluate.evaluation import evaluate_run
from moe.store.checkpoint import Checkpoints
from moe.store.records import read
from moe.tasks import TASKS
from moe.train.run import set_up
from moe.train.trainer import train

DOCS = pathlib.Path(__file__).parents[3] / "docs" / "tasks.md"
SMALL = {"num_steps": "60", "batch_size": "64", "eval.batch_size": "64", "log.every": "10"}
SMALL |= {"optimizer.learning_rate": "0.01", "moe.num_experts": "4", "eval.every": "20"}


@pytest.fixture
def file(tmp_path):
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.S)[1]
    lines = [line for line in code.splitlines() if line and "import" not in line]
    assert len(lines) <= 45
    path = tmp_path / "largest.py"
    path.write_text(code)
    yield path
    TASKS.pop("largest", None)


def test_a_third_task_trains_and_evaluates(file, tmp_path, capsys):
    whole = train(cli.load_config(str(file), SMALL), tmp_path / "whole")
    rows = [row for row in read(tmp_path / "whole" / "metrics.jsonl") if "train/loss" in row]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] / 2
    assert "rows/s" in capsys.readouterr().out
    result = evaluate_run(tmp_path / "whole", step=None, split=None, overrides={})
    assert result["examples"] == 128
    assert result["accuracy"] == pytest.approx(whole["eval/accuracy"])
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["task"] == "largest"


@pytest.mark.slow
@pytest.mark.slow
def test_its_router_may_remember(file, tmp_path):
    """Although the model has no blocks."""
    settings = SMALL | {"num_steps": "4", "router.name": "loss_free", "optimizer.warmup": "0"}
    train(cli.load_config(str(file), settings), tmp_path / "run")
    config = cli.load_config(str(file), settings)
    run = set_up(config, TASKS["largest"].open(config, "train"))
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
    state, _, _ = checkpoints.restore_newest({"routers": run.memory})
    (bias,) = jax.tree.leaves(state)
    assert 0 < abs(bias).max() <= 4e-3 * 1.001  # four steps of 0.001


@pytest.mark.parametrize("name", ["images", "text"])
def test_a_task_says_all_that_is_asked(name):
    task = TASKS[name]
    for asked in ("unit", "best", "shown", "sizes", "overrides", "pictures"):
        assert getattr(task, asked) is not None
    settings = cli.apply(config.default(name), {})
    assert min(task.shape(settings)) > 0 and task.units(settings) > 0
