"""`quantkit eval --kv-dtype` measures the logits that the engine computes, whatever the length of the engine's steps."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import tiny
from quantkit.checkpoint.reader import Checkpoint
from quantkit.evaluation.stream import final_hidden, open_cached
from quantkit.runtime.core.batch import single_sequence_batch
from quantkit.runtime.kv_cache.options import CacheOptions
from quantkit.runtime.model.model_runner import open_model

CPU = torch.device("cpu")
TOKENS = torch.randint(3, tiny.VOCAB, (2, 110), generator=torch.Generator().manual_seed(5))


def _engines(folder: Path, dtype: str, tokens: Tensor, step: int) -> Tensor:
    """Logits [T, V] of one text, computed by the engine's model in steps of `step` tokens."""
    model = open_model(folder, CPU, CacheOptions(memory=1 << 25, max_batch=1, dtype=dtype))
    logits = []
    for start in range(0, len(tokens), step):
        batch = single_sequence_batch(tokens[start : start + step], start, model.block_size)
        logits.append(model.forward(replace(batch, logit_rows=torch.arange(len(batch.token_ids)))))
    return torch.cat(logits)


def _evals(folder: Path, dtype: str) -> Tensor:
    """Logits [windows, T, V] of the evaluation, which runs block by block."""
    model = open_cached(Checkpoint(folder), CPU, dtype, TOKENS.shape[1])
    return model.logits(final_hidden(model, TOKENS, lambda done, total: None)).float()


@pytest.mark.parametrize("dtype", ["auto", "fp8", "int8", "int4", "int4+4"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_engines_logits(family: str, dtype: str, tmp_path: Path) -> None:
    """Both differ only in the order of sums. That may change a code that lies on the edge between two, which is rare and
    changes the logits far less than the KV dtype itself."""
    folder = tiny.make_model(tmp_path / "model", family)
    found, exact = _evals(folder, dtype), _evals(folder, "auto")
    for window, tokens in enumerate(TOKENS):
        wanted = _engines(folder, dtype, tokens, step=7 if window else len(tokens))
        cost = (found[window] - exact[window]).abs().mean()
        difference = (found[window] - wanted).abs().mean()
        assert difference <= (1e-5 * wanted.abs().mean() if dtype == "auto" else cost / 20)
        assert (cost == 0) == (dtype == "auto")
