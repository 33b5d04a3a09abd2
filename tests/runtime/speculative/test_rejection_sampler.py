"""Text with drafts is distributed as without drafts: against the exact distribution over a small vocabulary."""

from collections import Counter
from collections.abc import Callable, Hashable
from functools import cache
from itertools import product
from random import Random

import pytest
import torch
from torch import Tensor

from helpers.exact import chi_square, probabilities
from helpers.fake_model import logits_after
from helpers.proposers import Drawer
from helpers.sequences import sequence
from quantkit.runtime.core.request import SamplingParams
from quantkit.runtime.core.sequence import Draft, Sequence
from quantkit.runtime.speculative.rejection_sampler import verify_drafts

VOCAB = 5
PROMPT, OUTPUT = [3, 1], (1,)
#: Draft length, and rounds per test. Texts of three tokens are compared: two may be accepted, and one follows.
LENGTH, ROUNDS = 2, 3000

CASES = {
    "plain": SamplingParams(temperature=4.0),
    "cold": SamplingParams(temperature=1.5),
    "top-k": SamplingParams(temperature=4.0, top_k=3),
    "top-p": SamplingParams(temperature=4.0, top_p=0.8),
    "min-p": SamplingParams(temperature=3.0, min_p=0.2),
    "all": SamplingParams(temperature=4.0, top_k=4, top_p=0.95, min_p=0.05),
    "penalties": SamplingParams(temperature=2.0, repetition_penalty=1.4, presence_penalty=1.0, frequency_penalty=0.7),
}


@cache
def exact(text: tuple[int, ...], params: SamplingParams) -> Tensor:
    """The next token's probabilities after PROMPT, OUTPUT and `text`, float64 [V]."""
    logits, output = logits_after([*PROMPT, *OUTPUT, *text], VOCAB).double(), [*OUTPUT, *text]
    for token in {*PROMPT, *output}:
        logits[token] *= 1 / params.repetition_penalty if logits[token] > 0 else params.repetition_penalty
        logits[token] -= params.presence_penalty * (token in output) + params.frequency_penalty * output.count(token)
    return probabilities(logits, params)


def texts(params: SamplingParams) -> dict[Hashable, float]:
    """Probability of every text of LENGTH + 1 tokens."""
    wanted: dict[Hashable, float] = {}
    for text in product(range(VOCAB), repeat=LENGTH + 1):
        wanted[text] = 1.0
        for i, token in enumerate(text):
            wanted[text] *= float(exact(text[:i], params)[token])
    return wanted


def rows(text: Sequence, draft: Draft) -> Tensor:
    """The model's logits after the sequence and after each token of its draft."""
    tokens = [*text.tokens, *draft.tokens]
    return torch.stack([logits_after(tokens[: len(text.tokens) + i], VOCAB) for i in range(len(draft.tokens) + 1)])


def certain(random: Random) -> Callable[[Sequence], Draft]:
    """A drafter that returns no distributions: it prefers some tokens, by a rule that has nothing to do with the model."""
    return lambda text: Draft([min(random.choices(range(VOCAB), k=3)) for _ in range(LENGTH)])


def drawn(_: Random) -> Callable[[Sequence], Draft]:
    """A drafter that draws its tokens."""
    return lambda text: Drawer(VOCAB).draft(text, LENGTH)


def run(params: SamplingParams, drafter: Callable[[Sequence], Draft], seed: int) -> tuple[Counter[Hashable], int]:
    """The resulting texts, those that end early completed by the exact distribution; and the number of accepted tokens."""
    counts: Counter[Hashable] = Counter()
    accepted, rest = 0, Random(seed)
    made = [sequence(PROMPT, OUTPUT, params, index=10_000 * seed + index) for index in range(ROUNDS)]
    drafts = [drafter(text) for text in made]
    logits = torch.cat([rows(text, draft) for text, draft in zip(made, drafts, strict=True)])
    for draft, samples in zip(drafts, verify_drafts(logits, made, drafts), strict=True):
        tokens = tuple(each.token for each in samples)
        accepted += len(tokens) - 1
        assert tokens[:-1] == tuple(draft.tokens[: len(tokens) - 1])
        while len(tokens) <= LENGTH:
            tokens += tuple(rest.choices(range(VOCAB), exact(tokens, params).tolist()))
        counts[tokens] += 1
    return counts, accepted


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("drafter", [certain, drawn])
def test_texts_are_distributed_as_without_drafts(drafter: Callable[[Random], Callable[[Sequence], Draft]], name: str) -> None:
    counts, accepted = run(CASES[name], drafter(Random(5)), seed=1)
    statistic, bound = chi_square(counts, texts(CASES[name]))
    assert statistic < bound
    # Some drafts were accepted and some rejected; otherwise the test would show nothing.
    assert 0.05 * ROUNDS < accepted < 0.95 * LENGTH * ROUNDS


