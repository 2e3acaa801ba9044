"""`plan.py` from the command line: answers, and what a user can type wrong."""

import importlib.util
import json

import pytest

import plan as plan_script
from tests.moe.test_cli import run

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU's compiler, is not installed: pip install 'permoe[plan]'",
)
DIGITS = "--config=configs/digits.py"
SMALL = [
    "--config.data.image_size=8",
    "--config.data.channels=1",
    "--config.data.num_classes=10",
    "--config.model.depth=2",
    "--config.moe.layers=1",
]


def plan(argv, tmp_path, capsys) -> tuple[str, dict]:
    """The screen and the JSON of a plan."""
    file = tmp_path / "plan.json"
    plan_script.main([*argv, f"--json={file}"])
    return capsys.readouterr().out, json.loads(file.read_text())


def test_digits_on_eight_cpus(data_dir, tmp_path, capsys):
    """The shipped config as it stands: its sizes read off the data, experts over four devices."""
    argv = [DIGITS, "--topology=cpu:8", f"--config.data.data_dir={data_dir}"]
    out, numbers = plan([*argv, "--config.mesh.expert=4"], tmp_path, capsys)
    assert numbers["mesh"] == {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1}
    assert numbers["chips"] == 8 and numbers["parameters"]["total"] > 200_000
    kinds = {row["kind"] for row in numbers["collectives"]}
    assert kinds >= {"all-to-all", "all-reduce"}
    to_experts = [row for row in numbers["collectives"] if row["kind"] == "all-to-all"]
    assert all(row["axes"] == ["expert"] for row in to_experts)
    assert numbers["expert_weights_moved"] == []
    # Forward and backward, there and back, for each of the two layers of experts.
    assert sum(row["count"] for row in to_experts) == 2 * 2 * 2
    done, asked = (numbers["flops_per_chip"][key] for key in ("program", "model"))
    assert asked < done < 1.3 * asked
    assert numbers["memory"]["fits"] is None and numbers["time"] is None
    assert "expert weights moved: none" in out and "not known: temporary memory" in out
    assert f"{numbers['parameters']['total']:,}" in out


@pytest.mark.slow
def test_gpus_get_what_can_be_known(tmp_path, capsys):
    """Two hosts of four: what crosses hosts goes by the network, the rest by NVLink."""
    argv = [DIGITS, "--topology=h100:2x4", *SMALL, "--config.mesh.expert=4"]
    out, numbers = plan(argv, tmp_path, capsys)
    over = {(row["kind"], tuple(row["axes"])): row["network"] for row in numbers["collectives"]}
    assert over["all-to-all", ("expert",)] == "links"
    assert over["all-reduce", ("data", "expert")] == "network"
    assert numbers["time"]["slowest"] is None and numbers["time"]["fastest"] > 0
    assert "not known: main memory's traffic" in out and "at least" in out
    done = numbers["flops_per_chip"]["program"]
    assert numbers["time"]["compute"] == done / 494e12 and "compute, at the TF32 peak" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--topology=cpu:8"], "the following arguments are required: --config"),
        ([DIGITS], "the following arguments are required: --topology"),
        ([DIGITS, "--topology=v5q:2x2"], "no chip 'v5q'; expected v4, v5e, v5p, v6e"),
        ([DIGITS, "--topology=v5p"], "is not CHIP:SHAPE"),
        ([DIGITS, "--topology=cpu:8", "--config.mesh.expert=3", *SMALL], "a multiple of 3 devices"),
        ([DIGITS, "--topology=cpu:8", "--sweep", *SMALL], "which only a TPU's compiler says"),
        ([DIGITS, "--topology=cpu:8", "--sweep=x"], "invalid int value"),
        ([DIGITS, "--topology=cpu:8", "--json=no/such/plan.json"], "there is no directory no/such"),
        ([DIGITS, "--topology=cpu:8", "--json=tests"], "--json=tests: tests is a directory"),
        ([DIGITS, "--topology=cpu:8", "--json=/dev/full"], "/dev/full is no regular file"),
        ([DIGITS, "--topology=cpu:8", "--json="], "--json is empty; expected a path"),
        ([DIGITS, "--topology=cpu:1000000"], "expected 4096 at most"),
        ([DIGITS, "--topology=cpu:8", "--config.data.name=imagenet2012"], ".num_classes=N"),
        ([DIGITS, "--topology=cpu:8", "--config.router.name=topp"], "'topp' is unknown"),
        ([DIGITS, "--topology=cpu:4000", *SMALL], "a topology of 4000 devices needs a process"),
    ],
)
def test_errors(argv, message, monkeypatch, capsys):
    monkeypatch.setattr("moe.plan.planner.compile_step", None)  # not reached
    assert message in run(plan_script, argv, monkeypatch, capsys)


