"""Every shipped config builds, sparse and dense, and takes a step at a shrunken size."""

import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from moe import cli
from moe.data.images import from_arrays
from moe.models.build import count_parameters
from moe.store.checkpoint import named
from moe.tasks import TASKS
from moe.train.measure import evaluate
from moe.train.run import set_up
from tests.moe.conftest import TINY_TEXT, build_model, open_source, quick_jit

CONFIGS = sorted(pathlib.Path("configs").glob("[!_]*.py"))
TEXTS = [file for file in CONFIGS if cli.load_config(str(file), {}).task == "text"]
IMAGES = [file for file in CONFIGS if file not in TEXTS]
SHRUNK = {
    "num_steps": "20",
    "batch_size": "64",
    "data.image_size": "16",
    "data.num_classes": "0",
    "model.width": "16",
    "model.depth": "4",
    "model.mlp_dim": "32",
    "model.num_heads": "2",
    "model.patch_size": "4",
    "moe.expert_dim": "16",
    "optimizer.warmup_steps": "2",
    "eval.batch_size": "64",
    "mesh.fsdp": "1",
    "mesh.expert": "1",
}
SHRUNK_TEXT = {
    "num_steps": "20",
    "batch_size": "64",
    "data.name": "stdlib",
    "optimizer.warmup_steps": "2",
    "moe.num_experts": "8",
    "mesh.fsdp": "1",
    "mesh.expert": "1",
    "mesh.tensor": "1",
}


def source(channels: int):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (70, 20, 20, channels), np.uint8)
    names = tuple(f"class {i}" for i in range(7))
    return from_arrays(images, np.arange(70) % 7, names)


def test_there_are_configs():
    names = {file.stem for file in CONFIGS}
    assert names >= {"digits", "fashion_mnist", "cifar100", "vmoe_s32_imagenet"}
    assert names >= {"vmoe_b16_imagenet21k", "vmoe_15b"}
    assert names >= {"mixtral_8x7b", "olmoe_1b_7b", "qwen3_30b_a3b"}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_step_is_traced(file):
    if file in TEXTS:
        config = cli.load_config(str(file), TINY_TEXT | SHRUNK_TEXT)
        run = set_up(config, open_source(config, config.data.train_split))
    else:
        config = cli.load_config(str(file), SHRUNK)
        run = set_up(config, source(1 if file.stem in ("digits", "fashion_mnist") else 3))
    state = run.abstract_state()
    with jax.set_mesh(run.mesh):
        new, sums = jax.eval_shape(run.train_step, state, run.abstract_batch())
    assert named(new).keys() == named(state).keys() and sums["loss"].shape == ()


@pytest.mark.slow  # every config is traced above, and the default trains in other tests
@pytest.mark.parametrize("dense", ["false", "true"])
@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.stem)
def test_builds_and_takes_a_step(file, dense):
    config = cli.load_config(str(file), SHRUNK | {"moe.dense": dense})
    data = source(1 if file.stem in ("digits", "fashion_mnist") else 3)
    run = set_up(config, data)
    step = quick_jit(run.train_step)
    start = state = run.initial_state()
    batches = run.train_batches(data, 0)
    for _ in range(4):  # the first of a warmup has rate 0, and the head's kernel starts at 0
        state, sums = step(state, run.put(next(batches)))
    assert np.isfinite(float(sums["loss"])) and float(sums["grad_norm"]) > 0
    before, after = named(start["params"]), named(state["params"])
    same = {name for name in before if bool((before[name] == after[name]).all())}
    # A bias of the keys shifts all scores of a query alike: softmax does not see it.
    assert {name for name in same if not name.endswith("attention.key.bias")} == set()
    total = evaluate(run.jit(run.eval_step), state["params"], run.eval_batches(data), run.put)
    assert total["examples"] == 70 and 0 <= TASKS["images"].scalars(total)["accuracy"] <= 1


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vmoe_s32_imagenet", 56.7),
        ("cifar100", 7.65),
        ("fashion_mnist", 2.88),
        ("vmoe_15b", 14_660),  # of 1,000 classes; 14,689 with its own 21,843
    ],
)
def test_full_sizes(name, millions):
    """The configs as they stand, not shrunk, over 1,000 classes: shapes alone."""
    config = cli.load_config(f"configs/{name}.py", {})
    config.data.update({"channels": 3, "num_classes": 1000})
    config.data.image_size = config.data.image_size or 32
    model = nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0)))
    assert count_parameters(nnx.state(model, nnx.Param)) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mixtral_8x7b", 46_702_792_704, 12_879_925_248),
        ("olmoe_1b_7b", 6_919_161_856, 1_282_017_280),
        ("qwen3_30b_a3b", 30_532_122_624, 3_353_032_704),
    ],
)
def test_published_sizes(name, total, active):
    """46.7B and 12.9B, 6.9B and 1.3B, 30.5B and 3.3B as published; to the unit those of the
    published checkpoints' tensors, and of these K of E experts. Shapes alone: nothing is allocated.
    """
    config = cli.load_config(f"configs/{name}.py", {})
    params = nnx.state(nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0))), nnx.Param)
    share = config.router.topk.k / config.moe.num_experts
    assert (count_parameters(params), count_parameters(params, share)) == (total, active)
