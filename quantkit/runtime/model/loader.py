"""Load a checkpoint or artifact into transformers' model definition, one decoder block at a time.

The definition is built on the meta device. Every matrix is read, fused with those that read the same input, and repacked once
for its kernel. So peak memory is the packed model plus one block in its layout on disk.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.safetensors_header import quoted
from quantkit.errors import CheckpointError
from quantkit.methods.grid import QuantizedWeight
from quantkit.methods.threads import one_thread
from quantkit.models.families import Family, family_of
from quantkit.models.skeleton import build_skeleton, materialize_buffers, read_config
from quantkit.runtime.kv_cache.dtype_base import LayerShape
from quantkit.runtime.kv_cache.sizing import CachedModel
from quantkit.runtime.model import attention
from quantkit.runtime.model.layers import Embedding, FusedLinear, FusedSlice, Linear, Norm, pack_weight
from quantkit.runtime.model.weights import WeightReader

logger = logging.getLogger("quantkit.runtime")

#: Buffers that some tools store, though every model computes them.
_COMPUTED = (".inv_freq", ".masked_bias")


@dataclass(frozen=True)
class Definition:
    """A loaded model without a cache.

    Attributes:
        module: transformers' causal language model; its attention needs the keyword argument `attention_context`.
        config, family: of the model.
        layers: what each layer stores in the KV cache per token.
        dtype: of activations.
        device: of all weights and activations.
    """

    module: Any
    config: PreTrainedConfig
    family: Family
    layers: list[LayerShape]
    dtype: torch.dtype
    device: torch.device

    def linears(self) -> set[Linear]:
        """Every linear layer; fused matrices count as one."""
        modules = list(self.module.modules())
        fused = {module.fused.linear for module in modules if isinstance(module, FusedSlice)}
        return fused | {module for module in modules if isinstance(module, Linear)}

    @property
    def cached_model(self) -> CachedModel:
        """What a KV cache must know about the model."""
        declared = self.config.dtype if isinstance(self.config.dtype, torch.dtype) else self.dtype
        return CachedModel(self.layers, declared, self.config.max_position_embeddings, self.device)

    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step reads: all weights except the embedding table."""
        norms = sum(module.weight.nbytes for module in self.module.modules() if isinstance(module, Norm))
        return norms + sum(layer.kernel_weight.nbytes for layer in self.linears())


@torch.no_grad()
def load_definition(checkpoint: Checkpoint, device: torch.device) -> Definition:
    """Load a model for the runtime. Activations are float32 on a CPU, and have the checkpoint's dtype on a GPU.

    Raises:
        CheckpointError, FormatError: the model is unknown or damaged, or its tensors disagree with its config.
    """
    config = read_config(checkpoint)
    family = family_of(checkpoint.config["model_type"], str(checkpoint.folder / "config.json"))
    dtype = torch.float32 if device.type == "cpu" else config.dtype or torch.bfloat16
    model = build_skeleton(config, attention.register(), dtype)
    source = WeightReader(checkpoint)
    if source.extra_quantization:
        where, fields = checkpoint.folder / "config.json", " and ".join(source.extra_quantization)
        logger.warning("note: %s: %s are not applied; activations and KV cache stay more precise", where, fields)
    blocks = model.get_submodule(family.blocks_path)
    with one_thread():  # Loading is thousands of small passes over memory.
        for index, block in enumerate(blocks):
            load_block(block, f"{family.blocks_path}.{index}.", family, source, device, dtype)
        load_non_block_weights(model, source, device, dtype)
        _load_norms(model, "", family, source, device, dtype)
    materialize_buffers(model, model, device)
    ignored = _COMPUTED + sum(source.extra_quantization.values(), ())
    stray = sorted(name for name in source.unread if not name.endswith(ignored))
    if stray:
        raise CheckpointError(f"{checkpoint.folder}: holds {quoted(stray[0])}, which the model of config.json does not have")
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())), "a tensor was not loaded"
    heads = config.num_key_value_heads
    layers = [LayerShape(heads, block.self_attn.head_dim, block.self_attn.head_dim) for block in blocks]
    return Definition(model, config, family, layers, dtype, device)


def load_block(
    block: nn.Module, prefix: str, family: Family, source: WeightReader, device: torch.device, dtype: torch.dtype
) -> None:
    """Give a block of the skeleton its weights, packed for their kernels.

    Args:
        block: on the meta device; changed in place.
        prefix: start of its tensor names.
        family: of the model.
        source: where tensors are read from.
        device, dtype: see `load_definition`.

    Raises:
        CheckpointError, FormatError: a tensor is missing or damaged, or has another shape.
    """
    with source.checkpoint.prefetch(source.checkpoint.names_under(prefix)):
        for group in family.groups:
            matrices = [_read_linear(block.get_submodule(name), prefix + name, source) for name in group.names]
            modules = _linears(matrices, device, dtype)
            for name, module in zip(group.names, modules, strict=True):
                if hadamard := source.hadamard(prefix + name):
                    assert isinstance(module, Linear), f"{name} shares its inputs with other matrices"
                    module.hadamard = hadamard
                block.set_submodule(name, module)
        _load_norms(block, prefix, family, source, device, dtype)


