"""`quantkit eval`: measure a model, and compare it with a baseline."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from quantkit.checkpoint.files import write_tensors
from quantkit.checkpoint.reader import Checkpoint, sha256
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.data.corpus import evaluation_rows, tokens_sha256
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.evaluation.metrics import QualityMetrics, measure, measure_logits
from quantkit.evaluation.paged import bounded_logits, open_bounded
from quantkit.evaluation.stream import CachedStreamedModel, PackedStreamedModel, final_hidden, open_cached, open_model
from quantkit.formats.artifact import bits_per_weight
from quantkit.models.skeleton import read_config
from quantkit.models.streaming import StreamedModel
from quantkit.runtime.kv_cache.eviction import Budget
from quantkit.runtime.model.model_runner import ModelRunner
from quantkit.utils.cache_dir import cache_dir
from quantkit.utils.resources import cpu_seconds, peak_memory
from quantkit.version import __version__

#: Tokens over which the kernels are compared with dequantized weights: enough for a perplexity, and much less than a whole
#: evaluation.
_CHECKED_TOKENS = 2048

#: Largest relative change of the perplexity that the engine's kernels may cause. Rounding alone causes less; more is a defect.
KERNEL_TOLERANCE = 1e-3


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate: folders, text (see `data.corpus`), windows of `seq_len` tokens, device.

    With `kv_dtype`, the model (not the baseline) runs through the engine's kernels and a paged KV cache of that type. The
    difference from the numbers without it is the cost of that cache. With a `budget` that drops tokens, the whole model is
    loaded and runs as in the engine.
    """

    model: Path
    baseline: Path | None
    text: str
    windows: int
    seq_len: int
    device: torch.device
    kv_dtype: str | None = None
    budget: Budget = field(default_factory=Budget)


@dataclass(frozen=True)
class EvalRow:
    """The numbers of one model.

    Attributes:
        name: its folder.
        metrics: perplexity and distances from the baseline.
        bits_per_weight: stored bits per weight of the quantized matrices, scales and zero points included; of all matrices if
            none is quantized.
        size_bytes: total size of its shards.
    """

    name: str
    metrics: QualityMetrics
    bits_per_weight: float
    size_bytes: int


@dataclass(frozen=True)
class EvalReport:
    """The content of `--json`.

    `kernel_difference` is the relative difference between the perplexity through the engine's kernels and that of the
    dequantized weights in float32, over the first windows. It is None for a model that is not quantized, and for evaluations
    with a KV cache, which would contribute to it. `kv_bytes_per_token` is the size of the KV cache of `kv_dtype`, tail pages
    not included.
    """

    text: str
    windows: int
    seq_len: int
    tokens_sha256: str
    model: EvalRow
    baseline: EvalRow | None
    kernel_difference: float | None
    kv_dtype: str | None
    kv_policy: str
    kv_budget: int | None
    kv_bytes_per_token: float | None
    cpu_seconds: float
    peak_memory_bytes: int

    @property
    def ppl_increase(self) -> float | None:
        """The model's perplexity divided by the baseline's, minus 1; None without a baseline."""
        if self.baseline is None:
            return None
        return self.model.metrics.perplexity / self.baseline.metrics.perplexity - 1

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return asdict(self) | {"ppl_increase": self.ppl_increase}


