"""The architecture, enforced: which room may import which, no circles in Python or in C, short files, and docstrings."""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "quantkit" / "kernels" / "cpu" / "csrc"
LONGEST_FILE = 400

#: Room -> the rooms that it may import, in addition to itself. A room is a folder, or a file at the top of the package; what
#: lies below a room that is listed here belongs to it. Lower rooms come first, and rooms only import lower ones.
ROOMS: dict[str, tuple[str, ...]] = {
    "errors": (),
    "utils": ("errors",),
    "checkpoint": ("errors", "utils"),
    "kernels.layouts": (),
    "kernels.reference": ("kernels.layouts",),
    "kernels.attention_mass": ("kernels.layouts",),
    "kernels.autotune": ("utils",),
    "kernels.cpu": ("kernels.layouts", "kernels.reference", "utils"),
    "methods": ("errors", "kernels.cpu", "utils"),
    "kernels.gpu": ("kernels.layouts", "kernels.reference", "kernels.autotune", "utils"),
    "formats": ("checkpoint", "errors", "methods", "utils"),
    "recipe": ("errors", "formats", "methods", "utils"),
    "data": ("checkpoint", "errors", "recipe"),
    "models": ("checkpoint", "errors", "formats", "kernels.reference", "utils"),
    "quantization": (
        *("checkpoint", "data", "errors", "formats", "kernels.reference", "methods", "models", "recipe", "utils"),
    ),
    "runtime.core": ("errors",),
    "runtime.sampling": ("errors", "kernels.cpu", "runtime.core"),
    "runtime.kv_cache": ("errors", "kernels", "runtime.core", "utils"),
    "runtime.model": (
        *("checkpoint", "errors", "formats", "kernels", "methods", "models", "utils"),
        *("runtime.core", "runtime.kv_cache"),
    ),
    "runtime.speculative": (
        *("checkpoint", "errors", "kernels.cpu", "utils"),
        *("runtime.core", "runtime.kv_cache", "runtime.model", "runtime.sampling"),
    ),
    "runtime.engine": (
        *("errors", "kernels.cpu", "utils"),
        *("runtime.core", "runtime.kv_cache", "runtime.model", "runtime.sampling", "runtime.speculative"),
    ),
    "runtime.session": (
        *("checkpoint", "data", "errors", "utils"),
        *("runtime.core", "runtime.engine", "runtime.kv_cache", "runtime.model", "runtime.sampling", "runtime.speculative"),
    ),
    "evaluation": ("checkpoint", "data", "errors", "formats", "kernels", "models", "runtime", "utils"),
    "bench": ("errors",),
    "server": ("data", "errors", "runtime", "utils"),
}

#: Room -> the packages that it may import in addition to the standard library. Rooms that are not listed are free.
PACKAGES = {
    "errors": (),
    "utils": ("torch",),
    "methods": ("torch",),
    "kernels": ("torch", "triton"),
    "formats": ("torch", "yaml"),
    "bench": ("httpx", "matplotlib", "numpy"),
    "recipe": ("pydantic", "yaml"),
    "runtime.core": ("torch",),
    "runtime.engine": ("torch",),
    "runtime.kv_cache": ("torch",),
}


def _module(path: Path) -> str:
    """Dotted name of a file below `quantkit`; "" for the package itself."""
    return ".".join(path.relative_to(ROOT / "quantkit").with_suffix("").parts).removesuffix("__init__").removesuffix(".")


