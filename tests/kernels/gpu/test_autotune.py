"""The tuner: what it picks, remembers and shares between processes, and which errors it tolerates."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton

from quantkit.kernels.autotune import Config, Tuner, tuner

CONFIGS = [{"block": 32}, {"block": 64}, {"block": 128}]
PROBLEM = (4, 128, torch.float16)


class Machine:
    """A kernel with a known time: the closer `block` is to `best`, the faster; blocks from `limit` on do not fit."""

    def __init__(self, best: int, limit: int = 1000) -> None:
        self.best, self.limit, self.runs = best, limit, 0
        self._last = 0

    def run(self, config: Config) -> None:
        """The kernel."""
        if config["block"] >= self.limit:
            raise triton.OutOfResources(300, 200, "shared memory")
        self.runs += 1
        self._last = config["block"]

    def clock(self, call: Callable[[], object]) -> float:
        """Milliseconds of a call."""
        call()
        return abs(self._last - self.best)


def _best(machine: Machine, path: Path) -> Config:
    return Tuner(path, machine.clock).best("kernel", PROBLEM, CONFIGS, machine.run)


def test_the_fastest_is_picked_and_timed_once(tmp_path: Path) -> None:
    machine = Machine(best=64)
    tuner = Tuner(tmp_path / "device.json", machine.clock)
    for _ in range(2):
        assert tuner.best("kernel", PROBLEM, CONFIGS, machine.run) == {"block": 64}
    assert machine.runs == 3


def test_another_process_reads_the_choice(tmp_path: Path) -> None:
    path = tmp_path / "new" / "device.json"
    _best(Machine(best=128), path)
    later = Machine(best=32)
    assert _best(later, path) == {"block": 128}
    assert later.runs == 0
    assert [file.name for file in path.parent.iterdir()] == ["device.json"]


def test_problems_and_kernels_are_chosen_apart(tmp_path: Path) -> None:
    path, machine = tmp_path / "device.json", Machine(best=32)
    _best(machine, path)
    other = Machine(best=128)
    tuner = Tuner(path, other.clock)
    assert tuner.best("kernel", (8, 128, torch.float16), CONFIGS, other.run) == {"block": 128}
    assert tuner.best("another", PROBLEM, CONFIGS, other.run) == {"block": 128}
    assert tuner.best("kernel", PROBLEM, CONFIGS, other.run) == {"block": 32}
    assert len(json.loads(path.read_text())) == 3


def test_a_config_that_does_not_fit_is_passed_over(tmp_path: Path) -> None:
    assert _best(Machine(best=128, limit=128), tmp_path / "device.json") == {"block": 64}


def test_what_cannot_be_timed_is_the_first_and_not_remembered(tmp_path: Path) -> None:
    path, machine = tmp_path / "device.json", Machine(best=64, limit=0)
    assert _best(machine, path) == {"block": 32}
    assert not path.exists()
    assert _best(Machine(best=64), path) == {"block": 64}


def test_memory_that_runs_out_while_timing_is_no_failure(tmp_path: Path) -> None:
    def run(config: Config) -> None:
        raise torch.OutOfMemoryError

    assert Tuner(tmp_path / "device.json", Machine(64).clock).best("kernel", PROBLEM, CONFIGS, run) == {"block": 32}


def test_an_only_config_is_not_timed(tmp_path: Path) -> None:
    machine = Machine(best=64)
    assert Tuner(tmp_path / "file.json", machine.clock).best("kernel", PROBLEM, CONFIGS[:1], machine.run) == {"block": 32}
    assert machine.runs == 0


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"kernel: 4 128 torch.float16": {"block": 7}}'])
def test_a_file_that_means_nothing_is_tuned_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "device.json"
    path.write_text(content)
    assert _best(Machine(best=64), path) == {"block": 64}
    assert _best(Machine(best=32), path) == {"block": 64}


def test_an_unwritable_cache_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert _best(Machine(best=64), tmp_path / "file" / "device.json") == {"block": 64}


def test_nothing_is_timed_without_a_gpu() -> None:
    machine = Machine(best=128)
    assert tuner(torch.device("cpu")).best("kernel", PROBLEM, CONFIGS, machine.run) == {"block": 32}
    assert machine.runs == 0


def test_nothing_is_timed_or_kept_while_a_graph_is_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, machine = tmp_path / "device.json", Machine(best=128)
    tuner = Tuner(path, machine.clock)
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_available", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert tuner.best("kernel", PROBLEM, CONFIGS, machine.run) == {"block": 32}
    assert machine.runs == 0
    assert tuner.best("kernel", PROBLEM, CONFIGS, machine.run) == {"block": 128}
