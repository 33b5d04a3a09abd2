"""A small trained vocabulary of pieces of JSON, and an engine whose model writes noise unless it is constrained."""

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers.fake_model import FakeModel
from quantkit.runtime.engine.engine import Engine, EngineConfig
from quantkit.runtime.sampling.json_schema import JsonGrammars
from quantkit.runtime.speculative.proposer import Proposer

#: Wider than the tokenizer, as in real models, and an odd number.
VOCAB = 409
EOS = "</s>"

_TEXT = """
{"name": "Ada", "age": 36, "role": "admin", "tags": ["x", "y"], "point": {"x": 1, "y": -2}, "ok": true}
{
  "name": "Grace", "age": 85, "role": null, "tags": [], "point": {"x": 10, "y": 20}, "ok": false
}
[1, 2.5, -3e10, "text with spaces", "café", {"a": {"b": [{}]}}]
"""

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "role": {"enum": ["admin", "user", None, 3]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-zé]{1,5}$"}, "maxItems": 3},
        "point": {"$ref": "#/$defs/point"},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "role", "tags", "point", "ok"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "object",
            "properties": {axis: {"type": "integer", "minimum": -99, "maximum": 99} for axis in "xy"},
            "required": ["x", "y"],
            "additionalProperties": False,
        }
    },
}

#: Schemas whose texts all fit in 400 tokens.
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": PERSON,
    "choice": {"anyOf": [{"const": "yes"}, {"const": {"no": [1, 2]}}, {"type": "null"}]},
    "array": {"type": "array", "items": {"enum": ["red", "green", 7]}, "minItems": 2, "maxItems": 4},
    "string": {"type": "string", "format": "date"},
    "number": {"type": "integer", "minimum": 10, "maximum": 99999},
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with pieces of JSON and two special tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", EOS], show_progress=False, min_frequency=1
    )
    raw.train_from_iterator([_TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS)


def decode(tokens: list[int]) -> str:
    """Decode tokens, without special tokens."""
    return str(tokenizer().decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@cache
def grammars() -> JsonGrammars:
    """The grammars of this vocabulary."""
    return JsonGrammars(tokenizer(), VOCAB, [tokenizer().eos_token_id])


def engine(num_blocks: int = 1024, proposer: Proposer | None = None, draft_len: int = 4) -> Engine:
    """An engine whose model chooses pseudo-random tokens."""
    model = FakeModel(num_blocks, 4, 512, VOCAB)
    config = EngineConfig(max_batch=16, token_budget=128, draft_len=draft_len)
    return Engine(model, config, decode=decode, eos_token_ids=[tokenizer().eos_token_id], proposer=proposer)