def test_the_statistic_tells_distributions_apart() -> None:
    # The premise of the test above: the same draws do not fit the distribution of a slightly lower temperature, nor that of
    # the commonest mistake, drawing again from all of p where a token was refused, which favours what is drafted.
    params = CASES["plain"]
    counts, _ = run(params, certain(Random(5)), seed=1)
    statistic, bound = chi_square(counts, texts(SamplingParams(temperature=3.0)))
    assert statistic > bound
    draft = [((VOCAB - token) ** 3 - (VOCAB - token - 1) ** 3) / VOCAB**3 for token in range(VOCAB)]
    p = exact((), params).tolist()
    refused = 1 - sum(q * each for q, each in zip(draft, p, strict=True))
    mistaken: dict[Hashable, float] = {token: (draft[token] + refused) * p[token] for token in range(VOCAB)}
    first = Counter[Hashable]()
    for text, count in counts.items():
        assert isinstance(text, tuple)
        first[text[0]] += count
    statistic, bound = chi_square(first, mistaken)
    assert statistic > bound


def test_a_drafter_that_draws_from_the_models_own_distribution_is_always_right() -> None:
    params = SamplingParams(temperature=2.0, top_k=4)
    for index in range(300):
        text = sequence(PROMPT, OUTPUT, params, index=index)
        first = exact((), params)
        token = text.random.choices(range(VOCAB), first.tolist())[0]
        draft = Draft([token], first[None].float())
        (samples,) = verify_drafts(rows(text, draft), [text], [draft])
        # Rounding may reject 2^-24 of the draws.
        assert len(samples) == 2


def test_nothing_left_over_falls_back_to_the_models_distribution() -> None:
    # p equals q, and still the token is rejected, because its probability is 0 in both.
    params = SamplingParams(temperature=2.0, top_k=2)
    p = exact((), params)
    never = int((p == 0).nonzero()[0])
    text = sequence(PROMPT, OUTPUT, params)
    draft = Draft([never], p[None].float())
    logits = rows(text, draft)
    (samples,) = verify_drafts(logits, [text], [draft])
    assert len(samples) == 1
    assert float(p[samples[0].token]) > 0


def test_random_numbers_are_those_of_a_run_without_drafts() -> None:
    params = SamplingParams(temperature=3.0, top_p=0.9)
    for index in range(40):
        plain, drafted = (sequence(PROMPT, OUTPUT, params, index=index) for _ in range(2))
        tokens: list[int] = []
        for _ in range(3):
            (samples,) = verify_drafts(logits_after([*PROMPT, *OUTPUT, *tokens], VOCAB)[None], [plain], [Draft()])
            tokens.append(samples[0].token)
            plain.tokens.append(samples[0].token)
        draft = Draft([tokens[0], tokens[1] if index % 2 else (tokens[1] + 1) % VOCAB])
        (samples,) = verify_drafts(rows(drafted, draft), [drafted], [draft])
        assert [each.token for each in samples] == tokens[: 3 if index % 2 else 2]
        if index % 2:
            assert plain.random.random() == drafted.random.random()


def test_sequences_of_all_kinds_in_one_call() -> None:
    """Each sequence gets the same as alone: greedy, drawn, with and without logprobs, with drafts of any length and kind."""
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, logprobs=2, repetition_penalty=1.3),
        SamplingParams(temperature=2.0, logprobs=1),
        SamplingParams(temperature=3.0, top_k=3, frequency_penalty=0.5),
    ]
    cases = [(params, kind, count) for params in kinds for kind in ("certain", "drawn") for count in (0, 1, 3)]

    def make(number: int) -> tuple[Sequence, Draft]:
        params, kind, count = cases[number]
        text = sequence(PROMPT, OUTPUT, params, index=number)
        if kind == "drawn" and count and not params.greedy:
            return text, Drawer(VOCAB).draft(text, count)
        return text, Draft([(number + i) % VOCAB for i in range(count)])

    made = [make(number) for number in range(len(cases))]
    logits = torch.cat([rows(text, draft) for text, draft in made])
    together = verify_drafts(logits, [text for text, _ in made], [draft for _, draft in made])
    for number in range(len(cases)):
        text, draft = make(number)
        (alone,) = verify_drafts(rows(text, draft), [text], [draft])
        assert alone == together[number]
        assert all((each.logprobs is None) == (text.params.logprobs is None) for each in alone)
