"""Top-p and min-p over a whole vocabulary, without sorting it.

Tokens are ordered by falling logits, equal ones by id. The place where the cumulative mass crosses a number is usually among
the few most likely tokens. Otherwise tokens are counted into bins by their logits, and only the bin of the crossing is
sorted. Masses are whole numbers, so their sums in float64 are exact in any order of addition: both methods, and a full sort,
find the same token.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.runtime.sampling.top_k import largest

#: Mass of the whole vocabulary, up to rounding; a token with a probability below 2^-49 has mass 0.
WHOLE = 2.0**48

#: How many of the most likely tokens are searched first.
_FEW = 128

#: Number of bins, and the range of (largest logit - logit) / temperature that they span. Tokens beyond it have hardly any
#: mass; they are in the last bin.
_BINS, _SPAN = 2048, 24.0


def softmax(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Probabilities, float32 [R, V], of logits [R, V] divided by each row's temperature."""
    if any(each != 1 for each in temperatures):
        # The maximum is subtracted first: large logits divided by a small temperature would overflow or lose precision.
        logits = (logits - logits.amax(-1, keepdim=True)).div_(_column(temperatures, logits))
    return torch.softmax(logits, -1)


class Nucleus:
    """The tokens that top-p and min-p keep: a prefix of each row's sorted vocabulary. At least one of the two is active.

    Attributes:
        masses: float32 [R, V], the probabilities times WHOLE, rounded to whole numbers.
        kept: float64 [R, 1], the mass that is kept.
    """

    def __init__(self, logits: Tensor, temperatures: Sequence[float], top_p: Sequence[float], min_p: Sequence[float]) -> None:
        """
        Args:
            logits: float32 [R, V].
            temperatures, top_p, min_p: one per row, see `SamplingParams`.
        """
        vocab = logits.shape[1]
        self._logits, self._temperatures = logits, temperatures
        self._binned: dict[int, _BinnedRow] = {}
        self.masses = softmax(logits, temperatures).mul_(WHOLE).round_()
        self._ids = largest(logits, min(_FEW, vocab))[1]
        few = self.masses.gather(1, self._ids)
        self._cumulated = few.cumsum(-1, dtype=torch.float64)
        # Tokens as likely as the last of the few may be missing from them: only those before these are certain.
        values = logits.gather(1, self._ids)
        self._certain = (values > values[:, -1:]).sum(-1, keepdim=True) if vocab > _FEW else vocab
        self.kept = torch.full_like(self._cumulated[:, :1], math.inf)
        if min(top_p) < 1:
            share = _column(top_p, self.kept)
            self.kept = self._crossing((share * WHOLE).ceil_())[1].where(share < 1, math.inf)
        if max(min_p) > 0:
            self.kept = torch.minimum(self.kept, self._likely(_column(min_p, few) * few[:, :1], few))

    def draw(self, uniforms: Sequence[float]) -> Tensor:
        """Draw one token per row, int64 [R]: the first whose cumulative mass exceeds `uniforms`, from [0, 1), times `kept`."""
        share = (_column(uniforms, self.kept) * self.kept).floor_() + 1
        # Rounding may lift the target above the kept mass, which no token reaches.
        return self._crossing(torch.minimum(share, self.kept))[0][:, 0]

    def inside(self) -> Tensor:
        """Which tokens are kept, bool [R, V]."""
        last = self._crossing(self.kept)[0]
        value, ids = self._logits.gather(1, last), torch.arange(self._logits.shape[1], device=last.device)
        return (self._logits > value) | ((self._logits == value) & (ids <= last))

    def _crossing(self, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Find the first token of each row at which the cumulative mass reaches `mass`, or the last token with any mass.

        Args:
            mass: float64 [R, 1], positive.

        Returns:
            The ids of these tokens, int64 [R, 1], and the cumulative mass up to and including them, float64 [R, 1].
        """
        place = torch.searchsorted(self._cumulated, mass)
        beyond = (place >= self._certain)[:, 0].nonzero()[:, 0].tolist()
        place.clamp_(max=self._ids.shape[1] - 1)
        found, reached = self._ids.gather(1, place), self._cumulated.gather(1, place)
        for row in beyond:
            if row not in self._binned:
                self._binned[row] = _BinnedRow(self._logits[row], self.masses[row], self._temperatures[row])
            found[row], reached[row] = self._binned[row].crossing(mass[row])
        return found, reached

    def _likely(self, least: Tensor, few: Tensor) -> Tensor:
        """Total mass of the tokens with at least mass `least`, float32 [R, 1]; `few`: masses of the most likely tokens."""
        count = (few >= least).sum(-1, keepdim=True)
        found = self._cumulated.gather(1, count - 1)
        for row in (count > self._certain)[:, 0].nonzero()[:, 0].tolist():
            masses = self.masses[row]
            found[row] = masses[masses >= least[row]].sum(dtype=torch.float64)
        return found


class _BinnedRow:
    """One row whose tokens are counted into bins by their logits."""

    def __init__(self, logits: Tensor, masses: Tensor, temperature: float) -> None:
        self._logits, self._masses = logits, masses
        # The bin number grows as the logit falls, so the bins are in the tokens' order.
        below = (logits.max() - logits).mul_(_BINS / _SPAN / temperature)
        self._bins = below.clamp_(max=_BINS - 1).long()
        sums = torch.zeros(_BINS, dtype=torch.float64, device=logits.device)
        self._cumulated = sums.scatter_add_(0, self._bins, masses.double()).cumsum(0)

    def crossing(self, mass: Tensor) -> tuple[Tensor, Tensor]:
        """As `Nucleus._crossing`, for this row: float64 [1] -> int64 [1], float64 [1]."""
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
    """[R, 1] with the dtype and device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
