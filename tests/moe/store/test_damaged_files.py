"""Every file of a run and of its data set, damaged: one line that names it, or the right fallback.

Training ends where it would begin, and an evaluation is made once for all, so that each case costs
a fraction of what it would; what comes before and after is the programs' own.
"""

import hashlib
import re
import shutil

import pytest

import eval as eval_script
import train as train_script
from moe import cli
from moe.evaluate import evaluation
from moe.tasks import TASKS
from moe.train import trainer
from tests.moe.conftest import TINY

pytestmark = pytest.mark.slow
ERROR, NOT_A_FILE = "error", ("unreadable", "a directory")


def flip(file):
    data = bytearray(file.read_bytes() or b"\0")  # of an empty file: one
    data[len(data) // 2] ^= 0x80  # of a text: no UTF-8 any more
    file.write_bytes(data)


def link(file):
    file.unlink()
    file.symlink_to(file)  # also root cannot read it


def replace(file):
    file.unlink()
    file.mkdir()


DAMAGE = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "emptied": lambda file: file.write_bytes(b""),
    "flipped": flip,
    "of another kind": lambda file: file.write_bytes(b"\x89PNG\r\n[1, 2]\n"),
    "unreadable": link,
    "a directory": replace,
}


def steps(train, evaluates, error=(), also=()):
    """What training and evaluation do: the step that they take, or an error for some damages."""
    return {
        kind: (ERROR if kind in error else train, ERROR if kind in also else evaluates)
        for kind in DAMAGE
    }


ALL = tuple(DAMAGE)
RUN = {
    "config.json": steps(24, 24, ALL, ALL),
    "metrics.jsonl": steps(24, 24, ("flipped", "of another kind", *NOT_A_FILE)),
    "lock": steps(24, 24, NOT_A_FILE),
    "eval.json": steps(24, 24, (), ("a directory",)),
    "events/*": steps(24, 24),
    "checkpoints": steps(24, 24, ALL, ALL),
    "checkpoints/24/_CHECKPOINT_METADATA": steps(24, 24),
    "checkpoints/24/metrics/metrics": steps(24, 24),
    "checkpoints/24/checksums/checksums": steps(20, 20),
    "checkpoints/24/params/manifest.ocdbt": steps(20, 20),
    "checkpoints/24/params/d/*": steps(20, 20),
    "checkpoints/24/training/d/*": steps(20, 24),
}
DATA = ("dataset_info.json", "features.json", "*train.array_record*", "*test.array_record*")


def _draw_nothing(patch):
    patch.setattr(evaluation.report, "draw_load", lambda *a: None)
    patch.setattr(type(TASKS["images"]), "draw", lambda *a: None)


class Begun(Exception):
    """Stands for the training that begins at a step."""


@pytest.fixture(scope="module")
def total(finished_run, data_dir):
    """The sums of an evaluation of the run, made once; the run has an eval.json since."""
    made = []
    real = evaluation.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "evaluate", lambda *a: made.append(real(*a)) or made[0])
        _draw_nothing(patch)
        evaluation.evaluate_run(finished_run, step=None, split=None, overrides={})
    return made[0]


@pytest.fixture
def outcome(total, data_dir, tmp_path_factory, monkeypatch, capsys):
    """Returns a function: what a program does in a directory, and what it says."""

    config = tmp_path_factory.mktemp("config") / "tiny.py"  # that of the finished run
    config.write_text("from moe.config import default as get_config\n")

    def loop(run, step_fn, zeros, state, start, *rest):
        raise Begun(start)

    monkeypatch.setattr(trainer, "loop", loop)
    monkeypatch.setattr(evaluation, "evaluate", lambda *a: total)
    _draw_nothing(monkeypatch)

    def run(script, workdir, data=data_dir):
        argv = [f"--workdir={workdir}", f"--config.data.data_dir={data}"]
        if script is train_script:
            argv += [f"--config={config}", *(f"--config.{k}={v}" for k, v in TINY.items())]
        monkeypatch.setattr("sys.argv", ["script.py", *argv])
        code, step = 0, None
        try:
            cli.run(script.main)
        except SystemExit as exit_:
            code = exit_.code or 0
        except Begun as begun:
            step = begun.args[0]
        screen = capsys.readouterr()
        if code:
            assert code == 2 and screen.err.startswith("error: ") and screen.err.count("\n") == 1
            return ERROR, screen.err
        assert not screen.err
        if step is None:  # a complete run, or an evaluation
            step = int(re.search(r"(?:complete: |, step )(\d+)", screen.out)[1])
        return step, screen.out

    return run


def digest(directory):
    """Everything under a directory: the files' bytes, directories and links."""
    return {
        str(path): path.is_symlink() or path.is_dir() or hashlib.sha256(path.read_bytes()).digest()
        for path in directory.rglob("*")
    }


def damage(root, pattern, kind):
    """Damages the largest file of a pattern, or a whole directory; returns its path."""
    path = max(root.glob(pattern), key=lambda path: path.stat().st_size)
    if path.is_dir():
        shutil.rmtree(path)
        path.write_bytes(b"directory")
    DAMAGE[kind](path)
    return path


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", RUN)
def test_a_file_of_a_run(name, kind, finished_run, outcome, tmp_path):
    if name == "checkpoints" and kind == "a directory":
        pytest.skip("a directory is what belongs there")
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    path = damage(workdir, name, kind)
    trained, evaluated = RUN[name][kind]
    for script, expected in ((eval_script, evaluated), (train_script, trained)):
        before = digest(workdir)
        step, screen = outcome(script, workdir)
        assert step == expected, (script.__name__, screen)
        if step == ERROR:
            assert str(path) in screen
            assert digest(workdir) == before


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", DATA)
def test_a_file_of_a_data_set(name, kind, finished_run, outcome, data_dir, tmp_path):
    workdir, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(finished_run, workdir)
    shutil.copytree(data_dir, data)
    path = damage(next(data.glob("digits/*")), name, kind)
    for script in (train_script, eval_script):
        before = digest(tmp_path)
        step, screen = outcome(script, workdir, data)
        if script is eval_script and "train" in name:
            assert step in (24, ERROR)
        else:
            assert step == ERROR and (str(path) in screen or str(data) in screen), screen
            assert digest(tmp_path) == before
