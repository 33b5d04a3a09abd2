"""A KV dtype is one file and one registry line: a toy one is registered and used through the command line."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from helpers.command import quantkit, refused
from quantkit.runtime.kv_cache.dtype_base import KVDtype, LayerShape, TailStorage, Tokens
from quantkit.runtime.kv_cache.dtypes import KV_DTYPES


class Half(KVDtype):
    """float16, in blocks of 8 tokens."""

    block_size = 8

    def storage_dtype(self, declared: torch.dtype, layers: Sequence[LayerShape], device: torch.device) -> torch.dtype:
        """See `KVDtype`."""
        return torch.float16

    def allocate(
        self, tokens: Tokens, width: int, dtype: torch.dtype, device: torch.device, *, keys: bool, tail: TailStorage | None
    ) -> Tensor:
        """See `KVDtype`."""
        assert tail is None
        return torch.empty(*tokens, width, dtype=dtype, device=device)


def test_a_toy_dtype_is_used_through_the_command_line(llama: Path) -> None:
    options = ("generate", llama, "Hello", "--max-tokens", 12, "--ignore-eos", "--kv-memory", "64KiB")
    full = json.loads(quantkit(*options, "--json", "-").out)
    with KV_DTYPES.registered("half", Half(), "float16"):
        done = quantkit(*options, "--kv-dtype", "half", "--json", "-")
        found = json.loads(done.out)
        assert "choose from auto, bf16, fp8, int8, int4, int4+4, half" in refused(*options, "--kv-dtype", "quarter")
    assert found["summary"]["kv_dtype"] == "half"
    # Keys and values are rounded to 11 bits. The largest logits of this model are further apart than that moves them.
    assert found["completions"][0]["token_ids"] == full["completions"][0]["token_ids"]
    # 384 bytes per token instead of 768.
    assert (found["summary"]["kv_tokens"], full["summary"]["kv_tokens"]) == (168, 80)
    assert "half" not in KV_DTYPES
