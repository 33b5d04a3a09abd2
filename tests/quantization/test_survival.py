"""A run may be killed at any moment, run out of memory or disk space, or meet another run: nothing is lost or half-written."""

import errno
import functools
import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from helpers import tiny
from helpers.command import FAST, ended, quantkit, refused, signal_at_change, start, wait_until
from quantkit.checkpoint.activations import Activations
from quantkit.formats.artifact import write_metadata
from quantkit.kernels.cpu import gram
from quantkit.quantization import run as job
from quantkit.quantization.calibration import LockstepForward
from quantkit.quantization.memory import MemoryPlan
from quantkit.recipe import Recipe
from quantkit.utils.renamed_keys import RENAMED

BLOCKS = 6
METHODS = ("rtn", "gptq", "awq+gptq", "gptq and head")

#: Method -> the artifact of an uninterrupted run.
Whole = Callable[[str], Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny llama of six blocks, and with a recipe that quantizes its head too. Read only."""
    model = tiny.make_model(tmp_path_factory.mktemp("six") / "model", num_hidden_layers=BLOCKS)
    (model.parent / "head.yaml").write_text("{method: gptq, rules: [{match: lm_head, bits: 8}]}")
    return model


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Made on first use. Read only."""
    folder = tmp_path_factory.mktemp("whole")

    def made(method: str) -> Path:
        if not (folder / method).exists():
            assert quantkit(*command(source, folder / method, method)).status == 0
        return folder / method

    return made


@pytest.fixture(scope="module")
def half(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a gptq run leaves that was killed after its third block. Read only."""
    out = tmp_path_factory.mktemp("half") / "out"
    process = start(out.with_name("log"), *command(source, out, "gptq"), fault=at_line(out, 5))
    assert ended(process) == -signal.SIGKILL
    assert len(journal(out)) == 4
    return partial(out)


@pytest.fixture
def interrupted(half: Path, tmp_path: Path) -> Path:
    """OUT of an interrupted run, to be gone on with."""
    shutil.copytree(half, partial(tmp_path / "out"))
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    """A run that continues uses the number of threads of the interrupted run."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def command(source: Path, out: Path, method: str, *more: object) -> tuple[object, ...]:
    choice = ("--recipe", source.parent / "head.yaml") if method == "gptq and head" else ("--method", method)
    return ("quantize", source, "-o", out, *choice, *FAST, "-q", *more)


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def journal(out: Path) -> list[str]:
    path = partial(out) / "journal.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def at_line(out: Path, number: int, what: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """A fault: a signal just before the journal gets its `number`th line."""
    return signal_at_change(out.parent, number, what, of="journal.jsonl")


def contents(out: Path) -> dict[str, bytes]:
    """What must be equal to the byte."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix == ".safetensors"} | {
        "config.json": (out / "config.json").read_bytes()
    }


def require_absent_or_complete(out: Path) -> None:
    if out.exists():
        report = json.loads((out / "quantkit.json").read_text())
        assert all((out / name).is_file() for name in report["output_sha256"])


def finish(source: Path, out: Path, method: str, *more: object) -> dict[str, bytes]:
    """Run the same command to its end and return the artifact."""
    done = quantkit(*command(source, out, method, *more))
    assert done.status == 0, done.err
    assert not partial(out).exists()
    return contents(out)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_changes_of_the_disk(source: Path, whole: Whole, tmp_path: Path, method: str, seed: int) -> None:
    """Repeat one command, killed before a random change of a file each time, until it completes."""
    chance, out = random.Random(f"{seed} {method}"), tmp_path / "work" / "out"
    kills = 0
    while True:
        fault = signal_at_change(tmp_path / "work", chance.randint(1, 30))
        status = ended(start(tmp_path / "log", *command(source, out, method), fault=fault))
        require_absent_or_complete(out)
        if status == 0:
            break
        assert status == -signal.SIGKILL, (tmp_path / "log").read_text()
        kills += 1
    assert kills
    assert contents(out) == contents(whole(method))
    assert not partial(out).exists()


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_times(source: Path, whole: Whole, tmp_path: Path, method: str) -> None:
    chance, out = random.Random(method), tmp_path / "out"
    for _ in range(4):
        process = start(tmp_path / "log", *command(source, out, method))
        began, delay = time.monotonic(), chance.uniform(0.1, 1.0)
        while process.exitcode is None and time.monotonic() < began + delay:
            require_absent_or_complete(out)
            time.sleep(0.002)
        process.kill()
        ended(process)
        require_absent_or_complete(out)
        if out.exists():
            shutil.rmtree(out)
    assert finish(source, out, method) == contents(whole(method))


@pytest.mark.parametrize("lines", [1, 3, BLOCKS])
def test_goes_on_after_the_last_finished_block(source: Path, whole: Whole, tmp_path: Path, lines: int) -> None:
    out = tmp_path / "out"
    process = start(tmp_path / "log", *command(source, out, "awq+gptq"))
    wait_until(lambda: len(journal(out)) >= lines or process.exitcode is not None)
    process.kill()
    assert ended(process) == -signal.SIGKILL
    finished = len(journal(out)) - 1
    assert finish(source, out, "awq+gptq") == contents(whole("awq+gptq"))
    assert json.loads((out / "quantkit.json").read_text())["totals"]["resumed_blocks"] == finished >= lines - 1


def test_what_an_unfinished_block_needs_is_still_there(source: Path, whole: Whole, interrupted: Path) -> None:
    """Killed just before a line of the journal: only that block is done again."""
    assert finish(source, interrupted, "gptq") == contents(whole("gptq"))
    assert json.loads((interrupted / "quantkit.json").read_text())["totals"]["resumed_blocks"] == 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_every_step_from_the_last_block_on(source: Path, whole: Whole, tmp_path: Path, overwrite: bool) -> None:
    """Joining, publishing, replacing an older artifact and cleaning up."""
    work, out = tmp_path / "work", tmp_path / "work" / "out"
    more = ("--overwrite",) if overwrite else ()
    old = work.with_name("old")
    if overwrite:
        shutil.copytree(whole("gptq"), old)
    work.mkdir()
    process = start(tmp_path / "log", *command(source, out, "rtn"))
    wait_until(lambda: len(journal(out)) == BLOCKS + 1 or process.exitcode is not None)
    process.kill()
    assert ended(process) == -signal.SIGKILL
    shutil.copytree(work, tmp_path / "last")
    for step in itertools.count(1):
        shutil.rmtree(work)
        shutil.copytree(tmp_path / "last", work)
        if overwrite:
            shutil.copytree(old, out)
        status = ended(start(tmp_path / "log", *command(source, out, "rtn", *more), fault=signal_at_change(work, step)))
        require_absent_or_complete(out)
        if status == 0:
            break
        assert finish(source, out, "rtn", *more) == contents(whole("rtn")), f"killed before change {step}"
    assert step > 20


def test_left_over_workspace_of_a_complete_artifact_is_deleted(
    source: Path, whole: Whole, tmp_path: Path, interrupted: Path
) -> None:
    shutil.copytree(whole("gptq"), interrupted)
    done = quantkit("quantize", source, "-o", interrupted, "--method", "gptq", *FAST)
    assert done.status == 0
    assert "already complete" in done.err
    assert not partial(interrupted).exists()
    assert contents(interrupted) == contents(whole("gptq"))


def use_old_keys(path: Path, *inside: str) -> None:
    """Rename the keys of the recipe in a JSON file to those that earlier versions wrote."""
    data = json.loads(path.read_text())
    holder = functools.reduce(lambda each, key: each[key], inside, data)
    current = {new: old for old, new in RENAMED.items()}
    assert current.keys() <= holder["recipe"].keys()
    holder["recipe"] = {current.get(key, key): value for key, value in holder["recipe"].items()}
    path.write_text(json.dumps(data))


def test_an_interrupted_run_with_old_keys_is_gone_on_with(source: Path, whole: Whole, interrupted: Path) -> None:
    use_old_keys(partial(interrupted) / "run.json", "identity")
    done = quantkit("quantize", source, "-o", interrupted, "--method", "gptq", *FAST)
    assert "continuing an interrupted run after block 3 of 6" in done.err
    assert contents(interrupted) == contents(whole("gptq"))
    assert json.loads((interrupted / "quantkit.json").read_text())["recipe"].keys() == Recipe.model_fields.keys()


def test_a_complete_artifact_with_old_keys_is_recognised(source: Path, whole: Whole, interrupted: Path) -> None:
    shutil.copytree(whole("gptq"), interrupted)
    use_old_keys(interrupted / "quantkit.json")
    done = quantkit("quantize", source, "-o", interrupted, "--method", "gptq", *FAST, "--json", "-")
    assert "already complete" in done.err
    assert json.loads(done.out)["recipe"] == json.loads((whole("gptq") / "quantkit.json").read_text())["recipe"]


def test_another_artifact_is_no_reason_to_delete_a_workspace(source: Path, whole: Whole, interrupted: Path) -> None:
    shutil.copytree(whole("rtn"), interrupted)
    assert "exists" in refused(*command(source, interrupted, "gptq"))
    assert len(journal(interrupted)) == 4


def test_a_damaged_artifact_is_not_called_complete(source: Path, whole: Whole, interrupted: Path) -> None:
    shutil.copytree(whole("gptq"), interrupted)
    shard = interrupted / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    assert "exists" in refused(*command(source, interrupted, "gptq"))
    assert len(journal(interrupted)) == 4


@pytest.mark.parametrize(
    "tear",
    [
        lambda text: text[:-1],
        lambda text: text[:-20],
        lambda text: text[: text.rindex(b"{") + 1],
        lambda text: text + b'{"shard": "block-0',
        lambda text: text + b"12\n",
        lambda text: text + b"\xff\xfe\n",
        lambda text: text + b'{"shard": 3}\n',
        lambda text: b"",
    ],
)
def test_torn_journal(source: Path, whole: Whole, interrupted: Path, tear: Callable[[bytes], bytes]) -> None:
    path = partial(interrupted) / "journal.jsonl"
    path.write_bytes(tear(path.read_bytes()))
    assert finish(source, interrupted, "gptq") == contents(whole("gptq"))


@pytest.mark.parametrize("lost", ["block-00001.safetensors", "activations-00003.bin", "run.json", "outside.safetensors"])
def test_lost_file_of_an_interrupted_run(source: Path, whole: Whole, interrupted: Path, lost: str) -> None:
    (partial(interrupted) / lost).unlink()
    assert finish(source, interrupted, "gptq") == contents(whole("gptq"))


def test_second_run_is_turned_away_and_harms_nothing(source: Path, whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "work" / "out"
    pause = at_line(out, 4, signal.SIGSTOP)
    first = start(tmp_path / "log", *command(source, out, "gptq"), fault=pause)
    wait_until(lambda: len(journal(out)) >= 3)
    assert "another run" in refused(*command(source, out, "gptq"))
    assert "another run" in refused(*command(source, out, "rtn", "--overwrite"))
    # The first run may not have stopped yet. SIGCONT then has no effect, so it is sent repeatedly.
    while first.exitcode is None:
        assert first.pid is not None
        os.kill(first.pid, signal.SIGCONT)
        first.join(0.1)
    assert first.exitcode == 0, (tmp_path / "log").read_text()
    assert contents(out) == contents(whole("gptq"))


def test_changed_recipe_is_refused_by_name(source: Path, whole: Whole, interrupted: Path) -> None:
    assert "different recipe;" in refused(*command(source, interrupted, "gptq", "--bits", "3"))
    assert finish(source, interrupted, "gptq") == contents(whole("gptq"))


def test_changed_source_is_refused_by_name(source: Path, whole: Whole, interrupted: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(source, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.5.mlp.up_proj.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert "different source;" in refused(*command(other, interrupted, "gptq"))
    assert finish(source, interrupted, "gptq") == contents(whole("gptq"))


def test_changed_calibration_is_refused_by_name_or_overwritten(source: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "work" / "out", tmp_path / "text.txt"
    text.write_text("A first text. " * 1000)
    more = ("--calib", text)
    interruption = start(tmp_path / "log", *command(source, out, "gptq", *more), fault=at_line(out, 2))
    assert ended(interruption) == -signal.SIGKILL
    text.write_text("Another one. " * 1000)
    assert "different calibration tokens;" in refused(*command(source, out, "gptq", *more))
    anew = finish(source, out, "gptq", *more, "--overwrite")
    assert anew == finish(source, tmp_path / "fresh", "gptq", *more)


def test_number_of_threads_is_the_interrupted_runs(source: Path, tmp_path: Path) -> None:
    """It decides the order of sums, and so the last bits."""
    out, usual = tmp_path / "work" / "out", torch.get_num_threads()
    torch.set_num_threads(usual + 1)
    expected = finish(source, tmp_path / "other", "gptq")
    fault = functools.partial(_with_threads, usual + 1, at_line(out, 3))
    assert ended(start(tmp_path / "log", *command(source, out, "gptq"), fault=fault)) == -signal.SIGKILL
    torch.set_num_threads(usual)
    done = quantkit(*command(source, out, "gptq")[:-1])
    assert f"computing with {usual + 1} threads" in done.err
    assert contents(out) == expected


@pytest.fixture
def source_bf16(tmp_path: Path) -> Path:
    """Stored in 16 bit, so that there is a choice of how to multiply."""
    return tiny.make_model(tmp_path / "bf16", dtype=torch.bfloat16)


def _multiplying_in(choice: str, dtype: torch.dtype, then: Callable[[], None] = lambda: None) -> None:
    """From now on, this process behaves as if `choice`, a function that names the fastest dtype, named `dtype`."""
    setattr(job, choice, lambda *_: dtype)
    then()


@pytest.mark.parametrize(("choice", "said"), [("fastest_matmul", "products"), ("fastest_products", "Hessians")])
def test_products_are_the_interrupted_runs(
    source_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: str, said: str
) -> None:
    """They decide the last bits too."""
    if choice == "fastest_products" and not gram.supported():
        pytest.skip("no native products of bfloat16 here")
    source, work = source_bf16, tmp_path / "work"
    monkeypatch.setattr(job, choice, None)
    expected = {}
    for dtype in (torch.float32, torch.bfloat16):
        _multiplying_in(choice, dtype)
        expected[dtype] = finish(source, tmp_path / str(dtype), "gptq")
    assert expected[torch.float32] != expected[torch.bfloat16]
    fault = functools.partial(_multiplying_in, choice, torch.float32, at_line(work / "out", 3))
    assert ended(start(tmp_path / "log", *command(source, work / "out", "gptq"), fault=fault)) == -signal.SIGKILL
    done = quantkit(*command(source, work / "out", "gptq")[:-1])
    assert f"{said} in float32" in done.err
    assert contents(work / "out") == expected[torch.float32]
    recipe = ("--recipe", work / "out" / "quantkit.json")
    assert quantkit("quantize", source, "-o", work / "again", *recipe, "-q").status == 0
    assert contents(work / "again") == expected[torch.float32]


def _with_threads(threads: int, fault: Callable[[], None]) -> None:
    torch.set_num_threads(threads)
    fault()


def test_number_of_threads_is_the_recorded_runs(source: Path, tmp_path: Path) -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(usual + 1)
    expected = finish(source, tmp_path / "first", "gptq")
    torch.set_num_threads(usual)
    recipe = ("--recipe", tmp_path / "first" / "quantkit.json")
    assert quantkit("quantize", source, "-o", tmp_path / "again", *recipe, "-q").status == 0
    assert torch.get_num_threads() == usual + 1
    assert contents(tmp_path / "again") == expected


@pytest.mark.parametrize(
    "files",
    [
        {"precious.txt": "not a model"},
        {"config.json": "{}", "thesis.tex": "years of work"},
    ],
)
def test_overwrite_deletes_no_folder_that_is_no_model(source: Path, tmp_path: Path, files: dict[str, str]) -> None:
    for folder in (tmp_path / "one", partial(tmp_path / "two")):
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    assert "not a model" in refused(*command(source, tmp_path / "one", "rtn", "--overwrite"))
    assert "not made by quantkit" in refused(*command(source, tmp_path / "two", "rtn", "--overwrite"))
    for folder in (tmp_path / "one", partial(tmp_path / "two")):
        assert {path.name: path.read_text() for path in folder.iterdir()} == files


def test_overwrite_never_replaces_the_source(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model", num_hidden_layers=1)
    before = contents(model)
    assert "source itself" in refused(*command(model, model, "rtn", "--overwrite"))
    assert contents(model) == before


def test_overwrite_replaces_a_model_only_when_the_new_one_is_complete(
    source: Path, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole("gptq"), out)
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", _fails_at(BLOCKS + 2, OSError(errno.ENOSPC, "No space left on device")))
        assert "disk is full" in refused(*command(source, out, "rtn", "--overwrite"))
    assert contents(out) == contents(whole("gptq"))
    assert finish(source, out, "rtn", "--overwrite") == contents(whole("rtn"))


@pytest.mark.parametrize("place", [".", ""])
def test_out_may_be_the_current_folder(
    source: Path, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "exists" in refused(*command(source, Path(place), "rtn"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("rtn", ("--format", "gptq")),
        ("gptq", ("--seed", "7", "--bits", "3", "--asym")),
        ("awq+gptq", ("--recipe", "mixed-w4")),
        ("gptq and head", ("--act-order", "--group-size", "32")),
    ],
)
def test_the_artifacts_own_report_reproduces_it(source: Path, tmp_path: Path, method: str, more: tuple[str, ...]) -> None:
    first = finish(source, tmp_path / "first", method, *more)
    again = quantkit("quantize", source, "-o", tmp_path / "again", "--recipe", tmp_path / "first" / "quantkit.json", "-q")
    assert again.status == 0, again.err
    assert contents(tmp_path / "again") == first


@pytest.mark.parametrize("method", [method for method in METHODS if method != "rtn"])
def test_little_memory_gives_the_same_bytes(
    source: Path, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    mapped = _recorded(monkeypatch, Activations, "reserve")
    assert finish(source, tmp_path / "out", method, "--max-memory", "1KB") == contents(whole(method))
    assert [options["in_memory"] for options in mapped] == [False] * (BLOCKS + 1)


@pytest.mark.parametrize("memory", [("1KB", "1GB"), ("1GB", "1KB")])
def test_memory_may_differ_when_a_run_goes_on(source: Path, whole: Whole, tmp_path: Path, memory: tuple[str, str]) -> None:
    out = tmp_path / "work" / "out"
    less = command(source, out, "gptq", "--max-memory", memory[0])
    assert ended(start(tmp_path / "log", *less, fault=at_line(out, 3))) == -signal.SIGKILL
    assert len(journal(out)) == 2
    assert finish(source, out, "gptq", "--max-memory", memory[1]) == contents(whole("gptq"))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("keep_paused", [True, False])
def test_less_memory_comes_to_an_end_at_the_least(in_memory: bool, keep_paused: bool) -> None:
    ways = [MemoryPlan(in_memory, keep_paused)]
    while (less := ways[-1].smaller()) is not None:
        ways.append(less)
    assert ways[-1] == MemoryPlan(in_memory=False, keep_paused=False)
    assert len(ways) == 1 + in_memory + keep_paused


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
)


@pytest.mark.parametrize(
    ("error", "times"), zip(OUT_OF_MEMORY, (2, 1, 1), strict=True), ids=["device", "host", "torch on host"]
)
def test_out_of_memory_is_tried_again_with_less(
    source: Path,
    whole: Whole,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    times: int,
) -> None:
    """It strikes late, when half of the next block's inputs have replaced this one's."""
    strikes = _strikes_in_outputs(monkeypatch, error, block=3, times=times)
    done = quantkit("quantize", source, "-o", tmp_path / "out", "--method", "gptq", *FAST)
    assert done.status == 0, done.err
    assert strikes == [3] * times
    assert done.err.count("out of memory in block 2") == times
    assert contents(tmp_path / "out") == contents(whole("gptq"))


def test_out_of_memory_for_good_is_explained_and_finished_blocks_are_kept(
    source: Path, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        _strikes_in_outputs(patch, OUT_OF_MEMORY[0], block=3, times=99)
        assert "memory ran out in block 2" in refused(*command(source, out, "gptq"))
    assert len(journal(out)) == 3
    assert finish(source, out, "gptq") == contents(whole("gptq"))


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _strikes_in_outputs(monkeypatch, RuntimeError("our own bug"), block=1, times=1)
    with pytest.raises(RuntimeError, match="our own bug"):
        quantkit(*command(source, tmp_path / "out", "gptq"))


FULL = (
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
)


@pytest.mark.parametrize("error", FULL, ids=["space", "quota", "safetensors"])
@pytest.mark.parametrize("number", [1, 4, BLOCKS + 2])
def test_full_disk_at_a_shard(
    source: Path,
    whole: Whole,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    number: int,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", _fails_at(number, error))
        assert "disk is full" in refused(*command(source, out, "rtn"))
    assert not out.exists()
    assert len(journal(out)) == number - 1
    assert finish(source, out, "rtn") == contents(whole("rtn"))


@pytest.mark.parametrize(("name", "memory"), [("posix_fallocate", "1KB"), ("fsync", "1KB"), ("fsync", "1GB")])
def test_full_disk_anywhere_else(
    source: Path, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, memory: str
) -> None:
    out = tmp_path / "out"
    for number in (1, 2, 5):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, _fails_at(number, FULL[0], getattr(os, name)))
            assert "disk is full" in refused(*command(source, out, "gptq", "--max-memory", memory))
        assert not out.exists()
    assert finish(source, out, "gptq") == contents(whole("gptq"))


def test_out_that_appears_meanwhile_costs_no_finished_block(
    source: Path, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def write_and_make_out(*arguments: Any) -> None:
        write_metadata(*arguments)
        out.mkdir()

    with monkeypatch.context() as patch:
        patch.setattr(job, "write_metadata", write_and_make_out)
        assert "exists" in refused(*command(source, out, "rtn"))
    assert len(journal(out)) == BLOCKS + 1
    out.rmdir()
    assert finish(source, out, "rtn") == contents(whole("rtn"))


def test_interrupt_from_the_keyboard(source: Path, whole: Whole, tmp_path: Path) -> None:
    out, log = tmp_path / "work" / "out", tmp_path / "log"
    process = start(log, *command(source, out, "gptq"), fault=at_line(out, 3, signal.SIGINT))
    assert ended(process) == 130
    assert log.read_text() == "error: interrupted; the same command continues after the last finished block\n"
    assert finish(source, out, "gptq") == contents(whole("gptq"))


def _fails_at(number: int, error: Exception, original: Callable[..., Any] = save_file) -> Callable[..., Any]:
    """A wrapper of `original` whose `number`th call fails."""
    calls = itertools.count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise error
        return original(*args, **kwargs)

    return call


def _strikes_in_outputs(patch: pytest.MonkeyPatch, error: BaseException, block: int, times: int) -> list[int]:
    """Make the `block`th block's walk fail after its first output, `times` times; the blocks at which it did."""
    original, strikes, finished = LockstepForward.outputs, list[int](), [0]

    def outputs(self: LockstepForward) -> Iterator[tuple[torch.Tensor, ...]]:
        for number, output in enumerate(original(self)):
            if number == 1 and finished[0] == block - 1 and len(strikes) < times:
                strikes.append(block)
                raise error
            yield output
        finished[0] += 1

    patch.setattr(LockstepForward, "outputs", outputs)
    return strikes


def _recorded(patch: pytest.MonkeyPatch, owner: type, name: str) -> list[dict[str, Any]]:
    """The keyword arguments of every call of a class method."""
    original, calls = getattr(owner, name), list[dict[str, Any]]()

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return original(*args, **kwargs)

    patch.setattr(owner, name, call)
    return calls
