"""The wheel, installed outside the checkout and used there as a stranger would."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from tests.moe.test_commands import MINE, OWN, ROOT

pytestmark = pytest.mark.slow
SHORT = ["--config.num_steps=4", "--config.batch_size=8", "--config.eval.batch_size=64"]
SHORT += ["--config.optimizer.warmup_steps=1", "--config.model.patch_size=4"]
SHORT += ["--config.model.depth=2", "--config.moe.layers=1"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Builds the wheel from a copy of what git would check out."""
    folder = tmp_path_factory.mktemp("build")
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "copy" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder]
    built = subprocess.run([*command, folder / "copy"], capture_output=True, text=True)
    if "setuptools" in built.stderr and "No matching distribution" in built.stderr:
        pytest.skip("no package index can be reached to build with")
    assert built.returncode == 0, built.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def home(wheel, tmp_path_factory) -> pathlib.Path:
    """A folder with a clean environment: the wheel, and the dependencies of this environment.

    Those are a folder on the path, which brings no editable install of the checkout with it.
    """
    home = tmp_path_factory.mktemp("home")
    venv.create(home / "env", symlinks=True)
    (packages,) = (home / "env" / "lib").glob("python*/site-packages")
    pip = [sys.executable, "-m", "pip", f"--python={home / 'env' / 'bin' / 'python'}"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", wheel], check=True)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


def test_what_the_wheel_holds(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {
        *("isotonic", "routers", "moe", "permoe")
    }
    for package in ("isotonic", "routers", "moe"):
        assert f"{package}/py.typed" in names
        for file in (ROOT / package).rglob("*.py"):
            assert str(file.relative_to(ROOT)) in names
    for file in (ROOT / "configs").glob("*.py"):
        assert f"moe/configs/{file.name}" in names


def permoe(home: pathlib.Path, *arguments, code=0, **settings) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | settings
    environment |= {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [home / "env" / "bin" / "permoe", *arguments],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def test_it_trains_and_evaluates_what_was_shipped(home):
    assert "permoe 0" in permoe(home, "--version")
    data = f"--config.data.data_dir={home / 'data'}"
    permoe(home, "train", "--config=digits", f"--workdir={home / 'a'}", data, *SHORT)
    permoe(home, "eval", f"--workdir={home / 'a'}")
    assert json.loads((home / "a" / "eval.json").read_text())["examples"] == 359
    error = permoe(home, "train", "--config=digitz", "--workdir=x", code=2)
    assert error.startswith("error: no config file 'digitz'") and "digits" in error
    assert error.count("\n") == 1


def test_the_core_alone_has_the_operators_and_says_what_training_needs(wheel, tmp_path):
    """A clean environment, with what pip installs for `permoe` without an extra."""
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet"]
    subprocess.run([*pip, wheel], check=True)
    code = "import isotonic, routers; print(routers.sparse_topk_mask([3.0, 1, 2], 1).sum())"
    run = functools.partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True)
    assert run([python, "-c", code]).stdout == "1.0\n"
    for program in (["moe", "train", "--config=digits", "--workdir=a"], ["moe.data.prepare", "x"]):
        done = run([python, "-m", *program])
        assert done.returncode == 2 and "pip install 'permoe[train]'" in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_a_folder_of_configs_and_a_router_of_ones_own(home):
    """The file registers a router in a way that only --config=FILE can repeat."""
    (home / "configs").mkdir()
    (home / "configs" / "sizes_of_mine.py").write_text(f"WIDTH = 16\n\n\n{MINE}")
    chosen = "    config = default()\n    config.router.name = 'mine'\n"
    own = OWN.replace("    config = default()\n", chosen)
    own += "\n\nfrom routers import ROUTERS\nROUTERS['mine'] = sizes_of_mine.Mine\n"
    (home / "configs" / "mine.py").write_text(own)
    data = f"--config.data.data_dir={home / 'data'}"
    small = [f"--config.model.{k}=2" for k in ("num_heads", "mlp_dim")]
    permoe(home, "train", "--config=mine", "--workdir=b", data, *SHORT, *small)
    assert json.loads((home / "b" / "config.json").read_text())["model"]["width"] == 16
    assert "--config=FILE" in permoe(home, "eval", "--workdir=b", code=2)
    permoe(home, "eval", "--workdir=b", "--config=configs/mine.py")
    assert json.loads((home / "b" / "eval.json").read_text())["examples"] == 359


def test_a_router_of_an_installed_package_evaluates_by_itself(home):
    (packages,) = (home / "env" / "lib").glob("python*/site-packages")
    (packages / "router_of_mine.py").write_text(MINE)
    (folder := packages / "routers_of_mine-1.0.dist-info").mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: routers-of-mine\n")
    (folder / "entry_points.txt").write_text("[permoe.routers]\nown = router_of_mine:Mine\n")
    data = f"--config.data.data_dir={home / 'data'}"
    router = ("--config.router.name=own", "--config.router.own.k=1")
    permoe(home, "train", "--config=digits", "--workdir=c", data, *SHORT, *router)
    permoe(home, "eval", "--workdir=c")
    assert json.loads((home / "c" / "eval.json").read_text())["examples"] == 359
    (packages / "router_of_mine.py").write_text("import nothing_of_this_name\n")
    error = permoe(home, "eval", "--workdir=c", code=2)
    assert "the package routers-of-mine" in error and error.count("\n") == 1
