"""The next token of every row: constraint, penalties, temperature, top-k, top-p, min-p, in vLLM's order, then one
uniform number.

Top-k, top-p and min-p each keep the first tokens of the vocabulary in falling order of probability, so together they keep the
shortest of three prefixes, and a token is drawn by inverting the cumulated distribution. Sorting a vocabulary costs more than
all the rest: behind top-k, the likeliest tokens are selected first, more of them where the prefix turns out to be longer; what
top-p and min-p keep of a whole vocabulary is found by `nucleus`.

A row's token depends on its logits, its parameters and its own random numbers, never on the other rows: equal probabilities
are ordered by token id, and it takes the same path however many tokens had to be selected.
"""

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from quantkit.runtime.core.output import TokenLogprobs
from quantkit.runtime.core.request import SamplingParams
from quantkit.runtime.core.sequence import Sample, Sequence
from quantkit.runtime.sampling.logits import Penalty, apply_token_mask, penalise, top_logprobs
from quantkit.runtime.sampling.top_k import argmax, largest
from quantkit.runtime.sampling.top_p import Nucleus, softmax

#: Likeliest tokens that are selected, one number after another until every kept prefix is inside; at last all are sorted.
_WIDTHS = (64, 256, 1024, 4096)


@torch.inference_mode()
def sample(
    logits: Tensor,
    sequences: SequenceOf[Sequence],
    ahead: SequenceOf[SequenceOf[int]] | None = None,
    argmax_ids: SequenceOf[int] | None = None,
) -> list[Sample]:
    """One token for every row.

    Args:
        logits: float32 [R, V], the model's, without `logits.find_nonfinite`; changed by constraints and penalties.
        sequences: the R sequences that the rows follow. Those that are not greedy spend one random number each.
        ahead: tokens between each sequence's own and its row; none by default.
        likeliest_ids: the largest logit's of every row, where they are known.
    """
    params = [sequence.params for sequence in sequences]
    asked = [row for row, each in enumerate(params) if each.logprobs is not None]
    # Constraints and penalties change the logits; otherwise these are still what they were.
    changes = any(params[row].penalised or sequences[row].constraint is not None for row in asked)
    raw = None if not asked else logits if len(asked) == len(params) and not changes else logits[asked]
    if apply_constraints(logits, sequences, ahead):
        argmax_ids = None
    if all(each.argmax_only for each in params):
        return [Sample(token) for token in (argmax(logits) if argmax_ids is None else argmax_ids)]
    apply_penalties(logits, sequences, ahead)
    tokens = draw(logits, params, [0.0 if each.params.greedy else each.random.random() for each in sequences])
    samples = [Sample(token) for token in tokens]
    if raw is not None:
        wanted = [params[row].logprobs or 0 for row in asked]
        found = top_logprobs(raw, [tokens[row] for row in asked], wanted)
        for row, (value, top) in zip(asked, found, strict=True):
            samples[row] = Sample(tokens[row], TokenLogprobs(tokens[row], value, top))
    return samples


def apply_constraints(
    logits: Tensor, sequences: SequenceOf[Sequence], ahead: SequenceOf[SequenceOf[int]] | None = None
) -> bool:
    """Rule out, in place, what each row's sequence must not go on with (see `sample`); whether anything was."""
    if all(sequence.constraint is None for sequence in sequences):
        return False
    tokens = ahead or [()] * len(sequences)
    rows = enumerate(zip(sequences, tokens, strict=True))
    masks = {row: s.constraint.mask(each) for row, (s, each) in rows if s.constraint is not None}
    found = {row: mask for row, mask in masks.items() if mask is not None}
    if found:
        apply_token_mask(logits, list(found), list(found.values()))
    return bool(found)


def apply_penalties(logits: Tensor, sequences: SequenceOf[Sequence], ahead: SequenceOf[SequenceOf[int]] | None = None) -> None:
    """Penalise, in place, the tokens that each row's sequence has had; see `sample`."""
    tokens = ahead or [()] * len(sequences)
    rows = enumerate(zip(sequences, tokens, strict=True))
    penalties = [_penalty(row, sequence, each) for row, (sequence, each) in rows if sequence.params.penalised]
    if penalties:
        penalise(logits, penalties)


