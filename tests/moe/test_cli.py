"""What a user can type wrong: one clear line, exit code 2, no traceback, and files as they were."""

import hashlib
import pathlib

import pytest

import eval as eval_script
import train as train_script
from moe import cli
from moe.errors import UsageError

TRAIN = ["--config=configs/digits.py"]


def digest(directory: pathlib.Path) -> dict[str, str]:
    files = (file for file in directory.rglob("*") if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run(script, argv, monkeypatch, capsys) -> str:
    """Runs a script as a shell would; returns its error line."""
    monkeypatch.setattr("sys.argv", ["script.py", *argv])
    with pytest.raises(SystemExit) as exit_:
        cli.run(script.main)
    captured = capsys.readouterr().err
    assert exit_.value.code == 2
    line = captured.splitlines()[-1]  # before it, at most the notice that digits is prepared
    assert line.startswith("error: ") and captured.count("error:") == 1
    assert "Traceback" not in captured
    return line


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.router.name=topp", "'topp' is unknown; expected topk,"),
        ("--config.router.nme=topk", "unknown key config.router.nme; did you mean router.name"),
        ("--config.router.topk.kk=1", "unknown key config.router.topk.kk; did you mean"),
        ("--config.router=topk", "unknown key config.router; did you mean router.name"),
        ("--config.batch_size=many", "--config.batch_size='many' is not of type int"),
        ("--config.batch_size=2.5", "--config.batch_size='2.5' is not of type int"),
        ("--config.moe.dense=maybe", "is not of type bool; it is now False"),
        (
            "--config.batch_size=0",
            "config.batch_size=0: expected a whole number in [1, 1e6], such as",
        ),
        (
            "--config.router.sparse_expert_choice.k=9",
            "sparse_expert_choice.k=9.0 is above moe.num_experts=8",
        ),
        (
            "--config.router.sparse_expert_choice.p=1",
            "sparse_expert_choice.p=1.0: expected a number in (1, 100]",
        ),
        (
            "--config.router.sparse_expert_choice.strength=0",
            "sparse_expert_choice.strength=0.0: expected a number in [1e-6",
        ),
        (
            "--config.moe.capacity_factor=0",
            "config.moe.capacity_factor=0.0: expected a number in (0,",
        ),
        (
            "--config.moe.capacity_factor=-1",
            "config.moe.capacity_factor=-1.0: expected a number in (0,",
        ),
        ("--config.moe.layers=last-9", "fits no model of"),
        ("--config.moe.dispatch=magic", "expected capacity, dropless, dense"),
        (
            "--config.optimizer.name=adam",
            "expected adamw, sgd, adafactor, muon; did you mean adamw?",
        ),
        ("--config.optimizer.schedule=step", "'step' is unknown"),
        ("--config.optimizer.warmup_steps=999999", "below num_steps"),
        (
            "--config.optimizer.accumulate=3",
            "config.batch_size=64 must be a multiple of 3: groups of",
        ),
        ("--config.loss=hinge", "config.loss='hinge' is unknown"),
        ("--config.data.name=imagenet2012", "python -m moe.data.prepare imagenet2012"),
        ("--config.data.eval_split=valid", "valid"),
        ("--config.data.augment.crop=-1", "augment.crop=-1: expected a whole number in [0,"),
        ("--config.data.num_classes=7", "config.data.num_classes=7, but data set 'digits' has 10"),
        ("--config.log.every=0", "config.log.every=0: expected a whole number in [1, 2e9]"),
        ("--confg.seed=1", "unknown argument '--confg.seed=1'"),
        ("extra", "unknown argument 'extra'"),
    ],
)
def test_bad_settings(argument, message, data_dir, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    argv = [*TRAIN, f"--workdir={workdir}", f"--config.data.data_dir={data_dir}", argument]
    assert message in run(train_script, argv, monkeypatch, capsys)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config=configs/digitz.py", "--workdir=x"], "no config file 'configs/digitz.py'; here"),
        (["--workdir=x"], "the following arguments are required: --config"),
        ([*TRAIN], "the following arguments are required: --workdir"),
    ],
)
def test_bad_arguments(argv, message, monkeypatch, capsys):
    assert message in run(train_script, argv, monkeypatch, capsys)


