"""The native decoder against transformers' forward pass, for all families and all kinds of steps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers import tiny
from helpers.native_cases import rounds_inputs, threads  # noqa: F401
from quantkit.checkpoint.reader import Checkpoint
from quantkit.kernels.cpu import matmul as cpu_matmul
from quantkit.runtime.core.batch import Batch
from quantkit.runtime.kv_cache.cache import KVCache
from quantkit.runtime.kv_cache.cache_format import plain
from quantkit.runtime.model.loader import load_model
from quantkit.runtime.model.native_builder import describe
from quantkit.runtime.model.native_decoder import DecoderLayer, DecoderModel, NativeDecoder, Projection

CPU = torch.device("cpu")
BLOCK, BLOCKS = 4, 80

#: Families and options that change what the decoder does: biases, dense 16-bit weights, ropes that rotate part of a head.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in tiny.FAMILIES},
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama gelu": ("llama", {"hidden_act": "gelu", "hidden_size": 60, "intermediate_size": 100}),
    "llama bfloat16": ("llama", {"dtype": torch.bfloat16}),
    "llama float16": ("llama", {"dtype": torch.float16}),
    "phi3 partial": ("phi3", {"partial_rotary_factor": 0.5}),
}


class Session:
    """A decoder with its cache, fed with sequences of tokens; the blocks of all sequences are unordered."""

    def __init__(self, model: DecoderModel, layers: Any, dtype: torch.dtype = torch.float32) -> None:
        cache = KVCache(layers, BLOCKS, BLOCK, plain(dtype), CPU)
        for tensor in (*cache.keys, *cache.values):
            assert isinstance(tensor, Tensor)
            tensor.fill_(float("nan"))
        self.decoder = NativeDecoder(model, cache.keys, cache.values)
        self.table = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(0)).view(4, -1).int()
        self.done = [0] * 4

    def step(self, new: dict[int, Tensor]) -> Tensor:
        """Feed new tokens, given per sequence; returns the logits of all of them, one sequence after the other."""
        positions = torch.cat([torch.arange(self.done[s], self.done[s] + len(tokens)) for s, tokens in new.items()])
        counts = torch.tensor([0, *map(len, new.values())])
        rows = self.table[list(new)].repeat_interleave(counts[1:], 0)
        for sequence, tokens in new.items():
            self.done[sequence] += len(tokens)
        batch = Batch(
            token_ids=torch.cat(list(new.values())),
            positions=positions,
            slot_mapping=rows[torch.arange(len(rows)), positions // BLOCK].long() * BLOCK + positions % BLOCK,
            block_table=self.table[list(new)].contiguous(),
            query_start=counts.cumsum(0).int(),
            seq_lens=torch.tensor([self.done[s] for s in new], dtype=torch.int32),
            logit_rows=torch.arange(len(positions)),
            max_query_len=int(counts.max()),
            max_seq_len=max(self.done),
        )
        return self.decoder.forward(batch)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, DecoderModel, Any]]:
    """Folder, description and cache shape of a model, which is made once."""
    made: dict[str, tuple[Path, DecoderModel, Any]] = {}

    def get(name: str) -> tuple[Path, DecoderModel, Any]:
        if name not in made:
            family, options = MODELS[name]
            folder = tiny.make_model(tmp_path_factory.mktemp("model") / "model", family, **options)
            loaded = load_model(Checkpoint(folder), CPU)
            model = describe(loaded)
            assert model is not None
            made[name] = folder, model, loaded.layers
        return made[name]

    return get


@torch.no_grad()
def _wanted(folder: Path, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    logits: Tensor = model(tokens[None]).logits[0]
    return logits


def _tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
def test_families(name: str, load: Callable[[str], Any]) -> None:
    """A prompt in two pieces, then token by token, past all windows; a second sequence in the same batch begins later.

    Both decoders compute in float32 and differ in the order of sums. Three layers with matrices 4 times their usual size
    amplify that to about 1e-5 of the size of the logits. Where the native kernels round the inputs of bfloat16 weights, they
    are at least as close as transformers is in bfloat16.
    """
    folder, model, layers = load(name)
    first, second = _tokens(60), _tokens(41, 1)
    session = Session(model, layers)
    found = [session.step({2: first[:33]})]
    both = session.step({0: second[:40], 2: first[33:50]})
    other = [both[:40]]
    found.append(both[40:])
    found += [session.step({2: token[None]}) for token in first[50:]]
    other.append(session.step({0: second[40:]}))
    for tokens, logits in ((first, found), (second, other)):
        wanted = _wanted(folder, tokens)
        allowed = 1e-4 * float(wanted.abs().max())
        if name == "llama bfloat16" and rounds_inputs():
            allowed = float((_wanted(folder, tokens, torch.bfloat16) - wanted).abs().max())
        assert float((torch.cat(logits) - wanted).abs().max()) <= allowed


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_a_sequence_depends_on_nothing_but_itself(bits: int, threads: int, load: Callable[[str], Any]) -> None:  # noqa: F811
    """Logits are equal to the bit: alone or in a batch, in one prompt or token by token, on one thread or several."""
    _, model, layers = load("qwen3")
    model = _quantized(model, bits) if bits else model
    tokens = _tokens(30)
    batched = Session(model, layers, torch.bfloat16)
    found = batched.step({0: _tokens(17, 1), 1: tokens[:20], 3: _tokens(1, 2)})[17:37]
    found = torch.cat([found, *(batched.step({3: _tokens(1, 3), 1: token[None]})[1:] for token in tokens[20:])])
    torch.set_num_threads(1)
    alone = Session(model, layers, torch.bfloat16)
    assert torch.equal(found, torch.cat([alone.step({1: token[None]}) for token in tokens]))


def _projections(layer: DecoderLayer, change: Callable[[Projection], Projection]) -> DecoderLayer:
    """The layer with each projection replaced by `change` of it."""
    return replace(layer, qkv=change(layer.qkv), out=change(layer.out), gate_up=change(layer.gate_up), down=change(layer.down))


def _quantized(model: DecoderModel, bits: int) -> DecoderModel:
    """The same model with packed weights, quantized with one scale per 16 columns; biases are unchanged."""

    def pack(projection: Projection) -> Projection:
        weight = cpu_matmul.dequantize(projection.weight)
        scales = weight.unflatten(1, (-1, 16)).abs().amax(-1) / (2 ** (bits - 1) - 1)
        middle = 1 << (bits - 1)
        codes = ((weight / scales.repeat_interleave(16, 1)).round() + middle).to(torch.uint8)
        return Projection(cpu_matmul.pack(codes, scales, torch.full_like(scales, middle).byte(), bits, 16), projection.bias)

    layers = [_projections(layer, pack) for layer in model.layers]
    return replace(model, layers=layers, head=pack(model.head))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_weights(bits: int, load: Callable[[str], Any]) -> None:
    """Packed weights give what the same weights give in float32."""
    _, model, layers = load("llama biases")
    packed = _quantized(model, bits)

    def dense(projection: Projection) -> Projection:
        return Projection(cpu_matmul.pack_dense(cpu_matmul.dequantize(projection.weight)), projection.bias)

    same = [_projections(layer, dense) for layer in packed.layers]
    first = Session(packed, layers).step({0: _tokens(20)})
    second = Session(replace(packed, layers=same, head=dense(packed.head)), layers).step({0: _tokens(20)})
    assert float((first - second).abs().max()) <= 1e-4 * float(second.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cache_types(dtype: torch.dtype, load: Callable[[str], Any]) -> None:
    """Keys and values are rounded to the cache's type, by half a unit in its last place; the logits change by about as
    much.
    """
    _, model, layers = load("llama")
    exact = Session(model, layers).step({0: _tokens(40)})
    rounded = Session(model, layers, dtype).step({0: _tokens(40)})
    error = float((rounded - exact).abs().max() / exact.abs().max())
    assert 0 < error <= 8 * torch.finfo(dtype).eps


def test_a_piece_of_a_prompt_without_logits(load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, layers = load("llama")
    session, whole = Session(model, layers), Session(model, layers)
    full = session.step
    forward = session.decoder.forward
    monkeypatch.setattr(session.decoder, "forward", lambda batch: forward(replace(batch, logit_rows=batch.logit_rows[:0])))
    assert full({0: _tokens(20)}).shape == (0, tiny.VOCAB)
    monkeypatch.setattr(session.decoder, "forward", lambda batch: forward(replace(batch, logit_rows=batch.logit_rows[-1:])))
    last = full({0: _tokens(9, 1)})
    assert torch.equal(last, whole.step({0: torch.cat([_tokens(20), _tokens(9, 1)])})[-1:])
