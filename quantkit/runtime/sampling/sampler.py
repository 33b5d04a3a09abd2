"""Sampling: constraint, penalties, temperature, top-k, top-p and min-p, in vLLM's order, then one uniform number per token.

Top-k, top-p and min-p each keep a prefix of the vocabulary sorted by falling probability. Together they keep the shortest of
the three prefixes, and a token is drawn from it by inverting the cumulative distribution. Sorting a whole vocabulary would
cost more than everything else. So with top-k, only the most likely tokens are selected, and more of them if the prefix turns
out to be longer; without top-k, `top_p` finds what top-p and min-p keep.

A row's token depends on its own logits, parameters and random numbers, never on the other rows: tokens of equal probability
are ordered by id, and the result is the same however many tokens were selected.
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

#: How many of the most likely tokens to select: each width in turn, until it contains every kept prefix; then all.
_WIDTHS = (64, 256, 1024, 4096)


@torch.inference_mode()
def sample(
    logits: Tensor,
    sequences: SequenceOf[Sequence],
    ahead: SequenceOf[SequenceOf[int]] | None = None,
    argmax_ids: SequenceOf[int] | None = None,
) -> list[Sample]:
    """Choose one token per row.

    Args:
        logits: float32 [R, V], the model's, free of rows that `find_nonfinite` names; changed by constraints and penalties.
        sequences: the R sequences that the rows belong to. Those that are not greedy consume one random number each.
        ahead: draft tokens between the end of each sequence and its row; none by default.
        argmax_ids: place of the largest logit of each row, if known.
    """
    params = [sequence.params for sequence in sequences]
    asked = [row for row, each in enumerate(params) if each.logprobs is not None]
    # Log probabilities are those of the unchanged logits: copy them if constraints or penalties will change them.
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
    """Mask, in place, the tokens that each row's constraint forbids; arguments as for `sample`. Returns whether it masked
    anything."""
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
    """Penalise, in place, the earlier tokens of each row's sequence; arguments as for `sample`."""
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
    """Draw one token per row, after penalties were applied.

    Args:
        logits: float32 [R, V].
        params: one per row.
        uniforms: one number from [0, 1) per row; ignored for greedy rows.
    """
    tokens = [0] * len(params)
    greedy = [row for row, each in enumerate(params) if each.greedy]
    whole = [row for row, each in enumerate(params) if not each.greedy and not each.filtered]
    filtered, nucleus = _filtered(params)
    groups = (greedy, _draw_greedy), (whole, _draw_whole), (filtered, _draw_filtered), (nucleus, _draw_nucleus)
    for rows, choose in groups:
        if rows:
            part = logits if len(rows) == len(params) else logits[rows]
            chosen = choose(part, [params[row] for row in rows], [uniforms[row] for row in rows])
            for row, token in zip(rows, chosen.tolist(), strict=True):
                tokens[row] = token
    return tokens


