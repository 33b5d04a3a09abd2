"""What top-p and min-p keep of a whole vocabulary, and a draw from it, without sorting the vocabulary.

Tokens stand in falling order of their logits, equal ones by id. Where the cumulated mass crosses a number is usually found
among the few likeliest; otherwise tokens are counted into bins by their logits, and only the bin in which it crosses is
ordered. Weights are whole numbers, so that their sums are exact in float64, in whatever order they are added up: both ways,
and a full sort, find the same token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.runtime.selection import largest

#: Weight of the likeliest token. Those below half of 2^-34 of it count nothing; 2^19 of them add up exactly.
UNIT = 2.0**34

#: Likeliest tokens that are looked at first.
_FEW = 256

#: Bins, and the difference in logits over temperature that they span: what is behind weighs nothing.
_BINS, _SPAN = 2048, 24.0


class Nucleus:
    """What top-p and min-p keep of rows of logits: of each a prefix of the order.

    Attributes:
        weights: whole numbers in float32 [R, V], in proportion to the probabilities, UNIT for the likeliest.
        mass: that is kept, float64 [R, 1].
    """

    def __init__(self, logits: Tensor, temperatures: Sequence[float], top_p: Sequence[float], min_p: Sequence[float]) -> None:
        """
        Args:
            logits: float32 [R, V].
            temperatures, top_p, min_p: of every row, see `SamplingParams`.
        """
        vocab = logits.shape[1]
        assert vocab <= 1 << 19, vocab
        self._logits, self._temperatures = logits, temperatures
        self._orders: dict[int, _Order] = {}
        relative = logits - logits.amax(-1, keepdim=True)
        self.weights = relative.div_(_column(temperatures, relative)).exp_().mul_(UNIT).round_()
        self._ids = largest(logits, min(_FEW, vocab))[1]
        self._cumulated = self.weights.gather(1, self._ids).cumsum(-1, dtype=torch.float64)
        # Of tokens as likely as the last one, some may be missing.
        values = logits.gather(1, self._ids)
        self._certain = (values > values[:, -1:]).sum(-1, keepdim=True) if vocab > _FEW else vocab
        self.mass = self._sum(self.weights)
        likely = self.mass
        if max(min_p) > 0:
            likely = self._sum(self.weights.where(self.weights >= _column(min_p, relative) * UNIT, 0))
        if min(top_p) < 1:
            self.mass = self._crossing((_column(top_p, self.mass) * self.mass).ceil_().clamp_(min=1))[1]
        self.mass = torch.minimum(self.mass, likely)

    def draw(self, uniforms: Sequence[float]) -> Tensor:
        """A token of every row for numbers from [0, 1): the first whose cumulated mass exceeds that share of what is kept.
        int64 [R]."""
        share = (_column(uniforms, self.mass) * self.mass).floor_() + 1
        # Rounding may lift the share to the mass itself, which no token exceeds.
        return self._crossing(torch.minimum(share, self.mass))[0][:, 0]

    def inside(self) -> Tensor:
        """Which tokens are kept, bool [R, V]."""
        last = self._crossing(self.mass)[0]
        value, ids = self._logits.gather(1, last), torch.arange(self._logits.shape[1], device=last.device)
        return (self._logits > value) | ((self._logits == value) & (ids <= last))

    def _crossing(self, mass: Tensor) -> tuple[Tensor, Tensor]:
        """The first token of every row with which the cumulated mass reaches `mass`, 1 to the row's whole; float64 [R, 1].

        Returns:
            Its id, int64 [R, 1]; the cumulated mass with it.
        """
        place = torch.searchsorted(self._cumulated, mass)
        beyond = (place >= self._certain)[:, 0].nonzero()[:, 0].tolist()
        place.clamp_(max=self._ids.shape[1] - 1)
        found, reached = self._ids.gather(1, place), self._cumulated.gather(1, place)
        for row in beyond:
            if row not in self._orders:
                self._orders[row] = _Order(self._logits[row], self.weights[row], self._temperatures[row])
            found[row], reached[row] = self._orders[row].crossing(mass[row])
        return found, reached

    @staticmethod
    def _sum(weights: Tensor) -> Tensor:
        return weights.sum(-1, keepdim=True, dtype=torch.float64)


class _Order:
    """A row whose tokens are counted into bins by their logits."""

    def __init__(self, logits: Tensor, weights: Tensor, temperature: float) -> None:
        self._logits, self._weights = logits, weights
        # A bin is a function of the logit that never falls as logits do, so bins are in the tokens' order.
        below = (logits.max() - logits).mul_(_BINS / _SPAN / temperature)
        self._bins = below.clamp_(max=_BINS - 1).long()
        sums = torch.zeros(_BINS, dtype=torch.float64, device=logits.device)
        self._cumulated = sums.scatter_add_(0, self._bins, weights.double()).cumsum(0)

    def crossing(self, mass: Tensor) -> tuple[Tensor, Tensor]:
        """See `Nucleus`; float64 [1] -> [1], [1]."""
        chosen = int(torch.searchsorted(self._cumulated, mass).clamp_(max=_BINS - 1))
        ids = (self._bins == chosen).nonzero()[:, 0]
        ids = ids[self._logits[ids].sort(descending=True, stable=True).indices]
        cumulated = self._weights[ids].cumsum(0, dtype=torch.float64)
        if chosen:
            cumulated += self._cumulated[chosen - 1]
        place = torch.searchsorted(cumulated, mass).clamp_(max=len(ids) - 1)
        return ids[place], cumulated[place]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """[R, 1] of the type and on the device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
