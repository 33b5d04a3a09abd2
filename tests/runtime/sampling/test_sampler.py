"""Sampling compared with the definitions, written out in float64, one row at a time."""

import itertools
import math
from array import array
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.exact import kept, probabilities
from helpers.sequences import sequence
from quantkit.errors import RequestError
from quantkit.kernels.cpu.row_max import row_max
from quantkit.runtime.core.request import MAX_TEMPERATURE, SamplingParams
from quantkit.runtime.core.token_history import TokenHistory
from quantkit.runtime.sampling.logits import Penalty, find_nonfinite, penalise, top_logprobs
from quantkit.runtime.sampling.sampler import apply_penalties, distribution, draw, sample
from quantkit.runtime.sampling.top_k import argmax, largest

#: Wider than every selection width, so that all code paths are taken.
VOCAB = 9600

FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 300},
    {"top_k": 4500},
    {"top_k": VOCAB + 9},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"min_p": 0.1},
    {"min_p": 1e-6},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.7},
    {"top_k": 400, "top_p": 0.99, "min_p": 0.003},
]

#: Standard deviations of normal logits: from nearly flat, where almost all tokens are kept, to sharp.
SPREADS = (0.05, 1.0, 4.0)


def _logits(rows: int, spread: float, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def _interval(logits: Tensor, params: SamplingParams, token: int) -> tuple[float, float]:
    """The interval of uniform numbers that give `token`."""
    ids, values = kept(logits, params)
    if not params.filtered:
        ids, order = ids.sort()
        values = values[order]
    place = (ids == token).nonzero()
    assert len(place) == 1, f"token {token} is not kept"
    stop = float(values.cumsum(0)[place[0, 0]])
    return stop - float(values[place[0, 0]]), stop


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_tokens_are_those_of_the_inverted_distribution(filters: dict[str, float], spread: float) -> None:
    params = SamplingParams(temperature=0.8, **filters)  # type: ignore[arg-type]
    uniforms = [0.0, 0.013, 0.31, 0.5, 0.77, 0.99, 1 - 2**-24, 1 - 2**-53]
    logits = _logits(1, spread)
    tokens = draw(logits.expand(len(uniforms), -1), [params] * len(uniforms), uniforms)
    for token, uniform in zip(tokens, uniforms, strict=True):
        low, high = _interval(logits[0], params, token)
        # float32 sums of 9600 probabilities: the bounds of an interval move by some 1e-6.
        assert low - 1e-5 <= uniform <= high + 1e-5


@pytest.mark.parametrize("spread", SPREADS)
def test_the_distribution_is_what_is_drawn_from(spread: float) -> None:
    params = [SamplingParams(temperature=0.8, **filters) for filters in FILTERS]  # type: ignore[arg-type]
    logits = _logits(len(params), spread)
    found = distribution(logits.clone(), params)
    for row, each in enumerate(params):
        # float32 sums of 9600 probabilities; where a filter cuts, the token at the edge may fall on either side.
        gap = (found[row] - probabilities(logits[row], each)).abs()
        assert float(gap.sum()) < 2e-4
        assert float(found[row].sum()) == pytest.approx(1, abs=1e-5)
    greedy = distribution(logits[:2].clone(), [SamplingParams(temperature=0), params[0]])
    assert greedy[0].nonzero().flatten().tolist() == [int(logits[0].argmax())]


@pytest.mark.parametrize("spread", SPREADS)
def test_a_row_does_not_depend_on_its_neighbours(spread: float) -> None:
    params = [SamplingParams(temperature=t, **f) for t, f in itertools.product((0.0, 0.5, 1.5), FILTERS)]  # type: ignore[arg-type]
    draws = Random(0)
    # Rounding makes many logits equal; their order must not depend on how many were selected.
    logits = _logits(len(params), spread).mul(8).round().div(8)
    uniforms = [draws.random() for _ in params]
    together = draw(logits.clone(), params, uniforms)
    alone = [draw(logits[i : i + 1].clone(), params[i : i + 1], uniforms[i : i + 1])[0] for i in range(len(params))]
    assert together == alone


def test_equal_logits_are_kept_by_id() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [30, 10, 20]] = 1.0
    for top_k, wanted in ((2, {10, 20}), (5, {10, 20, 30, 0, 1})):
        found = {draw(logits, [SamplingParams(top_k=top_k)], [i / 50])[0] for i in range(50)}
        assert found == wanted