@pytest.mark.slow
@needs_tpu_compiler
def test_a_tpu_slice(tmp_path, capsys):
    argv = [DIGITS, "--topology=v5e:2x4", *SMALL, "--config.mesh.expert=4"]
    out, numbers = plan(argv, tmp_path, capsys)
    memory = numbers["memory"]
    assert memory["fits"] is True
    parts = ("parameters", "optimizer", "average", "batch", "activations", "padding", "temporary")
    assert sum(memory[key] for key in (*parts, "code")) == pytest.approx(memory["total"])
    assert 0 < numbers["time"]["fastest"] < numbers["time"]["slowest"]
    assert "all-to-all" in out and "expert weights moved: none" in out
    once = numbers["flops_per_chip"]
    assert once["program_loops_once"] == pytest.approx(once["xla_loops_once"], rel=0.3)


@pytest.mark.slow
@needs_tpu_compiler
def test_what_does_not_fit_is_an_answer(tmp_path, capsys):
    argv = ["--config=configs/vmoe_b16_imagenet21k.py", "--topology=v5e:2x4"]
    argv += ["--config.batch_size=8192", "--config.model.depth=4", "--config.model.remat=none"]
    out, numbers = plan(argv, tmp_path, capsys)
    assert numbers["memory"]["fits"] is False and numbers["time"] is None
    assert "does not fit; the compiler: " in out and "vailable HBM" in out
    assert numbers["memory"]["total"] > numbers["memory"]["limit"]


@pytest.mark.slow
@needs_tpu_compiler
def test_two_slices_add_a_network(tmp_path, capsys):
    argv = [DIGITS, "--topology=2xv5e:2x2", *SMALL, "--config.mesh.expert=4"]
    _, numbers = plan(argv, tmp_path, capsys)
    over = {row["network"]: row["axes"] for row in numbers["collectives"] if row["count"]}
    assert over["network"] == ["data"]
    assert numbers["time"]["network"] > 0


@pytest.mark.slow
@needs_tpu_compiler
def test_a_sweep_ranks_those_that_fit(tmp_path, capsys):
    argv = [DIGITS, "--topology=v5e:2x4", *SMALL, "--sweep=3"]
    out, plans = plan(argv, tmp_path, capsys)
    assert len(plans) == 3 and all(one["memory"]["fits"] for one in plans)
    times = [one["time"]["slowest"] for one in plans]
    assert times == sorted(times) and "sweep" in out


@pytest.mark.slow
@needs_tpu_compiler
def test_no_such_slice(monkeypatch, capsys):
    argv = [DIGITS, "--topology=v5p:3x5x7", *SMALL]
    assert "v5p has no slice 3x5x7" in run(plan_script, argv, monkeypatch, capsys)


@needs_tpu_compiler
@pytest.mark.slow
def test_a_tpu_moves_only_the_rows_that_there_are(tmp_path, capsys):
    """Dropless experts: ragged all-to-alls for the rows, and no kernel of an expert moved."""
    sizes = {"depth": 2, "scan": False, "remat": "none"}
    argv = [f"--config.model.{key}={value}" for key, value in sizes.items()]
    argv += ["--config.moe.dispatch=dropless", "--config.moe.group_size=1"]
    argv += ["--config.batch_size=64", "--config.eval.batch_size=64"]
    argv += ["--config=configs/vmoe_b16_imagenet21k.py", "--topology=v5e:2x4"]
    _, numbers = plan(argv, tmp_path, capsys)
    kinds = [row["kind"] for row in numbers["collectives"] if row["axes"] == ["expert"]]
    assert "ragged-all-to-all" in kinds and "all-gather" not in kinds
    assert numbers["expert_weights_moved"] == []
