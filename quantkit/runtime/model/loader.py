"""Load a checkpoint or artifact for the runtime, one decoder block at a time.

Every matrix is read, fused with those that read the same input, and repacked once for its kernel. So peak memory is the packed
model plus one block in its layout on disk. Nothing of transformers is imported: what a model consists of follows from its
config.json and its family.
"""

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.safetensors_header import quoted
from quantkit.errors import CheckpointError
from quantkit.methods.grid import QuantizedWeight
from quantkit.methods.threads import one_thread
from quantkit.models.config import ModelConfig, read_model_config
from quantkit.runtime.kv_cache.dtype_base import LayerShape
from quantkit.runtime.kv_cache.sizing import CachedModel
from quantkit.runtime.model.layers import Embedding, FusedLinear, FusedSlice, Linear, Norm, pack_weight
from quantkit.runtime.model.weights import WeightReader
from quantkit.utils.resources import return_freed_memory

logger = logging.getLogger("quantkit.runtime")

#: Buffers that some tools store, though every model computes them.
_COMPUTED = (".inv_freq", ".masked_bias")


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model without a cache.

    Attributes:
        checkpoint: where it was loaded from.
        config: what config.json says.
        modules: path -> `Linear`, `FusedSlice`, `Norm` or `Embedding`, for all modules with weights.
        dtype: of activations.
        device: of all weights and activations.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    modules: dict[str, nn.Module]
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def definition(self) -> Any:
        """The model as transformers defines it, with these modules; its attention needs the argument `attention_context`.

        Made on first use: where the native decoder runs the model, transformers' modelling code is not imported.

        Raises:
            CheckpointError: transformers refuses the config.
        """
        from quantkit.runtime.model.definition import build_definition

        return build_definition(self.checkpoint, self.modules, self.device, self.dtype)

    @property
    def head(self) -> Linear:
        """The output head."""
        head = self.modules[self.config.family.head]
        assert isinstance(head, Linear)
        return head

    def linears(self) -> set[Linear]:
        """Every linear layer; fused matrices count as one."""
        modules = self.modules.values()
        fused = {module.fused.linear for module in modules if isinstance(module, FusedSlice)}
        return fused | {module for module in modules if isinstance(module, Linear)}

    @property
    def layers(self) -> list[LayerShape]:
        """What each layer stores in the KV cache per token."""
        config = self.config
        return [LayerShape(config.kv_heads, config.head_dim, config.head_dim)] * len(config.windows)

    @property
    def cached_model(self) -> CachedModel:
        """What a KV cache must know about the model."""
        return CachedModel(self.layers, self.config.dtype or self.dtype, self.config.context, self.device)

    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step reads: all weights except the embedding table."""
        norms = sum(module.weight.nbytes for module in self.modules.values() if isinstance(module, Norm))
        return norms + sum(layer.kernel_weight.nbytes for layer in self.linears())


@torch.no_grad()
def load_model(checkpoint: Checkpoint, device: torch.device) -> LoadedModel:
    """Load a model for the runtime. Activations are float32 on a CPU, and have the checkpoint's dtype on a GPU.

    Raises:
        CheckpointError, FormatError: the model is unknown or damaged, or its tensors disagree with its config.
    """
    config = read_model_config(checkpoint)
    dtype = torch.float32 if device.type == "cpu" else config.dtype or torch.bfloat16
    source = WeightReader(checkpoint)
    if source.extra_quantization:
        where, fields = checkpoint.folder / "config.json", " and ".join(source.extra_quantization)
        logger.warning("note: %s: %s are not applied; activations and KV cache stay more precise", where, fields)
    loader = ModuleLoader(config, source, device, dtype)
    # What unpacking a block takes would leave holes between the tensors that stay.
    return_freed_memory(at_least=1 << 18)
    with one_thread():  # Loading is thousands of small passes over memory.
        # Embedding and head are the largest matrices. What unpacking them takes is free again when the blocks come.
        modules = loader.outside()
        for index in range(len(config.windows)):
            path = f"{config.family.blocks_path}.{index}"
            modules |= {f"{path}.{name}": module for name, module in loader.block(index).items()}
    ignored = _COMPUTED + sum(source.extra_quantization.values(), ())
    stray = sorted(name for name in source.unread if not name.endswith(ignored))
    if stray:
        raise CheckpointError(f"{checkpoint.folder}: holds {quoted(stray[0])}, which the model of config.json does not have")
    return LoadedModel(checkpoint, config, modules, dtype, device)


class ModuleLoader:
    """Makes a model's modules from its tensors."""

    def __init__(self, config: ModelConfig, source: WeightReader, device: torch.device, dtype: torch.dtype) -> None:
        """
        Args:
            config: of the model.
            source: its tensors.
            device: of the modules.
            dtype: of activations.
        """
        self._config, self._source, self._device, self._dtype = config, source, device, dtype

    def block(self, index: int) -> dict[str, nn.Module]:
        """The modules of block `index`, by path inside the block.

        Raises:
            CheckpointError, FormatError: a tensor is missing or damaged, or has another shape.
        """
        config, family, source = self._config, self._config.family, self._source
        prefix, made = f"{family.blocks_path}.{index}.", dict[str, nn.Module]()
        with source.checkpoint.prefetch(source.checkpoint.names_under(prefix)):
            for group in family.groups:
                matrices = [self._read(prefix + n, config.matrix_shape(n), bias=config.has_bias(n)) for n in group.names]
                for name, module in zip(group.names, _linears(matrices, self._device, self._dtype), strict=True):
                    if hadamard := source.hadamard(prefix + name):
                        assert isinstance(module, Linear), f"{name} shares its inputs with other matrices"
                        module.hadamard = hadamard
                    made[name] = module
            norms = {name: config.hidden_size for name in family.norms if name}
            made |= {name: self._norm(prefix + name, size) for name, size in (norms | config.head_norm_sizes()).items()}
        return made

    def outside(self) -> dict[str, nn.Module]:
        """Embedding, last norm and head, by path.

        On a CPU a tied head shares the embedding's memory, and an embedding that is no head stays in its file: a step reads a
        few rows of it.

        Raises:
            CheckpointError, FormatError: see `block`.
        """
        config, family, device, dtype = self._config, self._config.family, self._device, self._dtype
        shape = config.vocab_size, config.hidden_size
        tied = config.tied_head and not self._source.holds(family.head)
        read = self._source.mapped if device.type == "cpu" and not tied else self._source.tensor
        table = read(f"{family.embedding}.weight", shape)
        table = table if device.type == "cpu" else table.to(device, dtype)
        (head,) = _linears([(table, None, None) if tied else self._read(family.head, shape, bias=False)], device, dtype)
        embedding = Embedding(table, dtype, config.embedding_scale)
        return {family.embedding: embedding, family.head: head, family.norm: self._norm(family.norm, config.hidden_size)}

    def _norm(self, path: str, size: int) -> Norm:
        stored = self._source.tensor(f"{path}.weight", (size,)).float()
        return Norm((stored + self._config.family.norm_offset).to(self._device, self._dtype), self._config.epsilon)

    def _read(
        self, path: str, shape: tuple[int, int], *, bias: bool
    ) -> tuple[QuantizedWeight | Tensor, Tensor | None, Tensor | None]:
        """Weight, bias and column permutation of a linear layer."""
        weight, column_perm = self._source.matrix(path, shape)
        return weight, self._source.tensor(f"{path}.bias", shape[:1]) if bias else None, column_perm


def _linears(
    matrices: list[tuple[QuantizedWeight | Tensor, Tensor | None, Tensor | None]], device: torch.device, dtype: torch.dtype
) -> list[nn.Module]:
    """Layers for matrices that read one input: fused into one if possible."""
    column_perm = matrices[0][2]
    fusible = len(matrices) > 1 and all(_same(column_perm, each) for _, _, each in matrices)
    fused = _fused_weight([weight for weight, _, _ in matrices]) if fusible else None
    if fused is None:
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
        return torch.cat(dense) if len({weight.dtype for weight in dense}) == 1 else None
    if dense or len({weight.scheme for weight in packed}) != 1:
        return None
    codes, scales, zeros = (torch.cat([getattr(w, part) for w in packed]) for part in ("codes", "scales", "zeros"))
    return replace(packed[0], codes=codes, scales=scales, zeros=zeros)


def _vector(bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(device, dtype)


def _index(column_perm: Tensor | None, device: torch.device) -> Tensor | None:
    return None if column_perm is None else column_perm.to(device)
