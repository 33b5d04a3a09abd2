"""Constraints that make the output JSON of a given schema, with llguidance: a lexer and an Earley parser over token bytes.

The only module that imports llguidance, which the extra `serve` installs.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLParserLimits
from llguidance.hf import from_tokenizer

from quantkit.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Allowed between two tokens of JSON: nothing, one space, or a line break with indentation. JSON allows any amount of
#: whitespace, but small models would generate it without end.
_WHITESPACE = r"\n[ ]{0,20}|[ ]"


class JsonGrammars:
    """Compiles JSON schemas to constraints for one model's tokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """
        Args:
            tokenizer: the model's; reading all of its tokens takes a moment.
            vocab_size: width of the model's logits.
            eos_token_ids: the tokens that end a text.

        Raises:
            RequestError: the tokenizer does not come from the `tokenizers` library.
        """
        self._eos = frozenset(eos_token_ids)
        try:
            self._tokenizer = from_tokenizer(tokenizer, max(vocab_size, len(tokenizer)), sorted(self._eos))
        except ValueError as error:
            raise RequestError(f"texts cannot be constrained with this model's tokenizer ({_line(str(error))})") from None

    def compile(self, schema: Mapping[str, Any]) -> "JsonConstraint":
        """A constraint for JSON of this schema, with properties in the schema's order; `{"type": "object"}` allows any object.

        Raises:
            RequestError: it is not a schema, uses keywords that cannot be enforced, or no text satisfies it.
        """
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_pattern": _WHITESPACE})
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the JSON schema is refused ({_line(str(error))}); correct it") from None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        constraint = JsonConstraint(matcher, self._eos)
        # That no text satisfies the schema may show only in the first mask.
        if constraint.error is not None or constraint.mask(()) is None:
            raise RequestError(f"the JSON schema is refused ({constraint.error}); leave that out or correct it")
        return constraint


class JsonConstraint:
    """Implements `Constraint`."""

    def __init__(self, matcher: LLMatcher, eos: frozenset[int]) -> None:
        """
        Args:
            matcher: the grammar's state; owned by the constraint from now on.
            eos: tokens that end a text.
        """
        self._matcher, self._eos = matcher, eos
        self._ended = False

    @property
    def finished(self) -> bool:
        """See `Constraint`."""
        return self._ended or (self._matcher.is_stopped() and not self._matcher.is_error())

    @property
    def error(self) -> str | None:
        """See `Constraint`."""
        return _line(self._matcher.get_error()) if self._matcher.is_error() else None

    def mask(self, ahead: Sequence[int]) -> bytes | None:
        """See `Constraint`."""
        matcher, tokens = self._matcher, list(ahead)
        # A matcher that consumes a forbidden token cannot be used again, so `validate_tokens` checks first. The matcher does
        # not know end-of-text tokens.
        if self._ended or matcher.is_error() or not self._eos.isdisjoint(tokens):
            return None
        if tokens and matcher.validate_tokens(tokens) < len(tokens):
            return None
        if tokens:
            matcher.consume_tokens(tokens)
        allowed = matcher.compute_bitmask()
        if tokens:
            matcher.rollback(len(tokens))
        return None if matcher.is_error() else allowed

    def advance(self, token: int) -> None:
        """See `Constraint`."""
        if token in self._eos:
            self._ended = True
        else:
            self._matcher.consume_token(token)

    def copy(self) -> "JsonConstraint":
        """See `Constraint`."""
        copy = JsonConstraint(self._matcher.deep_copy(), self._eos)
        copy._ended = self._ended
        return copy


def _line(message: str) -> str:
    return " ".join(message.split())[:200]
