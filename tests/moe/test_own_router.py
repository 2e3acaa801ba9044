"""The router that docs/routers.md makes: a run of it learns, and remembers what the page says."""

import pathlib
import re

import numpy as np
import pytest
from flax import nnx

from moe import cli
from moe.nn import memory
from moe.store.checkpoint import Checkpoints
from moe.train.run import set_up
from moe.train.trainer import train
from routers import ROUTERS
from tests.moe.conftest import TINY, open_source

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "routers.md"


@pytest.fixture
def config_file(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    file = tmp_path / "centred.py"
    file.write_text(code)
    yield file
    ROUTERS.pop("centred", None)


def test_the_documented_router_trains_and_remembers(config_file, data_dir, tmp_path):
    settings = TINY | {"data.data_dir": str(data_dir), "num_steps": "4"}
    settings |= {"router.centred.decay": "0.5"}
    config = cli.load_config(str(config_file), settings)
    assert train(config, tmp_path / "run")["eval/loss"] < 2.4
    run = set_up(config, open_source(config, "train"))
    (found,) = memory.routers(nnx.merge(run.graphdef, run.variables))
    state, _, _ = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).restore_newest(
        {"routers": run.memory}
    )
    mean = state["routers"]["blocks"]["1"]["feed_forward"]["router"]["mean"]
    assert found.numbers == (1,) and mean.shape == (4,) and np.abs(mean).min() > 0


def test_every_router_has_a_row_on_the_page():
    (table,) = re.findall(r"^\| name .*\n\|.*\n((?:\|.*\n)+)", DOCS.read_text(), re.M)
    ahead = [
        (name, line.rstrip(" |").rpartition("| ")[2] == "yes")
        for line in table.splitlines()
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    ]
    assert sorted(ahead) == sorted((name, not router.causal) for name, router in ROUTERS.items())