def distribution(logits: Tensor, params: SequenceOf[SamplingParams]) -> Tensor:
    """The distribution that `draw` draws from.

    Args:
        logits: float32 [R, V], after penalties.
        params: one per row; a greedy row has all its mass on one token.

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
    """The token at which the cumulative distribution exceeds `uniform`, a number from [0, 1).

    `probabilities`: float32 [V]; need not be normalised; not all 0.
    """
    cumulated = probabilities.cumsum(-1)[None]
    return int(_inverse_cdf(cumulated, cumulated[:, -1:], [uniform]))


def _filtered(params: SequenceOf[SamplingParams]) -> tuple[list[int], list[int]]:
    """Rows with top-k, and rows with top-p or min-p but no top-k."""
    rows = [row for row, each in enumerate(params) if not each.greedy and each.filtered]
    return [row for row in rows if params[row].top_k], [row for row in rows if not params[row].top_k]


def _draw_greedy(logits: Tensor, _params: SequenceOf[SamplingParams], _uniforms: SequenceOf[float]) -> Tensor:
    return torch.tensor(argmax(logits))


def _column(values: SequenceOf[float], like: Tensor) -> Tensor:
    """float32 [R, 1]."""
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _draw_whole(logits: Tensor, params: SequenceOf[SamplingParams], uniforms: SequenceOf[float]) -> Tensor:
    """Draw from the whole distribution, in order of token ids. Returns int64 [R]."""
    cumulated = softmax(logits, [each.temperature for each in params]).cumsum(-1)
    return _inverse_cdf(cumulated, cumulated[:, -1:], uniforms)


def _inverse_cdf(cumulated: Tensor, mass: Tensor, uniforms: SequenceOf[float]) -> Tensor:
    """The first entry at which `cumulated` [R, K] exceeds `uniforms` times `mass` [R, 1]. Returns int64 [R]."""
    target = _column(uniforms, cumulated) * mass
    # Rounding may lift the target to the mass itself, which no entry exceeds; then take the entry that reaches it.
    last = torch.searchsorted(cumulated, mass.contiguous())
    return torch.searchsorted(cumulated, target, right=True).minimum(last)[:, 0]


def _draw_nucleus(logits: Tensor, params: SequenceOf[SamplingParams], uniforms: SequenceOf[float]) -> Tensor:
    """Draw from what top-p and min-p keep, in falling order of probability. Returns int64 [R]."""
    return _nucleus(logits, params).draw(uniforms)


def _nucleus(logits: Tensor, params: SequenceOf[SamplingParams]) -> Nucleus:
    """The nucleus of rows without top-k."""
    return Nucleus(
        logits,
        temperatures=[each.temperature for each in params],
        top_p=[each.top_p for each in params],
        min_p=[each.min_p for each in params],
    )


def _draw_filtered(logits: Tensor, params: SequenceOf[SamplingParams], uniforms: SequenceOf[float]) -> Tensor:
    """Draw from what top-k, and then top-p and min-p, keep, in falling order of probability. Returns int64 [R]."""
    chosen = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    for rows, ids, weights, kept in _ranked(logits, params):
        cumulated = weights.cumsum(-1)
        places = _inverse_cdf(cumulated, cumulated.gather(1, kept - 1), [uniforms[row] for row in rows])
        chosen[rows] = ids.gather(1, places[:, None])[:, 0]
    return chosen


def _ranked(logits: Tensor, params: SequenceOf[SamplingParams]) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Select the most likely tokens of rows with top-k, enough of them to contain every kept prefix.

    Yields:
        r of the rows; the ids of their k most likely tokens, int64 [r, k]; weights relative to the first one, float32 [r, k];
        how many of the tokens are kept, int64 [r, 1]. Every row is yielded once.
    """
    vocab, rows = logits.shape[1], list(range(len(params)))
    # A width must exceed the largest top-k.
    fewest = max(each.top_k or _WIDTHS[0] for each in params)
    for width in (*(width for width in _WIDTHS if fewest < width < vocab), vocab):
        values, ids = largest(logits if len(rows) == len(params) else logits[rows], width)
        left = [params[row] for row in rows]
        weights = ((values - values[:, :1]) / _column([each.temperature for each in left], values)).exp_()
        kept, certain = _kept(weights, vocab, left)
        done = certain.tolist()
        if all(done):
            yield rows, ids, weights, kept
            return
        if any(done):
            yield [row for row, each in zip(rows, done, strict=True) if each], ids[certain], weights[certain], kept[certain]
        rows = [row for row, each in zip(rows, done, strict=True) if not each]


def _kept(weights: Tensor, vocab: int, params: SequenceOf[SamplingParams]) -> tuple[Tensor, Tensor]:
    """How many of the selected tokens the filters keep, int64 [R, 1], and for which rows that is certain, bool [R].

    Args:
        weights: float32 [R, K], of the K most likely tokens, relative to the first one. Tokens as likely as the last one
            may be missing, so a row is certain only if what it keeps ends before these.
        vocab: size of the vocabulary.
        params: one per row.
    """
    width = weights.shape[1]
    top_k = torch.tensor([min(each.top_k, vocab) for each in params], device=weights.device)[:, None]
    top_p, min_p = (_column([getattr(each, name) for each in params], weights) for name in ("top_p", "min_p"))
    by_k = top_k.clamp(max=width)
    cumulated = weights.cumsum(-1)
    before = torch.nn.functional.pad(cumulated[:, :-1], (1, 0))
    within = before < top_p * cumulated.gather(1, by_k - 1)
    # The smallest values of top_p are 0 in float32; the most likely token is always kept.
    by_p = torch.where(top_p < 1, within.sum(-1, keepdim=True).clamp_(min=1), width)
    by_min = (weights >= min_p).sum(-1, keepdim=True)
    kept = torch.minimum(torch.minimum(by_k, by_p), by_min)
    inside = (weights.gather(1, kept - 1) > weights[:, -1:]) & (top_k <= width)
    return kept, (inside | (width == vocab))[:, 0]
