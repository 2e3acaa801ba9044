"""The one direction of imports: isotonic <- routers <- moe <- the scripts."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = {"train", "eval", "compare", "plan"}
FORBIDDEN = {
    "isotonic": {"routers", "moe", "configs", "flax", "optax"} | SCRIPTS,
    "routers": {"moe", "configs", "ml_collections"} | SCRIPTS,
    "moe": {"configs"} | SCRIPTS,
}
HEAVY = {"tensorflow", "torch"}  # neither is a dependency; one script prepares data with the first


def imported(file: pathlib.Path):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_downwards(package):
    for file in (ROOT / package).rglob("*.py"):
        heavy = set() if file.name == "prepare.py" else HEAVY
        assert not set(imported(file)) & (FORBIDDEN[package] | heavy), file


def test_every_package_is_installed():
    text = (ROOT / "pyproject.toml").read_text()
    for package in FORBIDDEN:
        for init in (ROOT / package).rglob("__init__.py"):
            assert f'"{".".join(init.parent.relative_to(ROOT).parts)}"' in text
