"""What is wrong with a directory gets one line, and nothing is left behind."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe.errors import UsageError
from moe.store import pieces
from tests.moe.store.huggingface.models import FIXTURES, exchange


@pytest.fixture
def copy(tmp_path):
    """A copy of a model, to be spoilt."""
    return shutil.copytree(FIXTURES / "olmoe", tmp_path / "copy")


def describe(copy, **changes):
    file = copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-100])


def change(copy, name, value=None):
    tensors = load_file(copy / "model.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, copy / "model.safetensors")


def pickled(copy):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")


UP = "model.layers.1.mlp.experts.3.up_proj.weight"
WRONG = {
    "cut": (cut, r"model.safetensors is damaged or missing \(.*not fully covered\)"),
    "family": (
        lambda copy: describe(copy, architectures=["GPT2LMHeadModel"]),
        r"architectures=\['GPT2LMHeadModel'\], which is unknown here: expected one of Mixtral",
    ),
    "no family": (lambda copy: describe(copy, architectures=None), "architectures=.None"),
    "shape": (
        lambda copy: describe(copy, intermediate_size=16),
        r"has the shape \[12, 16\]; by config.json it is \[16, 16\]",
    ),
    "pickles": (pickled, "weights as pickles alone, which run code when they are read"),
    "nothing": (lambda copy: (copy / "model.safetensors").unlink(), "has neither model.safetens"),
    "no config": (lambda copy: (copy / "config.json").unlink(), "cannot read .*config.json"),
    "no json": (lambda copy: (copy / "config.json").write_text("{"), "is no config.json"),
    "a list": (lambda copy: (copy / "config.json").write_text("[]"), "it is no table"),
    "missing": (lambda copy: change(copy, UP), f"needs {UP}: no safetensors have it"),
    "extra": (
        lambda copy: change(copy, "model.layers.2.mlp.gate.weight", np.ones((8, 16), np.float32)),
        r"has no place for model.layers.2.mlp.gate.weight",
    ),
    "whole numbers": (
        lambda copy: change(copy, UP, np.ones((12, 16), np.int8)),
        f"{UP} of .* is I8; expected F64, F32, F16, BF16",
    ),
    "clip": (lambda copy: describe(copy, clip_qkv=8.0), "says clip_qkv=8.0: expected null"),
    "bias": (lambda copy: describe(copy, attention_bias=True), "attention_bias=true"),
    "gelu": (lambda copy: describe(copy, hidden_act="gelu"), 'hidden_act="gelu": expected silu'),
    "yarn": (
        lambda copy: describe(copy, rope_parameters={"rope_type": "yarn", "factor": 4}),
        'rope_parameters.rope_type="yarn": expected default',
    ),
    "size": (lambda copy: describe(copy, hidden_size=None), "hidden_size=null: expected a whole"),
    "odd": (lambda copy: describe(copy, num_attention_heads=5), "fits no model here"),
    "text": (lambda copy: describe(copy, mlp_only_layers=3, model_type="x", hidden_size="a"),
             'hidden_size="a": expected a whole'),
    "tokenizer": (
        lambda copy: (copy / "tokenizer.json").write_text("{}"), "is no tokenizer.json"
    ),
    "vocabulary": (
        lambda copy: describe(copy, vocab_size=100), "has 268 tokens and the model .* 100"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_one_line_and_nothing_left(what, copy, tmp_path):
    spoil, line = WRONG[what]
    spoil(copy)
    with pytest.raises(UsageError, match=line) as error:
        exchange("import", copy, tmp_path / "run")
    assert all("\n" not in str(one) for one in getattr(error.value, "found", [error.value]))
    assert {file.name for file in tmp_path.iterdir()} == {"copy"}


def test_a_missing_shard(tmp_path):
    copy = shutil.copytree(FIXTURES / "mixtral", tmp_path / "copy")
    sorted(copy.glob("*.safetensors"))[1].unlink()
    with pytest.raises(UsageError, match=r"model-00002-of-.* is damaged or missing"):
        exchange("import", copy, tmp_path / "run")
    (copy / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UsageError, match="is no index of safetensors"):
        exchange("import", copy, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_too_little_disk(copy, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        usage = type(shutil.disk_usage("/"))
        patch.setattr(pieces.shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))
        with pytest.raises(UsageError, match=r"has 1e-06 GB of free space, and the parameters"):
            exchange("import", copy, tmp_path / "run")
    exchange("import", copy, tmp_path / "run")

    def full(*_):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(pieces.Writer, "_put", full)
    with pytest.raises(UsageError, match=r"No space left on device.*look whether its disk is full"):
        exchange("import", copy, tmp_path / "other")
    assert {file.name for file in tmp_path.iterdir()} == {"copy", "run"}


def test_a_directory_that_exists(copy, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").touch()
    with pytest.raises(UsageError, match="exists: delete it, or name another folder"):
        exchange("import", copy, tmp_path / "run")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["file"]


def test_a_damaged_checkpoint_is_not_exported(copy, tmp_path):
    run = exchange("import", copy, tmp_path / "run")
    file = run / "checkpoints" / "0" / "checksums" / "checksums"
    sums = json.loads(file.read_text())
    file.write_text(json.dumps(sums | {"params.norm.scale": 1}))
    with pytest.raises(UsageError, match=r"norm.scale is not as it was saved, by its checksum"):
        exchange("export", run, tmp_path / "away")
    for part in (run / "checkpoints" / "0" / "params").rglob("d/*"):
        part.write_bytes(b"")
    with pytest.raises(UsageError, match="cannot be read"):
        exchange("export", run, tmp_path / "away")
    assert not (tmp_path / "away").exists()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["import", "--from={copy}"], "the following arguments are required: --out"),
        (["take"], "invalid choice"),
        (["import", "--from={copy}", "--out={tmp}/run", "--seq_len=65"], "--seq_len=65 is above"),
        (["import", "--from={copy}", "--out={tmp}/run", "--seq_len=x"], "no whole number above 0"),
        (["import", "--from={copy}", "--out={tmp}/run", "--image_size=8"], "no meaning for a"),
        (["import", "--from={tmp}/none", "--out={tmp}/run"], "cannot read .*none/config.json"),
        (["import", "--from={copy}", "--out={tmp}/run", "--end=<stop>"], "has no token"),
    ],
)
def test_flags(flags, line, copy, tmp_path):
    from moe.store.huggingface import __main__ as huggingface

    with pytest.raises(UsageError, match=line):
        huggingface.main([flag.format(copy=copy, tmp=tmp_path) for flag in flags])
    assert not (tmp_path / "run").exists()


def test_the_command_ends_with_2(copy, tmp_path):
    cut(copy)
    command = [sys.executable, "-m", "moe.store.huggingface", "import"]
    ended = subprocess.run(
        [*command, f"--from={copy}", f"--out={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parents[4],
    )
    assert ended.returncode == 2 and ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1 and ended.stderr.startswith("error: ")
