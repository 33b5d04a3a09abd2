"""The house's directions: which room may import which, how long a file may be, and that what is public is explained."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 400


def _module(path: Path) -> str:
    """Dotted name of a file of the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {_module(path): path for path in sorted((ROOT / "quantkit").rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def _walk(name: str, tree: ast.AST) -> Iterator[ast.AST]:
    """Every node of a module, except what the package itself declares for type checkers only: it never runs."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and name == "quantkit":
            for other in node.orelse:
                yield from _walk(name, other)
        else:
            yield from _walk(name, node)


def _imports(name: str, tree: ast.Module) -> Iterator[str]:
    """Dotted names of everything that a module imports, at its top or inside a function."""
    for node in _walk(name, tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}"
            for alias in node.names:
                # `from quantkit.methods import awq` imports a module, `from quantkit.methods.awq import rtn` does not.
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES else str(node.module)


IMPORTS = {name: set(_imports(name, tree)) for name, tree in TREES.items()}


def _inside(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def _strangers(room: str, allowed: tuple[str, ...]) -> list[str]:
    """Imports of a room's modules that are neither in the standard library nor under an allowed name."""
    return [
        f"{name} imports {imported}"
        for name, imports in IMPORTS.items()
        if _inside(name, (room,))
        for imported in sorted(imports)
        if imported.split(".")[0] not in sys.stdlib_module_names and not _inside(imported, allowed)
    ]


#: Room -> all that it may import beside the standard library.
ALLOWED = {
    "quantkit.methods": ("torch", "quantkit.methods", "quantkit.utils.registry"),
    "quantkit.formats": ("torch", "quantkit.formats", "quantkit.methods.grid", "quantkit.errors"),
    "quantkit.kernels": ("torch", "triton", "quantkit.kernels"),
    "quantkit.bench": ("httpx", "matplotlib", "numpy", "quantkit.bench", "quantkit.errors"),
    "quantkit.quantization.calibration": (
        "torch",
        "greenlet",
        "quantkit.models.families",
        "quantkit.quantization.distributed",
    ),
    "quantkit.quantization.distributed": ("torch", "quantkit.errors"),
    "quantkit.models.families": ("quantkit.errors",),
    "quantkit.errors": (),
}

#: Room -> rooms that it never imports.
FORBIDDEN = {
    "quantkit.checkpoint": ("quantkit.methods", "quantkit.formats", "quantkit.quantization.run"),
    "quantkit.evaluation": ("quantkit.quantization.run",),
    "quantkit.runtime": ("quantkit.quantization.run",),
    "quantkit.server": ("quantkit.quantization.run",),
}


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    assert any(_inside(name, (room,)) for name in FILES)
    assert _strangers(room, ALLOWED[room]) == []


def _reach(start: str) -> set[str]:
    """Every module that importing `start` brings in, however far away."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in IMPORTS and name not in seen:
            seen.add(name)
            waiting.extend(IMPORTS[name])
    return seen


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_never_reaches_what_it_must_not(room: str) -> None:
    found = [
        f"{name} reaches {reached}"
        for name in FILES
        if _inside(name, (room,))
        for reached in sorted(_reach(name))
        if _inside(reached, FORBIDDEN[room])
    ]
    assert found == []


def test_nothing_imports_the_command_line() -> None:
    outside = {name: imports for name, imports in IMPORTS.items() if not _inside(name, ("quantkit.cli", "quantkit.__main__"))}
    assert [name for name, imports in outside.items() if any(_inside(i, ("quantkit.cli",)) for i in imports)] == []


def test_no_import_runs_in_circles() -> None:
    assert [name for name in FILES if any(name in _reach(imported) for imported in IMPORTS[name])] == []


@pytest.mark.parametrize("name", FILES)
def test_a_file_can_be_read_in_one_sitting(name: str) -> None:
    lines = FILES[name].read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST


def _public(body: list[ast.stmt], where: str) -> Iterator[tuple[str, ast.AST]]:
    """Public functions, classes and methods; what is nested in a function is nobody else's business."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{where}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f"{where}.{node.name}")


@pytest.mark.parametrize("name", FILES)
def test_what_is_public_is_explained(name: str) -> None:
    silent = [where for where, node in _public(TREES[name].body, name) if not ast.get_docstring(node)]
    assert silent == []
    assert ast.get_docstring(TREES[name]) or not TREES[name].body
