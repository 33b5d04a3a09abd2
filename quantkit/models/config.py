"""What config.json says about a decoder, as plain data.

transformers' configuration classes import most of its modelling code, a hundred megabytes of it. A model that runs in the
native decoder needs none of that, so its config.json is read here: with the defaults that transformers fills in, which the
families list, and with the older names of settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError
from quantkit.models.families import Family, family_of
from quantkit.models.rope import REQUIRED, RopeConfig

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

#: Settings that every family has. Sizes without a default must be in config.json.
_COMMON: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of a known family.

    Attributes:
        model_type, family: which family.
        vocab_size, hidden_size, intermediate_size: sizes of the embedding, of the residual stream and of the MLP.
        heads, kv_heads, head_dim: of attention, in every layer.
        context: longest sequence in tokens.
        dtype: the dtype that config.json declares; None if it declares none.
        tied_head: a head that is not stored is the embedding table.
        attention_bias, mlp_bias: whether all matrices of attention, and of the MLP, have a bias.
        activation: name of the MLP's activation in transformers.
        epsilon: of all norms.
        windows: per layer, the tokens that a query sees, including its own; 0 for all.
        ropes: the rotary position embeddings; layer_ropes: per layer, the index of its rope.
        attention_scale, attention_softcap: factor and soft cap of attention scores; 0: no cap.
        embedding_scale: factor inside the embedding; embedding_multiplier: factor of its result.
        residual_scale: multiplies what a block adds to the residual stream.
        logit_scale, logit_softcap: factor of the logits, then their soft cap; 0: no cap.
    """

    model_type: str
    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    dtype: torch.dtype | None
    tied_head: bool
    attention_bias: bool
    mlp_bias: bool
    activation: str
    epsilon: float
    windows: tuple[int, ...]
    ropes: tuple[RopeConfig, ...]
    layer_ropes: tuple[int, ...]
    attention_scale: float
    attention_softcap: float
    embedding_scale: float
    embedding_multiplier: float
    residual_scale: float
    logit_scale: float
    logit_softcap: float

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """[N, K] of a matrix of a block, such as "self_attn.q_proj"."""
        hidden, wide, queries, keys = (
            *(self.hidden_size, self.intermediate_size),
            *(self.heads * self.head_dim, self.kv_heads * self.head_dim),
        )
        return {
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "qkv_proj": (queries + 2 * keys, hidden),
            "o_proj": (hidden, queries),
            "gate_proj": (wide, hidden),
            "up_proj": (wide, hidden),
            "gate_up_proj": (2 * wide, hidden),
            "down_proj": (hidden, wide),
        }[name.rpartition(".")[2]]

    def has_bias(self, name: str) -> bool:
        """Whether a matrix of a block has a bias."""
        if name.startswith("mlp."):
            return self.mlp_bias
        return self.attention_bias or (self.family.qkv_bias and name != self.family.out_proj)

    def head_norm_sizes(self) -> dict[str, int]:
        """Elements of the norms of queries and keys, by module inside the block; empty without such norms."""
        if self.family.head_norms is None:
            return {}
        whole = self.family.head_norms == "all heads"
        sizes = (self.heads if whole else 1, self.kv_heads if whole else 1)
        return {f"self_attn.{name}": count * self.head_dim for name, count in zip(("q_norm", "k_norm"), sizes, strict=True)}


def read_model_config(checkpoint: Checkpoint) -> ModelConfig:
    """The config of a checkpoint. Checkpoints that bring their own code are refused.

    Raises:
        CheckpointError: the family is unknown, the config needs remote code, or a setting is missing or impossible.
    """
    path = checkpoint.folder / "config.json"
    refuse_remote_code(checkpoint)
    family = family_of(checkpoint.config["model_type"], str(path))
    settings = _Settings(path, checkpoint.config, _COMMON | dict(family.defaults))
    try:
        return _read(settings, family)
    except (TypeError, ValueError, AttributeError) as error:  # a setting of another type, at any depth
        raise CheckpointError(
            f"{path}: not a config of a {checkpoint.config['model_type']} model ({error}); fetch the file again"
        ) from None


