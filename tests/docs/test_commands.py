"""Every command line and every Python example of README.md, CONTRIBUTING.md and docs/ works.

Commands run for real on a tiny model that stands in for `demo`, with few samples. What needs a network, a server, another
engine or a long time is checked without being run: options are parsed by the parser that would read them; files, targets,
extras and routes must exist. A command that no rule covers fails.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from helpers.command import quantkit
from helpers.verbs import command, group, options

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_PYPROJECT = (ROOT / "pyproject.toml").read_text()
NAME = re.findall(r'^name = "(.+)"$', _PYPROJECT, re.MULTILINE)
EXTRAS = re.findall(r"^([\w-]+) = \[", _PYPROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0], re.MULTILINE)
LANGUAGES = {"sh", "python", "yaml", "json", "c", "text"}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:quantkit|make|pip|python -m|torchrun|pytest|mkdocs) [^`\n]+)`")


class Snippet(NamedTuple):
    """A command line or a Python example, and its position."""

    where: str
    text: str


def _where(page: Path, text: str, position: int) -> str:
    return f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, position) + 1}"


def _blocks(language: str) -> list[Snippet]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found += [Snippet(_where(page, text, m.start()), m[2]) for m in _FENCE.finditer(text) if m[1] == language]
    return found


def _commands() -> list[Snippet]:
    """Every line of every shell block, continued lines joined, without comments."""
    lines = [Snippet(where, line) for where, text in _blocks("sh") for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.text.strip()]


def _inline() -> list[Snippet]:
    """Commands within sentences and tables."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found += [Snippet(_where(page, text, m.start()), m[1]) for m in _INLINE.finditer(text)]
    return found


def _named(snippets: list[Snippet]) -> list[Any]:
    return [pytest.param(each.text, id=f"{each.where} {each.text.strip().splitlines()[0]:.60}") for each in snippets]


# What is run


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file that the commands name, and a cache in which a tiny model is `demo`."""
    import torch

    from helpers import tiny

    folder = tmp_path_factory.mktemp("desk")
    cache = folder / "cache"
    demo = tiny.make_model(cache / "demo", dtype=torch.bfloat16, max_position_embeddings=4096)
    config = json.loads((demo / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    (demo / "tokenizer_config.json").write_text(json.dumps(config))
    lines = "".join(json.dumps({"prompt": f"Prompt {number}: "}) + "\n" for number in range(2))
    for name in ("prompts.jsonl", "long.jsonl"):
        (folder / name).write_text(lines)
    (folder / "schema.json").write_text(json.dumps({"type": "boolean"}))
    (recipe,) = _blocks("yaml")
    (folder / "my-recipe.yaml").write_text(recipe.text)
    for name in ("my-text.txt", "wikitext2-valid.txt"):
        (folder / name).write_text("The quick brown fox jumps over the lazy dog. " * 400)
    patch = pytest.MonkeyPatch()
    patch.setenv("QUANTKIT_CACHE", str(cache))
    patch.chdir(folder)
    for recipe_name, out in (("gptq-w4", "demo-w4"), ("qspec-w4", "demo-qspec")):
        done = quantkit("quantize", "demo", "-o", out, "--recipe", recipe_name, *_SMALL["quantize"], "-q")
        assert done.status == 0, done.err
    patch.undo()
    shutil.copytree(folder / "demo-qspec", folder / "demo-rotated")
    return folder


#: Verb -> options that make a run short and possible on the tiny model; the last value of an option counts.
_SMALL = {
    "quantize": ("--samples", "4", "--seq-len", "32"),
    "eval": ("--windows", "2", "--seq-len", "32"),
    "generate": ("--max-tokens", "4", "--max-batch", "4", "--token-budget", "64"),
    "deploy": ("--tensor-parallel", "1"),  # The tiny model cannot be split.
}
#: Verbs that are run; the others serve, put load on a server or change a shell.
_RUN = ("quantize", "eval", "generate", "convert", "inspect", "deploy", "recipes", "calib")
#: Options of commands that are not run: they need a minute on an idle machine, a data set, another engine, a network.
_NOT_RUN = ("--speed", "--tasks", "--run")
_STAND_INS = {
    "$MODEL": "demo",
    "wikitext2": "my-text.txt",
    "16GiB": "16MiB",
    "4GiB": "16MiB",
    "1GiB": "16MiB",
    "256MiB": "16MiB",
}


def _run_quantkit(arguments: list[str], desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _parse_quantkit(arguments)
    verb = arguments[0]
    if verb not in _RUN or set(_NOT_RUN) & set(arguments):
        return
    monkeypatch.setenv("QUANTKIT_CACHE", str(desk / "cache"))
    monkeypatch.chdir(desk)
    words = [_STAND_INS.get(each, each) for each in arguments]
    passed_on = words[words.index("--") :] if "--" in words else []
    words = words[: len(words) - len(passed_on)] + list(_SMALL.get(verb, ()))
    if verb in ("quantize", "convert"):
        words.append("--overwrite")
    done = quantkit(*words, *passed_on)
    assert "Traceback" not in done.err
    if done.status == 1:  # A tiny random model loses more than the gates allow.
        assert "gate failed" in done.err
        assert {"--max-ppl-increase", "--max-kl"} & set(words)
    else:
        assert done.status == 0, done.err


# What is checked


def _parse_quantkit(arguments: list[str]) -> None:
    """All options are known, their values of the right type, no argument is missing."""
    verb, *rest = arguments
    if verb.startswith("-"):
        _known_options(group(), arguments)
    elif "--help" not in rest:
        context = group().commands[verb].make_context(verb, rest)
        assert context.params or not context.command.params


def _known_options(command: Any, arguments: list[str]) -> None:
    """Every option is one of the command's, whatever its value."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    assert {each for each in own if re.match(r"--?[a-z]", each)} <= options(command)


