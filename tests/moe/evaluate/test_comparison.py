"""compare.py: the table that comes out, and what is refused before anything is trained."""

import csv
import json

import pytest

import compare as compare_script
from moe import config as configs
from moe.errors import UsageError
from moe.evaluate import comparison
from moe.tasks import task_of
from routers import ROUTERS
from tests.moe.conftest import TINY
from tests.moe.test_cli import run


@pytest.fixture
def arguments(data_dir, tmp_path):
    keys = TINY | {"data.data_dir": str(data_dir)}
    overrides = [f"--config.{key}={value}" for key, value in keys.items()]
    return ["--config=configs/digits.py", *overrides]


@pytest.fixture
def trained(monkeypatch):
    """The configs that would have been trained, each with numbers of its own."""
    trained = []

    def train(config, workdir):
        trained.append(config)
        number, task, last = len(trained), task_of(config), config.num_steps
        speeds = {f"train/{task.unit}s_per_second": float(number)} if last > 1 else {}
        rows = [{"step": last, "train/skipped": 0.0} | speeds]
        scores = {task.best.key: number / 10, "eval/loss": 1.0 / number}
        rows += [{"step": last} | scores | {"eval/top5_accuracy": 1 - number / 100}]
        write_run(config, workdir, rows)

    monkeypatch.setattr(comparison, "train", train)
    return trained


SIZES = {"image_size": 8, "channels": 1, "num_classes": 10}


