"""Several processes write the same bytes as one process. If one of them ends, all end, and one line says why."""

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from helpers import tiny
from helpers.command import ended, quantkit, start
from quantkit.errors import NumericsError
from quantkit.methods.hessian import PARTS, HessianAccumulator
from quantkit.methods.scheme import Scheme
from quantkit.quantization import block as block_job
from quantkit.quantization.block import stack_matrices
from quantkit.quantization.distributed import ProcessGroup

#: 81 rows of 64 tokens: six micro-batches, of which the last has one row, and two that the original model walks too.
ROWS = ("--samples", "81", "--seq-len", "64")

Fault = Callable[[], None]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As torchrun gives every process that it starts; the number decides the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny bfloat16 llama, and with a recipe whose rules let hardly two matrices be solved together."""
    model = tiny.make_model(tmp_path_factory.mktemp("source") / "model", num_hidden_layers=2, dtype=torch.bfloat16)
    rules = "{match: '[kv]_proj', bits: 3}, {match: up_proj, bits: 2}, {match: o_proj, skip: true}, {match: lm_head, bits: 8}"
    (model.parent / "mixed.yaml").write_text(f"{{rules: [{rules}]}}")
    return model


def command(source: Path, out: Path, method: str, *more: object) -> tuple[object, ...]:
    recipe = ("--recipe", source.parent / "mixed.yaml")
    return ("quantize", source, "-o", out, *recipe, "--method", method, *ROWS, "-q", *more)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix == ".safetensors"}


def alone(source: Path, out: Path, method: str, *more: object) -> dict[str, bytes]:
    """What one process makes."""
    done = quantkit(*command(source, out, method, *more))
    assert done.status == 0, done.err
    return contents(out)


def together(log: Path, size: int, *arguments: object, faults: dict[int, Fault] | None = None) -> list[int]:
    """The exit statuses of `size` processes that run a command as a team; `faults` are by rank."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    members = [functools.partial(_become, rank, size, store.port, (faults or {}).get(rank)) for rank in range(size)]
    processes = [start(log, *arguments, fault=member) for member in members]
    return [ended(process) for process in processes]


def _become(rank: int, size: int, port: int, fault: Fault | None) -> None:
    """Make this process a member of a team, as torchrun's environment does."""
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in numbers.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    if fault is not None:
        fault()


@pytest.mark.parametrize(("method", "size"), [("rtn", 2), ("awq", 2), ("gptq", 2), ("awq+gptq", 2), ("awq+gptq", 9)])
def test_the_artifact_is_that_of_one_process(source: Path, tmp_path: Path, method: str, size: int) -> None:
    """Nine are more than there are micro-batches, and more than matrices."""
    expected = alone(source, tmp_path / "alone", method)
    statuses = together(tmp_path / "log", size, *command(source, tmp_path / "out", method))
    assert statuses == [0] * size, (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text() == ""
    assert contents(tmp_path / "out") == expected
    assert f'"processes": {size}' in (tmp_path / "out" / "quantkit.json").read_text()
    assert not (tmp_path / "out.partial").exists()


def test_little_memory_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    expected = alone(source, tmp_path / "alone", "gptq")
    assert together(tmp_path / "log", 2, *command(source, tmp_path / "out", "gptq", "--max-memory", "1KB")) == [0, 0]
    assert contents(tmp_path / "out") == expected


def test_started_by_torchrun(source: Path, tmp_path: Path) -> None:
    expected = alone(source, tmp_path / "alone", "awq+gptq")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "quantkit"]
    arguments = [str(argument) for argument in command(source, tmp_path / "out", "awq+gptq")]
    done = subprocess.run(launcher + arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == expected


def _at_measurement(number: int, act: Fault) -> None:
    """From here on this process does `act` when it measures a group's inputs for the `number`th time."""
    original, seen = block_job.accumulate_hessian, 0

    def accumulate_hessian(*args: Any, **named: Any) -> HessianAccumulator:
        nonlocal seen
        seen += 1
        if seen == number:
            act()
        return original(*args, **named)

    block_job.accumulate_hessian = accumulate_hessian


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fail(error: Exception) -> None:
    raise error


#: In a block of the mixed recipe three groups are measured.
IN_SECOND_BLOCK = functools.partial(functools.partial, _at_measurement, 5)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(source: Path, tmp_path: Path, victim: int) -> None:
    """The second command may continue with a different number of processes."""
    expected, out, log = alone(source, tmp_path / "alone", "gptq"), tmp_path / "out", tmp_path / "log"
    statuses = together(log, 2, *command(source, out, "gptq"), faults={victim: IN_SECOND_BLOCK(_die)})
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] == 2
    (line,) = log.read_text().splitlines()
    assert line.startswith("error: another of the 2 processes ended or no longer answers")
    assert "the same command continues after the last finished block" in line
    assert together(log, 3, *command(source, out, "gptq")) == [0, 0, 0]
    assert contents(out) == expected
    assert '"resumed_blocks": 1' in (out / "quantkit.json").read_text()


