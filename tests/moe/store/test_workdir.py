"""The directory of a run: whose it is, what may lie in it, and who writes there."""

import gc
import json
import re
import shutil

import jax
import numpy as np
import pytest

from moe.errors import UsageError
from moe.store.records import read
from moe.store.workdir import saved_config
from moe.train import trainer
from moe.train.trainer import train
from tests.moe import launch


@pytest.mark.parametrize(
    "text", ["", "[]", "[1]", "3", "null", '{"seed": "x"}', '{"moe": 3}', '{"seed": 0', "\x00"]
)
def test_a_file_that_is_no_config_is_named(text, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=f"^{re.escape(str(file))} is no config of a run"):
        saved_config(tmp_path)
    assert file.read_text() == text


def test_a_directory_in_place_of_the_config(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UsageError, match=r"is no config of a run \(Is a directory\)"):
        saved_config(tmp_path)


def test_no_run(tmp_path):
    assert saved_config(tmp_path) is None and saved_config(tmp_path / "nowhere") is None


class Begun(Exception):
    """Stands for the training that begins."""


@pytest.fixture
def begun(monkeypatch):
    """Training ends where it would begin; the list has the bytes of arrays that live then."""
    live = []

    def loop(*arguments):
        gc.collect()
        live.append(sum(a.nbytes for a in jax.live_arrays()))
        raise Begun

    monkeypatch.setattr(trainer, "loop", loop)
    return live


@pytest.mark.slow
@pytest.mark.slow
def test_a_resumed_run_holds_no_more_than_a_fresh_one(begun, finished_run, tiny, tmp_path):
    resumed = tmp_path / "resumed"
    shutil.copytree(finished_run, resumed)
    shutil.rmtree(resumed / "checkpoints" / "24")
    for workdir, settings in (
        (tmp_path / "fresh", {}),
        (resumed, {}),
        (tmp_path / "initialized", {"init__workdir": str(finished_run)}),
    ):
        gc.collect()
        before = sum(a.nbytes for a in jax.live_arrays())
        with pytest.raises(Begun):
            train(tiny(**settings), workdir)
        begun[-1] -= before
    fresh, resumed, initialized = begun
    assert fresh > 3 * 4 * 2000 and fresh == resumed == initialized


@pytest.mark.slow
def test_a_damaged_checkpoint_is_repeated_from_the_one_before(finished_run, tiny, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    files = (workdir / "checkpoints" / "24" / "params").rglob("d/*")
    largest = max(files, key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    results = train(tiny(), workdir)
    screen = capsys.readouterr().out
    assert "checkpoint 24 is damaged and was moved to" in screen
    assert f"continuing {workdir} at step 20" in screen
    assert launch.rows(workdir) == launch.rows(finished_run)
    assert results["eval/accuracy"] == launch.rows(finished_run)[-1]["eval/accuracy"]
    ours, theirs = launch.arrays(workdir, 24), launch.arrays(finished_run, 24)
    assert all(np.array_equal(ours[name], array) for name, array in theirs.items())


@pytest.mark.slow
def test_a_finished_run_says_so_and_becomes_longer(finished_run, tiny, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    last = launch.rows(workdir)[-1]
    assert train(tiny(), workdir)["eval/accuracy"] == last["eval/accuracy"]
    screen = capsys.readouterr().out
    assert f"{workdir} is complete: 24 steps, loss {last['eval/loss']:.4f}" in screen
    assert "--extend" in screen
    with pytest.raises(UsageError, match="of 24 steps: add --extend to train it on to step 26"):
        train(tiny(num_steps="26"), workdir)
    with pytest.raises(UsageError, match=r"another config \(num_steps=24, now 20"):
        train(tiny(num_steps="20"), workdir, extend=True)
    with pytest.raises(UsageError, match=r"another config \(batch_size=16, now 32"):
        train(tiny(num_steps="26", batch_size="32"), workdir, extend=True)
    assert launch.rows(workdir) == launch.rows(finished_run)
    train(tiny(num_steps="26"), workdir, extend=True)
    assert json.loads((workdir / "config.json").read_text())["num_steps"] == 26
    steps = [row["step"] for row in read(workdir / "metrics.jsonl") if "train/loss" in row]
    assert steps == [5, 10, 15, 20, 24, 25, 26]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": "-1"}, "seed"),
        ({"init__workdir": "nowhere"}, "init.workdir=nowhere holds no run"),
        ({"init__workdir": "RUN", "init__step": "3"}, "no checkpoint of step 3"),
        ({"init__workdir": "RUN", "model__width": "32"}, "give both models the same sizes"),
    ],
)
def test_what_cannot_start_leaves_no_directory(settings, message, finished_run, tiny, tmp_path):
    workdir = tmp_path / "deep" / "run"
    with pytest.raises(UsageError, match=message):
        train(
            tiny(**{k: v.replace("RUN", str(finished_run)) for k, v in settings.items()}), workdir
        )
    assert not workdir.parent.exists()


@pytest.mark.parametrize(
    ("name", "is_directory"),
    [
        ("checkpoints", False),
        ("checkpoints.damaged", False),
        ("events", False),
        ("metrics.jsonl", True),
        ("config.json", True),
        ("config.json.new", True),
        ("init.json", True),
        ("lock", True),
    ],
)
def test_what_is_in_the_way_is_named(name, is_directory, tiny, tmp_path):
    path = tmp_path / name
    if is_directory:
        path.mkdir()
    else:
        path.write_text("")
    with pytest.raises(UsageError, match=f"^{re.escape(str(path))} is in the way"):
        train(tiny(), tmp_path)
    assert list(tmp_path.iterdir()) == [path]
