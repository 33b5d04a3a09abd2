"""Loading for the runtime: every family and format gives the tokens and logits of transformers; errors are one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from helpers import tiny
from helpers.paged_logits import TOKENS, paged_logits, reference_logits
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli import app
from quantkit.errors import CheckpointError, ResourceError
from quantkit.kernels.cpu import library
from quantkit.methods.grid import QuantizedWeight
from quantkit.methods.scheme import Scheme
from quantkit.runtime.kv_cache.eviction import Budget
from quantkit.runtime.kv_cache.options import CacheOptions
from quantkit.runtime.model.layers import pack_weight
from quantkit.runtime.model.loader import load_model
from quantkit.runtime.model.model_runner import ModelRunner, open_model, open_with_draft
from quantkit.runtime.model.native_builder import describe

CPU = torch.device("cpu")


def opened(folder: Path) -> ModelRunner:
    return open_model(folder, CPU, CacheOptions(memory=1 << 24, block_size=4, dtype=torch.float32))


#: A long piece takes the way of prefill, short ones the way of decoding.
PIECES = [70, 1, 1, 5, 1, 12]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_gives_the_logits_of_transformers(tmp_path: Path, family: str) -> None:
    folder = tiny.make_model(tmp_path / "model", family)
    found, expected = paged_logits(opened(folder), TOKENS, PIECES), reference_logits(folder, TOKENS)
    # Both are float32; sums differ in their order only.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "awq"])
@pytest.mark.parametrize(("bits", "grid"), [(4, "--asym"), (3, "--sym"), (8, "--sym"), (2, "--asym")])
def test_artifacts_of_every_format_and_width(tmp_path: Path, form: str, bits: int, grid: str) -> None:
    if form == "awq" and bits != 4:
        pytest.skip("the awq format holds 4 bits")
    # A head in float16, since the inputs of one in bfloat16 may be rounded.
    folder = tiny.make_model(tmp_path / "model", "qwen2", dtype=torch.float16, shard="60KB")
    options = ["--method", "rtn", "--bits", str(bits), grid, "--group-size", "16", "--format", form, "-q"]
    done = CliRunner().invoke(app, ["quantize", str(folder), "-o", str(tmp_path / "out"), *options])
    assert done.exit_code == 0, done.output
    found, expected = paged_logits(opened(tmp_path / "out"), TOKENS, PIECES), reference_logits(tmp_path / "out", TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_mixed_schemes_and_a_quantized_head(tmp_path: Path) -> None:
    """Matrices of a group that are packed differently are not fused."""
    folder = tiny.make_model(tmp_path / "model", "llama")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "{method: rtn, bits: 4, group_size: 16, rules: [{match: k_proj$, bits: 8}, {match: up_proj$, skip: true},"
        " {match: lm_head, bits: 8}]}"
    )
    done = CliRunner().invoke(app, ["quantize", str(folder), "-o", str(tmp_path / "out"), "--recipe", str(recipe), "-q"])
    assert done.exit_code == 0, done.output
    found, expected = paged_logits(opened(tmp_path / "out"), TOKENS, PIECES), reference_logits(tmp_path / "out", TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shared", [True, False])
def test_dynamic_act_order(tmp_path: Path, bits: int, shared: bool) -> None:
    """A GPTQ artifact whose groups were formed on permuted columns, as other tools write them.

    Matrices that read one input and share a permutation are fused and run natively; otherwise they are still right.
    """
    folder = tiny.make_model(tmp_path / "model", "llama")
    options = ["--method", "rtn", "--bits", str(bits), "--group-size", "16", "--format", "gptq", "-q"]
    assert CliRunner().invoke(app, ["quantize", str(folder), "-o", str(tmp_path / "out"), *options]).exit_code == 0
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    for number, name in enumerate(name for name in tensors if name.endswith("g_idx")):
        columns = len(tensors[name])
        shuffle = torch.randperm(columns, generator=torch.Generator().manual_seed(columns if shared else number))
        tensors[name] = tensors[name][shuffle].contiguous()
    save_file(tensors, path, {"format": "pt"})
    assert (describe(load_model(Checkpoint(tmp_path / "out"), CPU)) is not None) == shared
    found, expected = paged_logits(opened(tmp_path / "out"), TOKENS, PIECES), reference_logits(tmp_path / "out", TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_without_a_compiler_and_with_a_16_bit_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own kernels are used, with a cache of the dtype that the checkpoint declares."""
    monkeypatch.setattr(library, "load", lambda: None)
    folder = tiny.make_model(tmp_path / "model", "llama", dtype=torch.bfloat16)
    model = open_model(folder, CPU, CacheOptions(memory=1 << 24, block_size=4))
    keys = model.cache.keys[0]
    assert isinstance(keys, Tensor)
    assert keys.dtype == torch.bfloat16
    found, expected = paged_logits(model, TOKENS, PIECES), reference_logits(folder, TOKENS)
    # Keys, values and the inputs of every product are rounded to bfloat16, 2^-9 of their size each.
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_groups_that_no_gpu_kernel_holds_are_dequantized() -> None:
    """Groups of 8 columns, which are smaller than a plane."""
    codes, scales, zeros = torch.zeros(4, 48, dtype=torch.uint8), torch.ones(4, 6), torch.zeros(4, 6, dtype=torch.uint8)
    weight = QuantizedWeight(codes, scales, zeros, Scheme(4, 8, symmetric=False))
    dense = pack_weight(weight, torch.device("meta"), torch.float16)
    assert isinstance(dense, Tensor)
    assert (dense.shape, dense.dtype) == ((4, 48), torch.float16)


