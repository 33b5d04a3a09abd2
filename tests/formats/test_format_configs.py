"""What the formats write to and read from config.json, and which schemes they refuse."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.slow_formats import UNTIMED
from quantkit.errors import FormatError
from quantkit.formats import FORMATS, ModuleSchemes, format_of
from quantkit.formats.base import module_patterns
from quantkit.methods.scheme import Scheme

CT, GPTQ, AWQ = FORMATS["compressed-tensors"], FORMATS["gptq"], FORMATS["awq"]
W4, W4A, W8 = Scheme(4, 128, True), Scheme(4, 128, False), Scheme(8, 32, True)

MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
#: Block 1 begins the names of blocks 10 and 11.
BLOCKS = (0, 1, 2, 10, 11)
MODULES = [f"model.layers.{block}.{matrix}" for block in BLOCKS for matrix in MATRICES]


def plan_of(main: Scheme | None, **others: Scheme | None) -> dict[str, Scheme | None]:
    """The scheme `main` for every matrix, except for those whose path contains a key of `others`; the head in 16 bit."""
    plan = {name: next((own for part, own in others.items() if part in name), main) for name in MODULES}
    return plan | {"lm_head": None}


def read_back(form: Any, plan: ModuleSchemes) -> dict[str, Scheme | None]:
    """The schemes after a round trip through JSON, as another program reads them."""
    return form.schemes(json.loads(json.dumps(form.config(plan))), list(plan))


# What is written: the whole dict, so that no key is lost or added unseen.


def test_compressed_tensors_config() -> None:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    assert CT.config(plan_of(W4)) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }


def test_compressed_tensors_config_of_whole_rows() -> None:
    weights = CT.config(plan_of(Scheme(8, -1, False)))["config_groups"]["group_0"]["weights"]
    assert weights["strategy"] == "channel"
    assert weights["group_size"] is None
    assert weights["symmetric"] is False


@pytest.mark.parametrize(("scheme", "version"), [(W4, "gptq"), (W4A, "gptq_v2")])
def test_gptq_config(scheme: Scheme, version: str) -> None:
    config = GPTQ.config(plan_of(scheme))
    meta = config.pop("meta")
    assert re.fullmatch(r"quantkit:\d+\.\d+\.\d+", meta["quantizer"][0])
    assert config == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": scheme.symmetric,
        "lm_head": False,
        "checkpoint_format": version,
        "pack_dtype": "int32",
    }


def test_awq_config() -> None:
    assert AWQ.config(plan_of(W4A)) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }


# Schemes there and back.

schemes = st.builds(Scheme, st.sampled_from([2, 3, 4, 8]), st.sampled_from([-1, 32, 128]), st.booleans())


@st.composite
def plans(draw: st.DrawFn, *, mixed_symmetry: bool) -> dict[str, Scheme | None]:
    """Any scheme or none for every matrix, from so small a choice that blocks often agree."""
    chosen = draw(st.lists(schemes, min_size=1, max_size=3))
    if not mixed_symmetry:
        chosen = [Scheme(s.bits, s.group_size, chosen[0].symmetric) for s in chosen]
    options: st.SearchStrategy[Scheme | None] = st.sampled_from([None, *chosen])
    by_matrix = {matrix: draw(options) for matrix in MATRICES}
    plan = {f"model.layers.{block}.{matrix}": by_matrix[matrix] for block in BLOCKS for matrix in MATRICES}
    exceptions = draw(st.dictionaries(st.sampled_from([*MODULES, "lm_head"]), options, max_size=6))
    plan = plan | {"lm_head": None} | exceptions
    return plan if any(plan.values()) else plan | {MODULES[0]: chosen[0]}


@UNTIMED
@given(plans(mixed_symmetry=True))
def test_any_plan_survives_compressed_tensors(plan: dict[str, Scheme | None]) -> None:
    assert read_back(CT, plan) == plan


@UNTIMED
@given(plans(mixed_symmetry=False))
def test_any_plan_survives_gptq(plan: dict[str, Scheme | None]) -> None:
    assert read_back(GPTQ, plan) == plan


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_a_plan_with_skipped_matrices_survives(form: Any) -> None:
    plan = plan_of(W4A, **{"layers.1.": None, "down_proj": None})
    assert read_back(form, plan) == plan


def test_gptq_refuses_to_mix_symmetries() -> None:
    with pytest.raises(FormatError, match=r"\Athe gptq format cannot mix .*; use compressed-tensors\Z"):
        GPTQ.config(plan_of(W4, down_proj=W4A))


def test_awq_refuses_mixed_plans() -> None:
    with pytest.raises(FormatError, match=r"\Athe awq format holds one scheme .*; use compressed-tensors for mixed ones\Z"):
        AWQ.config(plan_of(W4A, down_proj=Scheme(4, 32, False)))


def test_an_ending_of_all_blocks_is_one_pattern_and_of_some_is_spelled_out() -> None:
    plan = plan_of(W4)
    everywhere = [name for name in MODULES if name.endswith("down_proj")]
    assert module_patterns(everywhere, plan) == [r".*\.\d+\.mlp\.down_proj$"]
    assert module_patterns(everywhere[:1], plan) == [r"^model\.layers\.0\.mlp\.down_proj$"]
    assert module_patterns(["lm_head"], plan) == ["^lm_head$"]


def test_a_pattern_does_not_match_a_longer_ending() -> None:
    plan = {"m.layers.0.attn.q": W4, "m.layers.0.cross.attn.q": W8}
    assert read_back(CT, plan) == plan
    assert read_back(GPTQ, plan) == plan


def test_gptq_rules_reach_the_names_of_merged_matrices() -> None:
    """vLLM and SGLang look a rule up once for q, k and v, under `qkv_proj`, and once for gate and up."""
    merged = [f"model.layers.{block}.{name}" for block in BLOCKS for name in ("self_attn.qkv_proj", "mlp.gate_up_proj")]
    everywhere = GPTQ.schemes(GPTQ.config(plan_of(W4, self_attn=W8)), merged)
    assert everywhere == {name: W8 if "attn" in name else W4 for name in merged}
    somewhere = GPTQ.schemes(GPTQ.config(plan_of(W4, **{"layers.1.mlp": None, "layers.2.self_attn": W8})), merged)
    assert somewhere == dict.fromkeys(merged, W4) | {
        "model.layers.1.mlp.gate_up_proj": None,
        "model.layers.2.self_attn.qkv_proj": W8,
    }


# Configs of other tools.


def ct_config(**groups: tuple[list[str], dict[str, Any]]) -> dict[str, Any]:
    base = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    return {
        "format": "pack-quantized",
        "config_groups": {name: {"targets": targets, "weights": base | more} for name, (targets, more) in groups.items()},
    }


def test_compressed_tensors_names_go_before_patterns_before_classes() -> None:
    config = ct_config(
        a=(["Linear"], {"num_bits": 2}),
        b=(["re:.*down_proj$"], {"num_bits": 8}),
        c=(["model.layers.1.mlp.down_proj"], {"num_bits": 3}),
        d=(["Linear"], {"num_bits": 4}),
    )
    modules = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert [scheme and scheme.bits for scheme in CT.schemes(config, modules).values()] == [4, 8, 3]


def test_compressed_tensors_ignore_takes_patterns() -> None:
    config = ct_config(a=(["Linear"], {})) | {"ignore": ["lm_head", r"re:.*\.0\..*"]}
    assert [*CT.schemes(config, ["lm_head", "layers.0.q", "layers.1.q", "layers.10.q"]).values()] == [None, None, W4, W4]


@pytest.mark.parametrize("more", [{"type": "float"}, {"strategy": "tensor"}, {"strategy": "block"}, {"actorder": "group"}])
def test_compressed_tensors_weights_of_another_kind_are_refused(more: dict[str, Any]) -> None:
    """Their tensors have the same names and would be read as something else."""
    with pytest.raises(FormatError, match=rf"\Aweights with .*{next(iter(more.values()))}.* cannot be read; .*\Z"):
        CT.schemes(ct_config(a=(["Linear"], more)), MODULES)


@pytest.mark.parametrize("order", [None, "static", "weight"])
def test_compressed_tensors_static_order_is_read(order: str | None) -> None:
    assert CT.schemes(ct_config(a=(["Linear"], {"actorder": order})), ["x"]) == {"x": W4}


@pytest.mark.parametrize("sign", ["", "+:"])
def test_gptq_override_with_and_without_sign(sign: str) -> None:
    config = {"bits": 4, "group_size": 128, "dynamic": {rf"{sign}down.*": {"bits": 8}, r"-:up.*": {}}}
    found = GPTQ.schemes(config, ["q", "down", "up", "lm_head"])
    assert found == {"q": W4, "down": Scheme(8, 128, True), "up": None, "lm_head": None}


def test_the_first_gptq_rule_that_matches_decides() -> None:
    config = {"bits": 4, "group_size": 128, "dynamic": {"-:q": {}, "+:.*": {"bits": 8}}}
    assert GPTQ.schemes(config, ["q", "k"]) == {"q": None, "k": Scheme(8, 128, True)}


def test_awq_version_in_capitals_is_read() -> None:
    config = {"bits": 4, "group_size": 128, "version": "GEMM", "zero_point": True}
    assert AWQ.schemes(config, ["x"]) == {"x": W4A}


UNREADABLE: list[tuple[Any, dict[str, Any], str]] = [
    (CT, {"format": "marlin-24"}, "compressed-tensors format 'marlin-24' is not read; only pack-quantized"),
    (CT, ct_config(a=(["Linear"], {"num_bits": 5})), "bits 5 and group size 128 cannot be read"),
    (CT, ct_config(a=(["Linear"], {"num_bits": "4"})), "bits '4' and group size 128 cannot be read"),
    (GPTQ, {"bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read"),
    (GPTQ, {"bits": 4, "group_size": 0}, "bits 4 and group size 0 cannot be read"),
    (GPTQ, {"bits": 4, "group_size": 32, "dynamic": {"+:.*": {"bits": 6}}}, "bits 6 and group size 32 cannot be read"),
    (AWQ, {"bits": 4, "group_size": -2}, "bits 4 and group size -2 cannot be read"),
    (AWQ, {"bits": 3, "group_size": 32}, "only the 4-bit gemm version of the awq format can be read"),
    (AWQ, {"bits": 4, "group_size": 32, "version": "gemv"}, "only the 4-bit gemm version of the awq format can be read"),
]


@pytest.mark.parametrize(("form", "config", "message"), UNREADABLE, ids=lambda value: getattr(value, "name", None))
def test_a_config_that_cannot_be_read_says_why(form: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=rf"\A{re.escape(message)}.*\Z"):
        form.schemes(config, MODULES)


@pytest.mark.parametrize("method", [None, "bitsandbytes", ["gptq"], "a\nb" * 100])
def test_an_unknown_method_is_named_beside_the_known_ones(method: object) -> None:
    with pytest.raises(FormatError, match=r"\Aquant_method .* cannot be read; known: compressed-tensors, gptq, awq\Z"):
        format_of({"quant_method": method})


# What a format cannot hold.


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_a_group_size_that_does_not_divide_names_those_that_do(form: Any) -> None:
    message = "group size 128 does not divide 192 columns; use 16, 32, 64, 96, 192, -1"
    assert form.unsupported_reason(Scheme(4, 128, True), 64, 192) == message
    assert form.unsupported_reason(Scheme(4, 128, True), 64, 40) == "group size 128 does not divide 40 columns; use -1"


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
@UNTIMED
@given(st.integers(1, 40).map(lambda k: 8 * k), st.sampled_from([16, 32, 48, 64, 128, 256]))
def test_every_size_that_is_named_works(form: Any, columns: int, size: int) -> None:
    problem = form.unsupported_reason(Scheme(4, size, True), 8, columns)
    assert (problem is None) == (columns % size == 0)
    for named in re.findall(r"-?\d+", problem.split("use ")[1] if problem else ""):
        assert form.unsupported_reason(Scheme(4, int(named), True), 8, columns) is None


@pytest.mark.parametrize(("bits", "unit"), [(2, 16), (3, 32), (4, 8), (8, 4)])
def test_gptq_needs_whole_words_both_ways(bits: int, unit: int) -> None:
    scheme = Scheme(bits, -1, True)
    assert GPTQ.unsupported_reason(scheme, 3 * unit, 5 * unit) is None
    for rows, columns in ((3 * unit + unit // 2, 5 * unit), (3 * unit, 5 * unit + unit // 2)):
        problem = GPTQ.unsupported_reason(scheme, rows, columns)
        assert problem is not None
        assert f"{rows} x {columns} is not a multiple of {unit} both ways; use compressed-tensors" in problem


def test_awq_holds_four_bits_and_rows_in_eights() -> None:
    assert AWQ.unsupported_reason(Scheme(4, 32, True), 24, 96) is None
    assert AWQ.unsupported_reason(Scheme(3, 32, True), 24, 96) == "the awq format holds 4 bits, not 3; use compressed-tensors"
    assert "28 is not a multiple of 8; use compressed-tensors" in str(AWQ.unsupported_reason(Scheme(4, 32, True), 28, 96))


def test_engines_say_what_they_refuse() -> None:
    def loads(form: Any, *used: Scheme) -> dict[str, bool]:
        return {engine.name: engine.loads for engine in form.engines(set(used))}

    assert loads(CT, W4, W8) == {"vLLM": True, "SGLang": True, "transformers": True}
    assert loads(CT, W4, Scheme(3, 128, True))["SGLang"] is False
    assert loads(CT, W4A)["transformers"] is True
    assert loads(CT, W4A, W8)["transformers"] is False
    assert loads(GPTQ, W4)["vLLM"] is True
    assert loads(GPTQ, W4A)["vLLM"] is False
    assert loads(GPTQ, W4, Scheme(3, 128, True))["SGLang"] is False
