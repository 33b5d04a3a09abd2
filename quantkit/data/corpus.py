"""Turn text into rows of tokens, for calibration and for perplexity.

Documents are joined into one stream of tokens, which is cut into full rows, so no row holds padding. Only a blank line
separates documents, and no special token, because published perplexities are measured that way.

Importing this module does not import torch, transformers, datasets or huggingface_hub: listing the text sets is quick.
"""

import hashlib
import importlib
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from quantkit.errors import CorpusError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from quantkit.recipe import Calibration

#: The share of the built-in text that calibrates; the rest evaluates.
_CALIBRATION_SHARE = 0.8

#: With a seed, rows are drawn from a pool this many times as large as the number of rows asked for.
_POOL = 8

Part = Literal["calibration", "evaluation"]


class TextSet(BaseModel):
    """A text set: a manifest in `calibration_sets/`.

    Attributes:
        description: one line, which `quantkit calib` shows.
        dataset: "builtin", a file's path, or the name of a dataset on the Hub.
        config: the dataset's configuration, if it has several.
        split: the split that calibrates.
        evaluation_split: the split that evaluates; None: `split`.
        column: the column that holds the text or, if `chat`, the list of chat messages.
        chat: render the messages with the model's chat template.
        licence: the licence of the text.
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
    """The manifests of all text sets that ship with quantkit, by name."""
    files = [f for f in resources.files("quantkit.data.calibration_sets").iterdir() if f.name.endswith(".yaml")]
    return {
        f.name.removesuffix(".yaml"): TextSet.model_validate(yaml.safe_load(f.read_text("utf-8")))
        for f in sorted(files, key=str)
    }


def calibration_rows(spec: "Calibration", seed: int | None, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
    """Rows of calibration tokens, int64 [samples, seq_len].

    Without a seed these are the first rows of the text; with one, they are drawn at random from its beginning.

    Raises:
        CorpusError: the text is missing, empty, too short or not UTF-8.
    """
    wanted = spec.samples * (_POOL if seed is not None else 1)
    rows = _rows(spec.source, "calibration", wanted, spec.samples, spec.seq_len, tokenizer)
    if seed is not None:
        import torch

        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        rows = rows[order[: spec.samples]]
    return rows


def evaluation_rows(source: str, windows: int, seq_len: int, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
    """The first `windows` rows of a text, int64 [windows, seq_len]. Of the built-in text, none is used for calibration.

    Raises:
        CorpusError: as `calibration_rows`.
    """
    return _rows(source, "evaluation", windows, windows, seq_len, tokenizer)


def tokens_sha256(rows: "Tensor") -> str:
    """Hex SHA-256 of token rows as little-endian int64, row by row."""
    return hashlib.sha256(rows.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def _rows(source: str, part: Part, wanted: int, least: int, seq_len: int, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
    """Up to `wanted` rows of a text, int64 [rows, seq_len].

    Raises:
        CorpusError: the text has fewer than `least` rows, or cannot be read.
    """
    import torch

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


def _first_tokens(text: str, wanted: int, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
    """The first `wanted` tokens of `text`, or all of them if the text is shorter.

    Of a long text little more than that is tokenized. Cutting the text changes only the tokens next to the cut, so a margin
    of tokens before the cut is not used.
    """
    import torch

    margin = 64
    length = 4 * wanted + 1024
    while True:
        ids = tokenizer(text[:length], add_special_tokens=False, verbose=False)["input_ids"]
        if length >= len(text):
            return torch.tensor(ids, dtype=torch.int64)
        if len(ids) >= wanted + margin:
            return torch.tensor(ids[:wanted], dtype=torch.int64)
        length *= 2


def _documents(source: str, part: Part, tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    """The documents of a text set, a Hub dataset (`hf:NAME` or `hf:NAME:CONFIG`) or a file."""
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
    """English prose that comes with every Python: the language reference of `pydoc`.

    The reference repeats itself, so the evaluation part omits every paragraph that is in the calibration part.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    cut = text.index("\n\n", int(len(text) * _CALIBRATION_SHARE))
    if part == "calibration":
        return text[:cut]
    known = {paragraph.strip() for paragraph in text[:cut].split("\n\n")}
    return "\n\n".join(paragraph for paragraph in text[cut:].split("\n\n") if paragraph.strip() not in known)


def _hub_rows(chosen: TextSet, split: str, source: str) -> Iterator[dict[str, Any]]:
    """The rows of a dataset, streamed from the Hub or read from a folder."""
    try:
        if not Path(chosen.dataset).is_dir():
            from huggingface_hub import HfApi

            # The datasets library would retry for half a minute and print a line to stderr each time. This fails at once.
            HfApi().dataset_info(chosen.dataset, timeout=30)
        from datasets import load_dataset

        yield from load_dataset(chosen.dataset, chosen.config, split=split, streaming=True)
    except Exception as error:  # the datasets library raises many types
        raise CorpusError(
            f"dataset '{source}' cannot be loaded ({' '.join(str(error).split())[:200]}); "
            "without a network, name a local .txt, .jsonl or .parquet file"
        ) from error


def _file_documents(path: Path, tokenizer: "PreTrainedTokenizerBase", sets: list[str]) -> Iterator[str]:
    """The documents of a .jsonl or .parquet file, one per row, or a whole text file as one document."""
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
        raise CorpusError(f"{path}: cannot be read as {path.suffix or 'text'} ({reason}); repair or replace it") from error


def _render_any(row: Any, tokenizer: "PreTrainedTokenizerBase", path: Path) -> str:
    """A row of a file as text: its `messages` in the chat template if it has them, else its `text`."""
    chat = isinstance(row, dict) and "messages" in row
    return _render(row, "messages" if chat else "text", chat, tokenizer, str(path))


def _render(row: Any, column: str, chat: bool, tokenizer: "PreTrainedTokenizerBase", source: str) -> str:
    """A row of a text as a document: a conversation in the chat template, or plain text and a blank line.

    Raises:
        CorpusError: the column is missing or holds no text, the template fails, or the text is not valid Unicode.
    """
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
        raise CorpusError(f"text '{source}': a row is not UTF-8 (it holds half of a surrogate pair); correct it") from None
    return text