def _read_linear(
    module: nn.Module, path: str, source: WeightReader
) -> tuple[QuantizedWeight | Tensor, Tensor | None, Tensor | None]:
    """Weight, bias and column permutation of a linear layer of the skeleton."""
    assert isinstance(module.weight, Tensor)
    weight, column_perm = source.matrix(path, module.weight.shape)
    bias = source.tensor(f"{path}.bias", module.bias.shape) if isinstance(module.bias, Tensor) else None
    return weight, bias, column_perm


def _linears(
    matrices: list[tuple[QuantizedWeight | Tensor, Tensor | None, Tensor | None]], device: torch.device, dtype: torch.dtype
) -> list[nn.Module]:
    """Layers for matrices that read one input: fused into one if possible."""
    column_perm = matrices[0][2]
    fused = (
        _fused_weight([weight for weight, _, _ in matrices])
        if all(_same(column_perm, each) for _, _, each in matrices)
        else None
    )
    if fused is None or len(matrices) == 1:
        return [Linear(pack_weight(w, device, dtype), _vector(b, device, dtype), _index(o, device)) for w, b, o in matrices]
    sizes = [weight.shape[0] if isinstance(weight, Tensor) else weight.codes.shape[0] for weight, _, _ in matrices]
    biases = [torch.zeros(n) if bias is None else bias.float() for n, (_, bias, _) in zip(sizes, matrices, strict=True)]
    bias = None if all(bias is None for _, bias, _ in matrices) else torch.cat(biases)
    linear = Linear(pack_weight(fused, device, dtype), _vector(bias, device, dtype), _index(column_perm, device))
    return list(FusedLinear(linear, sizes).slices())


def _same(column_perm: Tensor | None, other: Tensor | None) -> bool:
    return column_perm is other or (column_perm is not None and other is not None and torch.equal(column_perm, other))


def _fused_weight(weights: list[QuantizedWeight | Tensor]) -> QuantizedWeight | Tensor | None:
    """The weights stacked; None if they are not all packed alike."""
    dense = [weight for weight in weights if isinstance(weight, Tensor)]
    packed = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    if dense and not packed:
        return torch.cat(dense) if len({weight.dtype for weight in dense}) == 1 and len(dense) > 1 else dense[0]
    if dense or len({weight.scheme for weight in packed}) != 1:
        return None
    codes, scales, zeros = (torch.cat([getattr(w, part) for w in packed]) for part in ("codes", "scales", "zeros"))
    return replace(packed[0], codes=codes, scales=scales, zeros=zeros)


def _load_norms(
    root: nn.Module, prefix: str, family: Family, source: WeightReader, device: torch.device, dtype: torch.dtype
) -> None:
    """Replace every RMS norm below `root` that has not been replaced yet."""
    for name, module in list(root.named_modules()):
        if not type(module).__name__.endswith("RMSNorm"):
            continue
        assert isinstance(module.weight, Tensor)
        stored = source.tensor(f"{prefix}{name}.weight", module.weight.shape)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        assert isinstance(eps, float), f"{name}: an RMS norm without epsilon"
        root.set_submodule(name, Norm((stored.float() + family.norm_offset).to(device, dtype), eps))


def load_non_block_weights(model: Any, source: WeightReader, device: torch.device, dtype: torch.dtype) -> None:
    """Give the skeleton its embedding and head, ready for their kernels; a tied head shares the embedding's memory.

    Args:
        model: a skeleton; changed in place.
        source, device, dtype: see `load_block`.

    Raises:
        CheckpointError, FormatError: a tensor is missing or damaged, or has another shape.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding_name, head_name = names[id(embedding)], names[id(head)]
    table = source.tensor(f"{embedding_name}.weight", embedding.weight.shape)
    table = table if device.type == "cpu" else table.to(device, dtype)
    weight: QuantizedWeight | Tensor = table
    bias = column_perm = None
    if source.holds(head_name) or not getattr(model.config, "tie_word_embeddings", False):
        weight, bias, column_perm = _read_linear(head, head_name, source)
    model.set_submodule(embedding_name, Embedding(table, dtype, float(getattr(embedding, "scalar_embed_scale", 1.0))))
    model.set_submodule(
        head_name, Linear(pack_weight(weight, device, dtype), _vector(bias, device, dtype), _index(column_perm, device))
    )


def _vector(bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(device, dtype)


def _index(column_perm: Tensor | None, device: torch.device) -> Tensor | None:
    return None if column_perm is None else column_perm.to(device)
