"""Configs of the paged kernels: all of them give the same result, fit their device, and are timed on a realistic problem."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.paged_samples import Heads, assert_attends, make_batch
from helpers.quantized_samples import SCHEMES, make_quantized
from quantkit.kernels import reference
from quantkit.kernels.autotune import Config, Tuner
from quantkit.kernels.gpu.attention import paged_attention as entry
from quantkit.kernels.gpu.attention.paged_args import AttentionArgs, ScoreParams
from quantkit.kernels.gpu.attention.paged_decode import paged_decode
from quantkit.kernels.gpu.attention.paged_plan import Device, Problem, decode_configs, number_of_splits, prefill_configs
from quantkit.kernels.gpu.attention.paged_prefill import paged_prefill

A100, H100, ADA = Device(80, 108, 166912), Device(90, 132, 232448), Device(89, 128, 101376)
SCALE = 0.3


def _plain(counts: list[int], heads: Heads, dtype: torch.dtype = torch.float16) -> AttentionArgs:
    batch = make_batch([200, 70], counts, heads, 16, dtype)
    out = torch.full((sum(counts), heads.kv * heads.ratio, heads.value_dim), float("nan"), dtype=dtype)
    return AttentionArgs(*batch.tensors, None, out.to(batch.query.device), ScoreParams.of(SCALE, 0, 0.0))


def _configs(find: Callable[[Problem, Device], list[Config]], call: AttentionArgs, new: int) -> list[Config]:
    """The configs for all devices, without duplicates."""
    found = [config for device in (A100, H100, ADA) for config in find(Problem.of(call, new, 2), device)]
    return [json.loads(each) for each in dict.fromkeys(json.dumps(each) for each in found)]


@pytest.mark.parametrize("count", [1, 8])
def test_every_decode_config_gives_the_same(count: int) -> None:
    heads = Heads(1, 4, 64, 64)
    batch, call = make_batch([200, 70], [count, count], heads, 16, torch.float16), _plain([count, count], heads)
    configs = _configs(decode_configs, call, count)
    assert len(configs) >= 4
    for config in configs:
        call.out.fill_(float("nan"))
        paged_decode(call, count, config)
        assert_attends(call.out, batch, scale=SCALE)


def test_every_prefill_config_gives_the_same() -> None:
    heads, counts = Heads(1, 4, 64, 64), [40, 13]
    batch, call = make_batch([200, 70], counts, heads, 16, torch.float16), _plain(counts, heads)
    configs = _configs(prefill_configs, call, 40)
    assert len(configs) >= 4
    for config in configs:
        call.out.fill_(float("nan"))
        paged_prefill(call, 40, config)
        assert_attends(call.out, batch, scale=SCALE)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_config_of_a_quantized_cache_gives_the_same(scheme: str) -> None:
    """float16 queries; see `test_paged_quantized` for the tolerance."""
    for counts, find in (([3, 1], decode_configs), ([33, 9], prefill_configs)):
        case = make_quantized(scheme, [90, 70], counts, Heads())
        query, rest = case.batch.query, case.tensors[1:]
        wanted = reference.paged_attention(query.double(), *rest, scale=SCALE)
        query = query.half()
        call = AttentionArgs(query, *rest, None, torch.empty_like(query), ScoreParams.of(SCALE, 0, 0.0))
        launch = paged_decode if find is decode_configs else paged_prefill
        configs = _configs(find, call, max(counts))
        assert len(configs) >= 3
        for config in configs:
            call.out.fill_(float("nan"))
            launch(call, max(counts), config)
            torch.testing.assert_close(call.out.double(), wanted, rtol=0, atol=2e-2)


@pytest.mark.parametrize("device", [A100, H100, ADA], ids=["A100", "H100", "Ada"])
@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_configs_fit_any_head(kind: int, device: Device) -> None:
    for dim in (16, 64, 96, 128, 256, 512):
        for new, ratio in ((1, 1), (8, 16), (1024, 4)):
            problem = Problem(kind, False, torch.bfloat16, 8, ratio, dim, dim, 16, new, 1, 1 << 14)
            for config in (decode_configs if new <= 8 else prefill_configs)(problem, device):
                assert problem.shared(config["rows"], config["tokens"], config["stages"]) <= device.shared_memory
                assert config["rows"] >= 16
                assert config["tokens"] >= 16


@pytest.mark.parametrize(
    ("programs", "tokens", "splits"),
    # 400 programs are wanted. A span has at least two tiles of 64 tokens.
    [(1, 1 << 20, 400), (8, 1 << 20, 50), (399, 1 << 20, 2), (400, 1 << 20, 1), (5000, 1 << 20, 1), (8, 1000, 8), (8, 1, 1)],
)
def test_spans_fill_the_machine_but_not_more(programs: int, tokens: int, splits: int) -> None:
    assert number_of_splits(programs, tokens, 64, 400) == splits


def _problem(new: int, sequences: int, context: int) -> Problem:
    call = _plain([1, 1], Heads())
    return Problem.of(replace(call, block_table=torch.zeros(1, context // 16, dtype=torch.int32)), new, sequences)


def test_calls_that_are_alike_share_a_problem() -> None:
    assert _problem(3, 5, 4000) == _problem(4, 8, 1040)
    assert _problem(3, 5, 4000) != _problem(3, 9, 4000)
    assert _problem(3, 5, 4000) != _problem(3, 5, 4112)
    assert _problem(1, 1, 1 << 17) == _problem(1, 1, 1 << 20)
    assert _problem(1, 1000, 1 << 17).context * 256 == 1 << 20  # no more tokens than a cache holds


def test_the_example_is_of_the_problem_and_reads_what_is_there() -> None:
    call = _plain([1, 1], Heads())
    assert isinstance(call.key_cache, Tensor)
    problem = _problem(2, 3, 1024)
    example = problem.example(call)
    example.check()
    assert problem == Problem.of(example, 2, 4)
    assert example.seq_lens.tolist() == [1024] * 4
    assert example.query_start.tolist() == [0, 2, 4, 6, 8]
    assert example.out.shape == (8, 4, 16)
    assert set(example.block_table.flatten().tolist()) == set(range(len(call.key_cache)))


def test_attention_is_timed_once_for_each_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device whose clock prefers the last config; the kernels are replaced, everything else is real."""
    launched: list[tuple[str, int, Config]] = []
    timed: list[int] = []

    def kernel(name: str) -> Callable[..., None]:
        def launch(call: AttentionArgs, new: int, config: Config, **_: Any) -> None:
            launched.append((name, int(call.seq_lens[0]), config))

        return launch

    def clock(call: Callable[[], object]) -> float:
        call()
        timed.append(launched[-1][1])
        return -float(len(timed))

    tuner = Tuner(tmp_path / "device.json", clock)
    monkeypatch.setattr(entry, "tuner", lambda device: tuner)
    monkeypatch.setattr(entry, "device_of", lambda device: H100)
    monkeypatch.setattr(entry, "paged_decode", kernel("decode"))
    monkeypatch.setattr(entry, "paged_prefill", kernel("prefill"))
    # Padding, with which CUDA graphs are warmed up: the timed call has full contexts nevertheless.
    batch = make_batch([40, 40], [1, 1], Heads(), 16, torch.float16)
    padding = replace(batch, seq_lens=torch.zeros_like(batch.seq_lens))
    entry.paged_attention(*padding.tensors, scale=SCALE)
    first = len(timed)
    assert first >= 4
    assert set(timed) == {1024}
    assert launched[-1] == ("decode", 0, launched[-2][2])
    entry.paged_attention(*batch.tensors, scale=SCALE)
    mixed = make_batch([90, 40], [30, 1], Heads(), 16, torch.float16)
    entry.paged_attention(*mixed.tensors, scale=SCALE)
    assert [name for name, length, _ in launched if length == 90] == ["prefill", "decode"]
    assert {name.split(":")[0] for name in json.loads((tmp_path / "device.json").read_text())} == {
        "paged_decode",
        "paged_prefill",
    }
    before = len(timed)
    entry.paged_attention(*mixed.tensors, scale=SCALE)
    assert len(timed) == before > first
