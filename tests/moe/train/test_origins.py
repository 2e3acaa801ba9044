"""A new run from another's checkpoint: every parameter accounted for, dense MLPs become experts."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from moe.errors import UsageError
from moe.store.checkpoint import named
from moe.store.origins import places
from moe.train.origins import start_from_checkpoint, write_origin
from moe.train.run import set_up
from moe.train.trainer import train
from tests.moe.conftest import open_source

SIZES = {"model__depth": "4", "moe__expert_dim": "32", "num_steps": "6"}
DENSE = SIZES | {"moe__layers": "none"}


def parameters(workdir, step):
    """{parameter of one block: array}, by the run's own loops."""
    from moe.config import from_json

    config = from_json((workdir / "config.json").read_text())
    run = set_up(config, devices=jax.devices()[:1])
    manager = ocp.CheckpointManager(workdir / "checkpoints")
    args = ocp.args.Composite(params=ocp.args.StandardRestore())
    arrays = manager.restore(step, args=args)["params"]
    return {
        name: arrays[f"params.{p.leaf}"] if p.turn is None else arrays[f"params.{p.leaf}"][p.turn]
        for name, p in places(run.graphdef, run.variables).items()
    }


@pytest.fixture(scope="module")
def dense(data_dir, tmp_path_factory):
    from moe import cli, config
    from tests.moe.conftest import TINY

    workdir = tmp_path_factory.mktemp("dense")
    dotted = {key.replace("__", "."): value for key, value in DENSE.items()}
    dotted |= {"data.data_dir": str(data_dir), "model.scan": "true"}
    train(cli.apply(config.default(), TINY | dotted), workdir)
    return workdir


def started(config, workdir):
    run = set_up(config, open_source(config, "train"))
    state, origin = start_from_checkpoint(run, run.initial_state())
    write_origin(origin, workdir)
    leaves = named(state["params"])
    return run, {
        name: np.asarray(leaves[p.leaf] if p.turn is None else leaves[p.leaf][p.turn])
        for name, p in places(run.graphdef, run.variables).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("scan", ["true", "false"])
def test_a_dense_checkpoint_becomes_experts(scan, dense, tiny, tmp_path, capsys):
    config = tiny(**SIZES, moe__layers="every-2", model__scan=scan, init__workdir=str(dense))
    run, mine = started(config, tmp_path)
    theirs = parameters(dense, 6)
    report = json.loads((tmp_path / "init.json").read_text())
    assert report["parameters"].keys() == mine.keys()
    fresh = named(run.initial_state()["params"])
    for name, origin in report["parameters"].items():
        if origin == "new":
            assert ".router." in name
            place = places(run.graphdef, run.variables)[name]
            value = fresh[place.leaf] if place.turn is None else fresh[place.leaf][place.turn]
            np.testing.assert_array_equal(mine[name], value)
        elif origin == name:
            np.testing.assert_array_equal(mine[name], theirs[name])
        else:
            assert ".experts." in name
            for expert in mine[name]:
                np.testing.assert_array_equal(expert.squeeze(), theirs[origin])
    experts = [name for name, origin in report["parameters"].items() if ".experts." in name]
    assert len(experts) == 2 * 4  # two blocks of four arrays
    screen = capsys.readouterr().out
    wide = "blocks.*.feed_forward.experts.kernel_wide: each expert a copy of blocks.*.feed_forward."
    assert wide + "wide.kernel (2 blocks)" in screen
    assert "blocks.*.feed_forward.router.kernel: new (2 blocks)" in screen


@pytest.mark.slow
def test_training_goes_on_from_there(dense, tiny, tmp_path):
    settings = SIZES | {"moe__layers": "every-2", "init__workdir": str(dense)}
    train(tiny(**settings), tmp_path)
    theirs, mine = parameters(dense, 6), parameters(tmp_path, 6)
    kernel = mine["blocks.1.feed_forward.experts.kernel_wide"]
    assert np.abs(kernel - theirs["blocks.1.feed_forward.wide.kernel"]).max() < 0.1
    assert not np.array_equal(kernel[0], kernel[1])  # trained apart since


def test_other_classes_get_a_new_head(dense, tiny):
    config = tiny(**DENSE, data__num_classes="7", init__workdir=str(dense))
    config.data.update({"image_size": 8, "channels": 1})
    run = set_up(config)
    origins = start_from_checkpoint(run, run.initial_state())[1]["parameters"]
    assert {name for name, origin in origins.items() if origin == "new"} == {
        "head.kernel",
        "head.bias",
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"moe__layers": "every-2", "moe__expert_dim": "16"},
            r"needs \[16\] and .*has \[32\].*--config.moe.expert_dim",
        ),
        ({"moe__layers": "none", "model__width": "32"}, "give both models the same sizes"),
        ({"init__workdir": "nowhere"}, "init.workdir=nowhere holds no run"),
        ({"init__step": "5"}, "no checkpoint of step 5"),
    ],
)
def test_what_does_not_fit(overrides, message, dense, tiny, tmp_path):
    with pytest.raises(UsageError, match=message):
        started(tiny(**DENSE | {"init__workdir": str(dense)} | overrides), tmp_path)
