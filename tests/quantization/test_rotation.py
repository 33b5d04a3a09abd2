"""Rotated models compute the same function, state the rotation, and are refused by readers that ignore it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from helpers import tiny
from helpers.rotated import HEAD, quantized, reference_logits
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import FormatError, RecipeError
from quantkit.evaluation.run import EvalRequest, run_evaluation
from quantkit.formats.artifact import online_hadamard
from quantkit.formats.convert import convert
from quantkit.formats.rotated import OnlineHadamard, add_transform, split_transform
from quantkit.kernels import reference
from quantkit.models.families import FAMILIES, family_of
from quantkit.quantization.progress import NoProgress
from quantkit.quantization.rotation import Rotation, rotate
from quantkit.quantization.run import QuantizeRequest, quantize_model
from quantkit.recipe import Calibration, Recipe

CPU = torch.device("cpu")
TOKENS = torch.randint(3, tiny.VOCAB, (90,), generator=torch.Generator().manual_seed(0))
ROTATABLE = [name for name in tiny.FAMILIES if FAMILIES[name].rotatable]


@pytest.mark.parametrize("columns", [1, 2, 12, 48, 64, 96, 576, 768, 100, 640, 7, 18])
def test_rotations_are_orthogonal(columns: int) -> None:
    matrix = rotate(torch.eye(columns, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(columns, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("columns", [2, 12, 48, 64, 576, 640, 768, 2880, 3584, 5120])
def test_a_rotation_spreads_one_channel_evenly(columns: int) -> None:
    """Where a Hadamard matrix is known, an outlier is spread evenly over all channels, which is the best possible result."""
    channel = torch.zeros(1, columns, dtype=torch.float64)
    channel[0, columns // 3] = 1.0
    torch.testing.assert_close(rotate(channel).abs(), torch.full_like(channel, columns**-0.5))


@torch.no_grad()
def rotated_logits(folder: Path, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """float64 logits of a model, and of the same with its tensors rotated and the online transform applied."""
    model = in_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa"))
    wanted = model(tokens[None]).logits[0]
    checkpoint, config = Checkpoint(folder), model.config
    config.tie_word_embeddings = False
    rotation = Rotation(cast(Checkpoint, Exact(checkpoint)), family_of(config.model_type, ""), config)
    other = in_float64(AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa"))
    other.load_state_dict(rotation([name for name, _ in other.named_parameters()]), strict=True)
    for name, module in other.named_modules():
        if block := rotation.online.block_of(name):
            module.register_forward_pre_hook(lambda _, args, block=block: (reference.hadamard(args[0], block),))
    return other(tokens[None]).logits[0], wanted


def in_float64(model: nn.Module) -> Any:
    """transformers' norms compute in float32 whatever the model does."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(forward, module)
    return model.eval()


class Exact:
    """A checkpoint whose tensors are float64, so that nothing is rounded."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tensors, self._checkpoint = checkpoint.tensors, checkpoint

    def read(self, names: list[str]) -> dict[str, Tensor]:
        return {name: tensor.double() for name, tensor in self._checkpoint.read(names).items()}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in ROTATABLE),
        ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_size": 48, "intermediate_size": 96}),
        ("llama", {"hidden_size": 60, "intermediate_size": 100, "head_dim": 12}),
        ("phi3", {"tie_word_embeddings": True}),
    ],
)
def test_the_function_stays_the_same(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Down to the rounding of float64."""
    found, wanted = rotated_logits(tiny.make_model(tmp_path / "model", family, **options), TOKENS[:40])
    assert float((found - wanted).abs().max()) <= 1e-10 * float(wanted.abs().max())


