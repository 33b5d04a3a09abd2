"""Read the weights of a model from a checkpoint: packed matrices, and dense tensors of the shapes that config.json implies."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.safetensors_header import quoted
from quantkit.errors import CheckpointError
from quantkit.formats.artifact import PackedReader
from quantkit.methods.grid import QuantizedWeight

#: Dtypes of dense tensors. Other dtypes are codes without scales, or would lose precision silently.
_DENSE = (torch.float32, torch.float16, torch.bfloat16)


class WeightReader:
    """The matrices and vectors of a checkpoint by name.

    Attributes:
        unread: tensors that were not read so far.
        extra_quantization: see `PackedReader`.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        quantized = "quantization_config" in checkpoint.config
        self._packed = PackedReader(checkpoint) if quantized else None
        self._modules = set(self._packed.modules) if self._packed else set()
        self.extra_quantization = self._packed.extra_quantization if self._packed else {}
        self.unread = set(checkpoint.tensors)

    def holds(self, module: str) -> bool:
        """Whether there is a packed or dense matrix under that path."""
        return module in self._modules or f"{module}.weight" in self.checkpoint.tensors

    def hadamard(self, module: str) -> int:
        """Block size of the Hadamard transform that a matrix expects its inputs to have gone through; 0 for none."""
        online = self._packed.online if self._packed else None
        return online.block_of(module) if online else 0

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """A dense tensor of the shape that config.json implies.

        Raises:
            CheckpointError: it is missing, has another shape, or has a dtype that models do not compute in.
        """
        return self._dense(name, shape, self.checkpoint.read([name])[name])

    def mapped(self, name: str, shape: Sequence[int]) -> Tensor:
        """`tensor`, but it stays in its file, see `Checkpoint.map`.

        Raises:
            CheckpointError: see `tensor`.
        """
        return self._dense(name, shape, self.checkpoint.map(name))

    def _dense(self, name: str, shape: Sequence[int], tensor: Tensor) -> Tensor:
        self.unread.discard(name)
        self._check(name, tensor.shape, shape)
        if tensor.dtype not in _DENSE:
            file, found = self.checkpoint.tensors[name].file, str(tensor.dtype).removeprefix("torch.")
            reason = f"is {found}, only float32, float16 and bfloat16 can be run; convert it, or fetch the original model"
            raise CheckpointError(f"{file}: tensor {quoted(name)} {reason}")
        return tensor

    def matrix(self, module: str, shape: Sequence[int]) -> tuple[QuantizedWeight | Tensor, Tensor | None]:
        """A matrix [N, K], quantized or dense, and its column permutation (see `PackedReader.read_sorted`).

        Raises:
            CheckpointError: it is missing, has another shape, or is dense and has a dtype that `tensor` refuses.
        """
        if self._packed is None or module not in self._modules:
            return self.tensor(f"{module}.weight", shape), None
        weight, column_perm = self._packed.read_sorted(module)
        self.unread -= {f"{module}.{suffix}" for suffix in self._packed.format.suffixes}
        self._check(module, weight.codes.shape, shape)
        return weight, column_perm

    def _check(self, name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
        if tuple(found) != tuple(wanted):
            where = self.checkpoint.folder
            raise CheckpointError(f"{where}: {quoted(name)} has shape {list(found)}, config.json says {list(wanted)}")
