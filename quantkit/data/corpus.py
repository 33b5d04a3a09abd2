"""Text -> rows of tokens, for calibration and for perplexity.

Documents are joined into one unbroken stream and cut into full rows, so no row holds padding. Nothing special is added
between documents but a blank line, because that is what the published perplexities do.
"""

import hashlib
import importlib
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from huggingface_hub import HfApi
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quantkit.errors import CorpusError
from quantkit.recipe import Calibration

#: The built-in text is cut here into calibration and evaluation.
_CALIBRATION_SHARE = 0.8

#: With a seed, rows are drawn from this many times as many rows as asked for.
_POOL = 8

Part = Literal["calibration", "evaluation"]


class TextSet(BaseModel):
    """A manifest of `calibration_sets/`.

    Attributes:
        description: one line for `quantkit calib`.
        dataset: "builtin", a file's path, or the name of a dataset on the Hub.
        config: the dataset's configuration, if it has several.
        split: which split of it calibrates.
        evaluation_split: which split evaluates, where that is another one.
        column: the column that holds the text, or the list of chat messages.
        chat: render messages with the model's chat template.
        licence: of the text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    description: str
    dataset: str
    config: str | None = None
    split: str = "train"
    evaluation_split: str | None = None
    column: Annotated[str, Field(min_length=1)] = "text"
    chat: bool = False
    licence: str = "unknown"


def text_sets() -> dict[str, TextSet]:
    """Name -> manifest of every set that ships with quantkit."""
    files = [f for f in resources.files("quantkit.data.calibration_sets").iterdir() if f.name.endswith(".yaml")]
    return {
        f.name.removesuffix(".yaml"): TextSet.model_validate(yaml.safe_load(f.read_text("utf-8")))
        for f in sorted(files, key=str)
    }


def calibration_rows(spec: Calibration, seed: int | None, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Rows of calibration tokens, int64 [samples, seq_len].

    Without a seed, the first rows of the text; with one, rows drawn at random from its beginning.

    Raises:
        CorpusError: the text is missing, empty, too short or not UTF-8.
    """
    wanted = spec.samples * (_POOL if seed is not None else 1)
    rows = _rows(spec.source, "calibration", wanted, spec.samples, spec.seq_len, tokenizer)
    if seed is not None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        rows = rows[order[: spec.samples]]
    return rows


