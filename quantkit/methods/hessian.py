"""Second moments of a matrix's inputs: all that GPTQ and AWQ need from the calibration data.

With inputs X [T tokens, K] the squared output error of replacing W by V is ||X (W - V)^T||^2 = T * tr((W - V) H (W - V)^T),
where H = X^T X / T. Both methods therefore work on H [K, K] alone, and every token is read once.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.methods.products import products_for

#: Column blocks of the triangular accumulation: 8 leave (1 + 1/8) / 2 = 56% of the full product's work.
_BLOCKS = 8

#: Column blocks of the drift, which is not symmetric; narrower ones are slower.
_DRIFT_BLOCKS = 4

#: Relative work of every part of the sums: the column blocks, then those of the drift, to which an eighth of the rows adds.
PARTS = (*range(1, _BLOCKS + 1), *([_BLOCKS * _BLOCKS / 8 / _DRIFT_BLOCKS] * _DRIFT_BLOCKS))


#: Rows that are mirrored at the diagonal in one step.
_MIRRORED = 256


class HessianAccumulator:
    """Running X^T X of one distinct input, and the drift of its first tokens from the original model's.

    Sums are float32; `mean` divides by the number of tokens, so micro-batches of different sizes count by their tokens.
    Rows hold no padding: the corpus cuts one continuous stream of tokens into full rows.
    """

    def __init__(
        self,
        columns: int,
        device: torch.device,
        parts: Collection[int] = range(len(PARTS)),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Sums over inputs of `columns` columns, of which only `parts` (indices into PARTS) are computed here.

        `dtype` is the one in which they are multiplied (`fastest_products`); in bfloat16, all inputs must be bfloat16.
        """
        blocks = [_columns(part, columns) for part in parts if part < _BLOCKS]
        drift_blocks = [_columns(part, columns) for part in parts if part >= _BLOCKS]
        self._products = products_for(dtype, device, blocks, drift_blocks)
        self.tokens = self.paired_tokens = 0
        self._ended = False
        self._sum = torch.zeros(columns, columns, device=device)
        self._cross: Tensor | None = None
        self._paired_sum = self._sum

    def add(self, inputs: Tensor, reference: Tensor | None = None) -> None:
        """Add the rows of `inputs` [..., K]; `reference` are the same rows in the unquantized model.

        Micro-batches with a reference come before those without.
        """
        assert not self._ended, "inputs came after the mean was taken"
        x = inputs.reshape(-1, self._sum.shape[0])
        if reference is not None:
            assert self.paired_tokens == self.tokens, "a micro-batch with a reference came after one without"
            if self._cross is None:
                self._cross = torch.zeros_like(self._sum)
            self._products.add_drift(self._cross, x, reference.reshape(x.shape))
            self.paired_tokens += len(x)
        elif self._cross is not None and self._paired_sum is self._sum:
            self._paired_sum = self._sum.clone()
        self.tokens += len(x)
        self._products.add_square(self._sum, x)

    def part(self, number: int) -> list[Tensor]:
        """Views of what belongs to part `number` of the sums, to be read, or filled where another process computed it."""
        block = _columns(number, self._sum.shape[0])
        if number >= _BLOCKS:
            return [] if self._cross is None else [self._cross[:, block]]
        sums = [self._sum] if self._paired_sum is self._sum else [self._sum, self._paired_sum]
        return [whole[: block.stop, block] for whole in sums]

    def mean(self) -> Tensor:
        """H = X^T X / T over all tokens, float32 [K, K], symmetric. Nothing can be added afterwards."""
        self._end()
        return self._sum

    def drift(self) -> "Drift | None":
        """How the inputs differ from the reference; None if no micro-batch had one. Nothing can be added afterwards."""
        self._end()
        return None if self._cross is None else Drift(self._cross, self._paired_sum)

    def _end(self) -> None:
        """Turn the sums into means in place: for a wide input each sum takes a large part of the memory."""
        if self._ended:
            return
        self._ended = True
        self._products.free_buffers()
        _make_symmetric_mean(self._sum, self.tokens)
        if self._cross is not None:
            self._cross /= self.paired_tokens
            if self._paired_sum is not self._sum:
                _make_symmetric_mean(self._paired_sum, self.paired_tokens)


@dataclass(frozen=True)
class Drift:
    """How the quantized model's inputs X differ from the original model's X_ref, over the tokens that ran through both.

    Attributes:
        cross: X^T (X_ref - X) / T, float32 [K, K].
        hessian: X^T X / T over the same tokens. Solving with the Hessian of *all* tokens instead would overshoot in
            every direction in which these tokens are larger than average, and the error would grow from block to block.
    """

    cross: Tensor
    hessian: Tensor

    def divided_by(self, outer: Tensor) -> "Drift":
        """The drift of the inputs divided by a channel scale s, given s s^T."""
        return Drift(self.cross / outer, self.hessian / outer)


def _columns(part: int, columns: int) -> slice:
    """The columns of a part of the sums; none where there are fewer columns than parts."""
    number, count = (part, _BLOCKS) if part < _BLOCKS else (part - _BLOCKS, _DRIFT_BLOCKS)
    step = -(-columns // count)
    return slice(min(number * step, columns), min((number + 1) * step, columns))


def _make_symmetric_mean(upper: Tensor, tokens: int) -> None:
    """Divide a sum by `tokens` and mirror its upper triangle; below the diagonal the sum is incomplete."""
    upper /= tokens
    for start in range(0, len(upper), _MIRRORED):
        block, stop = upper[start : start + _MIRRORED], start + _MIRRORED
        square = block[:, start:stop].triu_()
        square += square.triu(1).T
        upper[stop:, start:stop] = block[:, stop:].T
