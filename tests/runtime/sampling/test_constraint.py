"""Constrained output is JSON that satisfies its schema, with any sampling and drafts; other requests are not affected."""

import json
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any

import jsonschema
import pytest
import torch

from helpers.engine_runs import drain, tokens_of
from helpers.exact import chi_square
from helpers.fake_model import logits_after
from helpers.json_model import PERSON, SCHEMAS, VOCAB, decode, engine, grammars, tokenizer
from helpers.proposers import Drawer, Guesser, right, wrong
from helpers.sequences import sequence
from quantkit.errors import RequestError
from quantkit.runtime.core.constraint import Constraint
from quantkit.runtime.core.output import FinishReason, Output
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.core.sequence import Draft
from quantkit.runtime.core.sequence import Sequence as Text
from quantkit.runtime.sampling.logits import apply_token_mask
from quantkit.runtime.speculative.drafting import draft
from quantkit.runtime.speculative.ngram import NgramProposer
from quantkit.runtime.speculative.proposer import Proposer
from quantkit.runtime.speculative.rejection_sampler import verify_drafts

GREEDY = SamplingParams(temperature=0, max_tokens=400)
PARAMS = {
    "greedy": GREEDY,
    "sampled": SamplingParams(seed=3, max_tokens=400),
    "filtered": SamplingParams(seed=4, max_tokens=400, temperature=0.7, top_k=40, top_p=0.9, min_p=0.01),
    "penalised": SamplingParams(temperature=0, max_tokens=400, repetition_penalty=1.3, frequency_penalty=0.5, logprobs=2),
}
PROMPT = [5, 17, 9]