def test_greedy_and_cold_rows_take_the_likeliest() -> None:
    logits = _logits(4, 3.0)
    params = [SamplingParams(temperature=t, top_p=0.5) for t in (0.0, 1e-30, 1e-6, 1e-3)]
    assert draw(logits, params, [0.999] * 4) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1.0, MAX_TEMPERATURE])
def test_impossible_tokens_are_never_drawn(temperature: float) -> None:
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, [5, 4000]] = torch.tensor([0.0, -1.0])
    for filters in ({}, {"top_k": 3000}, {"top_p": 0.9999}, {"min_p": 1e-9}):
        params = SamplingParams(temperature=temperature, **filters)
        found = {draw(logits, [params], [u])[0] for u in (0.0, 0.4, 0.8, 1 - 2**-24, 1 - 2**-53)}
        assert found == {5, 4000}


@pytest.mark.parametrize("top_k", [0, 1, 50, 2**31 - 1])
@pytest.mark.parametrize("top_p", [5e-324, 1e-50])
def test_a_share_that_is_0_in_float32_keeps_the_likeliest(top_p: float, top_k: int) -> None:
    logits, params = _logits(1, 3.0), SamplingParams(top_p=top_p, top_k=top_k)
    likeliest = logits.argmax(-1).tolist()
    assert draw(logits, [params], [0.9]) == likeliest
    assert distribution(logits, [params])[0].nonzero().flatten().tolist() == likeliest


@pytest.mark.parametrize("filters", [{}, {"top_k": 20, "min_p": 0.02}], ids=str)
def test_frequencies_are_the_probabilities(filters: dict[str, float]) -> None:
    params, count, draws = SamplingParams(temperature=1.3, **filters), 20000, Random(1)  # type: ignore[arg-type]
    logits = _logits(1, 1.5, vocab=40)
    tokens = draw(logits.expand(count, -1), [params] * count, [draws.random() for _ in range(count)])
    ids, values = kept(logits[0], params)
    found = torch.bincount(torch.tensor(tokens), minlength=40)
    assert int(found.sum()) == int(found[ids].sum()) == count
    # Five standard deviations of a binomial count, for one of 40 tokens: once in 40,000 seeds, and the seed is fixed.
    deviation = (count * values * (1 - values)).sqrt()
    assert bool(((found[ids] - count * values).abs() <= 5 * deviation + 1).all())


