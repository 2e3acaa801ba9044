"""The comparison of compressed gradients: its arms, its table, and a run of two steps."""

import numpy as np
import pytest

from examples import compressed_gradients
from examples.compressed_gradients import ARMS, SPLITS, Arm, table
from moe import cli
from moe.errors import UsageError
from tests.moe.conftest import TINY


def test_every_arm_is_a_setting():
    assert Arm(1.0) == ARMS[0] and len(ARMS) == 10
    assert len({arm.folder for arm in ARMS}) == len({arm.name for arm in ARMS}) == 10
    assert Arm(0.01, "ef21").settings() == {"keep": 0.01, "feedback": True, "method": "ef21"}
    assert Arm(0.01).settings() == {"keep": 0.01, "feedback": False}


def test_the_table_has_means_and_deviations():
    rows = [{"eval/accuracy": a, "eval/loss": 1.0, "sent": 2500.0} for a in (0.5, 0.6)]
    text = table({Arm(0.01, "ef"): rows}, "eval/accuracy")
    assert "| 1.0%, ef | 2.5 kB | 55.00% ± 7.07% | 1.0000 ± 0.0000 |" in text


def test_workers_have_few_classes_each(tmp_path):
    config = cli.load_config("digits", {"data.data_dir": str(tmp_path)})
    mixed, dealt = (task() for task in SPLITS.values())
    source = mixed.open(config, "train")
    config, rows = mixed.resolve(config, source), range(config.batch_size)
    one, other = (next(task.train_batches(config, source, 5, rows)) for task in (mixed, dealt))
    assert (np.diff(other["label"]) >= 0).all() and (np.diff(one["label"]) < 0).any()
    order = np.argsort(one["label"], kind="stable")
    for name, array in one.items():
        np.testing.assert_array_equal(array[order], other[name])


@pytest.mark.slow
def test_two_arms_are_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compressed_gradients, "ARMS", (Arm(1.0), Arm(0.1, "ef")))
    monkeypatch.setattr(compressed_gradients, "SHARES", (0.1, 0.01))
    settings = {k: v for k, v in TINY.items() if k.startswith(("model", "moe", "batch"))}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    flags += [f"--config.data.data_dir={tmp_path}", "--config.log.every=1"]
    compressed_gradients.main(["--steps=2", "--seeds=2", f"--out={tmp_path / 'out'}", *flags])
    assert "| 10.0%, ef |" in capsys.readouterr().out
    assert (tmp_path / "out" / "compressed_gradients.png").exists()


def test_one_seed_has_no_deviation(tmp_path):
    with pytest.raises(UsageError, match="--seeds=1: expected 2 or more"):
        compressed_gradients.main(["--seeds=1", f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
