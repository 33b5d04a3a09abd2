"""Artifacts that another program reads: transformers with compressed-tensors."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.transform import TransformConfig, apply_transform_config
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

from helpers import tiny
from helpers.slow_formats import make_weight
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats import FORMATS
from quantkit.formats.artifact import dense_reader
from quantkit.formats.rotated import OnlineHadamard, add_transform
from quantkit.kernels import reference
from quantkit.methods.scheme import Scheme
from quantkit.quantization.run import QuantizeRequest, quantize_model
from quantkit.recipe import Calibration, Recipe, Rule

pytestmark = [
    pytest.mark.interop,
    # transformers warns that it keeps the artifact's own config in addition to `dequantize`; that is intended.
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`"),
]

TOKENS = torch.randint(tiny.VOCAB, (2, 64), generator=torch.Generator().manual_seed(0))
MIXED = (Rule(match=r"layers\.0\.", skip=True), Rule(match=r"down_proj|layers\.2\.self_attn", bits=8, group_size=-1))

#: Name -> family, dtype of the model, recipe.
CASES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "w4 sym": ("llama", torch.float32, {"group_size": 32}),
    "w4 asym": ("llama", torch.float32, {"group_size": 32, "symmetric": False}),
    "w8 asym": ("llama", torch.float32, {"bits": 8, "group_size": 64, "symmetric": False}),
    "w3 sym": ("llama", torch.float32, {"bits": 3, "group_size": 32}),
    "w2 asym": ("llama", torch.float32, {"bits": 2, "group_size": 16, "symmetric": False, "method": "rtn"}),
    "mixed": ("llama", torch.float32, {"group_size": 32, "rules": MIXED}),
    "head": ("llama", torch.float32, {"group_size": 32, "rules": (Rule(match="lm_head", bits=8),)}),
    "bfloat16 sym": ("llama", torch.bfloat16, {"group_size": 32, "method": "awq"}),
    "bfloat16 asym": ("llama", torch.bfloat16, {"group_size": 32, "symmetric": False, "method": "awq"}),
    "tied head": ("qwen2", torch.float32, {"bits": 8, "group_size": -1}),
    "fused asym": ("phi3", torch.float32, {"group_size": -1, "symmetric": False}),
    "fused mixed": ("phi3", torch.float32, {"group_size": 32, "rules": MIXED}),
}


def quantized(folder: Path, family: str, dtype: torch.dtype, recipe: dict[str, Any]) -> tuple[Path, Path]:
    """A tiny model, and the artifact that `recipe` makes from it."""
    model, out = tiny.make_model(folder / "model", family, dtype=dtype), folder / "out"
    chosen = Recipe(calibration=Calibration(samples=8, seq_len=64), **recipe)
    quantize_model(QuantizeRequest(model, out, chosen, torch.device("cpu"), max_memory=1 << 30, overwrite=False), Mock())
    return model, out


def with_our_weights(folder: Path, dtype: torch.dtype) -> nn.Module:
    """transformers' float32 model of the artifact's architecture, with the weights that we dequantize, rounded to `dtype`."""
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    names = [name for name, _ in model.named_parameters()]
    weights = {name: tensor.to(dtype).float() for name, tensor in dense_reader(Checkpoint(folder))(names).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model(TOKENS).logits
    return out


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_with_our_weights(tmp_path: Path, case: str) -> None:
    family, dtype, recipe = CASES[case]
    model, out = quantized(tmp_path, family, dtype, recipe)
    symmetric = recipe.get("symmetric", True)
    how = {} if symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    theirs = logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **how).eval())
    # Symmetric weights are dequantized in the requested dtype, asymmetric ones in the dtype of their scales.
    ours = logits(with_our_weights(out, torch.float32 if symmetric else dtype))
    # With equal weights only the order of float32 sums can differ. Dot products of up to 128 terms round by about
    # sqrt(128) * 2^-24 = 7e-7, relative. A single 4-bit code that is off by one moves some logit by 3e-4 of the largest, a
    # single 8-bit code by 1e-5 (measured, the weakest of some 60 codes).
    tolerance = 2e-6 * float(ours.abs().max())
    assert float((theirs - ours).abs().max()) <= tolerance
    original = logits(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval())
    assert float((original - ours).abs().max()) > 1000 * tolerance


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(24, 96), (5, 40)], ids=str)
def test_compressed_tensors_unpacks_what_we_pack(bits: int, shape: tuple[int, int]) -> None:
    rows, columns = shape
    weight = make_weight(Scheme(bits, 8, False), rows, columns)
    tensors = FORMATS["compressed-tensors"].encode(weight, torch.float16)
    offset = 1 << (bits - 1)
    codes = unpack_from_int32(tensors["weight_packed"], bits, torch.Size(shape))
    zeros = unpack_from_int32(tensors["weight_zero_point"], bits, torch.Size((rows, columns // 8)), packed_dim=0)
    assert torch.equal(codes.int() + offset, weight.codes.int())
    assert torch.equal(zeros.int() + offset, weight.zeros.int())


def test_rotated_artifacts_are_refused_by_name(tmp_path: Path) -> None:
    """transformers ignores transform_config, so it must refuse the model instead of computing without the transform."""
    _, out = quantized(tmp_path, "llama", torch.float32, {"group_size": 32, "rotate": True, "method": "rtn"})
    with pytest.raises(ValueError, match="quantkit-rotated"):
        AutoModelForCausalLM.from_pretrained(out)


def test_the_transform_is_what_compressed_tensors_says_it_is(tmp_path: Path) -> None:
    """With our transform_config, compressed-tensors rotates inputs as we do; our rotation of the weights is its inverse."""
    config = add_transform({"config_groups": {}}, OnlineHadamard(r".*\.mlp\.down_proj$", 16))["transform_config"]
    block = nn.ModuleDict({"mlp": nn.ModuleDict({"down_proj": nn.Linear(48, 5), "up_proj": nn.Linear(48, 5)})})
    model: Any = nn.ModuleDict({"0": block})
    weight, x = model["0"]["mlp"]["down_proj"].weight.detach().clone(), torch.randn(3, 48)
    apply_transform_config(model, TransformConfig.model_validate(config))
    down = model["0"]["mlp"]["down_proj"]
    torch.testing.assert_close(down.weight.detach(), reference.hadamard(weight, 16))
    torch.testing.assert_close(down(x), nn.functional.linear(x, weight, down.bias))
    torch.testing.assert_close(down.down_input(x), reference.hadamard(x, 16))
