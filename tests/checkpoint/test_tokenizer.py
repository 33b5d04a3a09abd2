"""The tokenizer of a folder is the one that transformers chooses, though transformers does not read the model's config."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.tokenizer import load_tokenizer

TEXT = "The capital of Frankreich ist  Paris, naïve 東京.\n<s> 12345"


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2"])
@pytest.mark.parametrize(
    "named",
    [
        {"tokenizer_class": "TokenizersBackend"},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True},
        {"tokenizer_class": "LlamaTokenizer"},
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"tokenizer_class": "GPT2Tokenizer"},
        {"tokenizer_class": "GemmaTokenizerFast"},
        {"tokenizer_class": "NoSuchTokenizer"},
        {},
    ],
    ids=lambda named: named.get("tokenizer_class", "none"),
)
def test_the_class_is_the_one_that_transformers_chooses(
    llama: Path, tmp_path: Path, model_type: str, named: dict[str, Any]
) -> None:
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    settings = json.loads((llama / "tokenizer_config.json").read_text())
    settings.pop("tokenizer_class", None)
    settings |= {"bos_token": "a", "eos_token": "b", "unk_token": "c"} | named
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ours = load_tokenizer(Checkpoint(tmp_path))
    assert type(ours) is type(theirs)
    tokens = ours(TEXT)["input_ids"]
    assert tokens == theirs(TEXT)["input_ids"]
    assert ours.decode(tokens) == theirs.decode(tokens)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
