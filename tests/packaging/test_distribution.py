"""What is published: one version, extras that exist, a complete source distribution, a wheel with all that it needs to run."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from quantkit.errors import DISTRIBUTION

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"


def _tracked() -> list[str]:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    listed = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks, and nothing else."""
    folder = tmp_path_factory.mktemp("source")
    for name in _tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def _build(source: Path, kind: str) -> Path:
    """The distribution that setuptools makes of the source, without a network."""
    out = source.with_name(f"{source.name}-{kind}")
    command = [sys.executable, "-c", BUILD, kind, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built


def _version() -> str:
    tree = ast.parse((ROOT / "quantkit" / "version.py").read_text(encoding="utf-8"))
    assignments = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    return str(ast.literal_eval(assignments["__version__"]))


def test_the_version_is_stated_once() -> None:
    assert 'dynamic = ["version"]' in PYPROJECT
    assert re.findall(r"^version = .*$", PYPROJECT, re.MULTILINE) == ['version = { attr = "quantkit.version.__version__" }']


def test_the_source_distribution_is_complete(source: Path) -> None:
    tracked = set(_tracked())
    built = _build(source, "sdist")
    assert built.name == f"quantkit_llm-{_version()}.tar.gz"
    with tarfile.open(built) as archive:
        packed = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert sorted(tracked - packed) == []
    added = {"PKG-INFO", "setup.cfg"}
    assert [name for name in sorted(packed - tracked - added) if not name.startswith("quantkit_llm.egg-info/")] == []


def test_the_wheel_holds_the_package_and_its_data(source: Path) -> None:
    built = _build(source, "wheel")
    assert built.name == f"quantkit_llm-{_version()}-py3-none-any.whl"
    with zipfile.ZipFile(built) as archive:
        packed = set(archive.namelist())
    package = {name for name in _tracked() if name.startswith("quantkit/")}
    assert sorted(package - packed) == []
    assert {name.split("/")[0] for name in packed - package} == {f"quantkit_llm-{_version()}.dist-info"}
    assert f"quantkit_llm-{_version()}.dist-info/licenses/LICENSE" in packed


def test_what_users_are_told_to_install_exists() -> None:
    extras = re.findall(r"^([\w-]+) = \[", PYPROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0], re.MULTILINE)
    files = [path for room in ("quantkit", "tests", "examples") for path in sorted((ROOT / room).rglob("*.*"))]
    told = [
        (str(path.relative_to(ROOT)), name, extra)
        for path in files
        if path.suffix in (".py", ".yml")
        for name, named in re.findall(r"\b(quantkit(?:-llm)?)\[([\w,-]+)\]", path.read_text(encoding="utf-8"))
        for extra in named.split(",")
    ]
    assert told
    assert f'name = "{DISTRIBUTION}"' in PYPROJECT
    assert [each for each in told if each[1] != DISTRIBUTION or each[2] not in extras] == []


def test_the_license_is_the_published_text() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.lstrip().startswith("Apache License\n                           Version 2.0, January 2004")
    assert 'license = "Apache-2.0"' in PYPROJECT
