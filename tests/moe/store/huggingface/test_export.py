"""Exports of runs that permoe trained, by their own names and as what they are not."""

import json

import jax
import numpy as np
import pytest

from moe.config import to_json
from moe.errors import UsageError
from moe.store.checkpoint import Checkpoints
from moe.store.origins import places
from moe.train.run import set_up
from tests.moe.store.huggingface import models
from tests.moe.store.huggingface.models import exchange


def test_any_run_goes_out_under_its_own_names(finished_run, tmp_path):
    away = exchange("export", finished_run, tmp_path / "away", "--format=plain")
    run, params = models.opened(finished_run)
    found = models.arrays(away)
    where = places(run.graphdef, run.variables)
    assert found.keys() == where.keys()
    np.testing.assert_array_equal(found["head.kernel"], params["head"]["kernel"])
    experts = params["blocks"]["1"]["feed_forward"]["experts"]
    np.testing.assert_array_equal(
        found["blocks.1.feed_forward.experts.kernel_wide"], experts["kernel_wide"]
    )
    assert json.loads((away / "permoe.json").read_text())["task"] == "images"
    half = exchange("export", finished_run, tmp_path / "half", "--format=plain", "--dtype=bfloat16")
    halved = models.arrays(half)
    np.testing.assert_allclose(halved["position"], found["position"], rtol=1e-2)


def test_what_has_another_shape_says_how_it_can_go(finished_run, finished_text_run, tmp_path):
    away = tmp_path / "away"
    with pytest.raises(UsageError, match=r"vit needs moe.layers=.*--format=plain"):
        exchange("export", finished_run, away)
    with pytest.raises(UsageError, match=r"qwen3_moe needs moe.shared_experts=0, not 1"):
        exchange("export", finished_text_run, away, "--format=qwen3_moe")
    with pytest.raises(UsageError, match="--format=gpt: expected one of mixtral"):
        exchange("export", finished_text_run, away, "--format=gpt")
    with pytest.raises(UsageError, match="--dtype=int8: expected one of float32"):
        exchange("export", finished_text_run, away, "--dtype=int8")
    with pytest.raises(UsageError, match="no checkpoint of step 5: it has"):
        exchange("export", finished_text_run, away, "--format=plain", "--step=5")
    with pytest.raises(UsageError, match="holds no run"):
        exchange("export", tmp_path, away)
    assert not away.exists() and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_loop_of_blocks_is_exported_block_by_block(tiny_text, tmp_path):
    """A decoder that was made here, scanned, with an average: transformers' names hold it."""
    overrides = {"model__scan": "true", "model__depth": "3", "moe__shared_experts": "0"}
    overrides |= {"optimizer__ema_decay": "0.5", "data__vocabulary": "257"}
    run = set_up(tiny_text(**overrides, moe__layers="from-1"))
    state = run.initial_state()
    state["ema"] = jax.tree.map(lambda a: a * 1.5, state["params"])
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    checkpoints.save(3, state, {})
    checkpoints.close()
    (tmp_path / "run" / "config.json").write_text(to_json(run.config))
    away = exchange("export", tmp_path / "run", tmp_path / "away")
    assert json.loads((away / "config.json").read_text())["mlp_only_layers"] == [0]
    again = exchange("import", away, tmp_path / "again")
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    ours, theirs = (models.logits(run, tokens) for run in (tmp_path / "run", again))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