def write_run(config, workdir, rows) -> None:
    """Leaves the files of a complete run."""
    config = config.copy_and_resolve_references()
    config.data.update(SIZES if config.task == "images" else {"vocabulary": 257})
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(configs.to_json(config))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_table_of_rows_and_seeds(arguments, trained, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    compare_script.main(
        [
            *arguments,
            "--routers=topk,dense",
            "--seeds=2",
            f"--out={out}",
            "--config.router.topk.k=1",
        ]
    )
    chosen = [(config.router.name, config.moe.dense, config.seed) for config in trained]
    assert chosen[::2] == [("topk", False, 0), ("topk", False, 1)]
    assert [row[1:] for row in chosen[1::2]] == [(True, 0), (True, 1)]
    assert all(config.router.topk.k == 1 for config in trained)
    lines = list(csv.reader((out / "table.csv").open()))
    assert [line[:5] for line in lines] == [
        ["router", "seed", "accuracy", "loss", "images_per_second"],
        ["topk", "0", "0.1", "1.0", "2.0"],
        ["topk", "1", "0.3", str(1 / 3), "2.0"],
        ["dense", "0", "0.2", "0.5", "3.0"],
        ["dense", "1", "0.4", "0.25", "3.0"],
    ]
    for name in ("accuracy.png", "curves.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "30.00% ± 14.14%" in capsys.readouterr().out


def test_another_metric_reads_the_same_runs(arguments, trained, tmp_path, capsys):
    argv = [*arguments, "--rows=topk,dense", "--seeds=1", f"--out={tmp_path}"]
    compare_script.main([*argv, "--metric=top5_accuracy"])
    assert "test top5 accuracy (1 seed)" in capsys.readouterr().out
    assert json.loads((tmp_path / "table.json").read_text())["metric"]["name"] == "top5_accuracy"
    lines = list(csv.reader((tmp_path / "table.csv").open()))
    assert lines[0][2] == "top5_accuracy" and [line[2] for line in lines[1:]] == ["0.99", "0.98"]
    compare_script.main(argv)
    assert len(trained) == 2
    assert list(csv.reader((tmp_path / "table.csv").open()))[1][2] == "0.1"
    with pytest.raises(UsageError, match=r"--metric=macro_accuracy: the evaluations of .* none"):
        compare_script.main([*argv, "--metric=macro_accuracy"])


def test_runs_of_one_step_have_no_speed(arguments, trained, tmp_path):
    argv = [*arguments, "--routers=topk", "--seeds=1", f"--out={tmp_path}", "--config.num_steps=1"]
    compare_script.main([*argv, "--config.optimizer.warmup_steps=0"])
    assert list(csv.reader((tmp_path / "table.csv").open()))[1][4] == "nan"


def test_all_of_a_text_are_those_that_do_not_look_ahead(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(comparison.Comparison, "check", lambda _: None)
    monkeypatch.setattr(comparison, "_parameters", lambda _: None)
    rows = comparison.compare("configs/stdlib.py", None, range(1), tmp_path / "out", {})
    names = [row.name for row in rows]
    assert {"topk", "sparse_topk"} < {*names} and names[-1] == "dense"
    assert not {"expert_choice", "sparse_expert_choice", "soft_moe"} & {*names}
    assert "bits per byte" in capsys.readouterr().out
    assert (tmp_path / "out" / "bits_per_byte.png").is_file()


def test_a_router_of_the_config_file_is_a_row(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison.Comparison, "check", lambda _: None)
    monkeypatch.setattr(comparison, "_parameters", lambda _: None)
    known = dict(ROUTERS)
    file = tmp_path / "own.py"
    file.write_text(
        "from moe.config import default as get_config\n"
        "from routers import ROUTERS\n"
        "ROUTERS['own'] = ROUTERS['topk']\n"
    )
    try:
        rows = comparison.compare(str(file), None, range(1), tmp_path / "out", {})
    finally:
        del ROUTERS["own"]
    assert known == ROUTERS and [row.name for row in rows] == [*known, "own", "dense"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--routers=topk,topp", "--rows: 'topp' is unknown; expected topk"),
        ("--routers=", "--rows: '' is unknown"),
        ("--routers=topk,dense,topk", "--rows: 'topk' is named twice"),
        ("--routers=topk:k=1,topk:k=01", "--rows: 'topk:k=1' is named twice"),
        ("--routers=topk:p=2", "--rows: topk: 'p' is no setting"),
        ("--routers=topk:k", "--rows: 'k' of 'topk:k': expected KEY=VALUE"),
        ("--routers=topk:k=x", "--config.router.topk.k='x' is not of type int"),
        ("--routers=topk:k=1:k=2", "sets router.topk.k twice"),
        ("--routers=topk:data.name=x", "data.name cannot differ between rows"),
        ("--routers=dense:router.soft_moe.k=1", "is a setting of another router"),
        ("--routers=topk:every=1", "may be checkpoint.every or eval.every or log.every"),
        ("--baseline=dense", "--baseline=dense is none of the rows topk, expert_choice"),
        ("--baseline=all", "--baseline=all is none of the rows"),
        ("--routers=topk --baseline=all", "--baseline=all is none of the rows topk"),
        ("--metric=top3_accuracy", "an evaluation of the row 'topk' has loss, accuracy, top5_acc"),
        ("--jobs=0", "--jobs=0 must be from 1 to 256"),
        ("--seeds=2-1", "--seeds=2-1: expected a number of seeds, or FIRST-LAST"),
        ("--tune=learning_rat:1,2", "'learning_rat' is no setting; did you mean learning_rate"),
        ("--tune=learning_rate:1", "expected each key once, with different values"),
        ("--tune=learning_rate:1,x", "--config.optimizer.learning_rate='x' is not of type"),
        ("--tune=router.topk.k:1,2", "router.topk.k is of one router"),
        ("--validation=train", "--validation is the split that --tune"),
        ("--merge=nowhere", "--merge reads tables alone: leave --config out"),
        ("--rows=topk", "not allowed with argument --routers"),
        ("--seeds=0", "--seeds=0 must be from 1 to 1000"),
        ("--config.moe.dense=True", "--config.moe.dense: the rows of a comparison set it"),
        ("--config.router.name=soft_moe", "use --rows=NAME,NAME"),
        ("--config.seed=3", "use --seeds=N for the seeds 0 to N-1"),
        (
            "--config.router.expert_choice.k=9",
            "is above moe.num_experts=4",
        ),  # of the second row
        ("--out=gs://bucket/x", "--out=gs://bucket/x is an address, not a path"),
        ("--out=", "--out is empty; expected a path"),
    ],
)
def test_what_cannot_be_compared(
    argument, message, arguments, trained, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    argv = [*arguments, f"--out={out}", "--routers=topk,expert_choice", *argument.split()]
    monkeypatch.chdir(tmp_path)
    argv[0] = f"--config={compare_script.__file__.replace('compare.py', 'configs/digits.py')}"
    assert message in run(compare_script, argv, monkeypatch, capsys)
    assert not trained and not list(tmp_path.iterdir())


def test_a_row_of_another_run(arguments, trained, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "expert_choice" / "1"
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(configs.to_json(configs.default()))
    argv = [*arguments, f"--out={tmp_path}", "--routers=topk,expert_choice", "--seeds=2"]
    assert f"{workdir} holds a run of another config" in run(
        compare_script, argv, monkeypatch, capsys
    )
    assert not trained and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["table.csv", "accuracy.png", "."])
def test_files_in_the_way_of_the_results(name, trained, tmp_path):
    out = tmp_path / "out"
    if name == ".":
        out.write_text("a file")
    else:
        (out / name).mkdir(parents=True)
    with pytest.raises(UsageError, match=r"cannot write .*move it away"):
        comparison.compare("configs/digits.py", ["topk"], range(1), out, {})
    assert not trained
