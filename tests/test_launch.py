"""The launchers of scripts/: what they print under --dry-run, and what stand-ins for gcloud, xpk,
sbatch and the machines behind them get on the real path. No cluster was ever asked.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted(file for file in (ROOT / "scripts").iterdir() if file.suffix != ".py")
# What quoting gets wrong: spaces, commas, both quotes, a dollar, a brace, an ampersand, a hash.
HARD = [
    "--config.moe.layers=1,3,5",
    "--config.data.train_split=full[102400:]",
    '--config.data.name=it\'s a "set" of $HOME and ${x} & `id` # {command} \\ *',
    "--config.init.workdir=",
    "--config.seed=7",
    "--start_timeout=1200",
]
TPU = ("--name=pod", "--zone=us-east5-a")
RUN = ("--config=configs/digits.py", "--workdir=/mnt/bucket/run")
LAUNCHERS = {
    "tpu_vm.sh": ("run", *TPU),
    "gke_xpk.sh": ("--cluster=c", "--workload=w", "--tpu-type=v5p-256"),
    "slurm.sh": ("--nodes=2", "--gpus=4"),
}


@pytest.fixture
def launch(tmp_path):
    """Runs a launcher of a copy of this checkout, which is a git repository of one commit."""
    checkout = tmp_path / "checkout"
    for name in ("scripts", "configs"):
        shutil.copytree(ROOT / name, checkout / name)
    (checkout / "train.py").touch()
    git = ["git", "-C", checkout, "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()

    def launch(name, *arguments, cwd=checkout, **environment):
        path = f"{stand_ins}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "TMPDIR": str(tmp_path), **environment}
        command = [checkout / "scripts" / name, *arguments]
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
        )

    launch.checkout, launch.tmp_path, launch.stand_ins = checkout, tmp_path, stand_ins
    launch.program = lambda name, text: program(stand_ins / name, text)
    return launch


def program(file: pathlib.Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)


def recorder(file: pathlib.Path) -> str:
    """Bash that appends its own name and arguments to a file, as a line of JSON."""
    code = f"import json, sys; print(json.dumps(sys.argv[1:]), file=open({str(file)!r}, 'a'))"
    return f'{shlex.quote(sys.executable)} -c {shlex.quote(code)} "$(basename "$0")" "$@"'


def calls(file: pathlib.Path) -> list[list[str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def words(result) -> list[list[str]]:
    """The commands of a dry run, split as a shell splits them."""
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


def error(result) -> str:
    """The one line of a failure."""
    assert result.returncode == 2 and not result.stdout, result
    assert re.fullmatch(r"error: .*\n", result.stderr), result.stderr
    return result.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_syntax_and_mode(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK) == (script.name != "common.sh")
    assert script.name == "common.sh" or "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_names_every_flag(launch, name):
    result = launch(name, "--help")
    assert result.returncode == 0 and not result.stderr
    source = (ROOT / "scripts" / name).read_text()
    flags = re.findall(r"\$\(flag ([a-z-]+)", source)
    assert flags and all(f"--{flag}" in result.stdout for flag in [*flags, "config", "dry-run"])


@pytest.mark.parametrize("name", LAUNCHERS)
def test_mistakes_are_one_line(launch, name):
    given = LAUNCHERS[name]
    for missing in given:
        if missing.startswith("--"):
            rest = [flag for flag in given if flag != missing]
            assert f"{missing.partition('=')[0]}=" in error(launch(name, *rest, *RUN))
    assert "'--nmae=3'" in error(launch(name, *given, *RUN, "--nmae=3"))
    assert "'stray'" in error(launch(name, *given, *RUN, "stray"))
    assert "--config=FILE" in error(launch(name, *given, RUN[1]))
    assert "--workdir=DIR" in error(launch(name, *given, RUN[0]))
    unknown = error(launch(name, *given, "--config=configs/digit.py", RUN[1]))
    assert "'configs/digit.py'" in unknown and "configs/digits.py" in unknown
    assert "mount" in error(launch(name, *given, RUN[0], "--workdir=gs://bucket/run"))
    assert "--config.seed=VALUE" in error(launch(name, *given, *RUN, "--config.seed"))
    assert "line break" in error(launch(name, *given, *RUN, "--config.data.name=a\nb"))
    if name != "slurm.sh":
        assert "absolute" in error(launch(name, *given, RUN[0], "--workdir=runs/a"))


def test_mistakes_of_one_launcher(launch):
    assert "create, setup, run" in error(launch("tpu_vm.sh"))
    assert "'start'" in error(launch("tpu_vm.sh", "start", *TPU))
    assert "--type" in error(launch("tpu_vm.sh", "create", *TPU))
    assert "v5p-N" in error(launch("tpu_vm.sh", "create", *TPU, "--type=v5p:4x4x8"))
    assert "no commit" in error(launch("tpu_vm.sh", "setup", *TPU, "--commit=nope"))
    assert "/mnt/other" in error(launch("tpu_vm.sh", "run", *TPU, *RUN, "--bucket=other"))
    assert "gs://" in error(launch("tpu_vm.sh", "run", *TPU, *RUN, "--bucket=gs://bucket"))
    xpk = [flag for flag in LAUNCHERS["gke_xpk.sh"] if "workload" not in flag]
    assert "a-z" in error(launch("gke_xpk.sh", *xpk, *RUN, "--workload=My_Run"))
    images = ("--docker-image=a", "--base-docker-image=b")
    assert "exclude" in error(launch("gke_xpk.sh", *LAUNCHERS["gke_xpk.sh"], *RUN, *images))
    assert "--gpus=0" in error(launch("slurm.sh", "--nodes=1", "--gpus=0", *RUN))
    assert "no .venv/bin/python" in error(launch("slurm.sh", "--nodes=1", "--gpus=1", *RUN))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_dry_run_prints_what_a_real_one_does_and_does_nothing(launch, name):
    """Word for word what the stand-ins get afterwards, from another directory too."""
    for tool in ("gcloud", "xpk", "sbatch"):
        launch.program(tool, recorder(launch.tmp_path / "calls"))
    before = sorted(launch.tmp_path.rglob("*"))
    arguments = [*LAUNCHERS[name], *RUN, *HARD, *(["--python=bash"] if name == "slurm.sh" else [])]
    printed = words(launch(name, *arguments, "--dry-run"))
    assert sorted(launch.tmp_path.rglob("*")) == before
    assert launch(name, *arguments).returncode == 0
    assert calls(launch.tmp_path / "calls") == printed
    if name != "tpu_vm.sh":  # whose paths are those of the workers
        elsewhere = words(launch(name, *arguments, "--dry-run", cwd=launch.tmp_path))
        assert elsewhere == [["cd", str(launch.checkout)], *printed]


def test_tpu_vm_create_and_delete(launch):
    create = ["create", *TPU, "--dry-run"]
    (command,) = words(launch("tpu_vm.sh", *create, "--type=v5p-256", "--spot", "--project=p"))
    assert command[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
    assert command[6:9] == ["--node-id=pod", "--zone=us-east5-a", "--project=p"]
    software = "--runtime-version=v2-alpha-tpuv5"
    assert command[9:] == ["--accelerator-type=v5p-256", software, "--spot"]
    (command,) = words(launch("tpu_vm.sh", *create, "--type=v9-8", "--runtime=new"))
    assert command[-1] == "--runtime-version=new"
    (command,) = words(launch("tpu_vm.sh", "delete", *TPU, "--dry-run"))
    assert command[3:6] == ["queued-resources", "delete", "pod"]


@pytest.fixture
def worker(launch):
    """A stand-in for a TPU VM: gcloud runs what it should send, in a home directory of its own."""
    home, log = launch.tmp_path / "home", launch.tmp_path / "calls"
    home.mkdir()
    ssh = f'(cd {home} && HOME={home} bash -c "${{last#--command=}}")'
    launch.program(
        "gcloud",
        f'{recorder(log)}\nlast=${{!#}}\ncase $4 in scp) cp "$5" {home} ;; ssh) {ssh} ;; esac',
    )
    for tool in ("sudo", "uv", "gcsfuse"):
        launch.program(tool, recorder(log))
    launch.program("mountpoint", "exit 1")
    launch.program("systemctl", "echo inactive; exit 3")
    launch.home, launch.log = home, log
    return launch


def test_tpu_vm_from_nothing_to_the_arguments_of_train(worker):
    """setup copies the commit; run starts a service whose file calls train.py with the words."""
    (worker.checkout / "train.py").write_text("not committed")
    setup = worker("tpu_vm.sh", "setup", *TPU)
    assert setup.returncode == 0 and "not committed" in setup.stderr, setup.stderr
    assert (worker.home / "permoe" / "train.py").read_text() == ""
    assert not (worker.home / "permoe.new").exists()
    tools = [call[0] for call in calls(worker.log)]
    assert tools == ["gcloud", "gcloud", "uv", "uv"]
    worker.log.unlink()

    program(worker.home / "permoe-venv/bin/python", recorder(worker.tmp_path / "trained"))
    run = worker("tpu_vm.sh", "run", *TPU, *RUN, *HARD, "--bucket=bucket")
    assert run.returncode == 0, run.stderr
    by_tool = {call[0]: call[1:] for call in calls(worker.log)}
    assert by_tool["gcsfuse"][-2:] == ["bucket", "/mnt/bucket"]
    service = by_tool["sudo"]  # the last one
    assert service[0] == "systemd-run" and service[-2] == "/bin/bash"
    assert {"--unit=permoe", "--property=RestartPreventExitStatus=2 143"} <= set(service)
    subprocess.run(service[-2:], check=True)
    assert calls(worker.tmp_path / "trained") == [["python", "-u", "train.py", *RUN, *HARD]]


def test_tpu_vm_leaves_a_run_alone(worker):
    """Neither another run nor other code while one is on, or waits to be started again."""
    assert worker("tpu_vm.sh", "run", *TPU, *RUN).returncode != 0  # before setup
    assert worker("tpu_vm.sh", "setup", *TPU).returncode == 0
    program(worker.home / "permoe-venv/bin/python", "")
    for state in ("active", "activating"):
        worker.program("systemctl", f"echo {state}")
        for action in (["setup", *TPU], ["run", *TPU, *RUN]):
            result = worker("tpu_vm.sh", *action)
            assert result.returncode == 2 and "a run is on" in result.stderr
    assert not (worker.home / "permoe-job.sh").exists()


def test_xpk_command_survives_its_shell_and_gets_its_signal(launch):
    """xpk puts the command in parentheses in a script of bash, and signals those."""
    log = launch.tmp_path / "calls"
    launch.program("xpk", recorder(log))
    assert launch("gke_xpk.sh", *LAUNCHERS["gke_xpk.sh"], *RUN, *HARD).returncode == 0
    (call,) = calls(log)
    assert {"--base-docker-image=python:3.12", "--script-dir=."} <= set(call)
    command = call[-1].removeprefix("--command=")
    log.unlink()
    ready = launch.tmp_path / "ready"
    launch.program(
        "python",
        f"{recorder(log)}\n[[ $2 == pip ]] && exit\n"
        f"trap 'echo saved; exit 143' TERM; touch {ready}; while :; do sleep 0.05; done",
    )
    wrapped = f"({command}) & PID=$!\necho $PID\nwait $PID\necho $?"
    environment = {**os.environ, "PATH": f"{launch.stand_ins}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        ["bash", "-c", wrapped], stdout=subprocess.PIPE, text=True, env=environment
    )
    pid, deadline = int(process.stdout.readline()), time.monotonic() + 30
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(pid, signal.SIGTERM)
    assert process.communicate(timeout=30)[0].split() == ["saved", "143"]
    install, train = calls(log)
    assert install == ["python", "-m", "pip", "install", "--quiet", ".[tpu]"]
    assert train == ["python", "-u", "train.py", *RUN, *HARD]


def test_xpk_with_an_image_installs_nothing(launch):
    flags = ("--docker-image=gcr.io/p/permoe:1", "--storage=s", "--num-slices=4", "--dry-run")
    (command,) = words(launch("gke_xpk.sh", *LAUNCHERS["gke_xpk.sh"], *RUN, *flags))
    assert {"--docker-image=gcr.io/p/permoe:1", "--storage=s", "--num-slices=4"} <= set(command)
    assert not [word for word in command if "script-dir" in word or "pip" in word]


@pytest.mark.parametrize(
    "codes, expected, steps, requeued",
    [
        ("0", 0, 1, False),
        ("2", 2, 1, False),  # a mistake: no second try
        ("143", 0, 1, True),  # saved before the time limit
        ("137 0", 0, 2, False),  # a process was killed, the next try ends
        ("137 143", 0, 2, True),
        ("1 1 1", 1, 3, False),
    ],
)
def test_slurm_job(launch, codes, expected, steps, requeued):
    """The job as SLURM runs it: each step's exit code, and what follows from it."""
    log, left = launch.tmp_path / "calls", launch.tmp_path / "codes"
    left.write_text("\n".join(codes.split()) + "\n")
    launch.program("scontrol", recorder(log))
    launch.program("srun", f"{recorder(log)}\nread -r code <{left}; sed -i 1d {left}; exit $code")
    launch.program(
        "sbatch",
        "while [[ $1 == --* ]]; do shift; done\n"
        'SLURM_JOB_ID=42 SLURM_CPUS_PER_TASK=6 exec bash "$@"',
    )
    flags = ("--nodes=2", "--gpus=4", "--cpus=6", "--python=bash")
    result = launch("slurm.sh", *flags, *RUN, *HARD)
    assert result.returncode == expected, result.stderr
    made = calls(log)
    train = ["srun", "--kill-on-bad-exit=0", "--gpu-bind=none", "--cpus-per-task=6"]
    train += ["bash", "-u", "train.py", *RUN, *HARD]
    assert made[:steps] == [train] * steps
    assert made[steps:] == ([["scontrol", "requeue", "42"]] if requeued else [])