def _penalised(logits: list[float], prompt: list[int], output: list[int], params: SamplingParams) -> list[float]:
    """Penalties by their definitions, token by token."""
    result = list(logits)
    for token in set(prompt) | set(output):
        factor = params.repetition_penalty
        result[token] = result[token] / factor if result[token] > 0 else result[token] * factor
    for token in set(output):
        result[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return result


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(repetition_penalty=0.6),
        SamplingParams(presence_penalty=1.1),
        SamplingParams(frequency_penalty=-0.4),
        SamplingParams(repetition_penalty=1.2, presence_penalty=-0.5, frequency_penalty=0.3),
    ],
    ids=lambda p: f"{p.repetition_penalty}/{p.presence_penalty}/{p.frequency_penalty}",
)
def test_penalties_are_as_defined_while_the_output_grows(params: SamplingParams) -> None:
    prompt, output = [1, 2, 2, 7], [3, 7, 3, 3, 11]
    history, other = TokenHistory(), TokenHistory()
    other.update(array("q", [0, 15]), 2)
    strengths = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
    for length in (0, 1, 4, 5):
        logits = _logits(3, 2.0, seed=length, vocab=16)
        wanted = logits.clone()
        wanted[0] = torch.tensor(_penalised(logits[0].tolist(), [0, 15], [], SamplingParams(repetition_penalty=3)))
        wanted[2] = torch.tensor(_penalised(logits[2].tolist(), prompt, output[:length], params))
        history.update(array("q", prompt + output[:length]), len(prompt))
        penalise(logits, [Penalty(2, history, (), *strengths), Penalty(0, other, (), 3.0, 0.0, 0.0)])
        # Three roundings of numbers up to 10 in float32.
        torch.testing.assert_close(logits, wanted, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("vocab", [31, 32, 96, 992, 1000, 4096])
@pytest.mark.parametrize("levels", [3, 1000], ids=["ties", "few-ties"])
def test_selection_is_that_of_torch(vocab: int, levels: int) -> None:
    logits = torch.randint(levels, (5, vocab), generator=torch.Generator().manual_seed(vocab)).float()
    logits[1, vocab // 2 :] = -math.inf
    logits[2] = 7.0
    assert argmax(logits) == logits.argmax(-1).tolist()
    order = logits.sort(dim=-1, descending=True, stable=True)
    for count in {1, 2, 20, vocab - 1, vocab} & set(range(1, vocab + 1)):
        values, ids = largest(logits, count)
        assert torch.equal(values, order.values[:, :count])
        assert torch.equal(logits.gather(1, ids), values)
        # Only among values equal to the last one may other ids be taken.
        certain = (values > values[:, -1:]) | (count == vocab)
        assert torch.equal(ids[certain], order.indices[:, :count][certain])
        rising = (ids.diff() > 0) | (values.diff() < 0)
        assert bool(rising.all())


def test_nonfinite_rows_are_found_and_named() -> None:
    logits = torch.zeros(6, 64)
    logits[1, 40], logits[2, 7], logits[3], logits[4, 9] = math.nan, math.inf, -math.inf, -math.inf
    logits[5, [1, 2]] = torch.tensor([math.inf, math.nan])
    assert find_nonfinite(row_max(logits)[0]) == {1: "NaN", 2: "Inf", 3: "-Inf for every token", 5: "NaN"}
    assert find_nonfinite(row_max(logits[[0, 4]])[0]) == find_nonfinite(row_max(logits[:0])[0]) == {}


def test_sample_penalises_only_whom_it_should_and_reports_unpenalised_logprobs() -> None:
    plain = SamplingParams(temperature=0)
    heavy = SamplingParams(temperature=0, presence_penalty=2, logprobs=2)
    logits = torch.tensor([[0.0, 3.0, 2.0, 0.5]]).repeat(3, 1)
    sequences = [sequence([0], (1, 1), each, index=i) for i, each in enumerate((plain, heavy, plain))]
    original = logits.clone()
    found = sample(logits, sequences)
    assert [each.token for each in found] == [1, 2, 1]
    wanted = original[0].log_softmax(-1)
    assert found[0].logprobs is None
    assert found[1].logprobs is not None
    assert found[1].logprobs.logprob == pytest.approx(float(wanted[2]))
    top: list[tuple[int, Any]] = [(1, pytest.approx(float(wanted[1]))), (2, pytest.approx(float(wanted[2])))]
    assert found[1].logprobs.top == top


def test_only_rows_that_are_drawn_spend_random_numbers() -> None:
    sequences = [sequence([0], (), SamplingParams(temperature=t), index=i) for i, t in enumerate((0.0, 1.0))]
    sample(_logits(2, 1.0, vocab=8), sequences)
    assert sequences[0].random.random() == Random(0).random()
    spent = Random(1)
    spent.random()
    assert sequences[1].random.random() == spent.random()


def test_likeliest_tokens_come_best_first() -> None:
    logits = torch.tensor([[-3.0, -1.0, -2.0, -4.0], [-1.0, -2.0, -3.0, -4.0]])
    found = top_logprobs(logits, [3, 0], [2, 0])
    wanted = logits.log_softmax(-1).tolist()
    low: Any = (pytest.approx(wanted[0][3]), [(1, pytest.approx(wanted[0][1])), (2, pytest.approx(wanted[0][2]))])
    high: Any = (pytest.approx(wanted[1][0]), [])
    assert found == [low, high]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, it must be at least 1"),
        ({"n": 0}, "n is 0, it must be at least 1"),
        ({"temperature": -0.1}, r"temperature is -0.1, it must be between 0 \(greedy\) and 1e\+06"),
        ({"temperature": 1e300}, r"temperature is 1e\+300"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, r"top_k is -1, it must be 0 \(all tokens\) or more"),
        ({"top_p": 0.0}, "top_p is 0.0, it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_p": -0.1}, "min_p is -0.1, it must be between 0 and 1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, it must be above 0; 1 turns it off"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1, it must be between -2 and 2"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"stop": ("a", "")}, "stop is .*, it must be strings that are not empty"),
        ({"logprobs": -1}, "logprobs is -1, it must be between 0 and 20"),
        ({"logprobs": 21}, "logprobs is 21"),
    ],
    ids=str,
)
def test_impossible_values_are_refused(values: dict[str, float], wanted: str) -> None:
    with pytest.raises(RequestError, match=f"^{wanted}") as caught:
        SamplingParams(**values)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def _by_sorting(logits: Tensor, params: SamplingParams, uniform: float) -> tuple[int, set[int]]:
    """The drawn token and the kept tokens of a row, from a sort of the whole vocabulary."""
    order = logits.sort(descending=True, stable=True).indices
    scaled = ((logits - logits.max()) / torch.tensor(params.temperature))[None]
    mass = (torch.softmax(scaled, -1)[0] * 2.0**48).round()[order]
    cumulated = mass.double().cumsum(0)
    share = math.ceil(params.top_p * 2.0**48) if params.top_p < 1 else math.inf
    least = torch.tensor(params.min_p) * mass[0]
    kept = min(int((cumulated < share).sum()) + 1, int((mass >= least).sum()), len(order))
    target = min(math.floor(uniform * float(cumulated[kept - 1])) + 1, int(cumulated[kept - 1]))
    return int(order[(cumulated < target).sum()]), set(order[:kept][mass[:kept] > 0].tolist())


