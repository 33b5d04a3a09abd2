"""What top-p and min-p keep of a whole vocabulary, and a draw from it, without sorting the vocabulary.

Tokens stand in falling order of their logits, equal ones by id. Where the cumulated mass crosses a number is usually found
among the few likeliest; otherwise tokens are counted into bins by their logits, and only the bin in which it crosses is
ordered. Masses are whole numbers, so that their sums are exact in float64, in whatever order they are added up: both ways,
and a full sort, find the same token.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.runtime.sampling.top_k import largest

#: Mass of a whole vocabulary, but for rounding; a token below half of 2^-48 has none.
WHOLE = 2.0**48

#: Likeliest tokens that are looked at first.
_FEW = 128

#: Bins, and the difference in logits over temperature that they span; what is behind, and hardly weighs anything, is in the
#: last one.
_BINS, _SPAN = 2048, 24.0


def softmax(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Probabilities, float32 [R, V]: those of logits [R, V] over a row's temperature."""
    if any(each != 1 for each in temperatures):
        # Divided first, large ones would overflow, or lose what tells them apart.
        logits = (logits - logits.amax(-1, keepdim=True)).div_(_column(temperatures, logits))
    return torch.softmax(logits, -1)


class Nucleus:
    """What top-p and min-p keep of rows of logits, of each a prefix of the order; one of them leaves something out.

    Attributes:
        masses: whole numbers in float32 [R, V]: the probabilities, times WHOLE.
        kept: mass that is kept, float64 [R, 1].
    """

    def __init__(self, logits: Tensor, temperatures: Sequence[float], top_p: Sequence[float], min_p: Sequence[float]) -> None:
        """
        Args:
            logits: float32 [R, V].
            temperatures, top_p, min_p: of every row, see `SamplingParams`.
        """
        vocab = logits.shape[1]
        self._logits, self._temperatures = logits, temperatures
        self._orders: dict[int, _Order] = {}
        self.masses = softmax(logits, temperatures).mul_(WHOLE).round_()
        self._ids = largest(logits, min(_FEW, vocab))[1]
        few = self.masses.gather(1, self._ids)
        self._cumulated = few.cumsum(-1, dtype=torch.float64)
        # Of tokens as likely as the last one, some may be missing.
        values = logits.gather(1, self._ids)
        self._certain = (values > values[:, -1:]).sum(-1, keepdim=True) if vocab > _FEW else vocab
        self.kept = torch.full_like(self._cumulated[:, :1], math.inf)
        if min(top_p) < 1:
            share = _column(top_p, self.kept)
            self.kept = self._crossing((share * WHOLE).ceil_())[1].where(share < 1, math.inf)
        if max(min_p) > 0:
            self.kept = torch.minimum(self.kept, self._likely(_column(min_p, few) * few[:, :1], few))

    def draw(self, uniforms: Sequence[float]) -> Tensor:
        """A token of every row for numbers from [0, 1): the first whose cumulated mass exceeds that share of what is kept.
        int64 [R]."""
        share = (_column(uniforms, self.kept) * self.kept).floor_() + 1
        # Rounding may lift the share to the mass itself, which no token exceeds.
        return self._crossing(torch.minimum(share, self.kept))[0][:, 0]

    def inside(self) -> Tensor:
        """Which tokens are kept, bool [R, V]."""
        last = self._crossing(self.kept)[0]
        value, ids = self._logits.gather(1, last), torch.arange(self._logits.shape[1], device=last.device)
        return (self._logits > value) | ((self._logits == value) & (ids <= last))

    def _crossing(self, mass: Tensor) -> tuple[Tensor, Tensor]:
        """The first token of every row with which the cumulated mass reaches `mass`, positive float64 [R, 1]; else the last
        one that has any.

        Returns:
            Its id, int64 [R, 1]; the cumulated mass with it.
        """
        place = torch.searchsorted(self._cumulated, mass)
        beyond = (place >= self._certain)[:, 0].nonzero()[:, 0].tolist()
        place.clamp_(max=self._ids.shape[1] - 1)
        found, reached = self._ids.gather(1, place), self._cumulated.gather(1, place)
        for row in beyond:
            if row not in self._orders:
                self._orders[row] = _Order(self._logits[row], self.masses[row], self._temperatures[row])
            found[row], reached[row] = self._orders[row].crossing(mass[row])
        return found, reached

    def _likely(self, least: Tensor, few: Tensor) -> Tensor:
        """Mass of the tokens that have at least `least`, float32 [R, 1]; `few` are the masses of the likeliest."""
        count = (few >= least).sum(-1, keepdim=True)
        found = self._cumulated.gather(1, count - 1)
        for row in (count > self._certain)[:, 0].nonzero()[:, 0].tolist():
            masses = self.masses[row]
            found[row] = masses[masses >= least[row]].sum(dtype=torch.float64)
        return found


class _Order:
    """A row whose tokens are counted into bins by their logits."""

    def __init__(self, logits: Tensor, masses: Tensor, temperature: float) -> None:
        self._logits, self._masses = logits, masses
        # A bin is a function of the logit that never falls as logits do, so bins are in the tokens' order.
        below = (logits.max() - logits).mul_(_BINS / _SPAN / temperature)
        self._bins = below.clamp_(max=_BINS - 1).long()
        sums = torch.zeros(_BINS, dtype=torch.float64, device=logits.device)
        self._cumulated = sums.scatter_add_(0, self._bins, masses.double()).cumsum(0)

    def crossing(self, mass: Tensor) -> tuple[Tensor, Tensor]:
        """See `Nucleus`; float64 [1] -> [1], [1]."""
        mass = torch.minimum(mass, self._cumulated[-1:])
        chosen = int(torch.searchsorted(self._cumulated, mass))
        ids = (self._bins == chosen).nonzero()[:, 0]
        ids = ids[self._logits[ids].sort(descending=True, stable=True).indices]
        cumulated = self._masses[ids].cumsum(0, dtype=torch.float64)
        if chosen:
            cumulated += self._cumulated[chosen - 1]
        place = torch.searchsorted(cumulated, mass)
        return ids[place], cumulated[place]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """[R, 1] of the type and on the device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