def run_evaluation(request: EvalRequest, advance: Callable[[str, int, int], None]) -> EvalReport:
    """Measure a model, and its distance from a baseline if one is given.

    Args:
        request: what to measure.
        advance: called with (model, blocks done, blocks).

    Raises:
        QuantkitError: a model or the text cannot be read, or the two models do not share a vocabulary.
    """
    checkpoint = Checkpoint(request.model)
    tokens = evaluation_rows(request.text, request.windows, request.seq_len, load_tokenizer(checkpoint))
    model = _open(request, checkpoint)
    reference: tuple[StreamedModel, Tensor] | None = None
    baseline: EvalRow | None = None
    if request.baseline is not None:
        source = Checkpoint(request.baseline)
        base = open_model(source, request.device)
        vocab_size = read_config(checkpoint).vocab_size
        if base.config.vocab_size != vocab_size:
            raise CheckpointError(
                f"{request.baseline}: has {base.config.vocab_size} tokens, {request.model} has {vocab_size}; "
                "a baseline must share the vocabulary"
            )
        reference = base, _cached_hidden(base, tokens, lambda done, total: advance("baseline", done, total))
        baseline = _row(source, measure(base, reference[1], tokens))
    difference = None
    if isinstance(model, ModelRunner):
        metrics = measure_logits(bounded_logits(model, request.budget, tokens, partial(advance, "model")), tokens, reference)
    else:
        hidden = final_hidden(model, tokens, partial(advance, "model"))
        metrics = measure(model, hidden, tokens, reference)
        if type(model) is PackedStreamedModel:
            difference = _kernel_difference(model, hidden, tokens, advance)
    return EvalReport(
        text=request.text,
        windows=request.windows,
        seq_len=request.seq_len,
        tokens_sha256=tokens_sha256(tokens),
        model=_row(checkpoint, metrics),
        baseline=baseline,
        kernel_difference=difference,
        kv_dtype=request.kv_dtype,
        kv_policy=request.budget.policy,
        kv_budget=request.budget.tokens,
        kv_bytes_per_token=model.cache.bytes_per_token if isinstance(model, ModelRunner | CachedStreamedModel) else None,
        cpu_seconds=cpu_seconds(),
        peak_memory_bytes=peak_memory(),
    )


def _open(request: EvalRequest, checkpoint: Checkpoint) -> StreamedModel | ModelRunner:
    """Open the model in the way that the request needs."""
    if request.budget.tokens is not None:
        return open_bounded(request.model, request.device, request.kv_dtype or "auto", request.seq_len, request.budget)
    if request.kv_dtype is not None:
        return open_cached(checkpoint, request.device, request.kv_dtype, request.seq_len)
    return open_model(checkpoint, request.device, packed="quantization_config" in checkpoint.config)


def _kernel_difference(
    model: StreamedModel, hidden: Tensor, tokens: Tensor, advance: Callable[[str, int, int], None]
) -> float:
    """Relative difference between the packed model's perplexity and that of its dequantized weights, over the first windows.

    Args:
        model: the packed model, which runs through the engine's kernels.
        hidden: its final hidden states, [windows, T, D].
        tokens: int64 [windows, T].
        advance: as for `run_evaluation`.
    """
    few = tokens[: max(1, _CHECKED_TOKENS // tokens.shape[1])]
    dense = open_model(model.checkpoint, model.device)
    reference = final_hidden(dense, few, lambda done, total: advance("dequantized", done, total))
    return measure(model, hidden[: len(few)], few).perplexity / measure(dense, reference, few).perplexity - 1


def _row(checkpoint: Checkpoint, metrics: QualityMetrics) -> EvalRow:
    size = sum(path.stat().st_size for path in checkpoint.files)
    return EvalRow(str(checkpoint.folder), metrics, bits_per_weight(checkpoint), size)


def _cached_hidden(model: StreamedModel, tokens: Tensor, advance: Callable[[int, int], None]) -> Tensor:
    """The baseline's final hidden states, from the user's cache if it has them: every evaluation against it needs them."""
    files = (model.checkpoint.folder / "config.json", *model.checkpoint.files)
    versions = torch.__version__, transformers.__version__, __version__
    # The shape is part of the key: the same tokens in windows of another length give other states.
    parts = [*versions, model.device.type, tokens_sha256(tokens), str(tuple(tokens.shape)), *map(sha256, files)]
    path = cache_dir() / "baselines" / (hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32] + ".safetensors")
    try:
        stored = load_file(path)
        cached: Tensor = stored["hidden"]
        if torch.equal(stored["sha256"], _digest(cached)):
            return cached
    except (OSError, SafetensorError, KeyError):
        pass  # Not cached, or damaged.
    hidden = final_hidden(model, tokens, advance)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"hidden": hidden, "sha256": _digest(hidden)})
    except (OSError, QuantkitError):
        pass  # Without the cache the next evaluation only takes longer.
    return hidden


def _digest(hidden: Tensor) -> Tensor:
    """SHA-256 as uint8 [32]. It detects damage to a cache that is read long after it was written."""
    return torch.tensor(list(hashlib.sha256(hidden.numpy().data).digest()), dtype=torch.uint8)