def test_a_workdir_of_another_config_is_left_alone(finished_run, data_dir, monkeypatch, capsys):
    before = digest(finished_run)
    argv = [*TRAIN, f"--workdir={finished_run}", f"--config.data.data_dir={data_dir}"]
    line = run(train_script, argv, monkeypatch, capsys)
    assert "holds a run of another config (batch_size=16, now" in line
    assert digest(finished_run) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step=3"], "no checkpoint of step 3"),
        (["--split=valid"], "valid"),
        (["--config.model.width=32"], "--config.model.width cannot be changed: evaluation takes"),
        (["--config.router.name=topk"], "--config.router.name cannot be changed"),
        (["--config.data.image_size=16"], "the overrides do not fit the checkpoint"),
        (["--config.eval.batch_size=12"], "must be a multiple of 8"),
        (["--config.mesh.expert=3"], "config.mesh asks for a multiple of 3 devices"),
        (["--config.data.name=cifar100"], "python -m moe.data.prepare cifar100"),
        (["--config.moe.eval_capacity=4"], "did you mean moe.eval_capacity_factor"),
    ],
)
def test_bad_evaluations(arguments, message, finished_run, monkeypatch, capsys):
    before = digest(finished_run)
    assert message in run(
        eval_script, [f"--workdir={finished_run}", *arguments], monkeypatch, capsys
    )
    assert digest(finished_run) == before


def test_evaluating_nothing(tmp_path, monkeypatch, capsys):
    line = run(eval_script, [f"--workdir={tmp_path}"], monkeypatch, capsys)
    assert "holds no run (no config.json)" in line


def test_a_run_is_a_config_too(finished_run, tmp_path):
    config = cli.load_config(str(finished_run), {"num_steps": "7"})
    assert (config.num_steps, config.model.width, config.data.name) == (7, 16, "digits")
    (tmp_path / "config.json").write_text('{"version": 1, "architectures": ["GPT2"]}')
    with pytest.raises(UsageError, match="is no run whose config can be used: it has"):
        cli.load_config(str(tmp_path), {})


def test_values_are_read_as_the_type_they_replace(tiny):
    config = tiny(
        data__augment__resized_crop="(0.5, 1)", moe__dense="True", router__sparse_topk__k="1.5"
    )
    assert config.data.augment.resized_crop == (0.5, 1)
    assert config.moe.dense is True
    assert config.router.sparse_topk.k == 1.5
    with pytest.raises(UsageError, match="needs a value"):
        cli.parse(__import__("argparse").ArgumentParser(), ["--config.seed"])


@pytest.mark.parametrize(
    "wrong",
    [  # typed; of the settings among each other; of the data and the devices
        {"batch_sise=3": "sise; did", "seed=x": "seed='x' is", "num_steps=0": "num_steps=0:"}
        | {"router.name=topp": "'topp' is", "data.data_dir=gs://b": "data_dir=gs://b is an addr"},
        {"model.width=62": "divide the width 62", "moe.layers=9": "moe.layers='9' fits no"}
        | {"moe.group_size=3": "config.batch_size=64 must", "": "eval.batch_size=256 must"},
        {"model.patch_size=3": "patch_size=3 does not divide the image size 8"}
        | {"batch_size=12": "config.batch_size=12 must", "eval.batch_size=9": "batch_size=9 must"},
        {"data.channels=3": "channels=3, but", "data.num_classes=9": "num_classes=9, but"},
    ],
)
def test_all_that_is_wrong_is_said_in_one_go(wrong, data_dir, tmp_path, monkeypatch, capsys):
    argv = [*TRAIN, f"--workdir={tmp_path / 'run'}", f"--config.data.data_dir={data_dir}"]
    argv += [f"--config.{text}" for text in wrong if text]
    monkeypatch.setattr("sys.argv", ["train.py", *argv])
    with pytest.raises(SystemExit) as exit_:
        cli.run(train_script.main)
    captured = capsys.readouterr().err.splitlines()
    lines = [line for line in captured if not line.startswith("preparing")]
    assert exit_.value.code == 2
    for part in wrong.values():
        assert any(line.startswith("error: ") and part in line for line in lines), lines
