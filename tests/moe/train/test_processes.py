"""Several real processes with real collectives: the same run, and what happens when one dies."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from moe.hosts.faults import LOST, LOST_LINE
from tests.moe import launch

FEW = {"num_steps": "6", "log__every": "1", "eval__every": "6", "checkpoint__every": "6"}
MANY = {"num_steps": "20", "log__every": "1", "optimizer__learning_rate": "0.01"}
EXPERTS = {"mesh__data": "1", "mesh__expert": "-1"}  # every process holds other experts
# All that could make a resumed run differ, and long enough to be killed in the middle.
LONG = {"num_steps": "150", "checkpoint__every": "9", "eval__every": "60", "log__every": "5"}
LONG |= {"router__name": "topk", "data__augment__crop": "1", "data__augment__mixup": "0.2"}
LONG |= {"model__dropout": "0.1", "optimizer__ema_decay": "0.9"}


@pytest.fixture(scope="module")
def one(data_dir, tmp_path_factory):
    """The few steps by a single process."""
    workdir = tmp_path_factory.mktemp("one")
    launch.succeed(launch.train(1, workdir, data_dir, **FEW))
    return workdir


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_as_one(count, one, data_dir, tmp_path):
    screens = launch.succeed(launch.train(count, tmp_path, data_dir, **FEW, **EXPERTS))
    np.testing.assert_allclose(launch.losses(tmp_path), launch.losses(one), rtol=0, atol=1e-5)
    assert f"on {count} device(s)" in screens[0]
    for screen in screens[1:]:
        assert not [line for line in screen.splitlines() if "Gloo" not in line], screen


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_evaluates_on_one_and_two(data_dir, tmp_path):
    workdir = tmp_path / "four"
    launch.succeed(launch.train(4, workdir, data_dir, **FEW, **EXPERTS))
    trained = launch.rows(workdir)[-1]
    for count in (1, 2):
        screens = launch.succeed(launch.Hosts(count, "eval.py", [f"--workdir={workdir}"]))
        found = json.loads((workdir / "eval.json").read_text())
        for key in ("accuracy", "loss", "top5_accuracy"):
            assert found[key] == pytest.approx(trained[f"eval/{key}"], abs=1e-6), count
        drawn = "drew" if count == 1 else "pictures are drawn by one process"
        assert drawn in screens[0]


@pytest.mark.slow
def test_sigterm_on_one_of_two_stops_both(data_dir, tmp_path):
    settings = FEW | {"num_steps": "60", "checkpoint__every": "50", "eval__every": "60"}
    unbroken, workdir = tmp_path / "unbroken", tmp_path / "stopped"
    run = launch.train(2, workdir, data_dir, **settings)
    run.wait_for(workdir, 8)
    run.processes[1].send_signal(signal.SIGTERM)
    codes, screens = run.finish()
    assert codes == [143, 143], "\n".join(screens)
    assert "checkpoint saved; the same command continues" in screens[0]
    assert "continuing" in launch.succeed(launch.train(2, workdir, data_dir, **settings))[0]
    launch.succeed(launch.train(2, unbroken, data_dir, **settings))
    assert_identical(workdir, unbroken, 60)


@pytest.mark.slow
def test_a_closed_terminal_of_one_of_two_stops_both(data_dir, tmp_path):
    settings = FEW | {"num_steps": "60", "checkpoint__every": "50", "eval__every": "60"}
    run = launch.train(2, tmp_path, data_dir, **settings)
    run.wait_for(tmp_path, 8)
    run.processes[0].send_signal(signal.SIGHUP)
    codes, screens = run.finish()
    assert codes == [129, 129], "\n".join(screens)
    assert "continuing" in launch.succeed(launch.train(2, tmp_path, data_dir, **settings))[0]


@pytest.mark.slow
def test_a_step_that_is_not_finite_ends_both(data_dir, tmp_path):
    # Each step multiplies the matrices by 1 - 100 * 1000.
    settings = FEW | {"num_steps": "20", "eval__every": "20", "optimizer__schedule": "constant"}
    settings |= {"optimizer__learning_rate": "100", "optimizer__weight_decay": "1000"}
    codes, screens = launch.train(2, tmp_path, data_dir, **settings).finish()
    assert codes == [2, 2], "\n".join(screens)
    assert "is not finite, and was not applied" in screens[0].splitlines()[-1]
    assert not errors(screens[1])


def assert_identical(workdir, unbroken, step):
    assert launch.rows(workdir) == launch.rows(unbroken)
    ours, theirs = launch.arrays(workdir, step), launch.arrays(unbroken, step)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), name


def test_an_error_of_all_is_said_once(data_dir, tmp_path):
    run = launch.train(2, tmp_path / "run", data_dir, data__train_split="trian")
    codes, screens = run.finish()
    assert codes == [2, 2], "\n".join(screens)
    assert "trian" in errors(screens[0]) and not errors(screens[1])
    assert not (tmp_path / "run").exists()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_steps", "7"),
        pytest.param("checkpoint.every", "5", marks=SLOW),
        pytest.param("optimizer.learning_rate", "0.5", marks=SLOW),
        pytest.param("batch_size", "32", marks=SLOW),
        pytest.param("seed", "1", marks=SLOW),
        pytest.param("model.width", "32", marks=SLOW),
        pytest.param("data.eval_split", "train[:50%]", marks=SLOW),
    ],
)
def test_a_process_with_another_setting_is_named(key, value, data_dir, tmp_path):
    own = {1: [f"--config.{key}={value}"]}
    codes, screens = launch.train(2, tmp_path / "run", data_dir, own=own, **FEW).finish()
    assert codes == [2, 2], "\n".join(screens)
    assert f"config.{key} is " in (line := errors(screens[0]))
    assert value in line.partition(" and not ")[0] and "process 1 was told" in line
    assert not errors(screens[1]) and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_with_other_code_is_named(data_dir, tmp_path):
    root = tmp_path / "checkout"
    shutil.copytree(launch.ROOT, root, ignore=shutil.ignore_patterns(".*", "runs", "docs", "tests"))
    with (root / "moe" / "train" / "step.py").open("a") as file:
        file.write("# another version\n")
    codes, screens = launch.train(2, tmp_path / "run", data_dir, roots={1: root}, **FEW).finish()
    assert codes == [2, 2], "\n".join(screens)
    assert "process 1 was told" in (line := errors(screens[0])) and "the program's source" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_number_of_processes_is_named(tmp_path):
    arguments = ["--config=configs/digits.py", f"--workdir={tmp_path / 'run'}"]
    codes, screens = launch.Hosts(2, "train.py", arguments, own={1: ["--num_processes=3"]}).finish()
    assert codes == [2, 2], "\n".join(screens)
    assert "process 0: this one was told --num_processes=2 and process 1 3; give" in errors(
        screens[0]
    )
    assert "process 1: this one was told --num_processes=3 and process 0 2; give" in errors(
        screens[1]
    )


@pytest.mark.slow
def test_evaluations_of_different_steps_are_named(finished_run, tmp_path):
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    arguments = [f"--workdir={workdir}"]
    codes, screens = launch.Hosts(2, "eval.py", arguments, own={1: ["--step=4"]}).finish()
    assert codes == [2, 2], "\n".join(screens)
    assert "step is 4 and not None" in errors(screens[0])


def errors(screen: str) -> str:
    """Returns the line of error on a screen, or ""; nothing stands there but what must."""
    expected = ("[Gloo]", "preparing the data set")
    lines = [line for line in screen.splitlines() if not line.startswith(expected)]
    assert len(lines) <= 1 and all(line.startswith("error: ") for line in lines), screen
    return "".join(lines)


def test_a_port_that_is_in_use_is_an_error_of_one_line(tmp_path):
    arguments = ["--config=configs/digits.py", f"--workdir={tmp_path / 'run'}"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        own = [f"--coordinator=127.0.0.1:{port}"]
        pair = launch.Hosts(2, "train.py", arguments, own={0: own})
        pair.processes[1].kill()
        codes, screens = pair.finish(60)
    assert codes[0] == 2 and f"port {port} of this machine is in use" in errors(screens[0])


@pytest.mark.slow
@pytest.mark.slow
def test_nobody_comes(data_dir, tmp_path):
    """Process 0 alone, and process 1 alone: an error line, in bounded time."""
    arguments = ["--config=configs/digits.py", f"--workdir={tmp_path / 'run'}"]
    pair = launch.Hosts(2, "train.py", arguments, start_timeout=3)
    pair.processes[1].kill()
    codes, screens = pair.finish(60)
    assert codes[0] == 2 and "not all processes came within --start_timeout=3" in screens[0]
    assert screens[0].count("\n") == 1, screens[0]
    pair = launch.Hosts(2, "train.py", arguments, start_timeout=3)
    pair.processes[0].kill()
    codes, screens = pair.finish(60)
    assert codes[1] == 2 and "no process 0 at --coordinator=127.0.0.1:" in screens[1]
    assert screens[1].count("\n") == 1, screens[1]


@pytest.mark.slow
def test_the_same_losses_over_20_steps(data_dir, tmp_path):
    for name, count, mesh in (("1", 1, {}), ("2", 2, EXPERTS), ("4", 4, {}), ("4e", 4, EXPERTS)):
        launch.succeed(launch.train(count, tmp_path / name, data_dir, **MANY, **mesh))
    single = launch.losses(tmp_path / "1")
    assert len(single) == 20 and single[-1] < single[0] - 0.05
    for name in ("2", "4", "4e"):
        found = launch.losses(tmp_path / name)
        print(name, "processes: largest difference", np.abs(found - single).max())
        np.testing.assert_allclose(found, single, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_kill_one_of_four_ten_times_in_a_row(data_dir, tmp_path):
    unbroken, workdir = tmp_path / "unbroken", tmp_path / "killed"
    launch.succeed(launch.train(4, unbroken, data_dir, **LONG, **EXPERTS))
    for turn in range(10):
        run = launch.train(4, workdir, data_dir, **LONG, **EXPERTS)
        step, victim = 12 * turn + random.randrange(5, 17), random.randrange(4)
        run.wait_for(workdir, step)
        run.processes[victim].kill()
        start = time.monotonic()
        codes, screens = run.finish(launch.HEARTBEAT + 60)
        seconds = time.monotonic() - start
        print(
            f"turn {turn}: killed {victim} at {step}, the others ended in {seconds:.1f} s: {codes}"
        )
        for own, (code, screen) in enumerate(zip(codes, screens, strict=True)):
            assert code == (-signal.SIGKILL if own == victim else LOST), screen
            assert own == victim or LOST_LINE in screen, screen
            assert "Traceback" not in screen, screen
        assert seconds < launch.HEARTBEAT + 20
    launch.succeed(launch.train(4, workdir, data_dir, **LONG, **EXPERTS))
    assert_identical(workdir, unbroken, 150)


@pytest.mark.slow
def test_two_processes_continue_what_four_began(data_dir, tmp_path):
    settings = MANY | {"num_steps": "40", "checkpoint__every": "10", "eval__every": "40"}
    launch.succeed(launch.train(1, tmp_path / "one", data_dir, **settings))
    run = launch.train(4, tmp_path / "moved", data_dir, **settings, **EXPERTS)
    run.wait_for(tmp_path / "moved", 13)
    run.processes[2].send_signal(signal.SIGTERM)
    codes, screens = run.finish()
    assert codes == [143] * 4, "\n".join(screens)
    (first, *_) = launch.succeed(
        launch.train(2, tmp_path / "moved", data_dir, **settings, **EXPERTS)
    )
    assert "continuing" in first
    found, expected = launch.losses(tmp_path / "moved"), launch.losses(tmp_path / "one")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_twenty_runs_on_a_loaded_machine(data_dir, tmp_path):
    settings = {"num_steps": "200", "eval__every": "50", "log__every": "50"}
    settings |= {"checkpoint__every": "100"}
    busy = [sys.executable, "-c", "while True: pass"]
    load = [subprocess.Popen(busy) for _ in range(os.cpu_count())]
    try:
        runs = []
        for turn in range(20):
            workdir = tmp_path / str(turn)
            codes, screens = launch.train(2, workdir, data_dir, **settings).finish(900)
            assert codes == [0, 0], f"run {turn}: " + "\n".join(screens)
            runs.append(launch.rows(workdir))
    finally:
        for process in load:
            process.kill()
    assert all(records == runs[0] for records in runs)
