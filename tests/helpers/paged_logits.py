"""Logits of a paged model and of transformers over the same tokens."""

import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers import tiny
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.artifact import dense_reader
from quantkit.runtime.core.batch import Batch

CPU = torch.device("cpu")


def reference_logits(folder: Path, tokens: Tensor) -> Tensor:
    """transformers' own logits [T, V] in float32, on dequantized weights where the folder is an artifact."""
    checkpoint = Checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    plain = folder.parent / f"{folder.name}-dense"
    plain.mkdir(exist_ok=True)
    (plain / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    names = {n if n.endswith((".weight", ".bias")) else n.rsplit(".", 1)[0] + ".weight" for n in checkpoint.tensors}
    dense = dense_reader(checkpoint)(sorted(names))
    save_file({name: tensor.float() for name, tensor in dense.items()}, plain / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits: Tensor = model(tokens[None]).logits[0]
    return logits


class PagedModel(Protocol):
    """What `paged_logits` needs of a model."""

    block_size: int
    num_blocks: int

    def forward(self, batch: Batch, /) -> Tensor:
        """Logits of a batch."""


def paged_logits(model: PagedModel, tokens: Tensor, pieces: list[int]) -> Tensor:
    """Logits [T, V] of one sequence that is computed in chunks, in scattered blocks."""
    table = torch.randperm(model.num_blocks, generator=torch.Generator().manual_seed(1)).int()
    out, start = [], 0
    for piece in pieces:
        stop = start + piece
        positions = torch.arange(start, stop)
        batch = Batch(
            token_ids=tokens[start:stop],
            positions=positions,
            slot_mapping=table[positions // model.block_size].long() * model.block_size + positions % model.block_size,
            block_table=table[None, : -(-stop // model.block_size)].contiguous(),
            query_start=torch.tensor([0, piece], dtype=torch.int32),
            seq_lens=torch.tensor([stop], dtype=torch.int32),
            logit_rows=torch.arange(piece),
            max_query_len=piece,
            max_seq_len=stop,
        )
        out.append(model.forward(batch))
        start = stop
    return torch.cat(out)


TOKENS = torch.randint(3, tiny.VOCAB, (90,), generator=torch.Generator().manual_seed(0))
