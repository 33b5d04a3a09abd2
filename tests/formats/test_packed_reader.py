"""Packed matrices on disk, intact or damaged: `artifact.PackedReader` returns weights or raises an error of one clear line."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from helpers.slow_formats import make_weight
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import FormatError, QuantkitError
from quantkit.formats import FORMATS
from quantkit.formats.artifact import PackedReader, bits_per_weight, dense_reader
from quantkit.methods.scheme import Scheme

NAMES = list(FORMATS)
SCHEME = Scheme(4, 32, False)
WEIGHT = make_weight(SCHEME, 32, 96)
MODULE = "model.layers.0.mlp.down_proj"

_UNCHECKED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
#: All examples of a property test share one folder; each rewrites it.
SHARED = settings(max_examples=60, deadline=None, suppress_health_check=_UNCHECKED)


def packed_tensors(form: str) -> dict[str, Tensor]:
    return {f"{MODULE}.{suffix}": tensor for suffix, tensor in FORMATS[form].encode(WEIGHT, torch.float16).items()}


def written(folder: Path, config: Any, tensors: dict[str, Tensor]) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder)


def artifact(folder: Path, form: str) -> Checkpoint:
    return written(folder, FORMATS[form].config({MODULE: SCHEME, "lm_head": None}), packed_tensors(form))


@pytest.mark.parametrize("form", NAMES)
def test_an_artifact_is_read_back(tmp_path: Path, form: str) -> None:
    checkpoint = artifact(tmp_path, form)
    packed = PackedReader(checkpoint)
    assert packed.format.name == form
    assert packed.modules == [MODULE]
    assert packed.scheme(MODULE) == SCHEME
    assert packed.shape(MODULE) == (32, 96)
    assert torch.equal(packed.read(MODULE).dequantize(), WEIGHT.dequantize())
    dense = dense_reader(checkpoint)([f"{MODULE}.weight"])
    assert torch.equal(dense[f"{MODULE}.weight"], WEIGHT.dequantize())


@pytest.mark.parametrize("form", NAMES)
def test_stored_bits_count_scales_and_zero_points_once(tmp_path: Path, form: str) -> None:
    assert bits_per_weight(artifact(tmp_path, form)) == 4 + 16 / 32 + 4 / 32


def test_a_null_quantization_config_means_dense(tmp_path: Path) -> None:
    """transformers reads it the same way."""
    weight = torch.randn(4, 8)
    checkpoint = written(tmp_path, None, {"x.weight": weight})
    assert torch.equal(dense_reader(checkpoint)(["x.weight"])["x.weight"], weight)
    assert bits_per_weight(checkpoint) == 32
    checkpoint.require_unquantized()


@pytest.mark.parametrize("form", NAMES)
def test_a_tensor_that_is_missing_is_named(tmp_path: Path, form: str) -> None:
    tensors = packed_tensors(form)
    del tensors[f"{MODULE}.{FORMATS[form].suffixes[1]}"]
    packed = PackedReader(written(tmp_path, FORMATS[form].config({MODULE: SCHEME}), tensors))
    with pytest.raises(FormatError, match=rf"\A{tmp_path}: '{MODULE}' lacks '{FORMATS[form].suffixes[1]}'; fetch .*\Z"):
        packed.read(MODULE)


@pytest.mark.parametrize("form", NAMES)
def test_no_packed_matrix_is_refused(tmp_path: Path, form: str) -> None:
    checkpoint = written(tmp_path, FORMATS[form].config({MODULE: SCHEME}), {"x.weight": torch.zeros(2, 2)})
    with pytest.raises(FormatError, match=rf"\A{tmp_path}/config.json: says {form}, but no shard holds .*; fetch .*\Z"):
        PackedReader(checkpoint)


@pytest.mark.parametrize("form", NAMES)
def test_packed_but_not_quantized_is_refused(tmp_path: Path, form: str) -> None:
    checkpoint = written(tmp_path, FORMATS[form].config({"other": SCHEME, MODULE: None}), packed_tensors(form))
    with pytest.raises(FormatError, match=rf"\A{tmp_path}/config.json: says '{MODULE}' is not quantized, but .*; fetch .*\Z"):
        PackedReader(checkpoint).read(MODULE)


@pytest.mark.parametrize("change", [lambda t: t.to(torch.int64), lambda t: t[None], lambda t: t[:0], lambda t: t.flatten()])
def test_packing_of_another_kind_is_refused(tmp_path: Path, change: Any) -> None:
    """GPTQ with words of another width, or with stacked experts."""
    tensors = packed_tensors("gptq")
    name = f"{MODULE}.qweight"
    tensors[name] = change(tensors[name]).contiguous()
    checkpoint = written(tmp_path, FORMATS["gptq"].config({MODULE: SCHEME}), tensors)
    with pytest.raises(FormatError, match=rf"\A{tmp_path}/model.safetensors: '{name}' is not an int32 matrix, .*\Z"):
        PackedReader(checkpoint)


@pytest.mark.parametrize("config", [[], "gptq", 4, True])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, config: Any) -> None:
    checkpoint = written(tmp_path, config, packed_tensors("gptq"))
    with pytest.raises(FormatError, match=rf"\A{tmp_path}/config.json: quantization_config is not an object; .*\Z"):
        PackedReader(checkpoint)


def test_an_incomplete_config_names_what_is_missing(tmp_path: Path) -> None:
    config = FORMATS["gptq"].config({MODULE: SCHEME})
    del config["bits"]
    with pytest.raises(FormatError, match=rf"\A{tmp_path}/config.json: quantization_config is incomplete \(.*'bits'.*\Z"):
        PackedReader(written(tmp_path, config, packed_tensors("gptq")))


def test_a_rule_that_is_no_regular_expression_is_refused(tmp_path: Path) -> None:
    config = FORMATS["gptq"].config({MODULE: SCHEME}) | {"dynamic": {"+:(": {}}}
    with pytest.raises(FormatError, match=rf"\A{tmp_path}/config.json: quantization_config is incomplete \(.*\Z"):
        PackedReader(written(tmp_path, config, packed_tensors("gptq")))


# Anything else that can be wrong: a QuantkitError of one line, or weights of the right shape.


def everything_or_one_line(checkpoint: Checkpoint) -> None:
    try:
        packed = PackedReader(checkpoint)
        for module in packed.modules:
            packed.shape(module)
            weight = packed.read(module)
            rows, columns = weight.codes.shape
            assert weight.dequantize().shape == (rows, columns)
            assert weight.scales.shape == weight.zeros.shape == (rows, weight.scheme.groups(columns))
            assert int(weight.codes.max()) <= weight.scheme.levels
            assert int(weight.zeros.max()) <= weight.scheme.levels
        bits_per_weight(checkpoint)
    except QuantkitError as error:
        message = str(error)
        assert "\n" not in message
        assert str(checkpoint.folder) in message
        assert len(message) < 600


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([-1, 0, 2, 3, 8, 32, 96]) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=4,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in keys for place in [(value, key), *places(inner)]]


@SHARED
@given(form=st.sampled_from(NAMES), data=st.data())
def test_any_damage_to_the_config(tmp_path: Path, form: str, data: st.DataObject) -> None:
    other = SCHEME if form == "awq" else Scheme(8, 32, False)
    plan = {MODULE: SCHEME, "lm_head": None, "model.layers.1.mlp.down_proj": other}
    config = copy.deepcopy(FORMATS[form].config(plan))
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(config) or [({}, "")]))
        container[key] = data.draw(junk)
    everything_or_one_line(written(tmp_path, config, packed_tensors(form)))


@SHARED
@given(form=st.sampled_from(NAMES), data=st.data())
def test_any_damage_to_the_tensors(tmp_path: Path, form: str, data: st.DataObject) -> None:
    tensors = packed_tensors(form)
    name = data.draw(st.sampled_from(sorted(tensors)))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64, torch.uint8, torch.float16, torch.bfloat16, torch.bool]))
    shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 12, 32, 96]), max_size=3))
    tensors[name] = torch.full(shape, data.draw(st.sampled_from([0, 1, -1, 96])), dtype=torch.int64).to(dtype)
    everything_or_one_line(written(tmp_path, FORMATS[form].config({MODULE: SCHEME}), tensors))


def test_a_gptq_matrix_with_dynamic_act_order_is_read_sorted_and_dense(tmp_path: Path) -> None:
    """Tensors as AutoGPTQ writes them with desc_act: column k belongs to group g_idx[k], in any order."""
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    shuffled = replace(WEIGHT, codes=WEIGHT.codes[:, order].contiguous())
    tensors = FORMATS["gptq"].encode(shuffled, torch.float16)
    tensors["g_idx"] = tensors["g_idx"][order].contiguous()
    config = FORMATS["gptq"].config({MODULE: SCHEME}) | {"desc_act": True}
    checkpoint = written(tmp_path, config, {f"{MODULE}.{suffix}": tensor for suffix, tensor in tensors.items()})
    packed = PackedReader(checkpoint)
    with pytest.raises(FormatError, match="g_idx is permuted"):
        packed.read(MODULE)
    weight, columns = packed.read_sorted(MODULE)
    assert columns is not None
    expected = WEIGHT.dequantize()[:, order]
    assert torch.equal(weight.dequantize(), expected[:, columns])
    assert torch.equal(dense_reader(checkpoint)([f"{MODULE}.weight"])[f"{MODULE}.weight"], expected)


def test_a_g_idx_with_groups_of_unequal_size_is_refused(tmp_path: Path) -> None:
    tensors = packed_tensors("gptq")
    tensors[f"{MODULE}.g_idx"][0] = 1
    packed = PackedReader(written(tmp_path, FORMATS["gptq"].config({MODULE: SCHEME}), tensors))
    with pytest.raises(FormatError, match=rf"\A{tmp_path}: '{MODULE}': g_idx does not put 32 columns .*; fetch .*\Z"):
        packed.read_sorted(MODULE)