def _penalty(row: int, sequence: Sequence, ahead: SequenceOf[int]) -> Penalty:
    params, history = sequence.params, sequence.history
    history.update(sequence.tokens, sequence.num_prompt)
    return Penalty(row, history, ahead, params.repetition_penalty, params.presence_penalty, params.frequency_penalty)


def draw(logits: Tensor, params: SequenceOf[SamplingParams], uniforms: SequenceOf[float]) -> list[int]:
    """One token for every row of penalised logits.

    Args:
        logits: float32 [R, V].
        params: of every row.
        uniforms: a number from [0, 1) for every row; unused where the row is greedy.
    """
    tokens = [0] * len(params)
    greedy = [row for row, each in enumerate(params) if each.greedy]
    whole = [row for row, each in enumerate(params) if not each.greedy and not each.filtered]
    filtered, nucleus = _filtered(params)
    ways = (greedy, _likeliest), (whole, _draw_whole), (filtered, _draw_filtered), (nucleus, _draw_nucleus)
    for rows, choose in ways:
        if rows:
            part = logits if len(rows) == len(params) else logits[rows]
            chosen = choose(part, [params[row] for row in rows], [uniforms[row] for row in rows])
            for row, token in zip(rows, chosen.tolist(), strict=True):
                tokens[row] = token
    return tokens


def distribution(logits: Tensor, params: SequenceOf[SamplingParams]) -> Tensor:
    """What `draw` draws from.

    Args:
        logits: float32 [R, V], penalised.
        params: of every row; a greedy one has all its mass on one token.

    Returns:
        Probabilities, float32 [R, V].
    """
    out = torch.zeros_like(logits)
    for row, each in enumerate(params):
        if each.greedy:
            out[row, argmax(logits[row : row + 1])] = 1
        elif not each.filtered:
            out[row] = softmax(logits[row : row + 1], [each.temperature])[0]
    filtered, nucleus = _filtered(params)
    if filtered:
        for rows, ids, weights, kept in _ranked(logits[filtered], [params[row] for row in filtered]):
            inside = torch.arange(weights.shape[1], device=weights.device) < kept
            weights = weights.where(inside, 0)
            places = torch.tensor([filtered[row] for row in rows], device=weights.device)[:, None]
            out[places, ids] = weights / weights.sum(-1, keepdim=True)
    if nucleus:
        found = _nucleus(logits[nucleus], [params[row] for row in nucleus])
        out[nucleus] = found.masses.where(found.inside(), 0) / found.kept.float()
    return out


def inverse_cdf(probabilities: Tensor, uniform: float) -> int:
    """The token that a number from [0, 1) gives. `probabilities`: float32 [V], not normalised, not all 0."""
    cumulated = probabilities.cumsum(-1)[None]
    return int(_inverse_cdf(cumulated, cumulated[:, -1:], [uniform]))


def _filtered(params: SequenceOf[SamplingParams]) -> tuple[list[int], list[int]]:
    """Rows that top-k filters, and rows that only top-p or min-p does."""
    rows = [row for row, each in enumerate(params) if not each.greedy and each.filtered]
    return [row for row in rows if params[row].top_k], [row for row in rows if not params[row].top_k]


def _likeliest(logits: Tensor, _params: SequenceOf[SamplingParams], _uniforms: SequenceOf[float]) -> Tensor:
    return torch.tensor(argmax(logits))


def _column(values: SequenceOf[float], like: Tensor) -> Tensor:
    """float32 [R, 1]."""
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _draw_whole(logits: Tensor, params: SequenceOf[SamplingParams], uniforms: SequenceOf[float]) -> Tensor:
    """From the whole distribution, in order of token ids. Returns int64 [R]."""
    cumulated = softmax(logits, [each.temperature for each in params]).cumsum(-1)
    return _inverse_cdf(cumulated, cumulated[:, -1:], uniforms)


