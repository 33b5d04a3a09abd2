"""Untrusted folders: every defect gives one error line and has no other effect."""

import json
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from quantkit.checkpoint.reader import Checkpoint, read_json, sha256
from quantkit.checkpoint.safetensors_header import DTYPES, TensorInfo
from quantkit.errors import CheckpointError, NumericsError, QuantkitError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TENSORS = {"a.weight": torch.arange(32.0).view(4, 8), "b.bias": torch.ones(3).half(), "c": torch.arange(5)}
GOOD = save(TENSORS)
HEADER_BYTES = struct.unpack("<Q", GOOD[:8])[0]
HEADER, BODY = json.loads(GOOD[8 : 8 + HEADER_BYTES]), GOOD[8 + HEADER_BYTES :]

_UNCHECKED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
#: All examples of a property test share one folder; each rewrites the files that it changes.
SHARED = settings(max_examples=100, deadline=None, suppress_health_check=_UNCHECKED)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A healthy one-shard model."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / SINGLE).write_bytes(GOOD)
    return tmp_path


def two_shards(model: Path, weight_map: Any = None) -> Path:
    """The model over one.safetensors (a.weight) and two.safetensors (b.bias, c)."""
    (model / SINGLE).unlink(missing_ok=True)
    save_file({"a.weight": TENSORS["a.weight"]}, model / "one.safetensors")
    save_file({"b.bias": TENSORS["b.bias"], "c": TENSORS["c"]}, model / "two.safetensors")
    files = {"a.weight": "one.safetensors", "b.bias": "two.safetensors", "c": "two.safetensors"}
    (model / INDEX).write_text(json.dumps({"weight_map": files if weight_map is None else weight_map}))
    return model


def refusal(model: Path) -> str:
    """What opening and reading everything is refused with."""
    with pytest.raises((CheckpointError, NumericsError)) as caught:
        read_all(model)
    message = str(caught.value)
    assert "\n" not in message
    assert str(model) in message
    return message.replace(str(model), "MODEL")