def evaluation_rows(source: str, windows: int, seq_len: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The first `windows` rows of a text, int64 [windows, seq_len], disjoint from calibration for the built-in text.

    Raises:
        CorpusError: as `calibration_rows`.
    """
    return _rows(source, "evaluation", windows, windows, seq_len, tokenizer)


def tokens_sha256(rows: Tensor) -> str:
    """Hex SHA-256 of token rows as little-endian int64, row by row."""
    return hashlib.sha256(rows.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def _rows(source: str, part: Part, wanted: int, least: int, seq_len: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    pieces: list[Tensor] = []
    count = 0
    for text in _documents(source, part, tokenizer):
        ids = _first_tokens(text, wanted * seq_len - count, tokenizer)
        pieces.append(ids)
        count += len(ids)
        if count >= wanted * seq_len:
            break
    rows = min(count // seq_len, wanted)
    if rows < least:
        raise CorpusError(
            f"text '{source}' gives {count:,} tokens, {least} rows of {seq_len} need {least * seq_len:,}; "
            "lower --samples, --windows or --seq-len, or name a longer text"
        )
    return torch.cat(pieces)[: rows * seq_len].view(rows, seq_len)


def _first_tokens(text: str, wanted: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """At least the first `wanted` tokens of `text`, or all, without tokenizing much more of a long text than that.

    Cutting the text changes only tokens at the cut, so a margin of tokens before it is not used.
    """
    margin = 64
    length = 4 * wanted + 1024
    while True:
        ids = tokenizer(text[:length], add_special_tokens=False, verbose=False)["input_ids"]
        if length >= len(text):
            return torch.tensor(ids, dtype=torch.int64)
        if len(ids) >= wanted + margin:
            return torch.tensor(ids[:wanted], dtype=torch.int64)
        length *= 2


def _documents(source: str, part: Part, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    sets = text_sets()
    if source in sets:
        chosen = sets[source]
    elif source.startswith("hf:"):
        name, _, config = source.removeprefix("hf:").partition(":")
        chosen = TextSet(description="", dataset=name, config=config or None)
    else:
        yield from _file_documents(Path(source), tokenizer, list(sets))
        return
    if chosen.dataset == "builtin":
        yield _builtin_text(part)
        return
    split = (part == "evaluation" and chosen.evaluation_split) or chosen.split
    for row in _hub_rows(chosen, split, source):
        yield _render(row, chosen.column, chosen.chat, tokenizer, source)


def _builtin_text(part: Part) -> str:
    """English prose that every Python carries: the language reference of `pydoc`.

    The reference repeats itself: evaluation leaves out every paragraph that calibration holds.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    cut = text.index("\n\n", int(len(text) * _CALIBRATION_SHARE))
    if part == "calibration":
        return text[:cut]
    known = {paragraph.strip() for paragraph in text[:cut].split("\n\n")}
    return "\n\n".join(paragraph for paragraph in text[cut:].split("\n\n") if paragraph.strip() not in known)


def _hub_rows(chosen: TextSet, split: str, source: str) -> Iterator[dict[str, Any]]:
    try:
        if not Path(chosen.dataset).is_dir():
            # Asked first, because the datasets library would try for half a minute, a line on stderr each time.
            HfApi().dataset_info(chosen.dataset, timeout=30)
        from datasets import load_dataset  # slow to import, and only needed here

        yield from load_dataset(chosen.dataset, chosen.config, split=split, streaming=True)
    except Exception as error:  # the datasets library raises many types
        raise CorpusError(
            f"dataset '{source}' cannot be loaded ({' '.join(str(error).split())[:200]}); "
            "without a network, name a local .txt, .jsonl or .parquet file"
        ) from error


def _file_documents(path: Path, tokenizer: PreTrainedTokenizerBase, sets: list[str]) -> Iterator[str]:
    if not path.is_file():
        raise CorpusError(f"text '{path}' is neither a file, nor hf:DATASET, nor one of: {', '.join(sets)}")
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    if line.strip():
                        yield _render_any(json.loads(line), tokenizer, path)
        elif path.suffix == ".parquet":
            parquet = importlib.import_module("pyarrow.parquet")
            for batch in parquet.ParquetFile(path).iter_batches():
                for row in batch.to_pylist():
                    yield _render_any(row, tokenizer, path)
        else:
            yield path.read_text(encoding="utf-8")
    except CorpusError:
        raise
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 (byte {error.start}); convert it with iconv first") from None
    except Exception as error:  # pyarrow raises many types
        reason = " ".join(str(error).split())[:200]
        raise CorpusError(f"{path}: cannot be read as {path.suffix or 'text'} ({reason}); mend or replace it") from error


def _render_any(row: Any, tokenizer: PreTrainedTokenizerBase, path: Path) -> str:
    """A row of a file: its `messages` through the chat template, else its `text`."""
    chat = isinstance(row, dict) and "messages" in row
    return _render(row, "messages" if chat else "text", chat, tokenizer, str(path))


def _render(row: Any, column: str, chat: bool, tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    value = row.get(column) if isinstance(row, dict) else None
    if chat and isinstance(value, list):
        try:
            text = str(tokenizer.apply_chat_template(value, tokenize=False))
        except Exception as error:  # jinja and transformers raise many types
            reason = " ".join(str(error).split())[:200]
            raise CorpusError(f"text '{source}': chat template failed ({reason}); name a text without chats") from error
    elif isinstance(value, str):
        text = value + "\n\n"
    else:
        known = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise CorpusError(f"text '{source}': a row has no text in column '{column}' (it has: {known:.200})")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CorpusError(f"text '{source}': a row is not UTF-8 (it holds half of a surrogate pair); mend it") from None
    return text
