"""Second moments of a matrix's inputs: all that GPTQ and AWQ need to know of the calibration data.

With inputs X [T tokens, K] the squared output error of replacing W by V is ||X (W - V)^T||^2 = T * tr((W - V) H (W - V)^T),
where H = X^T X / T. So both methods work on H [K, K] alone and never see a token twice.
"""

import torch
from torch import Tensor

#: Column blocks of the triangular accumulation: 8 leave (1 + 1/8) / 2 = 56% of the full product's work.
_BLOCKS = 8


class Hessian:
    """Running X^T X of one distinct input, and on request the cross moment of a second stream.

    Sums are float32; `mean` divides by the number of tokens, so that micro-batches of any size weigh by their tokens.
    Rows never hold padding: the corpus cuts one unbroken stream into full rows.
    """

    def __init__(self, columns: int, device: torch.device, *, paired: bool = False) -> None:
        self.tokens = self.paired_tokens = 0
        self._sum = torch.zeros(columns, columns, device=device)
        self._drift = torch.zeros(columns, columns, device=device) if paired else None

    def add(self, inputs: Tensor, reference: Tensor | None = None) -> None:
        """Add the rows of `inputs` [..., K]; `reference` are the same rows in the unquantized model."""
        x = inputs.reshape(-1, self._sum.shape[0]).float()
        self.tokens += x.shape[0]
        # The product is symmetric: only blocks on and above the diagonal are computed.
        step = -(-x.shape[1] // _BLOCKS)
        for start in range(0, x.shape[1], step):
            stop = start + step
            self._sum[:stop, start:stop].addmm_(x[:, :stop].T, x[:, start:stop])
        if reference is not None:
            assert self._drift is not None
            self.paired_tokens += x.shape[0]
            self._drift.addmm_(x.T, reference.reshape(x.shape).float() - x)

    def mean(self) -> Tensor:
        """H = X^T X / T, float32 [K, K], symmetric."""
        upper = self._sum.triu()
        return (upper + upper.triu(1).T) / self.tokens

    def drift(self) -> Tensor:
        """X^T (X_ref - X) / T over the paired tokens, float32 [K, K]: how the inputs stray from the original model's."""
        assert self._drift is not None
        return self._drift / self.paired_tokens