@pytest.mark.parametrize("rounded", [False, True], ids=["few-ties", "ties"])
@pytest.mark.parametrize("spread", [0.0, *SPREADS])
def test_a_nucleus_is_that_of_a_full_sort(spread: float, rounded: bool) -> None:
    filters = [{"top_p": p} for p in (1e-6, 0.1, 0.5, 0.9, 0.99, 0.9999)] + [{"min_p": m} for m in (1.0, 0.3, 1e-3, 1e-9)]
    filters += [{"top_p": 0.95, "min_p": m} for m in (1e-4, 0.05)]
    params = [SamplingParams(temperature=t, **f) for t in (0.3, 1.0, 2.5) for f in filters]  # type: ignore[arg-type]
    logits, draws = _logits(len(params), spread, seed=3), Random(2)
    logits[:, 9000:] = -math.inf
    logits[::5, :9000] += 40 * torch.rand(9000, generator=torch.Generator().manual_seed(1)).pow(300)
    logits = logits.mul(8).round().div(8) if rounded else logits
    uniforms = [draws.choice([draws.random(), 0.0, 1 - 2**-53]) for _ in params]
    wanted = [_by_sorting(row, each, u) for row, each, u in zip(logits, params, uniforms, strict=True)]
    before = logits.clone()
    assert draw(logits, params, uniforms) == [token for token, _ in wanted]
    found = distribution(logits, params)
    assert [set(row.nonzero().flatten().tolist()) for row in found] == [kept for _, kept in wanted]
    assert torch.equal(logits, before)


def test_a_tiny_repetition_penalty_leaves_numbers() -> None:
    logits = torch.tensor([[5.0, -1.0, 0.5, 0.0]])
    text = sequence([0], (), SamplingParams(repetition_penalty=1e-38, temperature=0.5))
    assert sample(logits, [text])[0].token == 0


def test_tokens_ahead_count_as_output() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25)
    prompt, output, ahead = [1, 2, 2, 7], (3, 7, 3), [[], [5], [5, 3], [5, 3, 5]]
    logits = _logits(4, 2.0, vocab=16)
    wanted = [_penalised(row.tolist(), prompt, [*output, *each], params) for row, each in zip(logits, ahead, strict=True)]
    apply_penalties(logits, [sequence(prompt, output, params)] * 4, ahead)
    # Three roundings of numbers up to 10 in float32.
    torch.testing.assert_close(logits, torch.tensor(wanted), rtol=1e-6, atol=1e-5)