FILES = {_module(path): path for path in sorted((ROOT / "quantkit").rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def _imports(name: str, tree: ast.Module) -> Iterator[str]:
    """What a module imports, at its top or inside a function: our modules without `quantkit.`, other packages with a "~"."""
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}"
            # `from quantkit.methods import awq` imports a module, `from quantkit.methods.awq import rtn` does not.
            wholes = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [w if w.removeprefix("quantkit.") in FILES else str(node.module) for w in wholes]
        for each in found:
            ours = each == "quantkit" or each.startswith("quantkit.")
            yield each.removeprefix("quantkit").removeprefix(".") if ours else f"~{each.split('.')[0]}"


#: The package itself imports nothing: what stands in its `TYPE_CHECKING` block is for type checkers.
IMPORTS = {name: set(_imports(name, tree)) if name else set[str]() for name, tree in TREES.items()}


def _inside(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def _files_of(room: str) -> list[str]:
    return [name for name in FILES if _inside(name, (room,))]


def _circles(graph: Mapping[str, set[str]]) -> list[str]:
    """The nodes from which a path leads back to themselves."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(graph.get(start, ()))
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting.extend(graph.get(name, ()))
        return seen

    return [name for name in graph if name in reach(name)]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    files = _files_of(room)
    assert files, "there is no such room"
    strangers = [
        f"{name} imports {imported}"
        for name in files
        for imported in sorted(IMPORTS[name])
        if not imported.startswith("~") and not _inside(imported, ("version", room, *ROOMS[room]))
    ]
    assert strangers == []


def test_rooms_are_listed_from_the_lowest_to_the_highest() -> None:
    listed: list[str] = []
    for room, below in ROOMS.items():
        assert [other for other in below if other not in ("kernels", "runtime") and other not in listed] == [], room
        listed.append(room)


@pytest.mark.parametrize("room", PACKAGES)
def test_a_room_imports_only_the_packages_that_it_may(room: str) -> None:
    strangers = [
        f"{name} imports {imported.removeprefix('~')}"
        for name in _files_of(room)
        for imported in sorted(IMPORTS[name])
        if imported.startswith("~") and imported[1:] not in sys.stdlib_module_names and imported[1:] not in PACKAGES[room]
    ]
    assert strangers == []


def test_every_file_is_in_a_room() -> None:
    faces = {"", "__main__", "version", "kernels", "runtime"}  # `kernels` and `runtime` are docstrings only
    homeless = [n for n in FILES if n not in faces and not _inside(n, (*ROOMS, "cli", "recipes", *_PYTHON_FACE))]
    assert homeless == []


#: What `from quantkit import ...` gives; like the command line, it may import every room.
_PYTHON_FACE = ("api",)


def test_nothing_imports_the_command_line_or_the_python_face() -> None:
    top = ("cli", *_PYTHON_FACE)
    outside = {n: imports for n, imports in IMPORTS.items() if not _inside(n, (*top, "__main__")) and n}
    assert [f"{n} imports {i}" for n, imports in outside.items() for i in sorted(imports) if _inside(i, top)] == []


def test_no_import_runs_in_a_circle() -> None:
    assert _circles(IMPORTS) == []


def _room_of(name: str) -> str:
    """The folder of a file, as the tree shows it; a file at the top of the package or of `runtime` is a room of its own."""
    parts = name.split(".")
    deep = 2 if parts[0] in ("runtime", "kernels") else 1
    return ".".join(parts[:deep])


def test_no_room_depends_on_itself_through_others() -> None:
    graph: dict[str, set[str]] = {}
    for name, imports in IMPORTS.items():
        ours = {_room_of(other) for other in imports if other and not other.startswith("~")}
        if name:
            graph.setdefault(_room_of(name), set()).update(ours - {_room_of(name)})
    assert _circles(graph) == []


@pytest.mark.parametrize("name", [name for name, path in FILES.items() if path.name == "__init__.py"])
def test_a_room_says_what_lives_in_it(name: str) -> None:
    assert ast.get_docstring(TREES[name])


def _c_code(path: Path) -> str:
    """A C file without comments and strings."""
    return re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\])*"', " ", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_no_circle_in_c() -> None:
    code = {path.name: _c_code(path) for path in sorted(CSRC.glob("*.c"))}
    defined = {
        function: name
        for name, text in code.items()
        for function in re.findall(r"^(?!static)[A-Za-z_][\w \t*]*?\b(\w+)\([^;{}]*\)\s*\{", text, flags=re.MULTILINE)
    }
    assert len(defined) > len(code), "the pattern no longer finds functions"
    calls = {name: {defined[w] for w in re.findall(r"\b\w+\b", text) if w in defined} - {name} for name, text in code.items()}
    assert _circles(calls) == []
    includes = {
        path.name: set(re.findall(r'^#include "(\w+\.h)"', path.read_text(encoding="utf-8"), flags=re.MULTILINE))
        for path in CSRC.glob("*.[ch]")
    }
    assert any(includes.values())
    assert _circles(includes) == []


@pytest.mark.parametrize("name", FILES)
def test_a_file_can_be_read_in_one_sitting(name: str) -> None:
    assert FILES[name].read_text(encoding="utf-8").count("\n") <= LONGEST_FILE


def _public(body: list[ast.stmt], where: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """Public functions, classes and methods; what is nested in a function is private."""
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


def test_tests_mirror_the_rooms() -> None:
    rooms = {path.relative_to(ROOT / "quantkit") for path in (ROOT / "quantkit").rglob("*") if path.is_dir()}
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    strangers = {str(folder) for folder in folders - rooms} - {".", "docs", "packaging"}
    assert strangers == set()


def test_tests_share_through_helpers_only() -> None:
    shared = re.compile(r"^\s*(?:from|import) (test_\w+|conftest)\b", flags=re.MULTILINE)
    found = [str(path) for path in (ROOT / "tests").rglob("*.py") if shared.search(path.read_text(encoding="utf-8"))]
    assert found == []