def test_slurm_asks_for_a_process_per_gpu(launch):
    flags = ("--nodes=2", "--gpus=4", "--time=1:00:00", "--qos=high", "--grace=300", "--dry-run")
    (command,) = words(launch("slurm.sh", *flags, *RUN))
    expected = {"--gpus-per-node=4", "--ntasks-per-node=4", "--signal=TERM@300", "--qos=high"}
    assert expected | {"--nodes=2", "--time=1:00:00"} <= set(command)


def test_jax_takes_the_processes_of_slurm_as_the_job_starts_them(monkeypatch):
    """One GPU for a process, by its SLURM_LOCALID: what slurm.sbatch is written for."""
    from jax._src.clusters.slurm_cluster import SlurmCluster

    step = {"JOB_ID": 7, "STEP_NODELIST": "n[03,05]", "NTASKS": 8, "PROCID": 5, "LOCALID": 1}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert SlurmCluster.is_env_present()
    assert SlurmCluster.get_coordinator_address(60, None).split(":")[0] == "n03"
    assert (SlurmCluster.get_process_count(), SlurmCluster.get_process_id()) == (8, 5)
    assert SlurmCluster.get_local_process_id() == 1


def test_the_page_shows_what_the_scripts_print(launch):
    """Every dry run of docs/launch.md, run again; only the commit differs."""
    page = (ROOT / "docs" / "launch.md").read_text()
    blocks = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    examples = [block for block in blocks if block.startswith("$ scripts/")]
    assert len(examples) >= 4
    for example in examples:
        typed, printed = re.fullmatch(r"\$ (.*?[^\\])\n(.*)", example, re.DOTALL).groups()
        name, *arguments = shlex.split(typed.replace("\\\n", " "))
        result = launch(name.removeprefix("scripts/"), *arguments, TMPDIR="/tmp")
        commit = re.compile(r"\b[0-9a-f]{12}\b")
        assert commit.sub("C", result.stdout) == commit.sub("C", printed), typed
