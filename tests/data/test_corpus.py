"""Text to rows of tokens: every source, disjoint parts, and no token changed by tokenizing piecemeal."""

import hashlib
import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers import tiny
from helpers.command import refused
from quantkit.data.corpus import calibration_rows, evaluation_rows, text_sets, tokens_sha256
from quantkit.errors import CorpusError
from quantkit.recipe import Calibration

#: Longer than any stretch that unrelated paragraphs of the reference share.
STRETCH = 100
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    """One token a byte."""
    return tiny.make_tokenizer()


@pytest.fixture(scope="module")
def merging(plain: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Long merges, learned from the built-in text, and no split into words that would confine them."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    text = everything("builtin", plain)[:40_000]
    raw.train_from_iterator([text[start : start + 1000] for start in range(0, len(text), 1000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def rows_of(source: object, tokenizer: Any, samples: int = 2, seq_len: int = 16, seed: int | None = None) -> torch.Tensor:
    return calibration_rows(Calibration(source=str(source), samples=samples, seq_len=seq_len), seed, tokenizer)


def decoded(rows: torch.Tensor, tokenizer: Any) -> str:
    return str(tokenizer.decode(rows.flatten().tolist(), clean_up_tokenization_spaces=False))


def everything(source: str, tokenizer: Any, *, evaluation: bool = False) -> str:
    """All text of a part, as the byte tokenizer gives it back."""
    with pytest.raises(CorpusError) as short:
        evaluation_rows(source, 10**9, 16, tokenizer) if evaluation else rows_of(source, tokenizer, samples=10**9)
    tokens = int(str(short.value).split(" gives ")[1].split(" tokens")[0].replace(",", ""))
    rows = evaluation_rows(source, tokens, 1, tokenizer) if evaluation else rows_of(source, tokenizer, tokens // 16)
    return decoded(rows, tokenizer)


@pytest.mark.parametrize("samples", [1, 3, 100, 1000])
@pytest.mark.parametrize("kind", ["plain", "merging"])
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("The quick brown fox jumps over the lazy dog. " * 3000, id="words"),
        pytest.param("=" * 60_000, id="one letter"),
        pytest.param("äöü 漢字 🎉\n" * 6000, id="many bytes a letter"),
        pytest.param("ab" * 20_000 + " " * 20_000, id="runs"),
    ],
)
def test_rows_are_the_first_tokens_of_the_whole(
    request: pytest.FixtureRequest, tmp_path: Path, text: str, kind: str, samples: int
) -> None:
    tokenizer = request.getfixturevalue(kind)
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < samples * 32:
        with pytest.raises(CorpusError, match=f"gives {len(ids):,} tokens"):
            rows_of(path, tokenizer, samples, 32)
    else:
        assert rows_of(path, tokenizer, samples, 32).flatten().tolist() == ids[: samples * 32]


def test_no_token_at_a_cut_is_used(tmp_path: Path, merging: PreTrainedTokenizerFast) -> None:
    """Wherever the text is cut for tokenizing, the tokens before the margin are those of the whole text."""
    path = tmp_path / "text.txt"
    path.write_text(("=" * 79 + "\n") * 1000)
    ids = merging(path.read_text(), add_special_tokens=False)["input_ids"]
    assert len(ids) < path.stat().st_size / 8
    for wanted in range(16, 400):
        assert rows_of(path, merging, 1, wanted).flatten().tolist() == ids[:wanted]


def test_builtin_parts_share_no_text(plain: PreTrainedTokenizerFast) -> None:
    calibration = everything("builtin", plain)
    evaluation = everything("builtin", plain, evaluation=True)
    assert len(calibration) > 300_000
    assert len(evaluation) > 50_000
    known = {calibration[start : start + STRETCH] for start in range(len(calibration) - STRETCH)}
    shared = [evaluation[start : start + STRETCH] for start in range(len(evaluation) - STRETCH)]
    assert [stretch for stretch in shared if stretch in known] == []


def test_documents_are_joined_across_rows(tmp_path: Path, plain: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n\n" for text in ("one", "two", "three")))
    assert decoded(rows_of(path, plain, 1, 16), plain) == "one\n\ntwo\n\nthree\n"


def test_parquet(tmp_path: Path, plain: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "text.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["first row", "second row"]}), path)
    assert decoded(rows_of(path, plain, 1, 21), plain) == "first row\n\nsecond row"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_messages_go_through_the_chat_template(tmp_path: Path, suffix: str) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "bot", "content": "Hello there"}]}]
    path = tmp_path / f"chats.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert decoded(rows_of(path, tokenizer, 1, 24), tokenizer) == "<user>Hi<bot>Hello there"


def test_any_other_file_is_plain_text(tmp_path: Path, plain: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "README"
    path.write_text('{"text": "not JSON here"}')
    assert decoded(rows_of(path, plain, 1, 16), plain) == '{"text": "not JS'


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "wikitext", "."])
def test_no_such_text(plain: PreTrainedTokenizerFast, name: str) -> None:
    with pytest.raises(CorpusError, match="neither a file, nor hf:DATASET, nor one of: builtin, c4"):
        rows_of(name, plain)


