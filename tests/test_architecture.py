"""The one direction of imports: isotonic <- routers <- moe <- the scripts, and moe's own rooms."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = {"train", "eval", "generate", "compare", "plan", "examples", "benchmarks"}
FORBIDDEN = {
    "isotonic": {"routers", "moe", "configs", "flax", "optax"} | SCRIPTS,
    "routers": {"moe", "configs", "ml_collections"} | SCRIPTS,
    "moe": {"configs"} | SCRIPTS,
}
# The rooms of `moe`: each imports from those before it. Beside them stand files that import none
# (errors, extras, outputs, ranges, seeds, screen, plugins, config_files), and config, checks and
# cli, which read all of them.
ROOMS = ["hosts", "nn", "models", "data", "tasks", "store", "train", "evaluate", "plan", "commands"]
HEAVY = {"tensorflow", "torch"}  # neither is a dependency; TFDS loads the first to prepare a set


def imported(file: pathlib.Path):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_downwards(package):
    for file in (ROOT / package).rglob("*.py"):
        assert not set(imported(file)) & (FORBIDDEN[package] | HEAVY), file


def test_every_package_is_installed():
    text = (ROOT / "pyproject.toml").read_text()
    for package in FORBIDDEN:
        for init in (ROOT / package).rglob("__init__.py"):
            assert f'"{".".join(init.parent.relative_to(ROOT).parts)}"' in text


def modules(file: pathlib.Path):
    """Yields the dotted names that a file imports, "moe.nn.layer" also of `from moe.nn import`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_from_those_before_them(room):
    assert (ROOT / "moe" / room).is_dir()
    later = ROOMS[ROOMS.index(room) + 1 :]
    for file in (ROOT / "moe" / room).rglob("*.py"):
        for module in modules(file):
            top, _, rest = module.partition(".")
            assert top != "moe" or rest.split(".")[0] not in later, f"{file} imports {module}"


def test_every_room_has_its_place():
    rooms = {init.parent.name for init in (ROOT / "moe").glob("*/__init__.py")}
    assert rooms == set(ROOMS)


# Who reads a config as a whole: the tasks' seam, what makes and stores runs, and what plans them.
# All else is handed the section, or the values, that it needs.
READERS = {"checks", "cli", "config", "tasks", "store.workdir", "plan"}
READERS |= {"train.run", "train.trainer", "train.agreement", "evaluate.evaluation"}
READERS |= {"evaluate.comparison", "evaluate.league.results"}


def test_the_config_is_handed_on_by_section():
    """A parameter named `config` is the whole; a section has the section's name."""
    for file in (ROOT / "moe").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT / "moe").with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.arg) and node.arg == "config":
                assert {name, name.split(".")[0]} & READERS, f"{file}:{node.lineno}"


def test_no_file_imports_itself_through_others():
    graph = {}
    for file in (ROOT / "moe").rglob("[!_]*.py"):
        graph[".".join(file.relative_to(ROOT).with_suffix("").parts)] = set(modules(file))
    done, path = set(), []

    def visit(name):
        assert name not in path, f"a cycle: {' -> '.join([*path, name])}"
        if name in graph and name not in done:
            path.append(name)
            for other in sorted(graph[name] - {name}):
                visit(other)
            done.add(path.pop())

    for name in graph:
        visit(name)
