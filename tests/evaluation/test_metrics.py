"""Perplexity and divergence against their formulas, computed in float64 from all logits at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import tiny
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import NumericsError
from quantkit.evaluation import metrics, stream
from quantkit.evaluation.metrics import measure
from quantkit.evaluation.stream import final_hidden, open_model
from quantkit.models.streaming import StreamedModel

CPU = torch.device("cpu")
TOKENS = torch.randint(tiny.VOCAB, (5, 64), generator=torch.Generator().manual_seed(0))
# log_softmax over 256 logits in float32 is accurate to about 1e-6 per prediction; a divergence here is about 0.5.
CLOSE: dict[str, Any] = {"rel": 1e-5}

Pair = tuple[StreamedModel, Tensor]


def _ignored(_done: int, _total: int) -> None: ...


def _opened(folder: Path, tokens: Tensor) -> Pair:
    model = open_model(Checkpoint(folder), CPU)
    return model, final_hidden(model, tokens, _ignored)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A tiny model and its final hidden states."""
    return _opened(tiny.make_model(tmp_path_factory.mktemp("metrics") / "model"), TOKENS)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Another model, with a soft cap on its logits."""
    folder = tmp_path_factory.mktemp("metrics") / "baseline"
    return _opened(tiny.make_model(folder, "gemma2", tie_word_embeddings=False), TOKENS)


def _log_probabilities(model: Pair) -> Tensor:
    """float64 [predictions, V]."""
    return model[0].logits(model[1]).double().log_softmax(-1)[:, :-1].flatten(0, 1)


def _perplexity(model: Pair) -> float:
    logp = _log_probabilities(model)
    return float((-logp[torch.arange(len(logp)), TOKENS[:, 1:].flatten()].mean()).exp())


def _divergences(model: Pair, baseline: Pair) -> Tensor:
    base = _log_probabilities(baseline)
    return (base.exp() * (base - _log_probabilities(model))).sum(-1)


def test_perplexity(model: Pair) -> None:
    found = measure(*model, TOKENS)
    assert found.predictions == 5 * 63
    assert found.perplexity == pytest.approx(_perplexity(model), **CLOSE)
    assert (found.kl_mean, found.kl_p99, found.top1_agreement) == (None, None, None)


def test_divergence_and_agreement(model: Pair, baseline: Pair) -> None:
    found, divergences = measure(*model, TOKENS, baseline), _divergences(model, baseline)
    assert found.perplexity == pytest.approx(_perplexity(model), **CLOSE)
    assert found.kl_mean == pytest.approx(float(divergences.mean()), **CLOSE)
    # 315 predictions: the 99th percentile lies 0.86 of the way from the 311th to the 312th in order.
    below, above = divergences.sort().values[310:312].tolist()
    assert found.kl_p99 == pytest.approx(below + 0.86 * (above - below), **CLOSE)
    first = [_log_probabilities(pair).argmax(-1) for pair in (model, baseline)]
    assert found.top1_agreement == float((first[0] == first[1]).double().mean())
    # The divergence is not symmetric: the other direction gives a different number.
    assert found.kl_mean != pytest.approx(float(_divergences(baseline, model).mean()), rel=1e-3)


@pytest.mark.parametrize("chunk", [1, 7, 21, 62, 63, 64, 1000])
def test_chunk_borders_change_nothing(chunk: int, model: Pair, baseline: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_CHUNK", chunk)
    found = measure(*model, TOKENS, baseline)
    divergences = _divergences(model, baseline)
    assert found.predictions == 5 * 63
    assert found.perplexity == pytest.approx(_perplexity(model), **CLOSE)
    assert found.kl_mean == pytest.approx(float(divergences.mean()), **CLOSE)
    assert found.kl_p99 == pytest.approx(float(divergences.quantile(0.99)), **CLOSE)


def test_the_shortest_window_scores_one_token(tmp_path: Path) -> None:
    tokens = TOKENS[:, :2]
    pair = _opened(tiny.make_model(tmp_path), tokens)
    found = measure(*pair, tokens)
    logp = pair[0].logits(pair[1]).double().log_softmax(-1)[:, 0]
    assert found.predictions == 5
    assert found.perplexity == pytest.approx(float((-logp[torch.arange(5), tokens[:, 1]].mean()).exp()), **CLOSE)


def test_a_model_does_not_diverge_from_itself(model: Pair) -> None:
    found = measure(*model, TOKENS, model)
    assert (found.kl_mean, found.kl_p99, found.top1_agreement) == (0.0, 0.0, 1.0)


def test_batches_of_windows_change_nothing(model: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    for tokens_at_once in (1, 128, 64 * 5):
        # One window at a time, two (the last batch smaller), all.
        monkeypatch.setattr(stream, "_BATCH_TOKENS", tokens_at_once)
        hidden = final_hidden(model[0], TOKENS, lambda *progress: seen.append(progress))
        # Products of other shapes are summed in another order.
        torch.testing.assert_close(hidden, model[1], rtol=1e-4, atol=1e-4)
    assert seen == [(1, 3), (2, 3), (3, 3)] * 3


def test_a_model_that_overflows_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny.make_model(tmp_path))

    def huge(names: list[str]) -> dict[str, Tensor]:
        tensors = checkpoint.read(names)
        return {name: t * 1e30 if "layers.1.mlp." in name else t for name, t in tensors.items()}

    model = StreamedModel(checkpoint, huge, torch.float32, CPU)
    with pytest.raises(NumericsError, match=r"model\.layers\.1 gives NaN or Inf"):
        final_hidden(model, TOKENS, _ignored)
