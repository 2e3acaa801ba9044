"""`permoe`: its list of programs, what it needs, configs by name, routers of other packages."""

import importlib.metadata
import pathlib
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from moe import cli, commands, config, config_files, extras, plugins
from moe.data import prepare
from moe.errors import UsageError
from routers import ROUTERS

ROOT = pathlib.Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def permoe(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Runs it as a shell would; returns the exit code and both screens."""
    monkeypatch.setattr("sys.argv", ["permoe", *arguments])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    try:
        commands.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_the_programs_are_listed(arguments, monkeypatch, capsys):
    code, out, _ = permoe(monkeypatch, capsys, *arguments)
    assert code == 0
    for name in commands.COMMANDS:
        assert f"\n  {name} " in out
        assert (ROOT / f"moe/commands/{name}.py").is_file() and (ROOT / f"{name}.py").is_file()


def test_words_that_are_wrong(monkeypatch, capsys):
    code, _, error = permoe(monkeypatch, capsys, "trian")
    assert (code, error.count("\n")) == (2, 1) and "expected train, eval" in error
    code, _, error = permoe(monkeypatch, capsys, "train", "--config=digits")
    assert (code, error.count("\n")) == (2, 1) and "required: --workdir" in error


def test_a_program_knows_its_name(monkeypatch, capsys):
    code, out, _ = permoe(monkeypatch, capsys, "eval", "--help")
    assert code == 0 and out.startswith("usage: permoe eval ")


def test_without_the_extra_one_line_says_what_to_type(monkeypatch, capsys):
    monkeypatch.setattr(extras, "NEEDED", (*extras.NEEDED, "no_such.module"))
    code, _, error = permoe(monkeypatch, capsys, "train", "--config=digits")
    assert code == 2 and error == (
        "error: permoe train needs 'no_such.module', which is not installed: "
        "type pip install 'permoe[train]'\n"
    )
    assert prepare.main(["digits"]) == 2
    assert "moe.data.prepare needs 'no_such.module'" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["-h"], 0)])
def test_preparing_says_how_it_is_used(arguments, code, capsys):
    assert prepare.main(arguments) == code
    out, error = capsys.readouterr()
    assert "text" in out + error and "images" in out + error
    assert error.count("\n") == (code == 2)


def plain(name: str) -> str:
    return name.lower().replace("_", "-")


def names(requirements: list[str]) -> set[str]:
    return {plain(Requirement(text).name) for text in requirements}


def closure(requirements: list[str]) -> set[str]:
    """Returns the packages that pip installs for requirements."""
    done, todo = set(), [(Requirement(text), "") for text in requirements]
    while todo:
        wanted, extra = todo.pop()
        if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
            continue
        for extra in wanted.extras | {""}:
            if (key := (plain(wanted.name), extra)) not in done:
                done.add(key)
                needs = importlib.metadata.requires(wanted.name) or []
                todo += [(Requirement(text), extra) for text in needs]
    return {name for name, _ in done}


def test_what_is_checked_is_what_the_extra_installs():
    brings = importlib.metadata.packages_distributions()
    tops = {module.split(".")[0] for module in extras.NEEDED}
    found = {plain(name) for top in tops for name in brings[top]}
    # `orbax` is a namespace that several packages share.
    expected = names(PROJECT["optional-dependencies"]["train"])
    assert found >= expected and len(extras.NEEDED) == len(expected)


def test_the_operators_and_routers_need_the_core_alone():
    """They import and compute where all is missing that only `permoe[train]` installs."""
    core = closure(PROJECT["dependencies"])
    train = names(PROJECT["optional-dependencies"]["train"]) | {"tensorflow", "torch"}
    brings = importlib.metadata.packages_distributions().items()
    missing = {top for top, by in brings if set(map(plain, by)) <= train - core} | {"moe"}
    assert {"grain", "tensorflow_datasets", "ml_collections", "matplotlib"} <= missing
    code = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(missing)}))
import isotonic, routers
from flax import nnx
y = routers.sparse_topk_mask(isotonic.isotonic_regression([3.0, 2.0, 4.0]), 1)
router = routers.ROUTERS["sparse_topk"](4, 4, 2, rngs=nnx.Rngs(0))
print(float(y.sum()), router(routers.routing.jnp.ones((1, 2, 4))).weights.shape)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1.0 (1, 2, 4)\n", done.stderr


def test_every_typed_package_says_so():
    for package in ("isotonic", "routers", "moe"):
        assert (ROOT / package / "py.typed").is_file()


OWN = "from moe.config import default\nfrom configs import sizes_of_mine\n\n\ndef get_config():\n"
OWN += "    config = default()\n    config.model.width = sizes_of_mine.WIDTH\n    return config\n"


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A folder with configs of its own, that is the current one."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sizes_of_mine.py").write_text("WIDTH = 24\n")
    (tmp_path / "configs" / "mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["mine", "configs/mine.py", "./configs/mine.py"])
def test_own_configs_import_from_their_own_folder(name, own_folder):
    assert cli.load_config(name, {}).model.width == 24


def test_shipped_configs_have_names_and_own_files_come_first(own_folder):
    assert cli.load_config("digits", {}).model.width == 64
    with pytest.raises(UsageError, match=r"here are configs/mine.py.*by name: .*digits, fash"):
        cli.load_config("digitz", {})
    with pytest.raises(UsageError, match=r"no config file 'configs/digits\.py'"):
        cli.load_config("configs/digits.py", {})
    (own_folder / "configs" / "digits.py").write_text(OWN)
    assert cli.load_config("digits", {}).model.width == 24
    assert config_files.shipped() == ROOT / "configs"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Returns a function: installs a package with a router's entry point, for this test."""
    known = dict(ROUTERS)

    def install(name: str, code: str, value: str = "router_of_mine:Mine"):
        folder = tmp_path / "routers_of_mine-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: routers-of-mine\n")
        (folder / "entry_points.txt").write_text(f"[permoe.routers]\n{name} = {value}\n")
        (tmp_path / "router_of_mine.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))
        plugins.load_routers.cache_clear()

    yield install
    ROUTERS.clear()
    ROUTERS.update(known)
    sys.modules.pop("router_of_mine", None)
    plugins.load_routers.cache_clear()


MINE = "import routers\n\n\nclass Mine(routers.TopK):\n    pass\n"


def test_a_router_of_another_package_is_like_a_shipped_one(package, tiny):
    package("mine", MINE)
    chosen = tiny(router__name="mine", router__mine__k="1")
    assert config.from_json(config.to_json(chosen)).router.mine.k == 1
    assert ROUTERS["mine"].__name__ == "Mine"


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("mine", "import no_such_package", r"loaded \(ModuleNotFoundError: No module .*uninstall"),
        ("mine", "", r"cannot be loaded \(AttributeError: "),
        ("mine", "Mine = 3", "is 3; expected a subclass of routers.Router"),
        ("topk", MINE, "has the name of another router"),
    ],
)
def test_a_broken_package_is_named(name, code, message, package):
    package(name, code)
    expected = rf"the router '{name}' of the package routers-of-mine .*{message}"
    with pytest.raises(UsageError, match=expected) as caught:
        config.default()
    assert "\n" not in str(caught.value)