def allowed(constraint: Constraint, ahead: Sequence[int] = ()) -> set[int]:
    """The tokens that a constraint allows next."""
    mask = constraint.mask(ahead)
    assert mask is not None
    return {token for token in range(VOCAB) if mask[token // 8] >> token % 8 & 1}


def advanced(constraint: Constraint, tokens: Sequence[int]) -> Constraint:
    """A copy, advanced by these tokens."""
    copy = constraint.copy()
    for token in tokens:
        copy.advance(token)
    return copy


def fits(schema: dict[str, Any], text: str) -> bool:
    """Whether a text is JSON and satisfies the schema."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def run(
    params: SamplingParams, schema: dict[str, Any] | None, proposer: Proposer | None = None, prompt: Sequence[int] = PROMPT
) -> Output:
    """The output of one request, run alone."""
    constraint = None if schema is None else grammars().compile(schema)
    (output,) = engine(proposer=proposer).generate([Request(prompt, params, constraint)])
    return output


@pytest.mark.parametrize("vocab", [5, 31, 32, 33, 64, 97])
@pytest.mark.parametrize("rows", [[0], [1, 3], [0, 1, 2, 3]])
def test_what_a_mask_leaves_out_is_ruled_out(vocab: int, rows: list[int]) -> None:
    random = Random(vocab)
    words = (vocab + 31) // 32
    masks = [random.randbytes(4 * words) for _ in rows]
    logits = torch.randn(4, vocab)
    found, wanted = logits.clone(), logits.clone()
    apply_token_mask(found, rows, masks)
    for row, mask in zip(rows, masks, strict=True):
        for token in range(vocab):
            if not int.from_bytes(mask, "little") >> token & 1:
                wanted[row, token] = float("-inf")
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("params", PARAMS)
def test_a_text_fits_its_schema(params: str, schema: str) -> None:
    output = run(PARAMS[params], SCHEMAS[schema])
    assert fits(SCHEMAS[schema], output.text), output.text
    assert (output.finish_reason, output.error) == (FinishReason.STOP, None)
    # The premise: without the constraint it does not.
    assert not fits(SCHEMAS[schema], run(PARAMS[params], None).text)


def test_many_samples_fit() -> None:
    output = engine().generate([Request(PROMPT, SamplingParams(seed=1, n=8, max_tokens=400), grammars().compile(PERSON))])
    assert all(fits(PERSON, each.text) for each in output)
    assert len({each.text for each in output}) == 8


@pytest.mark.parametrize("num_blocks", [1024, 56], ids=["room", "preemption"])
@pytest.mark.parametrize("params", ["greedy", "sampled"])
def test_a_batch_gives_each_what_it_gets_alone(params: str, num_blocks: int) -> None:
    running = engine(num_blocks)
    schemas = [PERSON, None, SCHEMAS["choice"], None, PERSON, SCHEMAS["array"]]
    prompts = [[3 + i, 50, 7 * i] for i in range(len(schemas))]
    # Four of the six would fill 56 blocks of 4 tokens before one of them ends.
    asked = replace(PARAMS[params], max_tokens=150)
    constraints = [None if schema is None else grammars().compile(schema) for schema in schemas]
    added = [Request(prompt, asked, constraint) for prompt, constraint in zip(prompts, constraints, strict=True)]
    ids = [running.add(each) for each in added]
    outputs = drain(running)
    assert (running.stats.preemptions > 0) == (num_blocks == 56)
    for request_id, each, schema in zip(ids, added, schemas, strict=True):
        assert tokens_of(outputs, request_id) == run(each.params, schema, prompt=each.prompt).token_ids


class Replay:
    """Drafts the known continuation with every fourth token wrong; implements `Proposer`."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = [*PROMPT, *tokens]

    def propose(self, wanted: Sequence[tuple[Text, int]]) -> list[Draft]:
        """See `Proposer`."""
        return [self._draft(len(text.tokens), count) for text, count in wanted]

    def _draft(self, start: int, count: int) -> Draft:
        places = range(start, min(start + count, len(self._tokens)))
        return Draft([(self._tokens[i] + (i % 4 == 0)) % VOCAB for i in places])

    def accepted(self, sequence: Text, count: int) -> None:
        """See `Proposer`."""

    def backlog(self, sequence: Text) -> int:
        """See `Proposer`."""
        return 0

    def released(self, sequence: Text) -> None:
        """See `Proposer`."""


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("proposer", ["ngram", "right", "wrong", "replay"])
def test_drafts_change_no_constrained_text(proposer: str, params: str) -> None:
    plain = run(PARAMS[params], PERSON)
    made: dict[str, Proposer] = {
        "ngram": NgramProposer(),
        "right": Guesser(right),
        "wrong": Guesser(wrong),
        "replay": Replay(plain.token_ids),
    }
    running = engine(proposer=made[proposer])
    (output,) = running.generate([Request(PROMPT, PARAMS[params], grammars().compile(PERSON))])
    assert (output.token_ids, output.logprobs) == (plain.token_ids, plain.logprobs)
    stats = running.stats.speculation
    assert stats is not None
    if proposer == "replay":
        assert 0.5 * stats.drafted < stats.accepted < stats.drafted


@pytest.mark.parametrize("params", ["greedy", "sampled"])
def test_drawn_drafts_give_texts_that_fit(params: str) -> None:
    assert fits(PERSON, run(PARAMS[params], PERSON, Drawer(VOCAB)).text)


class Falling:
    """Every token must be smaller than the one before it; implements `Constraint` for vocabularies of up to 32 tokens."""

    def __init__(self, last: int, error: str | None = None) -> None:
        self.last, self.error = last, error

    finished = False

    def mask(self, ahead: Sequence[int]) -> bytes | None:
        """See `Constraint`. Token 0 may always follow."""
        tokens = [self.last, *ahead]
        if self.error is not None or any(0 < after >= before for before, after in pairwise(tokens)):
            return None
        return (2 ** max(tokens[-1], 1) - 1).to_bytes(4, "little")

    def advance(self, token: int) -> None:
        """See `Constraint`."""
        self.last = token

    def copy(self) -> "Falling":
        """See `Constraint`."""
        return Falling(self.last, self.error)


@pytest.mark.parametrize("drawn", [False, True])
def test_texts_behind_drafts_are_distributed_as_the_constraint_says(drawn: bool) -> None:
    vocab, rounds, counts, accepted = 6, 3000, Counter[Hashable](), 0
    params, drafter = SamplingParams(temperature=5.0), Drawer(vocab)

    def exact(text: tuple[int, ...]) -> torch.Tensor:
        logits = logits_after([3, 1, *text], vocab).double() / 5
        keep = max(text[-1] if text else vocab, 1)
        return torch.softmax(logits[:keep], -1)

    for index in range(rounds):
        text = sequence([3, 1], (), params, index=index)
        text.constraint = Falling(vocab)
        tokens = drafter.draft(text, 2) if drawn else Draft(Random(index).choices(range(vocab), k=2))
        rows = torch.stack([logits_after([3, 1, *tokens.tokens[:i]], vocab) for i in range(3)])
        (samples,) = verify_drafts(rows, [text], [tokens])
        accepted += len(samples) - 1
        found = tuple(each.token for each in samples)
        while len(found) < 3:
            p = exact(found).tolist()
            found += tuple(text.random.choices(range(len(p)), p))
        counts[found] += 1
    wanted: dict[Hashable, float] = {}
    for first, p in enumerate(exact(()).tolist()):
        for second, q in enumerate(exact((first,)).tolist()):
            wanted |= {(first, second, third): p * q * r for third, r in enumerate(exact((first, second)).tolist())}
    statistic, bound = chi_square(counts, wanted)
    assert statistic < bound
    assert 0.05 * rounds < accepted < 1.9 * rounds


def test_a_model_drafts_within_the_constraint() -> None:
    text = sequence([3, 1], (), SamplingParams(temperature=0))
    text.constraint = Falling(6)

    def extend(drafts: Sequence[tuple[Text, list[int]]]) -> torch.Tensor:
        return torch.stack([logits_after([3, 1, *tokens], 6) for _, tokens in drafts])

    found = draft({text: 4}, extend([(text, [])]), extend)[text].tokens
    assert all(after < max(before, 1) for before, after in zip([6, *found], found, strict=False))


def test_the_end_is_allowed_exactly_where_the_text_may_end() -> None:
    eos = tokenizer().eos_token_id
    person = {"name": "é}", "age": 0, "role": None, "tags": ["é"], "point": {"x": 1, "y": -2}, "ok": True}
    texts = [
        ("number", "12345"),
        ("array", '["red", 7, "green"]'),
        ("array", '["red",\n  7]'),
        ("choice", '{"no": [1,2]}'),
        ("object", json.dumps(person, ensure_ascii=False)),
        ("object", json.dumps(person, ensure_ascii=False, indent=2)),
    ]
    ends = []
    for schema, text in texts:
        tokens = tokenizer()(text)["input_ids"]
        constraint = grammars().compile(SCHEMAS[schema])
        for length, token in enumerate(tokens):
            ends.append(fits(SCHEMAS[schema], decode(tokens[:length])))
            assert (eos in allowed(constraint)) == ends[-1]
            assert token in allowed(constraint)
            constraint.advance(token)
        assert allowed(constraint) == {eos} or not constraint.finished
        assert eos in allowed(constraint)
    # Before the last token, only the number may end, from its second digit on.
    assert 0 < sum(ends) < 5


def test_a_constraint_is_asked_about_drafts_without_being_changed() -> None:
    eos = tokenizer().eos_token_id
    constraint = grammars().compile(SCHEMAS["array"])
    tokens = tokenizer()('["red", 7, "green", 7]')["input_ids"]
    for length in range(len(tokens)):
        before = constraint.mask(())
        for ahead in (tokens[length:], tokens[length : length + 2], [0], [eos], [*tokens[length:], eos], [*tokens, 5]):
            whole = ahead == tokens[length : length + len(ahead)]
            assert (constraint.mask(ahead) is not None) == whole
            assert constraint.mask(()) == before
        assert allowed(constraint, tokens[length:]) == {eos}
        assert not constraint.finished
        other = advanced(constraint, tokens[length:])
        assert other.finished
        constraint.advance(tokens[length])
    assert constraint.finished
    assert constraint.error is None


def test_a_number_ends_with_the_end_of_sequence_token_and_an_object_without() -> None:
    eos = tokenizer().eos_token_id
    number = advanced(grammars().compile({"type": "integer"}), tokenizer()("12")["input_ids"])
    finished = number.finished
    assert eos in allowed(number)
    number.advance(eos)
    assert (finished, number.finished) == (False, True)
    output = run(GREEDY, SCHEMAS["array"])
    assert output.token_ids[-1] != eos
    assert (output.finish_reason, output.stop) == (FinishReason.STOP, None)
    # `ignore_eos` makes no difference: nothing else may follow a complete text.
    ignoring = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    assert fits(SCHEMAS["number"], run(ignoring, SCHEMAS["number"]).text)


def test_length_and_stop_strings_cut_a_text() -> None:
    whole = run(GREEDY, PERSON)
    count = len(whole.token_ids)
    cut = run(SamplingParams(temperature=0, max_tokens=count - 1), PERSON)
    assert (cut.finish_reason, cut.token_ids) == (FinishReason.LENGTH, whole.token_ids[:-1])
    exact = run(SamplingParams(temperature=0, max_tokens=count), PERSON)
    assert (exact.finish_reason, exact.text) == (FinishReason.STOP, whole.text)
    stopped = run(SamplingParams(temperature=0, max_tokens=400, stop=('"age"',)), PERSON)
    assert (stopped.finish_reason, stopped.stop) == (FinishReason.STOP, '"age"')
    assert whole.text.startswith(stopped.text + '"age"')


def test_log_probabilities_are_the_models_own() -> None:
    output = run(SamplingParams(temperature=0, max_tokens=400, logprobs=1), SCHEMAS["array"])
    for i, entry in enumerate(output.logprobs):
        exact = torch.log_softmax(logits_after([*PROMPT, *output.token_ids[:i]], VOCAB).double(), -1)
        # Sums of 409 float32 numbers: 2^-24 each, and a few more bits for exp and log.
        assert entry.logprob == pytest.approx(float(exact[entry.token]), abs=1e-5)
        assert entry.top[0][1] == pytest.approx(float(exact.max()), abs=1e-5)


def test_a_constraint_that_fails_ends_its_text_and_no_other() -> None:
    running = engine()
    bad = running.add(Request(PROMPT, GREEDY, Falling(VOCAB, error="out of fuel")))
    good = running.add(Request(PROMPT, GREEDY, grammars().compile(PERSON)))
    outputs = []
    while running.has_work:
        outputs += running.step()
        running.check()
    assert tokens_of(outputs, good) == run(GREEDY, PERSON).token_ids
    (failed,) = [out for out in outputs if out.request_id == bad]
    assert (failed.finish_reason, failed.token_ids) == (FinishReason.ERROR, [])
    assert "cannot be constrained any further (out of fuel)" in str(failed.error)
    assert running.stats.used_blocks == 0


def test_a_real_constraint_notices_what_it_never_allowed() -> None:
    constraint = grammars().compile(PERSON)
    constraint.advance(next(token for token in range(VOCAB) if token not in allowed(constraint)))
    assert constraint.error is not None
    assert not constraint.finished
    assert constraint.mask(()) is None


def _nested(depth: int) -> dict[str, Any]:
    """An array in an array in an array ..."""
    schema: dict[str, Any] = {"type": "array"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "foo"}, "Invalid type: foo"),
        ({"not": {"type": "string"}}, "Unimplemented keys"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "format": "zzz"}, "Unknown format: zzz"),
        ({"$ref": "#/nope"}, "does not exist"),
        ({"$ref": "http://localhost/x"}, "not present"),
        ({"enum": []}, "Unsatisfiable schema"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "Unsatisfiable schema"),
        ({"$ref": "#"}, "NoExtension"),
        (_nested(5000), "recursion"),
        ([], "object"),
        (3, "object"),
        ({"const": {1, 2}}, "not JSON serializable"),
    ],
)
def test_what_cannot_be_enforced_is_refused_in_one_line(schema: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as refusal:
        grammars().compile(schema)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300
