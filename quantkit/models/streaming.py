"""A model whose decoder blocks are streamed from disk: it is built on the meta device, and one block at a time is loaded.

The definition is transformers' own, and no family's forward pass is repeated here. A block's keyword arguments (masks, rotary
embeddings) are found by running the whole model with blocks that record their arguments. Final norm and head are run with
blocks that return a given hidden state.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError
from quantkit.formats.rotated import OnlineHadamard
from quantkit.kernels import reference
from quantkit.models import causal_attention
from quantkit.models.families import family_of
from quantkit.models.matmul_dtype import matmul_in
from quantkit.models.skeleton import build_skeleton, materialize_buffers, read_config

#: Reads tensors by name. For a quantized checkpoint it returns dequantized weights.
TensorReader = Callable[[list[str]], dict[str, Tensor]]


class StreamedModel:
    """A causal language model: embeddings, final norm and head are in memory, and each block only while it is used.

    Subclasses load weights in another way by overriding `load_non_block_weights` and `block`.

    Attributes:
        checkpoint: where the tensors come from.
        module: transformers' model. Parameters that are not loaded are on the meta device.
        config: the transformers config.
        family: groups and folds of a block.
        non_block_names: the names of all parameters outside the blocks.
        block_count: number of decoder blocks.
        dtype, device: dtype and device of every tensor that is loaded.
        matmul_dtype: the dtype in which a block's matrices are held and multiplied. May be changed between blocks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: TensorReader,
        dtype: torch.dtype,
        device: torch.device,
        online: OnlineHadamard | None = None,
    ) -> None:
        """Build the model and load everything outside the blocks.

        Args:
            checkpoint: an opened checkpoint folder.
            source: reads the tensors.
            dtype: the dtype of all parameters.
            device: where they are loaded.
            online: the rotation that must be applied at run time, if the tensors of `source` are rotated.

        Raises:
            CheckpointError: the architecture is unknown, needs remote code, or a tensor disagrees with config.json.
        """
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.matmul_dtype = dtype
        self._source = source
        self.family = family_of(checkpoint.config["model_type"], str(checkpoint.folder / "config.json"))
        self.config = read_config(checkpoint)
        if online:
            self.family, self.config.tie_word_embeddings = self.family.rotated(), False
        self.module = build_skeleton(self.config, "eager" if self.family.soft_cap else causal_attention.register(), dtype)
        self.block_count = len(self.blocks)
        if online:
            self._rotate_inputs(online)
        materialize_buffers(self.module, self.module, device, exclude=self.blocks)
        self.non_block_names = [
            name for name, _ in self.module.named_parameters() if not name.startswith(self.family.blocks_path)
        ]
        self.load_non_block_weights()

    def _rotate_inputs(self, online: OnlineHadamard) -> None:
        """Rotate the inputs of the rotated matrices. These hooks are registered first, so later hooks see rotated inputs."""
        for index, block in enumerate(self.blocks):
            for name in self.family.matrices:
                if size := online.block_of(self.prefix(index) + name):
                    block.get_submodule(name).register_forward_pre_hook(partial(_rotate_input, size))

    def load_non_block_weights(self) -> None:
        """Load embeddings, final norm and head."""
        self.load_tensors(self.module, "", self.non_block_names)
        self.module.tie_weights()

    def release_non_block_weights(self) -> None:
        """Free embeddings, final norm and head. Until `load_non_block_weights`, only `block` can be called."""
        empty = {name: p.detach().to("meta") for name, p in self.module.named_parameters() if name in self.non_block_names}
        self.module.load_state_dict(empty, strict=False, assign=True)
        self.module.tie_weights()

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks; their parameters are on the meta device except within `block`."""
        blocks = self.module.get_submodule(self.family.blocks_path)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def prefix(self, index: int) -> str:
        """The start of the tensor names of block `index`, with its last dot."""
        return f"{self.family.blocks_path}.{index}."

    def shape(self, index: int, name: str) -> tuple[int, int]:
        """Shape (N, K) of matrix `name` of block `index`."""
        weight = self.blocks[index].get_submodule(name).weight
        assert isinstance(weight, Tensor)
        rows, columns = weight.shape
        return rows, columns

    def parameters(self) -> dict[str, tuple[torch.Size, bool]]:
        """By name, every parameter's shape, and whether it may be missing because it is tied to another."""
        shapes = {name: p.shape for name, p in self.module.named_parameters(remove_duplicate=False)}
        tied = getattr(self.config, "tie_word_embeddings", False)
        return {name: (shape, tied and name == "lm_head.weight") for name, shape in shapes.items()}

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights loaded and its matrices in `matmul_dtype`. They are freed when the context ends."""
        module, prefix = self.blocks[index], self.prefix(index)
        materialize_buffers(self.module, module, self.device)
        self.load_tensors(module, prefix, [name for name, _ in module.named_parameters()])
        try:
            with matmul_in(self.matmul_dtype, map(module.get_submodule, self.family.matrices)):
                yield module
        finally:
            module.to("meta")

    def load_tensors(self, module: nn.Module, prefix: str, names: list[str]) -> None:
        """Give parameters of `module` their values.

        Args:
            module: the model or a part of it.
            prefix: the start of its tensor names.
            names: names of parameters inside `module`.

        Raises:
            CheckpointError: a tensor has another shape than config.json says.
        """
        tensors = self._source([prefix + name for name in names])
        state = {name: tensors[prefix + name].to(self.device, self.dtype) for name in names}
        for name, parameter in module.named_parameters():
            if name in state and state[name].shape != parameter.shape:
                found, wanted = list(state[name].shape), list(parameter.shape)
                raise CheckpointError(
                    f"{self.checkpoint.folder}: '{prefix}{name}' has shape {found}, config.json says {wanted}"
                )
        module.load_state_dict(state, strict=False, assign=True)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """The hidden states that enter the first block, and every block's keyword arguments.

        Args:
            tokens: int64 [B, T], full rows without padding.

        Returns:
            hidden [B, T, D], and one dict per block.
        """
        seen: list[tuple[Tensor, dict[str, Any]]] = []

        def record(hidden: Tensor, **kwargs: Any) -> Tensor:
            seen.append((hidden, kwargs))
            return hidden

        with self._replace_blocks(record):
            self.module.base_model(tokens.to(self.device), use_cache=False)
        return seen[0][0], [kwargs for _, kwargs in seen]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, T, V] for the last block's output [B, T, D]: final norm, head, and what the family does after it."""
        placeholder = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
        with self._replace_blocks(lambda _hidden, **_kwargs: hidden):
            out: Tensor = self.module(placeholder, use_cache=False).logits
        return out

    @torch.no_grad()
    def head_input(self, hidden: Tensor) -> Tensor:
        """What the output head reads, [B, T, D], for the last block's output [B, T, D]."""
        seen: list[Tensor] = []

        def catch(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(args[0])
            return (args[0][:, :1],)  # Logits of a single position are the cheapest that the forward pass can compute.

        hook = self.module.get_output_embeddings().register_forward_pre_hook(catch)
        try:
            self.logits(hidden)
        finally:
            hook.remove()
        return seen[0]

    @property
    def head_weight(self) -> Tensor:
        """The weight of the output head, [V, D]; the embedding's if they are tied."""
        weight: Tensor = self.module.get_output_embeddings().weight
        return weight.detach()

    @contextmanager
    def _replace_blocks(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        """Within the context, every block's forward pass is `forward`."""
        for module in self.blocks:
            module.forward = forward
        try:
            yield
        finally:
            for module in self.blocks:
                del module.forward


def _rotate_input(block: int, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (reference.hadamard(args[0], block),)


def check_tensors(checkpoint: Checkpoint, model: StreamedModel) -> None:
    """Compare every tensor's shape and dtype with what config.json says, before any tensor is read.

    Norms and other vectors may have another floating-point dtype, matrices may not.

    Raises:
        CheckpointError: a tensor is missing or disagrees.
    """
    for name, (shape, optional) in model.parameters().items():
        info = checkpoint.tensors.get(name)
        if info is None:
            if optional:
                continue
            raise CheckpointError(f"{checkpoint.folder}: tensor '{name}', which config.json calls for, is in no shard")
        if info.shape != tuple(shape):
            raise CheckpointError(f"{info.file}: '{name}' has shape {list(info.shape)}, config.json says {list(shape)}")
        if not info.is_floating_point or (len(shape) > 1 and info.torch_dtype != model.dtype):
            stored, promised = (str(dtype).removeprefix("torch.") for dtype in (info.torch_dtype, model.dtype))
            raise CheckpointError(f"{info.file}: '{name}' is {stored}, config.json says {promised}; correct its \"dtype\"")