@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_in_one_process_is_told_once_and_leaves_nothing_behind(source: Path, tmp_path: Path, victim: int) -> None:
    fault = IN_SECOND_BLOCK(functools.partial(_fail, NumericsError("the weights hold NaN")))
    statuses = together(tmp_path / "log", 3, *command(source, tmp_path / "out", "gptq"), faults={victim: fault})
    assert statuses == [2, 2, 2]
    assert (tmp_path / "log").read_text() == "error: the weights hold NaN\n"
    assert not (tmp_path / "out.partial").exists()


def test_an_error_in_every_process_is_told_once(source: Path, tmp_path: Path) -> None:
    assert together(tmp_path / "log", 2, *command(source, tmp_path / "out", "gptq", "--seq-len", "4096")) == [2, 2]
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert "longer than the model's context" in line


def test_lack_of_memory_in_one_process_keeps_finished_blocks(source: Path, tmp_path: Path) -> None:
    faults: dict[int, Fault] = {1: IN_SECOND_BLOCK(functools.partial(_fail, MemoryError()))}
    assert together(tmp_path / "log", 2, *command(source, tmp_path / "out", "gptq"), faults=faults) == [2, 2]
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert "memory ran out in block 1, in process 1 of 2" in line
    assert len((tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()) == 2


def test_a_finished_artifact_needs_nobody(source: Path, tmp_path: Path) -> None:
    """The leftovers of a killed run next to the output are deleted, and all processes end."""
    alone(source, tmp_path / "out", "rtn")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "lock").touch()
    assert together(tmp_path / "log", 2, *command(source, tmp_path / "out", "rtn")) == [0, 0]
    assert not (tmp_path / "out.partial").exists()


class _Of(ProcessGroup):
    """One of several, without a connection."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@given(st.lists(st.integers(1, 1000), max_size=30), st.integers(1, 12))
def test_jobs_are_shared_out_evenly(costs: list[int], size: int) -> None:
    owners = _Of(0, size).assign_owners(costs)
    assert owners == _Of(size - 1, size).assign_owners(costs)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(size)]
    # Nobody is given more while another has less to do: without its last and least job, the busiest is no busier than any.
    busiest = loads.index(max(loads))
    least = min((cost for cost, owner in zip(costs, owners, strict=True) if owner == busiest), default=0)
    assert max(loads) - least <= min(loads)


@pytest.mark.parametrize("columns", [5, 24, 36])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_shares_are_the_whole_sums(columns: int, size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 7, columns, generator=generator).to(dtype) for _ in range(6)]
    inputs = [(batches[0], batches[4]), (batches[1], batches[5]), (batches[2],), (batches[3],)]
    owners = _Of(0, size).assign_owners(PARTS)
    parts = [[part for part, owner in enumerate(owners) if owner == rank] for rank in range(size)]
    whole = HessianAccumulator(columns, torch.device("cpu"), dtype=dtype)
    shares = [HessianAccumulator(columns, torch.device("cpu"), own, dtype) for own in parts]
    for sums in (whole, *shares):
        for values in inputs:
            sums.add(*values)
    for part, owner in enumerate(owners):
        for share in shares:
            for mine, theirs in zip(share.part(part), shares[owner].part(part), strict=True):
                mine.copy_(theirs)
    for share in shares:
        assert torch.equal(share.mean(), whole.mean())
        found, expected = share.drift(), whole.drift()
        assert found is not None
        assert expected is not None
        assert torch.equal(found.cross, expected.cross)
        assert torch.equal(found.hessian, expected.hessian)


def test_matrices_are_stacked_up_to_a_limit() -> None:
    schemes = dict.fromkeys("abde", Scheme(4, 16, True)) | {"c": Scheme(8, 16, True)}
    rows = {"a": 3, "b": 4, "c": 5, "d": 9, "e": 1}
    assert stack_matrices(schemes, rows, 8) == [["a", "b"], ["d"], ["e"], ["c"]]
    assert stack_matrices(schemes, rows, 100) == [["a", "b", "d", "e"], ["c"]]