def test_what_is_written(made: Callable[..., tuple[Path, Path]]) -> None:
    model, out = made("qwen2", bits=8, method="awq+gptq")
    checkpoint = Checkpoint(out)
    assert checkpoint.config["tie_word_embeddings"] is False
    assert checkpoint.tensors["lm_head.weight"].shape == checkpoint.tensors["model.embed_tokens.weight"].shape
    assert online_hadamard(checkpoint) == OnlineHadamard(r".*\.mlp\.down_proj$", 128)
    after, before = load_file(out / "model.safetensors"), load_file(model / "model.safetensors")
    assert torch.equal(after["model.norm.weight"], torch.ones(64))
    # Rows of the embedding keep their lengths, and are other ones.
    lengths = [tensors["model.embed_tokens.weight"].norm(dim=1) for tensors in (before, after)]
    torch.testing.assert_close(*lengths)
    assert not torch.allclose(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"], atol=0.01)


def test_evaluation(made: Callable[..., tuple[Path, Path]]) -> None:
    model, out = made("llama", bits=8, rules=HEAD)
    report = run_evaluation(EvalRequest(out, model, "builtin", 4, 64, CPU), lambda *_: None)
    assert report.model.metrics.kl_mean is not None
    assert report.model.metrics.kl_mean < 0.01
    assert report.kernel_difference is not None
    assert abs(report.kernel_difference) < 1e-4
    cached = run_evaluation(EvalRequest(out, model, "builtin", 4, 64, CPU, kv_dtype="bf16"), lambda *_: None)
    assert cached.model.metrics.kl_mean is not None
    assert cached.model.metrics.kl_mean < 0.01


class KilledError(Exception):
    """In the middle of a run."""


class Killer(NoProgress):
    def block(self, done: int, total: int) -> None:
        if done == 2:
            raise KilledError


def test_an_interrupted_run_gives_the_same_bytes(llama_bf16: Path, tmp_path: Path) -> None:
    recipe = Recipe(rotate=True, rules=HEAD, calibration=Calibration(samples=8, seq_len=64))
    whole, again = ((tmp_path / name) for name in ("whole", "again"))
    requests = [QuantizeRequest(llama_bf16, out, recipe, CPU, max_memory=1 << 30, overwrite=False) for out in (whole, again)]
    quantize_model(requests[0], NoProgress())
    with pytest.raises(KilledError):
        quantize_model(requests[1], Killer())
    assert quantize_model(requests[1], NoProgress()).totals.resumed_blocks == 2
    assert (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert (whole / "config.json").read_bytes() == (again / "config.json").read_bytes()


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name not in ROTATABLE])
def test_families_that_cannot_be_rotated(family: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"rotate: {family} normalizes what its blocks add"):
        quantized(tiny.make_model(tmp_path / "model", family), tmp_path / "out", method="rtn")


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_formats_that_cannot_say_it(made: Callable[..., tuple[Path, Path]], form: str, tmp_path: Path) -> None:
    model, out = made("llama", bits=8, rules=HEAD)
    with pytest.raises(RecipeError, match=f"rotate: the {form} format has no field"):
        quantized(model, tmp_path / "out", format=form)
    with pytest.raises(FormatError, match="quantize again without rotate"):
        convert(out, tmp_path / "out", form, overwrite=False)


def test_conversion_to_the_same_format_keeps_it(made: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    _, out = made("llama", bits=8, rules=HEAD)
    convert(out, tmp_path / "again", "compressed-tensors", overwrite=False)
    assert online_hadamard(Checkpoint(tmp_path / "again")) == online_hadamard(Checkpoint(out)) is not None
    first, second = (reference_logits(folder, TOKENS[:8]) for folder in (out, tmp_path / "again"))
    assert torch.equal(first, second)


CONFIG = {"format": "pack-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": {}}}, "ignore": []}


def test_a_declaration_is_read_back() -> None:
    online = OnlineHadamard(r".*\.mlp\.down_proj$", 64)
    plain, found = split_transform(add_transform(CONFIG, online))
    assert found == online
    assert plain["format"] == "pack-quantized"
    assert [online.block_of(name) for name in ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj")] == [64, 0]
    assert split_transform(CONFIG) == (CONFIG, None)


def test_transforms_of_others_are_refused() -> None:
    theirs = CONFIG | {"transform_config": add_transform(CONFIG, OnlineHadamard("x", 64))["transform_config"]}
    with pytest.raises(FormatError, match="transform_config of another tool"):
        split_transform(theirs)
    assert split_transform(CONFIG | {"transform_config": {}})[1] is None
    for block in (0, 3, 48, "64", None):
        broken = add_transform(CONFIG, OnlineHadamard("x", block))  # type: ignore[arg-type]
        with pytest.raises(FormatError, match="not a Hadamard transform"):
            split_transform(broken)
