"""The documentation is complete, and everything that it names exists."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.verbs import command, options, verbs
from quantkit.recipe import Recipe, builtin_recipes

ROOT = Path(__file__).parents[2]
PAGES = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md"))}
PAGES |= {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")}
ALL = "\n".join(PAGES.values())
#: Pages for contributors; the modules and files that they name must exist.
NAMING = [page for page in PAGES if page.startswith("docs/extend/") or page in ("docs/architecture.md", "CONTRIBUTING.md")]


def _options() -> list[str]:
    """Every long option of every verb; "--no-x" is explained with "--x"."""
    spellings = {option for verb in verbs() for option in options(command(verb))}
    return sorted(each for each in spellings if each.startswith("--") and not each.startswith("--no-") and each != "--help")


@pytest.mark.parametrize("option", _options())
def test_every_option_is_explained(option: str) -> None:
    assert re.search(rf"{option}(?![\w-])", ALL)


def test_every_verb_is_in_the_readme() -> None:
    assert [verb for verb in verbs() if f"quantkit {verb}" not in PAGES["README.md"]] == []


def test_every_recipe_and_every_field_of_one_is_explained() -> None:
    text = PAGES["docs/quantize.md"]
    assert [name for name in (*builtin_recipes(), *Recipe.model_fields) if f"`{name}`" not in text] == []


def test_the_readme_is_short() -> None:
    assert PAGES["README.md"].count("\n") <= 150


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    paths = re.findall(r"`((?:quantkit|tests|benchmarks|docs|examples|\.github|\.ci)/[\w./+-]+)`", PAGES[page])
    assert [path for path in paths if "NAME" not in path and not (ROOT / path).exists()] == []


def _code() -> str:
    files = [path for room in ("quantkit", "tests", "benchmarks") for path in sorted((ROOT / room).rglob("*.py"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in files if path.parent.name != "docs")


def test_names_of_the_code_exist() -> None:
    words = set(re.findall(r"\w+", _code()))
    named = {(page, name) for page in NAMING for name in re.findall(r"`([A-Za-z_][\w.]*)`", PAGES[page])}
    upper = re.compile(r"NAME|OUT|MODEL|README|CHANGELOG")
    parts = [(page, part) for page, name in named if not upper.search(name) for part in name.split(".")]
    assert sorted({(page, part) for page, part in parts if part not in words}) == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """mkdocs checks links within docs/, and their anchors."""
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if "://" not in target]
    assert [target for target in targets if target and not (ROOT / page).parent.joinpath(target).exists()] == []


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason='needs pip install "quantkit-llm[docs]"')
    mkdocs = Path(sys.executable).parent / "mkdocs"
    assert mkdocs.is_file() or shutil.which("mkdocs")
    command = [str(mkdocs), "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    # The theme advertises its successor otherwise.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "site" / "index.html").is_file()
