"""Every family end to end, on tiny random models: measured as transformers would, quantized and measured again."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers import tiny
from helpers.quantized import loud_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.evaluation.metrics import QualityMetrics, measure
from quantkit.evaluation.run import EvalReport, EvalRequest, run_evaluation
from quantkit.evaluation.stream import final_hidden, open_model
from quantkit.models.families import FAMILIES
from quantkit.models.streaming import StreamedModel
from quantkit.quantization.progress import NoProgress
from quantkit.quantization.report import RunReport
from quantkit.quantization.run import QuantizeRequest, quantize_model
from quantkit.recipe import Calibration, Recipe, Rule

CPU = torch.device("cpu")
BLOCKS = 3
TOKENS = torch.randint(tiny.VOCAB, (4, 64), generator=torch.Generator().manual_seed(0))
#: Of Gemma 3's layers only every sixth sees everything, with a rotary embedding of its own.
LAYERS = {"gemma3_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}}
EVERY_FAMILY = pytest.mark.parametrize("family", list(tiny.FAMILIES))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> folder of its tiny model, made once."""
    root = tmp_path_factory.mktemp("families")

    def made(family: str) -> Path:
        folder = root / family
        return folder if folder.exists() else loud_model(folder, family, **LAYERS.get(family, {}))

    return made


def quantize(source: Path, out: Path, **recipe: Any) -> RunReport:
    """Quantize with 8 rows of 64 tokens."""
    chosen = Recipe(calibration=Calibration(samples=8, seq_len=64), **recipe)
    return quantize_model(QuantizeRequest(source, out, chosen, CPU, max_memory=1 << 30, overwrite=False), NoProgress())


def compare(model: Path, baseline: Path) -> EvalReport:
    """Evaluate on 4 windows of 64 tokens."""
    return run_evaluation(EvalRequest(model, baseline, "builtin", windows=4, seq_len=64, device=CPU), lambda *_: None)


def _ignored(_done: int, _total: int) -> None: ...


def _divergence(metrics: QualityMetrics) -> float:
    """The mean divergence from the baseline, which must have been measured."""
    assert metrics.kl_mean is not None
    return metrics.kl_mean


@cache
def _without_blocks(folder: Path) -> QualityMetrics:
    """The distance from `folder` of the same model with every matrix of every block zeroed: as wrong as it can get."""
    checkpoint = Checkpoint(folder)
    dense = open_model(checkpoint, CPU)

    def zeroed(names: list[str]) -> dict[str, Tensor]:
        tensors = checkpoint.read(names)
        return {name: t.zero_() if name.endswith("_proj.weight") else t for name, t in tensors.items()}

    ablated = StreamedModel(checkpoint, zeroed, torch.float32, CPU)
    hidden = [final_hidden(model, TOKENS, _ignored) for model in (ablated, dense)]
    return measure(ablated, hidden[0], TOKENS, (dense, hidden[1]))


def test_every_family_is_here() -> None:
    assert set(tiny.FAMILIES) == set(FAMILIES)


@EVERY_FAMILY
def test_every_matrix_of_a_block_is_in_a_group(family: str, source: Callable[[str], Path]) -> None:
    prefix = "model.layers.1."
    tensors = {
        name.removeprefix(prefix): t for name, t in Checkpoint(source(family)).tensors.items() if name.startswith(prefix)
    }
    matrices = {name.removesuffix(".weight") for name, info in tensors.items() if len(info.shape) == 2}
    assert matrices == set(FAMILIES[family].matrices)
    assert len(matrices) == len(FAMILIES[family].matrices)


@EVERY_FAMILY
def test_streaming_equals_transformers(family: str, source: Callable[[str], Path]) -> None:
    folder = source(family)
    attention = "eager" if FAMILIES[family].soft_cap else "sdpa"
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    read: list[Tensor] = []
    whole.lm_head.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        expected = whole.eval()(TOKENS).logits
    model = open_model(Checkpoint(folder), CPU)
    hidden = final_hidden(model, TOKENS, _ignored)
    # The same operations in float32, on batches of another shape: sums of a few hundred terms, 1e-5 of their size.
    torch.testing.assert_close(model.logits(hidden), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.head_input(hidden), read[0], rtol=1e-4, atol=1e-4)
    logp = expected.double().log_softmax(-1)[:, :-1]
    perplexity = (-logp.gather(-1, TOKENS[:, 1:, None]).mean()).exp()
    assert measure(model, hidden, TOKENS).perplexity == pytest.approx(float(perplexity), rel=1e-5)


