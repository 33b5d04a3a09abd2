"""Wrong input of every kind: one error line that names the cause, exit status 2, and no files left."""

import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import tiny
from helpers.command import FAST, quantkit, refused
from quantkit.data.corpus import calibration_rows
from quantkit.errors import CorpusError, RecipeError
from quantkit.recipe import Calibration, Recipe, load_recipe, resolved_json

QUICK = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"

#: Damages a copy of a good model, and returns the extra options that the damaged model needs to fail.
Spoil = Callable[[Path], "tuple[object, ...] | None"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two blocks in several shards. Read only."""
    return tiny.make_model(tmp_path_factory.mktemp("sharded") / "model", shard="60KB", num_hidden_layers=2)


@pytest.fixture
def model(sharded: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None deletes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: field for key, field in value.items() if field is not None}))


def edit_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    path = shard_of(folder, name)
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def in_config(**changes: Any) -> Spoil:
    return lambda folder: edit_json(folder / "config.json", **changes)


def in_tensor(change: Callable[[Tensor], Tensor], name: str = UP) -> Spoil:
    return lambda folder: edit_tensor(folder, name, change)


def in_index(file: str) -> Spoil:
    """The index names `file` for a tensor."""

    def spoil(folder: Path) -> None:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        edit_json(folder / INDEX, weight_map=weight_map | {UP: file})

    return spoil


def in_shard(change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = shard_of(folder, UP)
        path.write_bytes(change(path.read_bytes()))

    return spoil


def without(*patterns: str) -> Spoil:
    """Files are missing."""

    def spoil(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return spoil


def containing(name: str, content: str | bytes) -> Spoil:
    """The model's file `name` holds `content`."""

    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def given_text(content: bytes, name: str = "text.txt") -> Spoil:
    """Calibrate on a file with that content."""

    def spoil(folder: Path) -> tuple[object, ...]:
        path = folder.parent / name
        path.write_bytes(content)
        return ("--calib", path)

    return spoil


def given_recipe(text: str) -> Spoil:
    def spoil(folder: Path) -> tuple[object, ...]:
        path = folder.parent / "recipe.yaml"
        path.write_text(text)
        return ("--recipe", path)

    return spoil


def with_options(*options: object) -> Spoil:
    return lambda _folder: options


def pickled(folder: Path) -> None:
    without("*.safetensors", INDEX)(folder)
    torch.save({}, folder / "pytorch_model.bin")


def replaced_by(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[-1, -1] = value
        return tensor

    return change


def claimed_header(length: int) -> Callable[[bytes], bytes]:
    return lambda content: struct.pack("<Q", length) + content[8:]


#: What is wrong -> (how to make it so, what the line says).
CASES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "no config": (without("config.json"), ("config.json: not found",)),
    "config is no JSON": (containing("config.json", "{"), ("config.json", "fetch the file again")),
    "config is a list": (containing("config.json", "[]"), ("config.json", "JSON object")),
    "config is not UTF-8": (containing("config.json", b"\xff{}"), ("config.json",)),
    "no model_type": (in_config(model_type=None), ("config.json", "model_type")),
    "unknown architecture": (in_config(model_type="rwkv"), ("config.json", "'rwkv'", "supported: ", "llama")),
    "remote code": (in_config(auto_map={"AutoModel": "evil.Model"}), ("config.json", "trust_remote_code", "use a model")),
    "nonsense in config": (in_config(num_attention_heads="many"), ("config.json",)),
    "no context": (
        in_config(max_position_embeddings=0),
        ("config.json: max_position_embeddings is 0, it must be at least 1; fetch the file again",),
    ),
    "unknown dtype": (in_config(dtype="float128"), ("config.json", "float128")),
    "already quantized": (
        in_config(quantization_config={"quant_method": "gptq"}),
        ("config.json", "already quantized (gptq)", "start from the original"),
    ),
    "quantized by an unknown tool": (in_config(quantization_config=[]), ("config.json", "already quantized")),
    "no weights": (without("*.safetensors", INDEX), ("holds no model.safetensors",)),
    "pickle only": (pickled, ("pytorch_model.bin", "can run code", "convert them to safetensors")),
    "missing shard": (lambda f: shard_of(f, UP).unlink(), (INDEX, "missing", "fetch it")),
    "index is no JSON": (containing(INDEX, "nope"), (INDEX, "fetch the file again")),
    "index without a map": (lambda f: edit_json(f / INDEX, weight_map=None), (INDEX, "weight_map", "fetch")),
    "index names a missing file": (in_index("model-9.safetensors"), (INDEX, "model-9.safetensors", "missing", "fetch it")),
    "index leaves the folder": (in_index("../model.safetensors"), (INDEX, "../model.safetensors", "outside", "refused")),
    "index leaves by the root": (in_index("/etc/passwd"), (INDEX, "/etc/passwd", "outside", "refused")),
    "index names the folder": (in_index(".."), (INDEX, "'..'", "refused")),
    "index names the wrong shard": (in_index("model-00001-of-00002.safetensors"), (INDEX, "model-00001-of-00002")),
    "truncated shard": (in_shard(lambda content: content[:-100]), (".safetensors", "truncated", "fetch the file again")),
    "shard cut in its header": (in_shard(lambda content: content[:50]), (".safetensors", "truncated", "fetch")),
    "empty shard": (in_shard(lambda content: b""), (".safetensors", "truncated", "fetch")),
    "shard with a huge header": (in_shard(claimed_header(2**62)), (".safetensors", "truncated or damaged", "fetch")),
    "shard with trailing bytes": (in_shard(lambda content: content + b"0"), (".safetensors", "damaged", "fetch")),
    "wrong shape": (in_tensor(lambda t: t[:-1]), (".safetensors", UP, "[127, 64]", "config.json says [128, 64]")),
    "wrong shape outside the blocks": (
        in_tensor(lambda t: t[:-1], "model.embed_tokens.weight"),
        ("model.embed_tokens.weight", "[255, 64]", "config.json says [256, 64]"),
    ),
    "wrong dtype": (in_tensor(lambda t: t.half()), (".safetensors", UP, "float16", "config.json says float32", "correct")),
    "integers": (in_tensor(lambda t: t.int()), (".safetensors", UP, "int32", "config.json says float32")),
    "more blocks than tensors": (in_config(num_hidden_layers=3), ("model.layers.2.", "config.json calls for")),
    "NaN in a weight": (in_tensor(replaced_by(float("nan"))), (".safetensors", UP, "NaN or Inf", "damaged")),
    "Inf in a weight": (in_tensor(replaced_by(float("inf"))), (".safetensors", UP, "NaN or Inf", "damaged")),
    "NaN in an embedding": (
        in_tensor(replaced_by(float("nan")), "model.embed_tokens.weight"),
        (".safetensors", "model.embed_tokens.weight", "NaN or Inf"),
    ),
    "Inf in an activation": (
        in_tensor(lambda t: t * 1.5e38, "model.layers.1.post_attention_layernorm.weight"),
        ("model.layers.1.mlp.gate_proj", "inputs hold NaN or Inf"),
    ),
    "weights too large for any grid": (in_tensor(lambda t: t * 1e38), ("model.layers.1.mlp.",)),
    "no tokenizer": (without("token*"), ("holds no tokenizer", "tokenizer.json", "copy the original")),
    "broken tokenizer": (containing("tokenizer.json", "{}"), ("tokenizer cannot be read",)),
    "empty text": (given_text(b""), ("text.txt", "gives 0 tokens", "name a longer text")),
    "short text": (given_text(b"too short"), ("text.txt", "gives 9 tokens", "lower --samples")),
    "text is not UTF-8": (given_text(b"caf\xe9" * 9999), ("text.txt", "not UTF-8 (byte 3)", "iconv")),
    "jsonl is not UTF-8": (given_text(b'{"text": "caf\xe9"}\n', "t.jsonl"), ("t.jsonl", "not UTF-8", "iconv")),
    "jsonl is no JSON": (given_text(b'{"text": "a"}\n{"te\n', "t.jsonl"), ("t.jsonl", "cannot be read as .jsonl")),
    "jsonl nested too deeply": (given_text(b"[" * 100_000, "t.jsonl"), ("t.jsonl", "cannot be read as .jsonl")),
    "jsonl without text": (given_text(b'{"body": "a"}\n', "t.jsonl"), ("t.jsonl", "column 'text'", "it has: body")),
    "jsonl of numbers": (given_text(b"1\n", "t.jsonl"), ("t.jsonl", "column 'text'", "it has: int")),
    "jsonl with half a character": (given_text(b'{"text": "\\ud800"}\n' * 9999, "t.jsonl"), ("t.jsonl", "not UTF-8")),
    "chat without a template": (
        given_text(b'{"messages": [{"role": "user", "content": "Hi"}]}\n', "t.jsonl"),
        ("t.jsonl", "chat template failed"),
    ),
    "parquet is no parquet": (given_text(b"PAR1 no PAR1", "t.parquet"), ("t.parquet", "cannot be read as .parquet")),
    "no such text": (with_options("--calib", "nowhere.txt"), ("nowhere.txt", "neither a file", "builtin")),
    "group size does not divide": (with_options("--group-size", 48), ("group size 48", "64 columns", "use 16, 32, 64")),
    "group size is odd": (with_options("--group-size", 7), ("group size 7", "multiple of 8")),
    "bits that nothing holds": (with_options("--bits", 5), ("bits", "2, 3, 4 or 8", "got 5")),
    "bits that the format cannot hold": (with_options("--format", "awq", "--bits", 3, "--asym"), ("4 bits",)),
    "mixture that the format cannot hold": (
        given_recipe("bits: 4\nformat: awq\nrules: [{match: down_proj, group_size: 32}]"),
        ("the awq format holds one scheme", "use compressed-tensors"),
    ),
    "nothing to quantize": (given_recipe("rules: [{match: '', skip: true}]"), ("skip every matrix",)),
    "no samples": (with_options("--samples", 0), ("calibration.samples", "got 0")),
    "seed too large": (with_options("--seed", 2**64), ("seed", "less than")),
    "rows longer than the context": (with_options("--seq-len", 512), ("--seq-len 512", "context of 256")),
    "no such recipe": (with_options("--recipe", "best"), ("'best'", "neither a file nor one of", "gptq-w4")),
    "no such device": (with_options("--device", "cuda:99"), ("--device cuda:99", "use cpu")),
    "device is no device": (with_options("--device", "toaster"), ("--device toaster", "auto, cpu, cuda")),
    "memory is no size": (with_options("--max-memory", "lots"), ("--max-memory lots", "8GiB")),
    "json cannot be written": (with_options("--json", "no/such/folder.json"), ("--json no/such/folder.json", "exists")),
}

#: Found when a block is reached, after lines of progress; everything else before any work.
FOUND_LATE = ("NaN in a weight", "Inf in a weight", "Inf in an activation", "weights too large for any grid")


@pytest.mark.parametrize("what", CASES)
def test_refused_in_one_line_with_nothing_left(model: Path, tmp_path: Path, what: str) -> None:
    spoil, expected = CASES[what]
    options = spoil(model) or ()
    before = {path.name for path in tmp_path.iterdir()}
    late = ("-q",) if what in FOUND_LATE else ()
    line = refused("quantize", model, "-o", tmp_path / "out", *FAST, *late, *options)
    for words in expected:
        assert words in line
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("what", ["wrong shape", "truncated shard", "NaN in an embedding", "index leaves the folder"])
def test_other_verbs_refuse_too(model: Path, tmp_path: Path, what: str) -> None:
    spoil, expected = CASES[what]
    spoil(model)
    assert expected[1] in refused("quantize", model, "-o", tmp_path / "out", *FAST, "--plan")
    assert expected[1] in refused("eval", model, "--windows", "2", "--seq-len", "64")


def test_out_exists(sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    assert "exists; choose another name or pass --overwrite" in refused("quantize", sharded, "-o", out, *FAST)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "no such folder"),
        ("./no/where", "no such folder"),
        ("{model}/config.json", "is a file"),
        ("demo2", "the embedded model is 'demo'"),
    ],
)
@pytest.mark.parametrize("verb", ["quantize", "inspect", "eval", "convert"])
def test_no_such_model(sharded: Path, tmp_path: Path, name: str, words: str, verb: str) -> None:
    more = {"quantize": ("-o", tmp_path / "out"), "convert": (tmp_path / "out", "--format", "gptq")}
    assert words in refused(verb, name.format(model=sharded), *more.get(verb, ()))
    assert not any(tmp_path.iterdir())


