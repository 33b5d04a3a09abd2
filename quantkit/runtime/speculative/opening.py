"""From the words of `--spec` to a model and who drafts for it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from quantkit.checkpoint.locate import locate
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.errors import RequestError
from quantkit.runtime.kv_cache.cache import KVCache
from quantkit.runtime.kv_cache.options import CacheOptions
from quantkit.runtime.model.model_runner import ModelRunner, open_model, open_with_draft
from quantkit.runtime.speculative.draft_model import DraftModel
from quantkit.runtime.speculative.ngram import NgramProposer
from quantkit.runtime.speculative.proposer import Proposer
from quantkit.runtime.speculative.self_draft import SelfDraft


class Opened(NamedTuple):
    """A model and who drafts for it.

    Attributes:
        model: with its cache.
        new_proposer: makes one for each engine that runs the model; None: nothing drafts.
        draft_cache: of a draft model.
    """

    model: ModelRunner
    new_proposer: Callable[[], Proposer] | None
    draft_cache: KVCache | None = None


def open_speculating(
    folder: Path, device: torch.device, cache: CacheOptions, speculation: str, draft_act_bits: int = 8
) -> Opened:
    """Load a model and what drafts for it.

    Args:
        folder: of the model.
        device: where it runs.
        cache: how much it holds, a draft model's cache included.
        speculation: "off"; "ngram", from the text itself; "draft:MODEL", a smaller model with the same tokenizer; "qspec",
            the model itself with rounded activations; "quantspec", the model itself with the upper half of an int4+4 cache.
        draft_act_bits: bits of these, 4 or 8.

    Raises:
        RequestError: there is no such speculation, the draft model's tokenizer is another, nothing can be rounded, or the
            cache has no upper half.
        QuantkitError: a model cannot be loaded or the cache is too small.
    """
    kind, _, name = speculation.partition(":")
    if kind == "draft" and name:
        draft = locate(name)
        _check_tokenizers(folder, draft, speculation)
        model, drafter = open_with_draft(folder, draft, device, cache)
        return Opened(model, lambda: DraftModel(drafter, model.vocab_size), drafter.cache)
    if speculation == "qspec":
        if draft_act_bits not in (4, 8):
            raise RequestError(f"--draft-act-bits {draft_act_bits}: activations are rounded to 4 or 8 bits")
        model = open_model(folder, device, cache)
        rounded = model.quantized_draft(draft_act_bits)
        return Opened(model, lambda: SelfDraft(rounded, model.block_size))
    if speculation == "quantspec":
        if cache.dtype not in ("auto", "int4+4"):
            raise RequestError(f"--spec quantspec: drafts from an int4+4 cache, and --kv-dtype is {cache.dtype}; leave it out")
        model = open_model(folder, device, replace(cache, dtype="int4+4"))
        return Opened(model, lambda: SelfDraft(partial(model.forward, draft=True), model.block_size))
    if speculation not in ("off", "ngram"):
        raise RequestError(f"--spec {speculation}: no such speculation; use off, ngram, draft:MODEL, qspec or quantspec")
    return Opened(open_model(folder, device, cache), NgramProposer if speculation == "ngram" else None)


def _check_tokenizers(folder: Path, draft: Path, speculation: str) -> None:
    """
    Raises:
        RequestError: the same text is not the same tokens for both.
    """
    ours, theirs = (load_tokenizer(Checkpoint(each)).get_vocab() for each in (folder, draft))
    if ours != theirs:
        counts = f"{len(theirs):,} tokens, the model's {len(ours):,}" if len(ours) != len(theirs) else "other tokens"
        raise RequestError(f"--spec {speculation}: its tokenizer has {counts}; draft with a model of the same family")
