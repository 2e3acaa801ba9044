"""Tests which differences between the processes of a run are found, and how they are told."""

import json

import numpy as np
import pytest

from moe import cli, config
from moe.data.images import from_arrays
from moe.hosts.distributed import AgreedError
from moe.train import agreement

IMAGES = np.arange(40 * 4 * 4, dtype=np.uint8).reshape(40, 4, 4, 1)
LABELS = [i % 3 for i in range(40)]


def source(images=IMAGES, labels=LABELS, names="abc"):
    return from_arrays(images, labels, names)


def told(overrides=(), data=None, **others):
    settings = cli.apply(config.default(), dict(overrides))
    return others | agreement._told(settings, [data or source()])


@pytest.fixture
def compare(monkeypatch):
    """Returns a function: what `agree` says where the processes were told these things."""

    def run(*processes):
        monkeypatch.setattr(agreement.jax, "process_count", lambda: len(processes))
        monkeypatch.setattr(agreement, "together", lambda f: f())
        monkeypatch.setattr(agreement, "gather", lambda _: list(map(json.dumps, processes)))
        agreement.agree(config.default())

    return run


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: told({"num_steps": "7"}), r"config.num_steps is 7 and not 1000; give every"),
        (lambda: told({"checkpoint.every": "7"}), "config.checkpoint.every is 7 and not 500"),
        (lambda: told({"optimizer.learning_rate": "0.1"}), "learning_rate is 0.1 and not 0.001"),
        (lambda: told({"seed": "1", "batch_size": "64"}), "batch_size is 64 .*; config.seed is 1"),
        (lambda: told(data=source(IMAGES[:39], LABELS[:39])), "the data of split 'all' is"),
        (lambda: told(data=source(IMAGES + np.uint8(1))), "the data of split 'all' is"),
        (lambda: told(data=source(labels=[*LABELS[1:], 0])), "the data of split 'all' is"),
        (lambda: told(data=source(names="abd")), "the data of split 'all' is"),
        (lambda: told(step=4), "step is 4 and not 'absent'"),
        (lambda: told() | {"jax": "0.0.1"}, "jax is '0.0.1' and not"),
    ],
)
def test_a_difference_is_named(compare, other, message):
    with pytest.raises(AgreedError, match=f"process 2 was told .* process 0: .*{message}"):
        compare(told(), told(), other())


def test_the_places_of_a_host_are_its_own(compare, monkeypatch):
    first = told()
    monkeypatch.setenv("XLA_FLAGS", agreement.os.environ.get("XLA_FLAGS", "") + " --xla_dump_to=/a")
    compare(first, told({"data.data_dir": "/elsewhere"}))


def test_flags_of_the_compiler_are_compared(compare, monkeypatch):
    first = told()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    with pytest.raises(AgreedError, match="XLA_FLAGS is '--xla_cpu_enable_fast_math=true'"):
        compare(first, told())


def test_the_source_of_the_program_and_of_registered_routers_is_compared(monkeypatch, tmp_path):
    before, file = agreement._program(), tmp_path / "mine.py"
    digests = {before}
    for text in ("return 1", "return 2"):
        file.write_text(f"class Router:\n    def __call__(self):\n        {text}\n")
        scope = {"__name__": "mine"}
        exec(compile(file.read_text(), str(file), "exec"), scope)
        monkeypatch.setitem(agreement.routers.ROUTERS, "mine", scope["Router"])
        digests.add(agreement._program())
    assert len(digests) == 3 and agreement._program() in digests
