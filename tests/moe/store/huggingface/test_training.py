"""Imported models train on: an OLMoE as it is, a vision transformer as experts."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.moe.store.huggingface.models import FIXTURES, exchange

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[4]


def trained(workdir, source, *flags):
    """The losses of 50 steps on two devices, from the config and the parameters of a run."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "train.py", f"--config={source}", f"--workdir={workdir}"]
    command += [f"--config.init.workdir={source}", "--config.num_steps=50", "--config.log.every=5"]
    command += ["--config.eval.every=50", "--config.checkpoint.every=50"]
    ended = subprocess.run(
        [*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row], ended.stdout


def test_an_olmoe_trains_on(tmp_path):
    run = exchange("import", FIXTURES / "olmoe", tmp_path / "run")
    (tmp_path / "text").mkdir()
    for number in range(20):
        text = f"the cat {number} and the hat, then there was a cat with hats\n" * 20
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    prepare = [sys.executable, "-m", "moe.data.prepare", "text", f"--out={tmp_path / 'set'}"]
    prepare += [f"--files={tmp_path}/text/*.txt", f"--tokenizer={run / 'tokenizer.json'}"]
    prepare += ["--test_share=0.3"]
    subprocess.run(prepare, cwd=ROOT, check=True, capture_output=True)
    data = [f"--config.data.name={tmp_path / 'set'}"]
    mesh = ["--config.mesh.expert=2", "--config.optimizer.learning_rate=0.003"]
    losses, screen = trained(tmp_path / "on", run, *data, *mesh)
    assert "embedding: copied" in screen
    assert losses[-1] < losses[0] - 1, losses


def test_a_vision_transformer_becomes_experts(tmp_path):
    run = exchange("import", FIXTURES / "vit", tmp_path / "run")
    experts = ["--config.moe.layers=1", "--config.moe.num_experts=4"]
    experts += ["--config.router.name=topk", "--config.optimizer.learning_rate=0.003"]
    experts += ["--config.batch_size=64", "--config.eval.batch_size=64", "--config.mesh.expert=2"]
    losses, screen = trained(tmp_path / "sparse", run, *experts)
    assert "each expert a copy of blocks.*.feed_forward.wide.kernel" in screen
    assert "position: copied" in screen
    assert losses[-1] < losses[0] - 0.5, losses