@EVERY_FAMILY
@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_four_bits(family: str, method: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    folder, out = source(family), tmp_path / "out"
    report = quantize(folder, out, method=method, bits=4)
    assert len(report.matrices) == BLOCKS * len(FAMILIES[family].matrices) == report.totals.matrices
    assert all(0 < matrix.output_error < 0.01 and matrix.method == method for matrix in report.matrices)
    result = compare(out, folder)
    assert _divergence(result.model.metrics) < 0.1 * _divergence(_without_blocks(folder))
    # 4 bits and a scale, in the model's own float32, for every 64 of them.
    assert result.model.bits_per_weight == pytest.approx(4 + 32 / 64)
    _assert_unfoldable_said(family, method, report)
    _assert_the_rest_is_untouched(family, method, folder, out)


def _assert_unfoldable_said(family: str, method: str, report: RunReport) -> None:
    free = {name for group in FAMILIES[family].groups if group.fold is None for name in group.names}
    for matrix in report.matrices:
        inside = matrix.name.split(".", 3)[3]
        expected = inside in free and method == "awq+gptq"
        assert ("not folded" in matrix.note) == expected
        assert (matrix.scale_ratio is None) == (method == "gptq" or inside in free)
    assert bool(free) == (family == "olmo2")


def _assert_the_rest_is_untouched(family: str, method: str, source: Path, out: Path) -> None:
    """Embeddings, head, and every norm and bias that no scale was folded into, to the bit."""
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    groups = FAMILIES[family].groups
    producers = {group.fold.producer for group in groups if group.fold is not None} if method == "awq+gptq" else set()
    for name, tensor in before.items():
        inside = name.split(".", 3)[-1] if name.startswith("model.layers.") else name
        module = inside.removesuffix(".weight").removesuffix(".bias")
        if inside.endswith(".weight") and module in FAMILIES[family].matrices:
            assert name not in after
        elif module not in producers:
            assert torch.equal(after[name], tensor), name
        else:
            assert after[name].dtype == tensor.dtype
    assert "model.embed_tokens.weight" in after
    assert ("lm_head.weight" in after) == ("lm_head.weight" in before)


@EVERY_FAMILY
def test_eight_bits_are_nearly_exact(family: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    folder, out = source(family), tmp_path / "out"
    report = quantize(folder, out, method="awq", bits=8)
    # A group of 64 normal weights reaches 2.5 deviations, so a step is 1/51 of one and rounding loses 1/12 of its square:
    # 3e-5 of the power, 45 dB. Loud channels are not normal, which costs some of that.
    assert all(matrix.output_error < 1e-4 for matrix in report.matrices)
    assert all(matrix.snr_db > 30 for matrix in report.matrices)
    # A fold gone wrong would not be a matter of 8 bits: most groups that can be scaled are.
    ratios = [matrix.scale_ratio for matrix in report.matrices if matrix.scale_ratio is not None]
    assert sum(ratio > 0 for ratio in ratios) > len(ratios) / 2
    metrics = compare(out, folder).model.metrics
    assert _divergence(metrics) < 2e-3 * _divergence(_without_blocks(folder))
    assert metrics.top1_agreement is not None
    assert metrics.top1_agreement > 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_models_of_16_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    folder, out = loud_model(tmp_path / "model", "llama", dtype=dtype), tmp_path / "out"
    report = quantize(folder, out, method="awq+gptq", bits=4)
    assert all(matrix.output_error < 0.01 for matrix in report.matrices)
    tensors = load_file(out / "model.safetensors")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {dtype}
    result = compare(out, folder)
    assert _divergence(result.model.metrics) < 0.1 * _divergence(_without_blocks(folder))
    assert result.model.bits_per_weight == pytest.approx(4 + 16 / 64)
    assert result.baseline is not None
    assert result.model.size_bytes < result.baseline.size_bytes


@pytest.mark.parametrize("family", ["llama", "qwen2"], ids=["untied", "tied"])
def test_the_head_is_quantized_on_request(family: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    folder, divergence = source(family), {}
    for bits in (8, 2):
        out = tmp_path / str(bits)
        report = quantize(folder, out, method="gptq", bits=8, rules=(Rule(match="^lm_head$", bits=bits),))
        assert len(report.matrices) == BLOCKS * len(FAMILIES[family].matrices) + 1
        assert report.matrices[-1].name == "lm_head"
        assert "lm_head" not in report.unquantized
        tensors = load_file(out / "model.safetensors")
        assert "lm_head.weight" not in tensors
        embeddings = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(tensors["model.embed_tokens.weight"], embeddings)
        divergence[bits] = _divergence(compare(out, folder).model.metrics)
    # The evaluation sees the quantized head, not the embedding that it was tied to.
    assert divergence[8] < 2e-3 * _divergence(_without_blocks(folder))
    assert divergence[2] > 10 * divergence[8]
