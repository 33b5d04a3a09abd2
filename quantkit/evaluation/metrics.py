"""Perplexity, and the distance of a model's predictions from a baseline's.

The text is cut into windows of T tokens that do not overlap. Every token except the first of a window is predicted from the
tokens before it in the window: n = windows * (T - 1) predictions.

    perplexity = exp(-1/n * sum_i ln p(x_i))
    KL_i = sum_v p_base(v) * (ln p_base(v) - ln p(v)), in nats; mean and 99th percentile over the n predictions
    top-1 agreement = share of predictions with the same most likely token as the baseline's
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.models.streaming import StreamedModel

#: Predictions whose logits are in memory at a time.
_CHUNK = 512


@dataclass(frozen=True)
class QualityMetrics:
    """A model's numbers over one set of windows. The last three are None without a baseline."""

    perplexity: float
    predictions: int
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None


def measure(
    model: StreamedModel, hidden: Tensor, tokens: Tensor, baseline: tuple[StreamedModel, Tensor] | None = None
) -> QualityMetrics:
    """Metrics from final hidden states.

    Args:
        model: computes logits from `hidden`.
        hidden: final hidden states [windows, T, D], from `final_hidden`.
        tokens: int64 [windows, T].
        baseline: the reference model and its own final hidden states for the same tokens.
    """
    last = tokens.shape[1] - 1

    def chunks(window: int) -> Iterator[Tensor]:
        for start in range(0, last, _CHUNK):
            yield _logits(model, hidden, window, start, min(start + _CHUNK, last))

    return measure_logits(chunks, tokens, baseline)


@torch.no_grad()
def measure_logits(
    chunks: Callable[[int], Iterable[Tensor]], tokens: Tensor, baseline: tuple[StreamedModel, Tensor] | None = None
) -> QualityMetrics:
    """Metrics from logits.

    Args:
        chunks: window number -> logits that follow each of its tokens except the last, in chunks of [n, V].
        tokens: int64 [windows, T].
        baseline: as for `measure`.
    """
    windows, length = tokens.shape
    nll = 0.0
    agreed = 0
    divergences = []
    for window in range(windows):
        start = 0
        for logits in chunks(window):
            logp, stop = logits.float().log_softmax(-1), start + len(logits)
            target = tokens[window, start + 1 : stop + 1].to(logp.device)
            nll -= float(logp.gather(1, target[:, None]).double().sum())
            if baseline is not None:
                base = _logits(*baseline, window, start, stop).float().log_softmax(-1).to(logp.device)
                agreed += int((base.argmax(-1) == logp.argmax(-1)).sum())
                divergences.append((base.exp() * (base - logp)).sum(-1).clamp_(min=0).cpu())
            start = stop
        assert start == length - 1
    count = windows * (length - 1)
    perplexity = float(torch.tensor(nll / count, dtype=torch.float64).exp())
    if baseline is None:
        return QualityMetrics(perplexity, count)
    kl = torch.cat(divergences).double()
    return QualityMetrics(perplexity, count, float(kl.mean()), float(kl.quantile(0.99)), agreed / count)


def _logits(model: StreamedModel, hidden: Tensor, window: int, start: int, stop: int) -> Tensor:
    """Logits that follow tokens `start` to `stop` of a window, [stop - start, V]."""
    return model.logits(hidden[window : window + 1, start:stop].to(model.device, model.dtype))[0]