def _read(settings: "_Settings", family: Family) -> ModelConfig:
    heads = settings.size("num_attention_heads")
    kv_heads = settings.size("num_key_value_heads", otherwise=heads)
    hidden = settings.size("hidden_size")
    head_dim = settings.size("head_dim", otherwise=hidden // heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"{settings.path}: {heads} attention heads cannot share {kv_heads} key-value heads; fetch the file again"
        )
    context = context_of(settings["max_position_embeddings"], settings.path)
    kinds = _layer_kinds(settings, settings.size("num_hidden_layers"))
    slides = settings.get("sliding_window") is not None and settings.get("use_sliding_window", True)
    window = settings.size("sliding_window") if slides else 0
    ropes = _ropes(settings, head_dim, context)
    return ModelConfig(
        model_type=settings.config["model_type"],
        family=family,
        vocab_size=settings.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=settings.size("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context=context,
        dtype=_DTYPES.get(str(settings.config.get("dtype") or settings.config.get("torch_dtype"))),
        tied_head=bool(settings["tie_word_embeddings"]),
        attention_bias=bool(settings.get("attention_bias")),
        mlp_bias=bool(settings.get("mlp_bias")),
        activation=str(settings.get("hidden_activation", settings["hidden_act"])),
        epsilon=settings.number("rms_norm_eps"),
        windows=tuple(window if kind == "sliding_attention" else 0 for kind in kinds),
        ropes=tuple(ropes.values()),
        layer_ropes=tuple(list(ropes).index(kind) if kind in ropes else 0 for kind in kinds),
        attention_scale=_attention_scale(settings, head_dim),
        attention_softcap=float(settings.get("attn_logit_softcapping") or 0.0),
        embedding_scale=hidden**0.5 if family.scaled_embedding else 1.0,
        embedding_multiplier=settings.number("embedding_multiplier", otherwise=1.0),
        residual_scale=settings.number("residual_multiplier", otherwise=1.0),
        logit_scale=1.0 / settings.number("logits_scaling", otherwise=1.0),
        logit_softcap=float(settings.get("final_logit_softcapping") or 0.0),
    )


def refuse_remote_code(checkpoint: Checkpoint) -> None:
    """
    Raises:
        CheckpointError: the checkpoint brings its own code.
    """
    if "auto_map" in checkpoint.config:
        path = checkpoint.folder / "config.json"
        raise CheckpointError(f"{path}: needs trust_remote_code, which quantkit never runs; use a model with built-in code")


def context_of(value: Any, path: Path) -> int:
    """`max_position_embeddings` of a config.json.

    Raises:
        CheckpointError: it is not a positive integer.
    """
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{path}: max_position_embeddings is {value}, it must be at least 1; fetch the file again")
    return value


class _Settings:
    """The settings of a config.json that a family has, checked when they are read."""

    def __init__(self, path: Path, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.path, self.config, self._defaults = path, config, defaults

    def __getitem__(self, key: str) -> Any:
        return self.config[key] if key in self.config else self._defaults[key]

    def get(self, key: str, otherwise: Any = None) -> Any:
        """A setting that only some families have; `otherwise` for the others, whatever config.json says."""
        return self[key] if key in self._defaults else otherwise

    def size(self, key: str, otherwise: int | None = None) -> int:
        """A positive integer; `otherwise` replaces null.

        Raises:
            CheckpointError: it is something else, or missing.
        """
        value = self.config.get(key, self._defaults.get(key))
        value = otherwise if value is None else value
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.path}: {key} is {value!r}, it must be a positive integer; fetch the file again")
        return value

    def number(self, key: str, otherwise: float = 0.0) -> float:
        """A positive number, `otherwise` in families without it.

        Raises:
            CheckpointError: it is something else.
        """
        value = self.get(key, otherwise)
        if not isinstance(value, int | float) or not value > 0:
            raise CheckpointError(f"{self.path}: {key} is {value!r}, it must be a positive number; fetch the file again")
        return float(value)


def _attention_scale(settings: _Settings, head_dim: int) -> float:
    if settings.get("query_pre_attn_scalar") is not None:
        return float(settings.number("query_pre_attn_scalar") ** -0.5)
    return settings.number("attention_multiplier", otherwise=head_dim**-0.5)


def _layer_kinds(settings: _Settings, layers: int) -> list[str]:
    """Per layer "sliding_attention" or "full_attention".

    Raises:
        CheckpointError: `layer_types` is not a list of them.
    """
    kinds = settings.get("layer_types")
    if kinds is None:
        # Gemma: every n-th layer sees everything. Qwen: the first n do. Others: all layers are alike.
        pattern, full = settings.get("sliding_window_pattern"), settings.get("max_window_layers", 0)
        sliding = [(number + 1) % pattern if pattern else number >= full for number in range(layers)]
        return ["sliding_attention" if each else "full_attention" for each in sliding]
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise CheckpointError(f"{settings.path}: layer_types does not name the attention of {layers} layers; fetch it again")
    return kinds


def _ropes(settings: _Settings, head_dim: int, context: int) -> dict[str, RopeConfig]:
    """Layer type -> rope; the key is "" if all layers share one."""
    # "rope_scaling", "rope_theta" and "type" are the names that transformers used before version 5.
    scaling, parameters = settings.config.get("rope_scaling") or {}, settings.config.get("rope_parameters") or {}
    theta, local_theta = settings.number("rope_theta"), settings.get("rope_local_base_freq")
    if local_theta is None:
        return {"": _rope(settings, scaling or parameters, theta, head_dim, context)}
    full, sliding = ({"rope_type": "default"} | (parameters.get(f"{kind}_attention") or {}) for kind in ("full", "sliding"))
    return {
        "full_attention": _rope(settings, full | scaling, theta, head_dim, context),
        "sliding_attention": _rope(settings, sliding, local_theta, head_dim, context),
    }


def _rope(settings: _Settings, given: Mapping[str, Any], theta: float, head_dim: int, context: int) -> RopeConfig:
    """
    Raises:
        CheckpointError: a number is missing.
    """
    original = settings.config.get("original_max_position_embeddings")
    parameters = {"original_max_position_embeddings": context, "rope_theta": theta, **given}
    if original is not None:
        parameters["original_max_position_embeddings"] = original
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    if "short_factor" in parameters:
        kind = "longrope"  # Phi 3 has had several names for it.
    missing = [key for key in REQUIRED.get(kind, ()) if not isinstance(parameters.get(key), int | float)]
    if missing:
        raise CheckpointError(f"{settings.path}: a rope of type '{kind}' needs the number {missing[0]}; fetch the file again")
    part = parameters.get("partial_rotary_factor", settings.get("partial_rotary_factor"))
    rotated = part if settings.get("partial_rotary_factor") is not None else 1.0
    return RopeConfig(kind, float(parameters["rope_theta"]), int(head_dim * rotated), parameters)
