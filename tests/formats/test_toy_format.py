"""A format needs one registry entry: a format that a test registers works everywhere, from the command line to `deploy`."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.command import quantkit, refused
from helpers.slow_formats import make_weight
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats import FORMATS, EngineSupport, Format, ModuleSchemes
from quantkit.formats.artifact import PackedReader
from quantkit.methods.grid import QuantizedWeight
from quantkit.methods.scheme import Scheme

RTN = ("--method", "rtn", "--group-size", "32", "-q")


def _encode(weight: QuantizedWeight, _dtype: torch.dtype) -> dict[str, Tensor]:
    return {"codes": weight.codes.int(), "scales": weight.scales, "zeros": weight.zeros}


def _decode(tensors: Mapping[str, Tensor], scheme: Scheme, _config: Mapping[str, Any]) -> QuantizedWeight:
    return QuantizedWeight(tensors["codes"].to(torch.uint8), tensors["scales"], tensors["zeros"], scheme)


def _config(schemes: ModuleSchemes) -> dict[str, Any]:
    (scheme,) = {scheme for scheme in schemes.values() if scheme is not None}
    return {"quant_method": "toy", "scheme": [scheme.bits, scheme.group_size, scheme.symmetric]}


def _stored_bytes(scheme: Scheme, rows: int, columns: int, _itemsize: int) -> int:
    return 4 * rows * columns + 5 * rows * scheme.groups(columns)


TOY = Format(
    name="toy",
    suffixes=("codes", "scales", "zeros"),
    encode=_encode,
    decode=_decode,
    config=_config,
    schemes=lambda config, modules: dict.fromkeys(modules, Scheme(*config["scheme"])),
    unsupported_reason=lambda scheme, _rows, _columns: None if scheme.bits == 4 else "the toy format holds 4 bits",
    engines=lambda _used: [EngineSupport("vLLM", False, "too old for toys")],
    dense_shape=lambda stored, _bits: (stored[0], stored[1]),
    stored_bytes=_stored_bytes,
    packed_rows=lambda _scheme: False,
    packed_columns=lambda _scheme: False,
    extra_config_files=("toy.json",),
)


@pytest.fixture(autouse=True)
def _toy() -> Iterator[None]:
    with FORMATS.registered("toy", TOY, "One int32 per weight."):
        yield


@pytest.fixture
def artifact(llama: Path, tmp_path: Path) -> Path:
    done = quantkit("quantize", llama, "-o", tmp_path / "toy", "--format", "toy", *RTN)
    assert done.status == 0, done.err
    return tmp_path / "toy"


def test_every_entry_is_the_format_of_its_name() -> None:
    assert FORMATS.choices() == ["compressed-tensors", "gptq", "awq", "toy"]
    assert all(FORMATS[name].name == name for name in FORMATS)


def test_quantize_and_inspect_use_the_toy(artifact: Path) -> None:
    assert json.loads((artifact / "toy.json").read_text())["quant_method"] == "toy"
    shown = quantkit("inspect", artifact, "--json", "-")
    assert shown.status == 0, shown.err
    facts = json.loads(shown.out)
    assert facts["format"] == "toy"
    assert facts["schemes"] == {"4-bit g32 sym": 21}
    assert facts["engines"] == [{"name": "vLLM", "loads": False, "note": "too old for toys"}]
    # 32 bits per code, and 32 + 8 for the scale and zero point of 32 codes.
    assert facts["bits per weight"] == 32 + 40 / 32


def test_plan_predicts_the_toys_size(llama: Path, artifact: Path, tmp_path: Path) -> None:
    done = quantkit("quantize", llama, "-o", tmp_path / "out", "--format", "toy", *RTN, "--plan", "--json", "-")
    assert done.status == 0, done.err
    held = sum(tensor.nbytes for path in artifact.glob("*.safetensors") for tensor in load_file(path).values())
    assert json.loads(done.out)["disk_bytes"] == held


def test_convert_from_and_to_the_toy(artifact: Path, tmp_path: Path) -> None:
    for source, out, name in ((artifact, "gptq", "gptq"), (tmp_path / "gptq", "again", "toy")):
        done = quantkit("convert", source, tmp_path / out, "--format", name)
        assert done.status == 0, done.err
    first, again = (load_file(folder / "model.safetensors") for folder in (artifact, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_what_the_toy_cannot_hold_is_refused(llama: Path, tmp_path: Path) -> None:
    message = refused("quantize", llama, "-o", tmp_path / "out", "--format", "toy", "--bits", "8", *RTN)
    assert message.endswith("the toy format holds 4 bits")
    message = refused("quantize", llama, "-o", tmp_path / "out", "--format", "toy", "--rotate", *RTN)
    assert message.endswith("rotate: the toy format has no field for it; use --format compressed-tensors")


@pytest.mark.parametrize(
    ("engine", "reason"),
    [("vllm", "vLLM does not load it (too old for toys)"), ("sglang", "(it does not read the toy format)")],
)
def test_deploy_offers_another_format(artifact: Path, engine: str, reason: str) -> None:
    message = refused("deploy", engine, artifact)
    assert reason in message
    assert message.endswith(f"use `quantkit convert {artifact} OUT --format compressed-tensors`")


def test_an_unknown_format_lists_the_toy_too(artifact: Path, tmp_path: Path) -> None:
    done = quantkit("convert", artifact, tmp_path / "out", "--format", "gguf")
    assert done.status == 2
    words = " ".join(done.err.replace("│", " ").split())
    assert "unknown format 'gguf'; choose from: compressed-tensors, gptq, awq, toy" in words


def test_the_reader_takes_the_format_from_the_registry(artifact: Path) -> None:
    assert PackedReader(Checkpoint(artifact)).format is TOY


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq", "toy"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(32, 96), (24, 96), (5, 96)])
def test_predicted_bytes_are_those_that_are_stored(
    name: str, dtype: torch.dtype, bits: int, symmetric: bool, rows: int, columns: int
) -> None:
    scheme = Scheme(bits, 32, symmetric)
    if FORMATS[name].unsupported_reason(scheme, rows, columns) is None:
        tensors = FORMATS[name].encode(make_weight(scheme, rows, columns), dtype)
        stored = sum(tensor.nbytes for tensor in tensors.values())
        assert FORMATS[name].stored_bytes(scheme, rows, columns, dtype.itemsize) == stored
