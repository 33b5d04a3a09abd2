"""One evaluation from folder to report: the cache of the baseline, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import tiny
from quantkit.cli.progress import RunProgress
from quantkit.errors import CheckpointError, CorpusError
from quantkit.evaluation.run import KERNEL_TOLERANCE, EvalReport, EvalRequest, run_evaluation
from quantkit.quantization.run import QuantizeRequest, quantize_model
from quantkit.recipe import load_recipe
from quantkit.runtime.model.loader import ModuleLoader


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for every test."""
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "baselines"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that differs from the llama."""
    return tiny.make_model(tmp_path_factory.mktemp("other") / "model", "qwen3")


def _evaluate(model: Path, baseline: Path | None, windows: int = 3) -> tuple[EvalReport, set[str]]:
    """A report, and the models that had to be run for it."""
    walked: set[str] = set()
    request = EvalRequest(model, baseline, "builtin", windows=windows, seq_len=32, device=torch.device("cpu"))
    return run_evaluation(request, lambda name, _done, _total: walked.add(name)), walked


def test_without_a_baseline(llama: Path, cache: Path) -> None:
    report, walked = _evaluate(llama, None)
    assert walked == {"model"}
    assert report.baseline is None
    assert report.ppl_increase is None
    assert report.model.metrics.kl_mean is None
    assert report.model.bits_per_weight == 32
    assert report.model.size_bytes == (llama / "model.safetensors").stat().st_size
    assert json.loads(json.dumps(report.to_json()))["model"]["metrics"]["predictions"] == 3 * 31
    assert not cache.exists()


def test_a_model_against_itself(llama: Path) -> None:
    report, walked = _evaluate(llama, llama)
    assert walked == {"baseline", "model"}
    assert report.baseline is not None
    assert report.model.metrics.perplexity == report.baseline.metrics.perplexity
    assert report.ppl_increase == 0
    assert (report.model.metrics.kl_mean, report.model.metrics.top1_agreement) == (0, 1)


def test_increase_is_relative_to_the_baseline(llama: Path, other: Path) -> None:
    report, _ = _evaluate(llama, other)
    assert report.baseline is not None
    expected = report.model.metrics.perplexity / report.baseline.metrics.perplexity - 1
    assert report.to_json()["ppl_increase"] == pytest.approx(expected)
    assert expected != 0


def test_a_cached_baseline_gives_the_same_numbers(llama: Path, other: Path, cache: Path) -> None:
    first, walked = _evaluate(llama, other)
    assert walked == {"baseline", "model"}
    again, walked = _evaluate(llama, other)
    assert walked == {"model"}
    assert (first.model, first.baseline) == (again.model, again.baseline)
    assert len(list(cache.iterdir())) == 1


def test_another_text_or_model_is_another_baseline(llama: Path, other: Path, cache: Path) -> None:
    _evaluate(llama, other)
    for model, baseline, windows in ((llama, other, 2), (other, llama, 3)):
        _, walked = _evaluate(model, baseline, windows)
        assert walked == {"baseline", "model"}
    assert len(list(cache.iterdir())) == 3


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * 4096)


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.write_bytes(content)


def _other_names(path: Path) -> None:
    save_file({"something": torch.zeros(3)}, path)


def _other_shape(path: Path) -> None:
    save_file(load_file(path) | {"hidden": torch.zeros(1, 2, 64)}, path)


@pytest.mark.parametrize("damage", [_empty, _garbage, _truncated, _one_bit, _other_names, _other_shape])
def test_a_damaged_cache_is_made_again(damage: Callable[[Path], None], llama: Path, other: Path, cache: Path) -> None:
    first, _ = _evaluate(llama, other)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    damage(path)
    again, walked = _evaluate(llama, other)
    assert walked == {"baseline", "model"}
    assert (first.model, first.baseline) == (again.model, again.baseline)
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(llama: Path, other: Path, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    report, walked = _evaluate(llama, other)
    assert walked == {"baseline", "model"}
    assert report.model.metrics.kl_mean is not None


def test_another_vocabulary_is_refused_before_any_work(llama: Path, tmp_path: Path) -> None:
    wide = tiny.make_model(tmp_path / "wide", vocab_size=300)
    for model, baseline in ((llama, wide), (wide, llama)):
        with pytest.raises(CheckpointError, match="must share the vocabulary") as caught:
            _evaluate(model, baseline)
        message = str(caught.value)
        assert "\n" not in message
        assert all(part in message for part in ("256", "300", str(model), str(baseline)))


def test_a_text_that_is_too_short_is_refused(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("A few words.")
    request = EvalRequest(llama, None, str(text), windows=3, seq_len=32, device=torch.device("cpu"))
    with pytest.raises(CorpusError, match="gives 12 tokens"):
        run_evaluation(request, lambda *_: None)


def _quantized(model: Path, out: Path, bits: int) -> Path:
    """A model whose matrices are all packed, the head in 8 bits."""
    recipe = load_recipe("rtn-w4", {"bits": bits, "group_size": 16, "rules": [{"match": "lm_head", "bits": 8}]})
    quantize_model(
        QuantizeRequest(model, out, recipe, torch.device("cpu"), 1 << 30, overwrite=False),
        RunProgress(quiet=True, verbose=False),
    )
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_kernels_are_as_good_as_dequantized_weights(llama: Path, tmp_path: Path, bits: int) -> None:
    """The bound is the project's promise; on a CPU only the order of float32 sums differs."""
    report, walked = _evaluate(_quantized(llama, tmp_path / "out", bits), None)
    assert "dequantized" in walked
    assert report.kernel_difference is not None
    assert abs(report.kernel_difference) <= KERNEL_TOLERANCE


def test_an_error_of_the_head_is_seen(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's head has doubled scales; that of the dequantized weights does not."""

    outside = ModuleLoader.outside

    def doubled(loader: ModuleLoader) -> dict[str, Any]:
        modules: dict[str, Any] = outside(loader)
        modules["lm_head"].kernel_weight.scales.mul_(2)
        return modules

    monkeypatch.setattr(ModuleLoader, "outside", doubled)
    report, _ = _evaluate(_quantized(llama, tmp_path / "out", 4), None)
    assert report.kernel_difference is not None
    assert abs(report.kernel_difference) > 10 * KERNEL_TOLERANCE


def test_a_model_that_is_not_quantized_has_nothing_to_compare(llama: Path) -> None:
    report, walked = _evaluate(llama, None)
    assert (report.kernel_difference, walked) == (None, {"model"})
