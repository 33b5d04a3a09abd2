"""Which tokens of a draft are accepted, and the token that follows them. The text is distributed as it is without drafts.

`match_exact`, for greedy sequences and for drafts that were not drawn from a distribution: the token of each row is chosen as
if the draft before it were accepted, and draft tokens are accepted as long as they equal the chosen ones. A draft token x is
thus accepted with probability p(x), and otherwise a token is drawn from p without x. That is the rule below for a q with all
its mass on x. It spends the same random numbers as generation without drafts, so a seed gives the same text.

`rejection_sample`, for a drafter that drew x from q: speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1;
Chen et al., arXiv 2302.01318). Accept x with probability min(1, p(x) / q(x)); otherwise draw from max(p - q, 0), normalized,
and stop. If all tokens are accepted, one more is drawn from p.
"""

from collections.abc import Sequence as SequenceOf
from itertools import accumulate, islice

import torch
from torch import Tensor

from quantkit.runtime.core.output import TokenLogprobs
from quantkit.runtime.core.sequence import Draft, Sample, Sequence
from quantkit.runtime.sampling.logits import top_logprobs
from quantkit.runtime.sampling.sampler import apply_constraints, apply_penalties, distribution, inverse_cdf, sample


@torch.inference_mode()
def verify_drafts(
    logits: Tensor,
    sequences: SequenceOf[Sequence],
    drafts: SequenceOf[Draft],
    argmax_ids: SequenceOf[int] | None = None,
) -> list[list[Sample]]:
    """The tokens that follow each sequence: the accepted ones of its draft, and one more.

    Args:
        logits: float32 [R, V], after the sequence and after each token of its draft, one sequence after another; as for
            `sample`.
        sequences: the S sequences.
        drafts: one per sequence.
        argmax_ids: place of the largest logit of each row, if known.
    """
    starts = list(accumulate((1 + len(draft.tokens) for draft in drafts), initial=0))
    drawn = {i for i, draft in enumerate(drafts) if draft.probabilities is not None and not sequences[i].params.greedy}
    rest = [i for i in range(len(sequences)) if i not in drawn]
    if not drawn:
        return match_exact(logits, sequences, drafts, argmax_ids)
    chosen = {i: rejection_sample(logits[starts[i] : starts[i + 1]], sequences[i], drafts[i]) for i in drawn}
    if rest:
        rows = [row for i in rest for row in range(starts[i], starts[i + 1])]
        known = None if argmax_ids is None else [argmax_ids[row] for row in rows]
        matched = match_exact(logits[rows], [sequences[i] for i in rest], [drafts[i] for i in rest], known)
        chosen |= zip(rest, matched, strict=True)
    return [chosen[i] for i in range(len(sequences))]


def match_exact(
    logits: Tensor,
    sequences: SequenceOf[Sequence],
    drafts: SequenceOf[Draft],
    argmax_ids: SequenceOf[int] | None,
) -> list[list[Sample]]:
    """Choose a token on every row; accept draft tokens as long as they equal the chosen ones."""
    rows = [(s, draft.tokens[:i]) for s, draft in zip(sequences, drafts, strict=True) for i in range(len(draft.tokens) + 1)]
    if len(rows) == len(sequences):
        return [[each] for each in sample(logits, sequences, argmax_ids=argmax_ids)]
    # Rows after the first disagreement spend random numbers for nothing: these are given back.
    drawing = [bool(d.tokens) and not s.params.greedy for s, d in zip(sequences, drafts, strict=True)]
    states = [s.random.getstate() if draws else None for s, draws in zip(sequences, drawing, strict=True)]
    samples = iter(sample(logits, [sequence for sequence, _ in rows], [ahead for _, ahead in rows], argmax_ids))
    chosen = []
    for sequence, draft, state in zip(sequences, drafts, states, strict=True):
        of_draft = list(islice(samples, len(draft.tokens) + 1))
        agree = [each.token == token for each, token in zip(of_draft, draft.tokens, strict=False)]
        chosen.append(of_draft[: [*agree, False].index(False) + 1])
        if state is not None:
            sequence.random.setstate(state)
            for _ in chosen[-1]:
                sequence.random.random()
    return chosen


def rejection_sample(logits: Tensor, sequence: Sequence, draft: Draft) -> list[Sample]:
    """Speculative sampling of one sequence: logits [k + 1, V], a draft of k tokens drawn from its `probabilities`."""
    params, drawn, rows = sequence.params, list(draft.tokens), len(logits)
    assert draft.probabilities is not None
    raw = None if params.logprobs is None else logits.clone()
    sequences, ahead = [sequence] * rows, [drawn[:i] for i in range(rows)]
    apply_constraints(logits, sequences, ahead)
    apply_penalties(logits, sequences, ahead)
    p, q = distribution(logits, [params] * rows), draft.probabilities
    places = torch.tensor(drawn, device=p.device)[:, None]
    ratios = (p[:-1].gather(1, places) / q.gather(1, places))[:, 0].tolist()
    accepted = 0
    while accepted < len(drawn) and sequence.random.random() < ratios[accepted]:
        accepted += 1
    last = p[accepted]
    if accepted < len(drawn):
        residual = (last - q[accepted]).clamp_(min=0)
        # Where p and q differ by rounding only, the residual may be zero everywhere.
        last = residual if bool(residual.any()) else last
    tokens = [*drawn[:accepted], inverse_cdf(last, sequence.random.random())]
    if raw is None:
        return [Sample(token) for token in tokens]
    found = top_logprobs(raw[: len(tokens)], tokens, [params.logprobs or 0] * len(tokens))
    return [Sample(token, TokenLogprobs(token, *each)) for token, each in zip(tokens, found, strict=True)]
