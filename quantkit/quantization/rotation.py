"""Rotate a model so that its activations have no outliers, without changing what it computes.

Three rotations (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406), all of them Hadamard matrices:

- R of the residual stream. Every matrix that writes to the stream is multiplied by R on its output side, every matrix that
  reads it by R on its input side. RMS norms commute with R once their weights are folded into the matrices that follow.
- A rotation of the values of every attention head, and its inverse on the input side of the output projection.
- A rotation of the down projection's input. No other matrix can absorb it, so the runtime applies it, in blocks.

Only the last one costs time when the model runs. The first one unties head and embedding, because the head absorbs the last
norm.
"""

from collections.abc import Callable, Iterable
from functools import cache
from math import isqrt

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import RecipeError
from quantkit.formats.rotated import OnlineHadamard
from quantkit.kernels import reference
from quantkit.models.families import Family

#: The largest block that a program of the GPU kernel can hold in registers.
_LARGEST_BLOCK = 4096


class Rotation:
    """Reads a checkpoint's tensors as the rotated model has them; a `TensorReader`.

    Attributes:
        online: the rotation that the runtime must apply.
    """

    def __init__(self, checkpoint: Checkpoint, family: Family, config: PreTrainedConfig) -> None:
        """
        Args:
            checkpoint: a checkpoint whose tensors have the shapes that `config` calls for.
            family: its family.
            config: its transformers config.

        Raises:
            RecipeError: the family normalizes what its blocks add to the residual stream.
        """
        if not family.rotatable:
            raise RecipeError(
                f"rotate: {config.model_type} normalizes what its blocks add to the residual stream, so it cannot be rotated; "
                "use a recipe without rotate"
            )
        self._checkpoint, self._family = checkpoint, family
        self._width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._value_rows = config.num_key_value_heads * self._width
        self._outside = family.blocks_path.removesuffix("layers")
        block = min(_power_of_two(config.intermediate_size), _LARGEST_BLOCK)
        self.online = OnlineHadamard(rf".*\.{family.down_proj.replace('.', chr(92) + '.')}$", block)

    def __call__(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, in their stored dtype, rounded once from float64."""
        return {name: self._tensor(name) for name in names}

    def _tensor(self, name: str) -> Tensor:
        module, _, _ = name.rpartition(".")
        stored = self._stored(name)
        if name == f"{self._outside}embed_tokens.weight":
            return rotate(stored.double()).to(stored.dtype)
        if name == "lm_head.weight":
            return self._reader(stored, f"{self._outside}norm").to(stored.dtype)
        prefix, inside = self._split(module)
        if module == f"{self._outside}norm" or inside in self._family.residual_readers.values():
            return torch.full_like(stored, 1.0 - self._family.norm_offset)
        return self._inside(prefix, inside, stored).to(stored.dtype).contiguous()

    def _stored(self, name: str) -> Tensor:
        """The tensor that the checkpoint holds; for a head that is tied, the embedding."""
        if name == "lm_head.weight" and name not in self._checkpoint.tensors:
            name = f"{self._outside}embed_tokens.weight"
        return self._checkpoint.read([name])[name]

    def _split(self, module: str) -> tuple[str, str]:
        """Split `model.layers.3.mlp.up_proj` into `model.layers.3.` and `mlp.up_proj`; outside blocks, the second is empty."""
        start = self._family.blocks_path + "."
        if not module.startswith(start):
            return module, ""
        number, _, inside = module.removeprefix(start).partition(".")
        return f"{start}{number}.", inside

    def _inside(self, prefix: str, module: str, x: Tensor) -> Tensor:
        """Rotate a weight [N, K] or bias [N] of a block."""
        family = self._family
        if module in family.residual_readers and x.dim() == 2:
            x = self._reader(x, prefix + family.residual_readers[module])
        if module == family.value_proj:
            kept, values = x.double().split([len(x) - self._value_rows, self._value_rows])
            x = torch.cat([kept, _of_outputs(self._heads, values)])
        if module in family.residual_writers:
            x = _of_outputs(rotate, x.double())
        if module == family.out_proj and x.dim() == 2:
            x = self._heads(x)
        if module == family.down_proj and x.dim() == 2:
            x = reference.hadamard(x, self.online.block)
        return x

    def _reader(self, x: Tensor, norm: str) -> Tensor:
        """Rotate the input side of a matrix that reads the residual stream, and fold its norm's weight into it."""
        weight = self._checkpoint.read([f"{norm}.weight"])[f"{norm}.weight"]
        return rotate(x.double() * (weight.double() + self._family.norm_offset))

    def _heads(self, x: Tensor) -> Tensor:
        """Rotate each head's part of the last dimension."""
        return rotate(x.unflatten(-1, (-1, self._width))).flatten(-2)


def _of_outputs(rotation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Rotate the first dimension of a weight [N, K] or bias [N], instead of the last."""
    return rotation(x.transpose(0, -1)).transpose(0, -1)


def rotate(x: Tensor) -> Tensor:
    """x R for float64 x [..., K] and an orthogonal R: a Hadamard matrix if one of order K is easy to construct.

    R is the Kronecker product of Paley's matrix of order m and Sylvester's of order K / m, a power of two, with the smallest
    m for which there is one. If there is none, R is block-diagonal with Sylvester's matrices.
    """
    columns = x.shape[-1]
    core = _core(columns).to(x)
    narrow = reference.hadamard(x, columns // len(core)).unflatten(-1, (len(core), -1))
    wide: Tensor = (narrow.transpose(-1, -2) @ core).transpose(-1, -2)
    return wide.flatten(-2)


@cache
def _core(order: int) -> Tensor:
    """The factor of an orthogonal matrix that is not Sylvester's, float64 [m, m]; order / m is a power of two."""
    odd = order // _power_of_two(order)
    if odd == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    size = 4 * odd
    while order % size == 0:
        if _is_prime(size - 1):
            return _paley(size - 1)
        size *= 2
    return torch.eye(odd, dtype=torch.float64)


def _paley(prime: int) -> Tensor:
    """The orthonormal Hadamard matrix of order q + 1 for a prime q = 3 mod 4 (Paley's first construction)."""
    numbers = torch.arange(prime)
    residues = torch.full((prime,), -1.0, dtype=torch.float64)
    residues[numbers * numbers % prime] = 1.0
    residues[0] = 0.0
    matrix = torch.full((prime + 1, prime + 1), (prime + 1) ** -0.5, dtype=torch.float64)
    matrix[1:, 0] *= -1.0
    matrix[1:, 1:] *= residues[(numbers[:, None] - numbers) % prime] + torch.eye(prime, dtype=torch.float64)
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))


def _power_of_two(number: int) -> int:
    """The largest power of two that divides `number`."""
    return number & -number
