"""Imports go down: the rooms of docs/layers.md use those below them alone, and no modules form a circle."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ifnd_fast"
LAYERS = ROOT / "docs" / "layers.md"

pytestmark = pytest.mark.skipif(not LAYERS.exists(), reason="needs the source tree")


def rooms() -> list[str]:
    """The table's, from the top down."""
    return re.findall(r"^\| `(\w+)` \|", LAYERS.read_text(), re.MULTILINE)


def files() -> dict[str, Path]:
    """Every module below ifnd_fast, by its dotted name there."""
    found = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
    found |= {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.glob("kernels/*.py")}
    return {".".join(parts).removesuffix(".__init__"): path for parts, path in found.items() if parts != ("__init__",)}


def statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Those of functions too, and not those for type checkers alone."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.stmt):
            yield child
        yield from statements(child)


def imports() -> dict[str, set[str]]:
    """The modules that each module imports, wherever in it."""
    modules, found = files(), {}
    for name, path in modules.items():
        used: set[str] = set()
        for statement in statements(ast.parse(path.read_text())):
            if isinstance(statement, ast.Import):
                used |= {alias.name for alias in statement.names}
            elif isinstance(statement, ast.ImportFrom):
                assert statement.level == 0, f"{name}: relative import"
                of = statement.module or ""
                names = {f"{of}.{alias.name}" for alias in statement.names}
                used |= names | {of}
        used = {full.removeprefix("ifnd_fast.") for full in used if full.startswith("ifnd_fast.")}
        found[name] = (used & set(modules)) - {name}
    return found


def room_of(module: str) -> str | None:
    """None: it is in no room (yet)."""
    room = module.partition(".")[0]
    return room if (PACKAGE / room).is_dir() or room == "cli" else None


def test_imports_go_down():
    order = rooms()
    assert {"ops", "kernels", "evaluate"} <= set(order)
    upward = [
        f"{module} imports {used}"
        for module, others in imports().items()
        for used in others
        if (above := room_of(used)) and (below := room_of(module)) and order.index(above) < order.index(below)
    ]
    assert not upward


def test_packages_with_adapters_are_imported_by_these_alone():
    adapted = re.compile(r"^\s*(?:from|import) (?:lightning|lightly|pytorch_metric_learning)\b", re.MULTILINE)
    users = {name for name, path in files().items() if adapted.search(path.read_text())}
    assert users and {room_of(name) for name in users} == {"integrations"}


def test_no_circles():
    modules = imports()
    assert modules["ops.info_nce"] >= {"ops.checks", "ops.reference"}  # what is read is read right
    # A package's face imports its modules: that a module is in a package is no import of the face.
    faces = {name for name in modules if any(other.startswith(f"{name}.") for other in modules)}
    list(graphlib.TopologicalSorter({name: used - faces for name, used in modules.items()}).static_order())