class TestSeed:
    def test_repeats(self, plain: PreTrainedTokenizerFast) -> None:
        first, again = rows_of("builtin", plain, 8, seed=3), rows_of("builtin", plain, 8, seed=3)
        assert first.equal(again)
        assert tokens_sha256(first) == tokens_sha256(again)

    def test_changes_the_rows(self, plain: PreTrainedTokenizerFast) -> None:
        sets = [tokens_sha256(rows_of("builtin", plain, 8, seed=seed)) for seed in (None, 0, 1, 2)]
        assert len(set(sets)) == 4

    def test_draws_rows_of_the_text_without_repeating_one(self, plain: PreTrainedTokenizerFast) -> None:
        pool = {tuple(row) for row in rows_of("builtin", plain, 64).tolist()}
        drawn = [tuple(row) for row in rows_of("builtin", plain, 8, seed=5).tolist()]
        assert set(drawn) <= pool
        assert len(set(drawn)) == 8

    def test_takes_a_short_text_as_it_is(self, tmp_path: Path, plain: PreTrainedTokenizerFast) -> None:
        path = tmp_path / "text.txt"
        path.write_text("0123456789abcdef" + "fedcba9876543210" + "rest")
        rows = rows_of(path, plain, 2, 16, seed=1)
        assert sorted(decoded(row, plain) for row in rows) == ["0123456789abcdef", "fedcba9876543210"]


class FakeHub:
    """A fake of the datasets library that records the calls."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.asked = rows, list[tuple[str, str | None, str]]()

    def load_dataset(self, name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, Any]]:
        assert streaming, "a dataset may be larger than the disk"
        self.asked.append((name, config, split))
        return self.rows


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub([{"text": f"row {number} of it", "messages": [{"role": "u", "content": "x" * 9}]} for number in range(99)])
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr("datasets.load_dataset", fake.load_dataset)
    return fake


@pytest.mark.parametrize(
    ("source", "calibration", "evaluation"),
    [
        ("wikitext2", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"), "test"),
        ("c4", ("allenai/c4", "en", "train"), "validation"),
        ("pile-val", ("mit-han-lab/pile-val-backup", None, "validation"), "validation"),
        ("ultrachat", ("HuggingFaceH4/ultrachat_200k", None, "train_sft"), "test_sft"),
        ("hf:owner/name", ("owner/name", None, "train"), "train"),
        ("hf:owner/name:part", ("owner/name", "part", "train"), "train"),
    ],
)
def test_sets_of_the_hub(fake_hub: FakeHub, source: str, calibration: tuple[str, str | None, str], evaluation: str) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = rows_of(source, tokenizer, 1, 16)
    evaluation_rows(source, 1, 16, tokenizer)
    assert fake_hub.asked == [calibration, (*calibration[:2], evaluation)]
    assert decoded(rows, tokenizer) == ("<u>xxxxxxxxx<u>x" if source == "ultrachat" else "row 0 of it\n\nrow")


def test_every_manifest_names_a_licence_and_a_description() -> None:
    assert all(entry.licence != "unknown" and entry.description for entry in text_sets().values())


@pytest.mark.parametrize("source", ["hf:owner/name", "wikitext2", "ultrachat", "hf:"])
def test_without_a_network_one_line(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    line = refused("quantize", llama, "-o", tmp_path / "out", "--calib", source)
    assert f"dataset '{source}' cannot be loaded" in line
    assert "name a local .txt, .jsonl or .parquet file" in line
    assert not any(tmp_path.iterdir())


def test_hash_is_of_little_endian_int64() -> None:
    tokens = bytes([1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0])
    assert tokens_sha256(torch.tensor([[1, 256]])) == hashlib.sha256(tokens).hexdigest()
