"""config.json as the runtime reads it, against transformers: defaults, older names of settings, ropes; and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers import tiny
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError
from quantkit.models.config import ModelConfig, read_model_config
from quantkit.models.families import FAMILIES
from quantkit.models.skeleton import build_skeleton, read_config

SIZES = {
    "vocab_size": 64,
    "hidden_size": 512,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "pad_token_id": 0,
}

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}

#: model_type and what config.json says in addition to the sizes, in today's and in older spellings.
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "torch_dtype": "float16"}),
    (
        "llama",
        {"head_dim": 16, "num_key_value_heads": 8, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
    ),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "sliding_window": 16, "max_position_embeddings": 4096}),
    (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5}},
    ),
    ("llama", {"rope_parameters": YARN | {"attention_factor": 1.5, "truncate": False, "beta_fast": 16}}),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    ("mistral", {"sliding_window": None, "num_key_value_heads": 8, "head_dim": None, "attention_bias": True}),
    ("mistral", {"dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3, "rope_scaling": YARN}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 3}),
    (
        "qwen3",
        {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 4, "attention_bias": True},
    ),
    ("granite", {"attention_multiplier": 0.1, "embedding_multiplier": 12.0, "residual_multiplier": 0.2, "logits_scaling": 8}),
    ("phi3", {"sliding_window": 16, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 4096}),
    (
        "phi3",
        {
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
            "original_max_position_embeddings": 4096,
            "max_position_embeddings": 131072,
        },
    ),
    ("gemma2", {"query_pre_attn_scalar": 144, "final_logit_softcapping": None, "attn_logit_softcapping": 20.0, "head_dim": 4}),
    ("gemma3_text", {"rope_theta": 1e5, "rope_local_base_freq": 5e3, "sliding_window_pattern": 3, "sliding_window": 16}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "query_pre_attn_scalar": 168}),
    (
        "gemma3_text",
        {
            "layer_types": ["sliding_attention", "full_attention"] * 4,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
            },
        },
    ),
    ("olmo2", {"rope_theta": 500000, "rms_norm_eps": 1e-6, "num_key_value_heads": 4}),
]


def checkpoint(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """A checkpoint with that config and one tensor, which nothing here reads."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    return Checkpoint(folder)


@pytest.mark.parametrize(("family", "options"), CONFIGS)
def test_settings_are_what_transformers_makes_of_them(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    """The numbers that transformers' modules compute with, down to the frequencies of ropes, which are equal to the bit."""
    opened = checkpoint(tmp_path, {"model_type": family} | SIZES | options)
    ours, theirs = read_model_config(opened), read_config(opened)
    model = build_skeleton(theirs, "eager", torch.float32)
    assert (ours.vocab_size, ours.context, ours.dtype) == (64, theirs.max_position_embeddings, theirs.dtype)
    assert ours.tied_head == theirs.tie_word_embeddings
    assert ours.embedding_scale == float(getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0))
    assert ours.embedding_multiplier == getattr(theirs, "embedding_multiplier", 1.0)
    assert ours.residual_scale == getattr(theirs, "residual_multiplier", 1.0)
    assert ours.logit_scale == 1 / getattr(theirs, "logits_scaling", 1.0)
    assert ours.logit_softcap == (getattr(theirs, "final_logit_softcapping", None) or 0.0)
    assert ours.activation == getattr(theirs, "hidden_activation", getattr(theirs, "hidden_act", None))
    assert model.base_model.norm.weight.shape == (ours.hidden_size,)
    blocks = model.get_submodule(ours.family.blocks_path)
    assert len(blocks) == len(ours.windows) == len(ours.layer_ropes)
    for block, window in zip(blocks, ours.windows, strict=True):
        _check_block(ours, block, window, getattr(theirs, "sliding_window", None) if family in ("mistral", "phi3") else None)
    _check_ropes(ours, theirs)


def _check_block(ours: ModelConfig, block: Any, window: int, shared_window: int | None) -> None:
    attention = block.self_attn
    assert (attention.head_dim, attention.scaling) == (ours.head_dim, ours.attention_scale)
    assert attention.num_key_value_groups == ours.heads // ours.kv_heads
    assert window == (getattr(attention, "sliding_window", shared_window) or 0)
    assert ours.attention_softcap == (getattr(attention, "attn_logit_softcapping", None) or 0.0)
    matrices = {name: block.get_submodule(name) for name in ours.family.matrices}
    assert {n: tuple(m.weight.shape) for n, m in matrices.items()} == {n: ours.matrix_shape(n) for n in matrices}
    assert {n: m.bias is not None for n, m in matrices.items()} == {n: ours.has_bias(n) for n in matrices}
    norms = {name: module for name, module in block.named_modules() if type(module).__name__.endswith("RMSNorm")}
    sizes = {name: ours.hidden_size for name in ours.family.norms if name} | ours.head_norm_sizes()
    assert {name: norm.weight.numel() for name, norm in norms.items()} == sizes
    assert {getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) for norm in norms.values()} == {ours.epsilon}


def _check_ropes(ours: ModelConfig, theirs: Any) -> None:
    """Rotary embeddings, computed where there are numbers: the skeleton's are on the meta device."""
    rotary: Any = type(build_skeleton(theirs, "eager", torch.float32).base_model.rotary_emb)(config=theirs)
    kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {"": rotary.rope_type}
    assert {kind for kind in kinds.values() if kind not in ("dynamic", "longrope")} == {
        rope.kind for rope in ours.ropes if rope.is_fixed
    }
    types = getattr(theirs, "layer_types", None)
    for layer, index in enumerate(ours.layer_ropes):
        if ours.ropes[index].is_fixed:
            prefix = f"{types[layer]}_" if len(kinds) > 1 and types is not None else ""
            frequencies, scaling = ours.ropes[index].frequencies()
            assert torch.equal(frequencies, getattr(rotary, f"{prefix}inv_freq"))
            assert scaling == getattr(rotary, f"{prefix}attention_scaling")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is None, it must be a positive integer; fetch"),
        ({"num_attention_heads": "32"}, "num_attention_heads is '32', it must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, it must be a positive integer"),
        ({"num_key_value_heads": 5}, "32 attention heads cannot share 5 key-value heads"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', it must be a positive number"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "a rope of type 'llama3' needs the number low_freq_factor"),
        ({"rope_scaling": ["llama3"]}, "not a config of a qwen3 model"),
        ({"layer_types": ["full_attention"]}, "layer_types does not name the attention of 8 layers"),
        ({"layer_types": [{}] * 8}, "not a config of a qwen3 model"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings is long, it must be at least 1"),
        ({"auto_map": {}}, "needs trust_remote_code"),
        ({"model_type": "mamba"}, "architecture 'mamba' is not supported"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_model_config(checkpoint(tmp_path, {"model_type": "qwen3"} | SIZES | change))
    assert "config.json: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_tiny_models_cover_every_family() -> None:
    assert set(tiny.FAMILIES) == set(FAMILIES)