def read_all(model: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(model)
    return checkpoint.read(checkpoint.tensors)


def tensors_or_one_line(model: Path) -> None:
    """The property: a model that opens is read as its header says, any other is refused in one line."""
    try:
        checkpoint = Checkpoint(model)
        for name, tensor in checkpoint.read(checkpoint.tensors).items():
            info = checkpoint.tensors[name]
            assert (tensor.dtype, tuple(tensor.shape)) == (info.torch_dtype, info.shape)
    except (CheckpointError, NumericsError) as error:
        message = str(error)
        assert "\n" not in message
        assert str(model) in message
        assert len(message) < 600


@pytest.fixture
def little_memory() -> Iterator[None]:
    """2 GiB more of address space than is in use: a size in a header that is believed fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# What is right is read.


def test_a_shard_is_read_as_it_was_written(model: Path) -> None:
    checkpoint = Checkpoint(model)
    assert checkpoint.tensors["b.bias"] == TensorInfo(model / SINGLE, "F16", (3,))
    assert checkpoint.tensors["b.bias"].nbytes == 6
    read = checkpoint.read(["c", "a.weight"])
    assert list(read) == ["c", "a.weight"]
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in read.items())


def test_shards_are_found_through_the_index(model: Path) -> None:
    checkpoint = Checkpoint(two_shards(model))
    assert [file.name for file in checkpoint.files] == ["one.safetensors", "two.safetensors"]
    found = {name: info.file.name for name, info in checkpoint.tensors.items()}
    assert found == read_json(model / INDEX)["weight_map"]
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in checkpoint.read(TENSORS).items())


def test_names_under_a_prefix(model: Path) -> None:
    checkpoint = Checkpoint(model)
    assert checkpoint.names_under("") == ["a.weight", "b.bias", "c"]
    assert checkpoint.names_under("a.") == ["a.weight"]


def test_a_read_tensor_outlives_its_file(model: Path) -> None:
    tensor = Checkpoint(model).read(["a.weight"])["a.weight"]
    (model / SINGLE).write_bytes(bytes(len(GOOD)))
    assert torch.equal(tensor, TENSORS["a.weight"])


def test_a_mapped_tensor_stays_in_its_file(model: Path) -> None:
    """Also when the file is replaced. The kernel lists which addresses belong to which file."""
    tensor = Checkpoint(model).map("a.weight")
    assert torch.equal(tensor, TENSORS["a.weight"])
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(model / SINGLE))]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    assert any(start <= tensor.data_ptr() < stop for start, stop in ranges)
    (model / "new").write_bytes(bytes(len(GOOD)))
    (model / "new").rename(model / SINGLE)
    assert torch.equal(tensor, TENSORS["a.weight"])


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_read(model: Path, name: str) -> None:
    dtype = getattr(torch, DTYPES[name].torch_name)
    values = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    save_file({"x": values}, model / SINGLE)
    info = Checkpoint(model).tensors["x"]
    assert (info.dtype, info.torch_dtype, info.nbytes) == (name, dtype, values.nbytes)
    assert info.is_floating_point == dtype.is_floating_point
    read = read_all(model)["x"]
    assert read.dtype == dtype
    assert torch.equal(read.to(torch.float64), values.to(torch.float64))


# Metadata.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON (Expecting property name"),
        ("", "cannot be read as JSON (Expecting value"),
        ("[" * 100_000, "cannot be read as JSON (maximum recursion depth"),
        ('{"a": ' + "1" * 5000 + "}", "cannot be read as JSON (Exceeds the limit"),
        ("[]", "must hold a JSON object, holds list"),
        ("null", "must hold a JSON object, holds NoneType"),
        ("{}", "has no 'model_type'"),
        ('{"model_type": 7}', "has no 'model_type'"),
    ],
    ids=["truncated", "empty", "deep", "huge number", "list", "null", "no type", "type no text"],
)
def test_config_json(model: Path, text: str, message: str) -> None:
    (model / "config.json").write_text(text)
    assert refusal(model).startswith(f"MODEL/config.json: {message}")


def test_config_json_not_utf8(model: Path) -> None:
    (model / "config.json").write_bytes(b'{"model_type": "\xff"}')
    assert refusal(model).startswith("MODEL/config.json: cannot be read as JSON (")


def test_empty_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "MODEL/config.json: not found; is this a Hugging Face model folder?"


def test_no_weights(model: Path) -> None:
    (model / SINGLE).unlink()
    assert refusal(model) == f"MODEL: holds no {SINGLE} and no {INDEX}; fetch the weights"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_never_opened(model: Path, name: str) -> None:
    (model / SINGLE).unlink()
    (model / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert refusal(model).startswith(f"MODEL/{name}: pickled weights can run code and are not read; convert them")


def test_a_quantized_source_is_refused_with_the_way_out(model: Path) -> None:
    Checkpoint(model).require_unquantized()
    (model / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(CheckpointError, match=r"\A.*config.json: the model is already quantized \(gptq\); .*convert.*\Z"):
        Checkpoint(model).require_unquantized()


# The index.


@pytest.mark.parametrize("name", ["../x", "../one.safetensors", "/etc/passwd", "sub/one.safetensors", "..", ".", ""])
def test_index_outside_the_folder(model: Path, name: str) -> None:
    two_shards(model, {"a.weight": name})
    assert refusal(model) == f"MODEL/{INDEX}: names '{name}', which is outside the model's folder; refused"


@pytest.mark.parametrize("name", ["three.safetensors", "x" * 5000, "a\0b", "a\nb", "\ud800"])
def test_index_names_a_missing_shard(model: Path, name: str) -> None:
    two_shards(model, {"a.weight": "one.safetensors", "b.bias": name})
    assert refusal(model) == f"MODEL/{INDEX}: names {name!r:.120}, which is missing from MODEL; fetch it"


def test_index_disagrees_with_a_shard(model: Path) -> None:
    two_shards(model, {"a.weight": "two.safetensors", "b.bias": "two.safetensors"})
    assert refusal(model).startswith(f"MODEL/{INDEX}: says 'a.weight' is in two.safetensors, which does not hold it; fetch")


def test_a_tensor_in_two_shards(model: Path) -> None:
    two_shards(model)
    save_file({"a.weight": torch.zeros(1), "b.bias": torch.zeros(1)}, model / "one.safetensors")
    assert refusal(model) == "MODEL/two.safetensors: tensor 'b.bias' is also in one.safetensors; fetch the model again"


def test_a_shard_that_is_a_broken_link(model: Path) -> None:
    two_shards(model)
    (model / "two.safetensors").unlink()
    (model / "two.safetensors").symlink_to("nowhere")
    assert refusal(model) == "MODEL/two.safetensors: shard is missing; fetch it again"


@pytest.mark.parametrize("entries", [{}, [], None, 7, {"a.weight": 7}, {"a.weight": None}])
def test_index_without_a_usable_map(model: Path, entries: Any) -> None:
    two_shards(model)
    (model / INDEX).write_text(json.dumps({"weight_map": entries}))
    assert refusal(model) == f"MODEL/{INDEX}: has no usable 'weight_map'; fetch the file again"


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=6,
)
present = st.sampled_from(["one.safetensors", "two.safetensors", "config.json", INDEX, ".", "folder"])
file_names = present | st.text(max_size=300)


@SHARED
@given(st.dictionaries(st.sampled_from(sorted(TENSORS)) | st.text(max_size=9), file_names | junk, max_size=4))
def test_any_weight_map(model: Path, weight_map: dict[str, Any]) -> None:
    (model / "folder").mkdir(exist_ok=True)
    tensors_or_one_line(two_shards(model, weight_map))


@SHARED
@given(junk.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60))
def test_any_index(model: Path, raw: bytes) -> None:
    two_shards(model)
    (model / INDEX).write_bytes(raw)
    tensors_or_one_line(model)


@SHARED
@given(junk.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60))
def test_any_json_file(model: Path, raw: bytes) -> None:
    (model / "config.json").write_bytes(raw)
    try:
        assert isinstance(read_json(model / "config.json"), dict)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017 (either outcome is right)
    tensors_or_one_line(model)


# The shards.


def test_every_truncation_is_refused(model: Path) -> None:
    for length in range(len(GOOD)):
        (model / SINGLE).write_bytes(GOOD[:length])
        assert refusal(model).startswith(f"MODEL/{SINGLE}: truncated or damaged ("), length


@SHARED
@given(st.binary(max_size=200))
def test_random_bytes(model: Path, raw: bytes) -> None:
    (model / SINGLE).write_bytes(raw)
    tensors_or_one_line(model)


@SHARED
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes(model: Path, changes: list[tuple[int, int]]) -> None:
    raw = bytearray(GOOD)
    for place, value in changes:
        raw[place] = value
    (model / SINGLE).write_bytes(raw)
    tensors_or_one_line(model)


sizes = st.sampled_from([-1, 0, 1, 3, 4, 2**31, 2**32, 2**40, 2**63, 2**64 - 1, 2**64])
fields = {
    "dtype": st.sampled_from([*DTYPES, "F4", "F8_E8M0", "F6_E2M3", "C64", "U16", "U64", "f32", ""]) | junk,
    "shape": st.lists(sizes, max_size=4) | junk,
    "data_offsets": st.lists(sizes | st.sampled_from([40, 168, 174]), max_size=3) | junk,
}


@SHARED
@given(st.data())
def test_any_header(model: Path, little_memory: None, data: st.DataObject) -> None:
    header = json.loads(json.dumps(HEADER))
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from([*HEADER, "__metadata__"]) | st.text(max_size=5))
        field = data.draw(st.sampled_from([*fields, "all"]))
        if field == "all" or not isinstance(header.get(name), dict):
            header[name] = data.draw(junk | st.fixed_dictionaries(fields))
        else:
            header[name][field] = data.draw(fields[field])
    raw = json.dumps(header).encode()
    (model / SINGLE).write_bytes(struct.pack("<Q", len(raw)) + raw + BODY)
    tensors_or_one_line(model)


@pytest.mark.parametrize("shape", [[0, 2**63], [2**64 - 1, 0]])
def test_an_empty_tensor_of_impossible_size(model: Path, shape: list[int]) -> None:
    """safetensors accepts its header, torch cannot hold its shape."""
    raw = json.dumps({"x\ny": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (model / SINGLE).write_bytes(struct.pack("<Q", len(raw)) + raw)
    assert refusal(model) == f"MODEL/{SINGLE}: tensor 'x\\ny' has an impossible shape; fetch the file again"


def test_a_name_with_line_breaks_is_quoted(model: Path) -> None:
    raw = json.dumps({"x\ny": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}).encode()
    (model / SINGLE).write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4))
    assert r"'x\ny'" in refusal(model)


def test_a_dtype_that_is_not_read(model: Path) -> None:
    raw = json.dumps({"x": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    (model / SINGLE).write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    assert refusal(model).startswith(f"MODEL/{SINGLE}: tensor 'x' has dtype C64; only F64, F32, ")


@SHARED
@given(st.integers(0, 2**64 - 1))
@example(2**64 - 1)
@example(2**33)
@example(HEADER_BYTES + 1)
def test_any_header_length(model: Path, little_memory: None, length: int) -> None:
    (model / SINGLE).write_bytes(struct.pack("<Q", length) + GOOD[8:])
    tensors_or_one_line(model)


# The values.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 500, -1])
def test_nan_and_inf_are_named(model: Path, dtype: torch.dtype, value: float, place: int) -> None:
    weight = torch.randn(20, 50).to(dtype)
    weight.view(-1)[place] = value
    save_file({"fine": torch.randn(4).to(dtype), "layers.0.weight": weight}, model / SINGLE)
    with pytest.raises(NumericsError, match=rf"\A{model / SINGLE}: tensor 'layers.0.weight' holds NaN or Inf; .*\Z"):
        read_all(model)
    with pytest.raises(NumericsError, match=r"tensor 'layers.0.weight' holds NaN or Inf"):
        Checkpoint(model).map("layers.0.weight")
    assert Checkpoint(model).read(["fine"])["fine"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_largest_finite_values_are_read(model: Path, dtype: torch.dtype) -> None:
    weight = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, torch.finfo(dtype).smallest_normal], dtype=dtype)
    save_file({"x": weight, "empty": torch.empty(0, 3, dtype=dtype)}, model / SINGLE)
    assert torch.equal(read_all(model)["x"], weight)


# A shard that changes after opening.


def test_a_tensor_that_is_missing(model: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"\A{model}: tensor 'x' is missing; fetch the model again\Z"):
        Checkpoint(model).read(["x"])
    with pytest.raises(CheckpointError, match=rf"\A{model}: tensor 'x' is missing; fetch the model again\Z"):
        Checkpoint(model).map("x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), "shard is missing; fetch it again"),
        (lambda file: file.write_bytes(GOOD[:-1]), "truncated or damaged ("),
        (lambda file: save_file({"b": torch.ones(1)}, file), "truncated or damaged (File does not contain tensor a.weight)"),
        (lambda file: save_file({"a.weight": torch.ones(8, 4)}, file), "changed while it was being read"),
        (lambda file: save_file({"a.weight": torch.ones(4, 8).double()}, file), "changed while it was being read"),
    ],
    ids=["gone", "cut", "other tensors", "other shape", "other dtype"],
)
@pytest.mark.parametrize("read", [lambda opened: opened.read(["a.weight"]), lambda opened: opened.map("a.weight")])
def test_a_shard_changes_after_opening(model: Path, change: Any, message: str, read: Callable[[Checkpoint], Any]) -> None:
    checkpoint = Checkpoint(model)
    change(model / SINGLE)
    with pytest.raises(CheckpointError) as caught:
        read(checkpoint)
    assert str(caught.value).startswith(f"{model / SINGLE}: {message}")
    assert "\n" not in str(caught.value)


def test_sha256_of_a_file_and_of_none(model: Path) -> None:
    (model / "x").write_bytes(b"abc")
    assert sha256(model / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(QuantkitError, match=rf"\A{model}/y: cannot be read \(No such file or directory\)\Z"):
        sha256(model / "y")
