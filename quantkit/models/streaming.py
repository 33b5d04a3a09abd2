"""The model as a stream of decoder blocks: built on the meta device, one block real at a time.

The definition is transformers' own. Each block's keyword arguments (masks, rotary embeddings) are recorded by running the
whole model with every block replaced by a recorder, and final norm and head by running it with blocks that hand back a
given hidden state; so no family's forward is written down again here.
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
from quantkit.models import causal_attention as causal
from quantkit.models.families import family_of
from quantkit.models.matmul_dtype import matmul_in
from quantkit.models.skeleton import build_skeleton, materialize_buffers, read_config

#: Reads tensors by name; a quantized checkpoint's reader hands out dense weights.
TensorReader = Callable[[list[str]], dict[str, Tensor]]


class StreamedModel:
    """A causal language model of which embeddings, final norm and head are real, and blocks come and go.

    Attributes:
        checkpoint: where the tensors come from.
        config: the transformers config.
        family: groups and folds of a block.
        block_count: number of decoder blocks.
        dtype, device: of every tensor that is loaded.
        matmul_dtype: in which a block's matrices are held and multiply; may be changed between blocks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: TensorReader,
        dtype: torch.dtype,
        device: torch.device,
        online: OnlineHadamard | None = None,
    ) -> None:
        """Build the skeleton and load everything outside the blocks.

        Args:
            online: what has to be done at run time to the model of `source`, if it is a rotated one.

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
        self._model = build_skeleton(self.config, "eager" if self.family.soft_cap else causal.register(), dtype)
        self.block_count = len(self._blocks)
        if online:
            self._rotate_inputs(online)
        materialize_buffers(self._model, self._model, device, exclude=self._blocks)
        self._non_block_names = [
            name for name, _ in self._model.named_parameters() if not name.startswith(self.family.blocks_path)
        ]
        self.load_non_block_weights()

    def _rotate_inputs(self, online: OnlineHadamard) -> None:
        """These hooks are the first of their modules: whoever hooks a module later sees its inputs rotated."""
        for index, block in enumerate(self._blocks):
            for name in self.family.matrices:
                if size := online.block_of(self.prefix(index) + name):
                    block.get_submodule(name).register_forward_pre_hook(partial(_rotate_input, size))

    def load_non_block_weights(self) -> None:
        """Read embeddings, final norm and head."""
        self._load(self._model, "", self._non_block_names)
        self._model.tie_weights()

    def release_non_block_weights(self) -> None:
        """Free embeddings, final norm and head. Until `load_non_block_weights`, only `block` can be called."""
        empty = {name: p.detach().to("meta") for name, p in self._model.named_parameters() if name in self._non_block_names}
        self._model.load_state_dict(empty, strict=False, assign=True)
        self._model.tie_weights()

    @property
    def _blocks(self) -> nn.ModuleList:
        blocks = self._model.get_submodule(self.family.blocks_path)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def prefix(self, index: int) -> str:
        """Start of the tensor names of block `index`."""
        return f"{self.family.blocks_path}.{index}."

    def shape(self, index: int, name: str) -> tuple[int, int]:
        """(N, K) of matrix `name` of block `index`."""
        weight = self._blocks[index].get_submodule(name).weight
        assert isinstance(weight, Tensor)
        rows, columns = weight.shape
        return rows, columns

    def parameters(self) -> dict[str, tuple[torch.Size, bool]]:
        """Name -> (shape, whether it may be missing because it is tied to another) of every parameter."""
        shapes = {name: p.shape for name, p in self._model.named_parameters(remove_duplicate=False)}
        tied = getattr(self.config, "tie_word_embeddings", False)
        return {name: (shape, tied and name == "lm_head.weight") for name, shape in shapes.items()}

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights, matrices in `matmul_dtype`; they are released when the context ends."""
        module, prefix = self._blocks[index], self.prefix(index)
        materialize_buffers(self._model, module, self.device)
        self._load(module, prefix, [name for name, _ in module.named_parameters()])
        try:
            with matmul_in(self.matmul_dtype, map(module.get_submodule, self.family.matrices)):
                yield module
        finally:
            module.to("meta")

    def _load(self, module: nn.Module, prefix: str, names: list[str]) -> None:
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
        """Hidden states entering the first block, and every block's keyword arguments.

        Args:
            tokens: int64 [B, T], full rows without padding.

        Returns:
            hidden [B, T, D] and one dict a block.
        """
        seen: list[tuple[Tensor, dict[str, Any]]] = []

        def record(hidden: Tensor, **kwargs: Any) -> Tensor:
            seen.append((hidden, kwargs))
            return hidden

        with self._blocks_replaced(record):
            self._model.base_model(tokens.to(self.device), use_cache=False)
        return seen[0][0], [kwargs for _, kwargs in seen]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, T, V] for the last block's output [B, T, D]: final norm, head, and whatever the family adds."""
        placeholder = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
        with self._blocks_replaced(lambda _hidden, **_kwargs: hidden):
            out: Tensor = self._model(placeholder, use_cache=False).logits
        return out

    @torch.no_grad()
    def head_input(self, hidden: Tensor) -> Tensor:
        """What the output head reads, [B, T, D], for the last block's output [B, T, D]."""
        seen: list[Tensor] = []

        def catch(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(args[0])
            return (args[0][:, :1],)  # One position's logits are the least that the forward can be asked for.

        hook = self._model.get_output_embeddings().register_forward_pre_hook(catch)
        try:
            self.logits(hidden)
        finally:
            hook.remove()
        return seen[0]

    @property
    def head_weight(self) -> Tensor:
        """Weight of the output head, [V, D]; the embedding's where they are tied."""
        weight: Tensor = self._model.get_output_embeddings().weight
        return weight.detach()

    @contextmanager
    def _blocks_replaced(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        for module in self._blocks:
            module.forward = forward
        try:
            yield
        finally:
            for module in self._blocks:
                del module.forward


def _rotate_input(block: int, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (reference.hadamard(args[0], block),)


def check_tensors(checkpoint: Checkpoint, model: StreamedModel) -> None:
    """Compare every tensor's shape and dtype with what config.json promises, before any is read.

    Norms and other vectors may be kept in another floating dtype, matrices may not.

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
