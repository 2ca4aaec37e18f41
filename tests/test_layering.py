"""Who may import whom, read from the source: no arrow but those that the rooms allow.

    kvrag                       may import store, retrieval and kernels
    store, retrieval, kernels   import nothing of ours
    kvrag/config.py             alone reads the environment and settings files

Ours is always imported as `kvrag.*`: a bare `import store` finds the folder in this checkout and
nothing, or another project's package, in an installation.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("store", "retrieval", "kernels")
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}
SETTINGS_READERS = {"tomllib", "configparser", "dotenv", "pydantic_settings"}


def sources(*folders: str) -> list[Path]:
    """Python files below the folders; the rooms once, under their own names."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    linked = {ROOT / "kvrag" / room for room in ROOMS}
    return [path for path in found if not linked & set(path.parents)]


def module_name(path: Path) -> str:
    """What the file is imported as."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("kvrag", *parts) if parts[0] in ROOMS else parts)


def imported(tree: ast.AST, module: str, *, package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything imported, under TYPE_CHECKING and in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + package]
                base = ".".join([*parts, *filter(None, [node.module])])
            # `from kvrag import store` names a module as much as `import kvrag.store` does.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            called = called.id if isinstance(called, ast.Name) else called
            name = node.args[0]
            if called in ("import_module", "__import__") and isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


def forbidden(module: str, name: str) -> str | None:
    """Why `module` may not import `name`, or None."""
    top = name.split(".")[0]
    if top in ROOMS:
        return f"imports {top}, which is kvrag.{top}"
    if top == "tests" and not module.startswith("tests"):
        return "imports tests"
    room = module.split(".")[1] if module.startswith("kvrag.") else ""
    inside = name == f"kvrag.{room}" or name.startswith(f"kvrag.{room}.")
    if room in ROOMS and top == "kvrag" and not inside:
        return f"imports {name}: the room {room} imports nothing of ours"
    return None


def problems_of_imports(source: str, module: str, *, package: bool = False) -> list[str]:
    names = imported(ast.parse(source), module, package=package)
    return [f"{line}: {why}" for line, name in names if (why := forbidden(module, name))]


def problems_of_environment(source: str) -> list[str]:
    """Lines that read the environment, or import what reads settings files."""
    tree = ast.parse(source)
    written = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
    }
    reads = [
        f"{node.lineno}: os.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT and id(node) not in written
    ]
    readers = [
        f"{line}: {name}"
        for line, name in imported(tree, "", package=False)
        if name.split(".")[0] in SETTINGS_READERS or name.removeprefix("os.") in ENVIRONMENT
    ]
    return reads + readers


@pytest.mark.parametrize("path", sources("kvrag", *ROOMS, "tests", "examples"), ids=module_name)
def test_imports_follow_the_rooms(path):
    problems = problems_of_imports(
        path.read_text(), module_name(path), package=path.name == "__init__.py"
    )
    assert problems == []


@pytest.mark.parametrize("path", sources("kvrag", *ROOMS), ids=module_name)
def test_only_the_settings_read_the_environment(path):
    problems = problems_of_environment(path.read_text())
    assert bool(problems) == (path == ROOT / "kvrag" / "config.py"), problems


def test_rooms_are_links():
    for room in ROOMS:
        link = ROOT / "kvrag" / room
        assert link.is_symlink()
        assert link.readlink() == Path("..") / room


@pytest.mark.parametrize(
    ("module", "line", "allowed"),
    [
        ("kvrag.store.disk", "from .tier import Tier", True),
        ("kvrag.store.codecs.raw", "from ..tier import Tier", True),
        ("kvrag.store.codecs.raw", "from ... import config", False),
        ("kvrag.store.disk", "from ..retrieval import load", False),
        ("kvrag.store.disk", "import kvrag.config", False),
        ("kvrag.store.disk", "from kvrag import errors", False),
        ("kvrag.store.disk", "if 0:\n    from kvrag.errors import KvragError", False),
        ("kvrag.store.disk", "importlib.import_module('kvrag.engine')", False),
        ("kvrag.kernels.attention", "import kvrag.store.disk", False),
        ("kvrag.engine", "from kvrag.store.disk import DiskTier", True),
        ("kvrag.engine", "from store.disk import DiskTier", False),
        ("kvrag.engine", "import kernels", False),
        ("tests.test_x", "import retrieval", False),
        ("kvrag.engine", "from tests.tiny import make_tiny_model", False),
    ],
)
def test_the_walk_sees_forbidden_arrows(module, line, allowed):
    assert (problems_of_imports(line, module) == []) is allowed


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("os.environ['A'] = 'b'", True),
        ("os.environ['A']", False),
        ("os.environ.get('A')", False),
        ("os.getenv('A')", False),
        ("from os import environ", False),
        ("import tomllib", False),
    ],
)
def test_the_walk_sees_reads_of_the_environment(line, allowed):
    assert (problems_of_environment(line) == []) is allowed