def test_messages_with_line_breaks_stay_one_line(sharded: Path, tmp_path: Path) -> None:
    assert "two lines" in refused("quantize", sharded, "-o", tmp_path / "out", "--recipe", "two\nlines")


def survives(recipe: Path) -> None:
    """A recipe file is read, or refused in one line; never anything else."""
    with contextlib.suppress(RecipeError):
        assert isinstance(load_recipe(str(recipe), {}), Recipe)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "&a [*a]",
        "rules: &a [{match: x}, *a]",
        "method: gptq\nbits: .nan",
        "damping: .inf",
        "seed: 1" + "0" * 400,
        "rules: [{match: '('}]",
        "rules: [{match: 'a{99999999999}'}]",
        f"rules: [{{match: '{'(' * 3000}{')' * 3000}'}}]",
        "1: 2",
        "? {a: b}\n: c",
        "!!python/object/apply:os.system [true]",
        "method: 2020-99-99",
        "bits: 4\nbits: 3\ngroup: 1",
        "- method",
        "",
        "\0",
    ],
)
def test_hostile_recipe_is_refused(sharded: Path, tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    line = refused("quantize", sharded, "-o", tmp_path / "out", "--recipe", recipe)
    assert "recipe" in line
    assert len(line) < 1000


@QUICK
@given(content=st.binary(max_size=200))
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_random_bytes_as_a_recipe(tmp_path: Path, content: bytes, suffix: str) -> None:
    recipe = tmp_path / f"recipe.{suffix}"
    recipe.write_bytes(content)
    survives(recipe)


#: Values that a field of a recipe may hold by mistake.
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@QUICK
@given(field=st.sampled_from([*Recipe.model_fields, "unknown"]), value=anything)
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_mutated_recipe(tmp_path: Path, field: str, value: Any, suffix: str) -> None:
    fields = resolved_json(Recipe()) | {field: value}
    recipe = tmp_path / f"recipe.{suffix}"
    recipe.write_text(json.dumps({"recipe": fields}) if suffix == "json" else yaml.safe_dump(fields))
    survives(recipe)


def mutations(content: bytes) -> st.SearchStrategy[bytes]:
    """`content` with a byte changed, a piece cut out, or its end missing."""
    place = st.integers(0, len(content) - 1)
    changed = st.builds(lambda at, byte: content[:at] + bytes([byte]) + content[at + 1 :], place, st.integers(0, 255))
    cut = st.builds(lambda at, length: content[:at] + content[at + length :], place, st.integers(1, 50))
    ended = st.builds(lambda at: content[:at], place)
    return changed | cut | ended


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.make_tokenizer()


ROWS = [{"text": f"Row {number} of a text to calibrate on."} for number in range(40)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def parquet_bytes() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("name", ["text.jsonl", "text.parquet", "text.txt"])
class TestCalibrationFile:
    """Any file gives rows of tokens or is refused in one line."""

    @staticmethod
    def survives(path: Path, content: bytes, tokenizer: Any) -> None:
        path.write_bytes(content)
        with contextlib.suppress(CorpusError):
            rows = calibration_rows(Calibration(source=str(path), samples=4, seq_len=16), 0, tokenizer)
            assert rows.shape == (4, 16)

    @QUICK
    @given(content=st.binary(max_size=300))
    def test_random_bytes(self, tmp_path: Path, tokenizer: Any, name: str, content: bytes) -> None:
        self.survives(tmp_path / name, content, tokenizer)

    @QUICK
    @given(data=st.data())
    def test_mutated(self, tmp_path: Path, tokenizer: Any, name: str, data: st.DataObject) -> None:
        good = parquet_bytes() if name.endswith("parquet") else JSONL
        self.survives(tmp_path / name, data.draw(mutations(good)), tokenizer)

    @QUICK
    @given(rows=st.lists(anything, max_size=5))
    def test_random_rows(self, tmp_path: Path, tokenizer: Any, name: str, rows: list[Any]) -> None:
        self.survives(tmp_path / name, "\n".join(map(json.dumps, rows)).encode(), tokenizer)


@pytest.fixture(scope="module")
def report(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A real quantkit.json."""
    out = tmp_path_factory.mktemp("artifact") / "out"
    assert quantkit("quantize", sharded, "-o", out, "--method", "rtn", "-q").status == 0
    return (out / "quantkit.json").read_bytes()


@QUICK
@given(data=st.data())
def test_mutated_report_as_a_recipe(tmp_path: Path, report: bytes, data: st.DataObject) -> None:
    recipe = tmp_path / "quantkit.json"
    recipe.write_bytes(data.draw(mutations(report)))
    survives(recipe)