def _damaged(llama: Path, folder: Path, change: dict[str, Tensor | None]) -> Checkpoint:
    """The llama with some tensors replaced or, for None, left out."""
    folder.mkdir()
    for path in llama.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = {
        name: tensor for name, tensor in (load_file(llama / "model.safetensors") | change).items() if tensor is not None
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return Checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "'model.layers.1.mlp.up_proj.weight' is missing; fetch"),
        ({"model.norm.weight": None}, "'model.norm.weight' is missing; fetch"),
        ({"lm_head.weight": None}, "'lm_head.weight' is missing; fetch"),
        ({"model.layers.0.self_attn.q_proj.weight": torch.zeros(3, 64)}, r"has shape \[3, 64\], config.json says \[64, 64\]"),
        ({"model.layers.3.mlp.up_proj.weight": torch.zeros(2, 2)}, "which the model of config.json does not have"),
    ],
)
def test_tensors_that_disagree_with_the_config(
    llama: Path, tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(_damaged(llama, tmp_path / "model", change), CPU)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("lm_head.weight", torch.float64),
        ("lm_head.weight", torch.int8),
        ("model.embed_tokens.weight", torch.int32),
        ("model.norm.weight", torch.int32),
        ("model.layers.0.mlp.up_proj.weight", torch.float8_e4m3fn),
    ],
)
def test_dense_tensors_of_other_types_are_refused(llama: Path, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    checkpoint = _damaged(llama, tmp_path / "model", {name: load_file(llama / "model.safetensors")[name].to(dtype)})
    found = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=rf"model.safetensors: tensor '{name}' is {found}, only float32, .*; convert it"):
        load_model(checkpoint, CPU)


@pytest.mark.parametrize("length", [0, -4])
def test_a_context_without_tokens_is_refused(llama: Path, tmp_path: Path, length: int) -> None:
    checkpoint = _damaged(llama, tmp_path / "model", {})
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(checkpoint.config | {"max_position_embeddings": length}))
    with pytest.raises(CheckpointError, match=f"config.json: max_position_embeddings is {length}, it must be at least 1"):
        load_model(Checkpoint(tmp_path / "model"), CPU)


