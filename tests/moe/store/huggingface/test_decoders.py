"""Decoders of transformers and runs compute the same, in both directions."""

import json

import numpy as np
import pytest

import generate
from moe.errors import UsageError
from moe.store import workdir as workdirs
from moe.store.checkpoint import Checkpoints, named
from moe.store.huggingface import tensors
from tests.moe.store.huggingface import models
from tests.moe.store.huggingface.models import DECODERS, FIXTURES, exchange


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns a function: the run that was imported from a fixture, made once."""
    folder = tmp_path_factory.mktemp("imported")

    def run(name):
        if not (folder / name).exists():
            exchange("import", FIXTURES / name, folder / name)
        return folder / name

    return run


@pytest.mark.parametrize("name", DECODERS)
def test_logits_and_greedy_tokens(name, runs):
    told, workdir = models.expected(name), runs(name)
    run, _ = models.opened(workdir)
    if run.config.model.dtype == "bfloat16":  # the reference computed in float32
        text = (workdir / "config.json").read_text().replace('"bfloat16"', '"float32"')
        (workdir / "config.json").write_text(text)
    found = models.logits(workdir, told["tokens"])
    assert np.abs(told["logits"]).max() > 1
    np.testing.assert_allclose(found, told["logits"], rtol=0, atol=1e-4)
    prompts, most = told["tokens"][:, :8], told["drawn"].shape[1]
    np.testing.assert_array_equal(models.drawn(workdir, prompts, most), told["drawn"])


@pytest.mark.parametrize("name", DECODERS)
def test_there_and_back_and_there(name, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "SHARD", 9000)
    away = exchange("export", runs(name), tmp_path / "away")
    again = exchange("import", away, tmp_path / "again")
    (_, ours), (_, theirs) = models.opened(runs(name)), models.opened(again)
    ours, theirs = named(ours), named(theirs)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    before, after = (json.loads((d / "config.json").read_text()) for d in (FIXTURES / name, away))
    assert {key: after[key] for key in ("architectures", "model_type")} == {
        key: before[key] for key in ("architectures", "model_type")
    }
    assert (away / "tokenizer.json").read_bytes() == (
        FIXTURES / name / "tokenizer.json"
    ).read_bytes()
    if not name.endswith("fused"):
        original, written = models.arrays(FIXTURES / name), models.arrays(away)
        assert original.keys() == written.keys()
        assert all(np.array_equal(original[key], written[key]) for key in original)
    assert len(list(away.glob("*.safetensors"))) > 2 and (away / tensors.INDEX).exists()


def test_a_checkpoint_as_training_saves_it(runs, tmp_path):
    """Orbax reads what was written piece by piece, and writes it with the same checksums."""
    _, params = models.opened(runs("mixtral"))
    saved = Checkpoints(tmp_path / "checkpoints")
    saved.save(0, {"params": params}, {})
    saved.close()
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager(runs("mixtral") / "checkpoints")
    assert manager.all_steps() == [0] and manager.latest_step() == 0
    args = ocp.args.Composite(params=ocp.args.StandardRestore())
    restored = manager.restore(0, args=args)["params"]
    for name, array in named({"params": params}).items():
        np.testing.assert_array_equal(restored[name], array)
    sums = [
        json.loads((place / "0/checksums/checksums").read_text())
        for place in (tmp_path / "checkpoints", runs("mixtral") / "checkpoints")
    ]
    assert sums[0] == sums[1]


def test_generation_reads_the_runs_own_tokenizer(runs, capsys):
    generate.main([f"--workdir={runs('olmoe')}", "--prompt=the cat", "--max_tokens=5"])
    assert capsys.readouterr().out.startswith("the cat")


def test_training_does_not_go_on_inside_an_import(runs):
    with pytest.raises(UsageError, match="imported parameters and no state of training"):
        workdirs.check_trained(runs("olmoe"))


def test_a_shorter_context(tmp_path):
    exchange("import", FIXTURES / "mixtral", tmp_path / "run", "--seq_len=32")
    assert models.opened(tmp_path / "run")[0].config.data.seq_len == 32