def _inverse_cdf(cumulated: Tensor, mass: Tensor, uniforms: SequenceOf[float]) -> Tensor:
    """The first entry at which `cumulated` [R, K] exceeds the share `uniforms` of `mass` [R, 1]. Returns int64 [R]."""
    target = _column(uniforms, cumulated) * mass
    # Rounding may lift the target to the mass itself, which no entry exceeds: then it is the one that completes it.
    last = torch.searchsorted(cumulated, mass.contiguous())
    return torch.searchsorted(cumulated, target, right=True).minimum(last)[:, 0]


def _draw_nucleus(logits: Tensor, params: SequenceOf[SamplingParams], uniforms: SequenceOf[float]) -> Tensor:
    """From what top-p and min-p keep, in falling order of probability. Returns int64 [R]."""
    return _nucleus(logits, params).draw(uniforms)


def _nucleus(logits: Tensor, params: SequenceOf[SamplingParams]) -> Nucleus:
    """Rows without top-k."""
    return Nucleus(logits, *([getattr(each, name) for each in params] for name in ("temperature", "top_p", "min_p")))


def _draw_filtered(logits: Tensor, params: SequenceOf[SamplingParams], uniforms: SequenceOf[float]) -> Tensor:
    """From what top-k, and then top-p and min-p, keep, in falling order of probability. Returns int64 [R]."""
    chosen = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    for rows, ids, weights, kept in _ranked(logits, params):
        cumulated = weights.cumsum(-1)
        places = _inverse_cdf(cumulated, cumulated.gather(1, kept - 1), [uniforms[row] for row in rows])
        chosen[rows] = ids.gather(1, places[:, None])[:, 0]
    return chosen


def _ranked(logits: Tensor, params: SequenceOf[SamplingParams]) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """The likeliest tokens of rows with top-k, as many as it takes for every kept prefix to be inside.

    Yields:
        Some r of the rows; ids of their k likeliest tokens, int64 [r, k]; weights relative to the first, [r, k]; how many of
        them are kept, int64 [r, 1]. Every row comes once.
    """
    vocab, rows = logits.shape[1], list(range(len(params)))
    # Fewer are not enough for top-k, nor often without it.
    fewest = max(each.top_k or _WIDTHS[0] for each in params)
    for width in (*(width for width in _WIDTHS if fewest < width < vocab), vocab):
        values, ids = largest(logits if len(rows) == len(params) else logits[rows], width)
        left = [params[row] for row in rows]
        weights = ((values - values[:, :1]) / _column([each.temperature for each in left], values)).exp_()
        kept, settled = _kept(weights, vocab, left)
        done = settled.tolist()
        if all(done):
            yield rows, ids, weights, kept
            return
        if any(done):
            yield [row for row, each in zip(rows, done, strict=True) if each], ids[settled], weights[settled], kept[settled]
        rows = [row for row, each in zip(rows, done, strict=True) if not each]


def _kept(weights: Tensor, vocab: int, params: SequenceOf[SamplingParams]) -> tuple[Tensor, Tensor]:
    """How many of the ranked tokens the filters keep, int64 [R, 1], and for which rows that is certain, bool [R].

    `weights` [R, K] are those of the K likeliest of a vocabulary relative to the first. Of tokens as likely as the last one,
    some may be missing: a row is certain when what it keeps ends before these.
    """
    width = weights.shape[1]
    top_k = torch.tensor([min(each.top_k, vocab) for each in params], device=weights.device)[:, None]
    top_p, min_p = (_column([getattr(each, name) for each in params], weights) for name in ("top_p", "min_p"))
    by_k = top_k.clamp(max=width)
    cumulated = weights.cumsum(-1)
    before = torch.nn.functional.pad(cumulated[:, :-1], (1, 0))
    within = before < top_p * cumulated.gather(1, by_k - 1)
    # In float32 the smallest top_p are 0; the likeliest token is kept all the same.
    by_p = torch.where(top_p < 1, within.sum(-1, keepdim=True).clamp_(min=1), width)
    by_min = (weights >= min_p).sum(-1, keepdim=True)
    kept = torch.minimum(torch.minimum(by_k, by_p), by_min)
    inside = (weights.gather(1, kept - 1) > weights[:, -1:]) & (top_k <= width)
    return kept, (inside | (width == vocab))[:, 0]
