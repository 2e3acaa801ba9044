"""A small model on the embedded digits, shared by the tests of `moe`."""

import functools

import jax
import pytest

from moe import cli, config
from moe.tasks import task_of
from moe.train.trainer import train

# These tests compile much and compute little: without LLVM's costly passes they take half as long.
QUICK = {"xla_backend_optimization_level": 0}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)

TINY = {
    "num_steps": "24",
    "batch_size": "16",
    "model.width": "16",
    "model.depth": "2",
    "model.mlp_dim": "32",
    "model.num_heads": "2",
    "model.patch_size": "4",
    "moe.layers": "1",
    "moe.num_experts": "4",
    "moe.expert_dim": "16",
    "optimizer.warmup_steps": "2",
    "eval.every": "12",
    "eval.batch_size": "64",
    "log.every": "5",
    "checkpoint.every": "4",
}

TINY_TEXT = {
    "num_steps": "8",
    "batch_size": "8",
    "data.seq_len": "32",
    "model.width": "16",
    "model.depth": "2",
    "model.mlp_dim": "32",
    "model.num_heads": "2",
    "model.kv_heads": "1",
    "model.chunk": "64",
    "moe.num_experts": "4",
    "moe.expert_dim": "16",
    "moe.shared_experts": "1",
    "data.train_split": "train[:2%]",
    "data.eval_split": "test[:1]",
    "eval.batch_size": "8",
}


def open_source(config, split):
    return task_of(config).open(config, split)


def build_model(config, rngs):
    return task_of(config).build(config, rngs)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def tiny(data_dir):
    """Returns a function: the tiny config with overrides, as text."""

    def make(**overrides):
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        return cli.apply(config.default(), TINY | {"data.data_dir": str(data_dir)} | dotted)

    return make


@pytest.fixture
def tiny_text():
    """Returns a function: the tiny config of a text with overrides, as text."""

    def make(**overrides):
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        return cli.apply(config.default("text"), TINY_TEXT | dotted)

    return make


@pytest.fixture(scope="session")
def finished_run(data_dir, tmp_path_factory):
    """The directory of a run of the tiny config; tests that change it copy it first."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    train(cli.apply(config.default(), TINY | {"data.data_dir": str(data_dir)}), workdir)
    return workdir


@pytest.fixture(scope="session")
def finished_text_run(tmp_path_factory):
    """The directory of a run of the tiny config of a text."""
    workdir = tmp_path_factory.mktemp("runs") / "text"
    train(cli.apply(config.default("text"), TINY_TEXT), workdir)
    return workdir