def _check_pip(arguments: list[str]) -> None:
    """Ours is named with extras that there are."""
    assert arguments[0] == "install"
    for requirement in arguments[1:]:
        match = re.fullmatch(r"([\w-]+)(?:\[([\w,-]+)\])?", requirement)
        assert match is not None
        assert [match[1]] == NAME
        extras = match[2].split(",") if match[2] else []
        assert set(extras) <= set(EXTRAS)


def _check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert arguments, "which target?"
    assert all(re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) for target in arguments)


def _check_module(arguments: list[str]) -> None:
    """`python -m benchmarks.X`: the module's usage knows every option."""
    assert arguments[0] == "-m"
    module = ROOT / (arguments[1].replace(".", "/") + ".py")
    source = module.read_text()
    for option in (each for each in arguments[2:] if each.startswith("--")):
        assert f'"{option}"' in source, f"{arguments[1]} has no option {option}"


def _check_torchrun(arguments: list[str]) -> None:
    assert arguments[0] == "--nproc-per-node"
    assert arguments[1].isdecimal()
    assert arguments[2:4] == ["-m", "quantkit"]
    _parse_quantkit(arguments[4:])


def _check_pytest(arguments: list[str]) -> None:
    assert all((ROOT / each.split("::")[0]).exists() for each in arguments)


def _check_curl(arguments: list[str]) -> None:
    """The route is the server's, and the body is one of a request."""
    from quantkit.server import schemas

    (url,) = (each for each in arguments if each.startswith(("localhost", "http")))
    route = "/" + url.split("://")[-1].partition("/")[2]
    assert f'"{route}"' in (ROOT / "quantkit" / "server" / "app.py").read_text()
    body = json.loads(arguments[arguments.index("-d") + 1])
    assert route == "/v1/chat/completions"
    schemas.ChatBody.model_validate(body)


def _check_ray(arguments: list[str]) -> None:
    assert arguments[0] == "start"
    assert all(each == "--head" or each.startswith("--address=") for each in arguments[1:])


def _check_lm_eval(arguments: list[str]) -> None:
    assert arguments[:2] == ["--model", "local-completions"]
    assert set(arguments[2::2]) <= {"--tasks", "--model_args"}
    fields = dict(each.split("=", 1) for each in arguments[arguments.index("--model_args") + 1].split(","))
    assert fields["base_url"].endswith("/v1/completions")


def _check_mkdocs(arguments: list[str]) -> None:
    assert arguments in (["serve"], ["build", "--strict"])


def _check_pre_commit(arguments: list[str]) -> None:
    assert arguments == ["install"]
    assert yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]


#: First word of a command -> the check of the rest that is possible without running it.
_CHECKS: dict[str, Callable[[list[str]], None]] = {
    "quantkit": _parse_quantkit,
    "pip": _check_pip,
    "make": _check_make,
    "python": _check_module,
    "torchrun": _check_torchrun,
    "pytest": _check_pytest,
    "curl": _check_curl,
    "ray": _check_ray,
    "lm_eval": _check_lm_eval,
    "mkdocs": _check_mkdocs,
    "pre-commit": _check_pre_commit,
}


def _words(line: str) -> list[str]:
    """The command's words without comments and leading assignments of variables."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        assert words[0].startswith("QUANTKIT_"), words[0]
        words.pop(0)
    assert not {"|", "&&", ";", ">"} & set(words), "one command per line"
    return words


@pytest.mark.parametrize("line", _named(_commands()))
def test_a_command_works(line: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = _words(line)
    assert words[0] in _CHECKS, f"no rule covers {words[0]}"
    if words[0] == "quantkit":
        _run_quantkit(words[1:], desk, monkeypatch)
    else:
        _CHECKS[words[0]](words[1:])


@pytest.mark.parametrize("line", _named(_inline()))
def test_a_command_within_a_sentence_is_understood(line: str) -> None:
    """Values are not checked, because words in capital letters stand for what the user fills in."""
    words = _words(line)
    if words[0] != "quantkit" or len(words) == 1:
        _CHECKS[words[0]](words[1:])
        return
    _known_options(group() if words[1].startswith("-") else command(words[1]), words[1:])


@pytest.mark.parametrize("source", _named(_blocks("python")))
def test_a_python_example_runs(source: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(desk / "cache"))
    monkeypatch.chdir(desk)
    for long, short in (("512", "32"), ("64", "4"), ("windows=4", "windows=2")):
        source = re.sub(rf"\b{long}\b", short, source)
    exec(compile(source, "<example>", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_say_what_they_are(page: Path) -> None:
    """A block without a language, or an indented one, would not be looked at by the tests above."""
    text = page.read_text(encoding="utf-8")
    assert {match[1] for match in _FENCE.finditer(text)} <= LANGUAGES
    assert text.count("\n```") + text.startswith("```") == 2 * len(_FENCE.findall(text))
    outside = _FENCE.sub("", text)
    assert not re.search(r"^ {4,}(?:quantkit|pip|python|make|curl|torchrun) ", outside, re.MULTILINE)