def test_what_is_to_be_quantized_beside_weights_stays_precise_and_is_said(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """W4A8 with an 8-bit KV cache, as llm-compressor writes it."""
    out = tmp_path / "out"
    options = ["--method", "rtn", "--bits", "4", "--group-size", "16", "-q"]
    assert CliRunner().invoke(app, ["quantize", str(llama), "-o", str(out), *options]).exit_code == 0
    plain = paged_logits(opened(out), TOKENS, PIECES)
    assert not caplog.messages
    config, eight = json.loads((out / "config.json").read_text()), {"num_bits": 8, "type": "float", "dynamic": False}
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = eight
    config["quantization_config"]["kv_cache_scheme"] = eight
    (out / "config.json").write_text(json.dumps(config))
    attention = "model.layers.0.self_attn"
    scales = {f"{attention}.{name}": torch.ones(1) for name in ("q_proj.input_scale", "k_scale", "v_scale")}
    save_file(load_file(out / "model.safetensors") | scales, out / "model.safetensors", {"format": "pt"})
    assert torch.equal(paged_logits(opened(out), TOKENS, PIECES), plain)
    fields = "input_activations and kv_cache_scheme are not applied; activations and KV cache stay more precise"
    assert caplog.messages == [f"note: {out}/config.json: {fields}"]


def test_the_cache_is_sized_from_memory(llama: Path) -> None:
    per_token = 3 * 2 * 2 * 16 * 4  # layers x (key + value) x heads x width x float32
    model = open_model(llama, CPU, CacheOptions(memory=100 * per_token, max_batch=1))
    assert (model.num_blocks, model.max_model_len) == (6, 96)
    assert model.cache.nbytes == 96 * per_token
    whole = open_model(llama, CPU, CacheOptions(memory=1 << 30, max_batch=2))
    assert (whole.max_model_len, whole.num_blocks) == (256, 2 * 16)
    bounded = open_model(llama, CPU, CacheOptions(memory=100 * per_token, max_batch=4, budget=Budget("sinks", 48)))
    assert (bounded.max_model_len, bounded.num_blocks) == (256, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (CacheOptions(max_model_len=300), "--max-model-len 300 is longer than the model's context of 256"),
        (
            CacheOptions(memory=10_000, max_model_len=200),
            "one request of --max-model-len 200 needs .* MiB; give more memory or",
        ),
        (
            CacheOptions(memory=30_000, max_model_len=200, budget=Budget("sinks", 64)),
            "holds 32 tokens, one request of --kv-budget 64 needs .* MiB; give more memory or lower --kv-budget",
        ),
        (CacheOptions(memory=100), "--kv-memory of 100 bytes does not hold a block of 16 tokens; give more"),
    ],
)
def test_a_cache_that_cannot_serve_one_request(llama: Path, options: CacheOptions, message: str) -> None:
    with pytest.raises(ResourceError, match=message):
        open_model(llama, CPU, options)


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> int:
    """A machine with memory for 1,024 tokens of the llama."""
    free = 1024 * 3 * 2 * 2 * 16 * 4
    monkeypatch.setattr("quantkit.runtime.kv_cache.sizing.available_memory", lambda: free)
    return free


def test_a_cache_larger_than_what_is_free_is_refused(llama: Path, little: int) -> None:
    # Only what would be allocated counts: 4 sequences of 256 tokens take all free memory.
    assert open_model(llama, CPU, CacheOptions(memory=1 << 40, max_batch=4)).cache.nbytes == little
    with pytest.raises(ResourceError, match=r"--kv-memory: there are 0.0 GiB of free memory and the cache would take "):
        open_model(llama, CPU, CacheOptions(memory=1 << 40, max_batch=5))


def test_the_caches_of_model_and_drafter_must_both_be_free(llama: Path, little: int) -> None:
    model, drafter = open_with_draft(llama, llama, CPU, CacheOptions(memory=1 << 40, max_batch=2))
    assert model.cache.nbytes + drafter.cache.nbytes == little
    with pytest.raises(ResourceError, match="--kv-memory: "):
        open_with_draft(llama, llama, CPU, CacheOptions(memory=1 << 40, max_batch=3))
