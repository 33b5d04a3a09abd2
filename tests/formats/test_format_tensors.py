"""Every bit of the three layouts against slow references; encode and decode as inverses; tensors that other tools wrote."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import slow_formats
from helpers.slow_formats import UNTIMED, make_weight
from quantkit.errors import FormatError
from quantkit.formats import FORMATS
from quantkit.formats.base import cast_exactly
from quantkit.methods.grid import QuantizedWeight
from quantkit.methods.scheme import Scheme

CT, GPTQ, AWQ = FORMATS["compressed-tensors"], FORMATS["gptq"], FORMATS["awq"]
V1 = {"quant_method": "gptq", "checkpoint_format": "gptq"}
V2 = {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}

#: Rows of 24 and of 96 end within a word at some widths and at a word at others.
GROUPS = [-1, 8, 32]
SCHEMES = [Scheme(bits, size, symmetric) for bits in (2, 3, 4, 8) for size in GROUPS for symmetric in (True, False)]


def name_of(value: object) -> str:
    return str(value).replace(" ", "-")


def gptq_config(scheme: Scheme) -> dict[str, Any]:
    return V1 if scheme.symmetric else V2


def lists(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {suffix: tensor.tolist() for suffix, tensor in tensors.items()}


def kinds(tensors: dict[str, Tensor]) -> dict[str, torch.dtype]:
    return {suffix: tensor.dtype for suffix, tensor in tensors.items()}


def assert_same(got: QuantizedWeight, wanted: QuantizedWeight) -> None:
    assert got.scheme == wanted.scheme
    for field in ("codes", "scales", "zeros"):
        ours, theirs = getattr(got, field), getattr(wanted, field)
        assert ours.dtype == theirs.dtype, field
        assert torch.equal(ours, theirs), field
        assert ours.is_contiguous(), field


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
@pytest.mark.parametrize("shape", [(24, 96), (5, 96), (1, 32)], ids=name_of)
def test_compressed_tensors_bit_by_bit(scheme: Scheme, shape: tuple[int, int]) -> None:
    weight = make_weight(scheme, *shape)
    tensors = CT.encode(weight, torch.bfloat16)
    assert lists(tensors) == slow_formats.compressed_tensors(weight)
    expected = {"weight_packed": torch.int32, "weight_scale": torch.bfloat16, "weight_shape": torch.int64}
    assert kinds(tensors) == expected | ({} if scheme.symmetric else {"weight_zero_point": torch.int32})


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
@pytest.mark.parametrize("shape", [(32, 96), (96, 32)], ids=name_of)
def test_gptq_bit_by_bit(scheme: Scheme, shape: tuple[int, int]) -> None:
    weight = make_weight(scheme, *shape)
    tensors = GPTQ.encode(weight, torch.bfloat16)
    assert lists(tensors) == slow_formats.gptq(weight, version=1 if scheme.symmetric else 2)
    assert kinds(tensors) == {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.float16,
        "g_idx": torch.int32,
    }


@pytest.mark.parametrize("size", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(24, 96), (8, 32)], ids=name_of)
def test_awq_bit_by_bit(size: int, symmetric: bool, shape: tuple[int, int]) -> None:
    weight = make_weight(Scheme(4, size, symmetric), *shape)
    tensors = AWQ.encode(weight, torch.bfloat16)
    assert lists(tensors) == slow_formats.awq(weight)
    assert kinds(tensors) == {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_narrow_gptq_shapes_fill_their_words(bits: int) -> None:
    """The smallest N and K that are allowed."""
    unit = 32 // bits
    weight = make_weight(Scheme(bits, -1, False), unit, 3 * unit)
    assert lists(GPTQ.encode(weight, torch.float16)) == slow_formats.gptq(weight, version=2)


def test_one_packer_serves_gptq_and_compressed_tensors() -> None:
    weight = make_weight(Scheme(3, 32, False), 32, 96)
    ours, theirs = CT.encode(weight, torch.float16), GPTQ.encode(weight, torch.float16)
    assert torch.equal(ours["weight_packed"], theirs["qweight"].T)
    assert torch.equal(ours["weight_scale"], theirs["scales"].T)
    assert torch.equal(ours["weight_zero_point"], theirs["qzeros"].T)


def test_words_that_formats_md_writes_out() -> None:
    weight = make_weight(Scheme(4, -1, True), 8, 8)
    weight.codes[:] = torch.arange(8, dtype=torch.uint8)[:, None]  # row n holds n
    assert GPTQ.encode(weight, torch.float16)["qzeros"].tolist() == [[0x77777777]]
    awq = AWQ.encode(weight, torch.float16)
    assert awq["qzeros"].tolist() == [[slow_formats.signed(0x88888888)]]
    assert awq["qweight"].tolist() == [[0x75316420]] * 8


@st.composite
def weights(draw: st.DrawFn) -> QuantizedWeight:
    """Matrices of any scheme, in shapes that every format but AWQ (4 bits) holds."""
    bits, symmetric = draw(st.sampled_from([2, 3, 4, 8])), draw(st.booleans())
    columns = 32 * draw(st.integers(1, 4))
    size = draw(st.sampled_from([size for size in (-1, 8, 16, 32, 48, 96) if columns % size == 0]))
    rows = 32 * draw(st.integers(1, 2))
    return make_weight(Scheme(bits, size, symmetric), rows, columns, seed=draw(st.integers(0, 2**31)))


@UNTIMED
@given(weights())
def test_decode_undoes_encode(weight: QuantizedWeight) -> None:
    scheme = weight.scheme
    assert_same(CT.decode(CT.encode(weight, torch.bfloat16), scheme, {}), weight)
    assert_same(GPTQ.decode(GPTQ.encode(weight, torch.float16), scheme, gptq_config(scheme)), weight)
    if scheme.bits == 4:
        asymmetric = Scheme(4, scheme.group_size, False)
        stored = AWQ.decode(AWQ.encode(weight, torch.float16), asymmetric, {})
        assert_same(stored, QuantizedWeight(weight.codes, weight.scales, weight.zeros, asymmetric))
        assert torch.equal(stored.dequantize(), weight.dequantize())


@UNTIMED
@given(rows=st.integers(1, 9), columns=st.integers(1, 70), bits=st.sampled_from([2, 3, 4, 8]), symmetric=st.booleans())
def test_compressed_tensors_holds_any_shape(rows: int, columns: int, bits: int, symmetric: bool) -> None:
    weight = make_weight(Scheme(bits, -1, symmetric), rows, columns)
    assert_same(CT.decode(CT.encode(weight, torch.float16), weight.scheme, {}), weight)


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_dense_shape_comes_from_the_header(form: Any) -> None:
    weight = make_weight(Scheme(4, 32, False), 32, 96)
    first = form.encode(weight, torch.float16)[form.suffixes[0]]
    assert form.dense_shape(tuple(first.shape), 4) == (32, 96)


def test_weight_shape_may_be_missing() -> None:
    weight = make_weight(Scheme(4, 32, True), 5, 96)
    tensors = CT.encode(weight, torch.float16)
    del tensors["weight_shape"]
    assert_same(CT.decode(tensors, weight.scheme, {}), weight)


@pytest.mark.parametrize(("value", "dtype"), [(1 + 2**-10, torch.bfloat16), (1e5, torch.float16), (2.0**-30, torch.float16)])
def test_a_scale_that_would_be_rounded_is_refused(value: float, dtype: torch.dtype) -> None:
    kept = torch.tensor([0.5, -2.0, 2.0**-24])
    assert torch.equal(cast_exactly(kept, dtype), kept.to(dtype))
    with pytest.raises(FormatError, match=r"\Ascales are not exact in \w+16, .*; use another format\Z"):
        cast_exactly(torch.tensor([0.5, value]), dtype)


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_no_format_rounds_a_scale(form: Any) -> None:
    weight = make_weight(Scheme(4, 32, False), 32, 96)
    weight.scales[3, 1] = 1 + 2**-20
    with pytest.raises(FormatError, match="not exact"):
        form.encode(weight, torch.bfloat16)


# Tensors of other tools.


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_v1_asymmetric_stores_one_less(bits: int) -> None:
    weight = make_weight(Scheme(bits, 32, False), 32, 96)
    weight.zeros.clamp_(min=1)
    tensors = GPTQ.encode(weight, torch.float16)
    tensors["qzeros"] = torch.tensor(slow_formats.gptq(weight, version=1)["qzeros"], dtype=torch.int32)
    assert_same(GPTQ.decode(tensors, weight.scheme, V1), weight)
    assert_same(GPTQ.decode(tensors, weight.scheme, {"quant_method": "gptq"}), weight)  # without the key it is v1


@pytest.mark.parametrize(("bits", "ones"), [(2, 0x55555555), (4, 0x11111111), (8, 0x01010101)])
def test_gptq_v1_underflow_is_read_as_gptqmodel_writes_it(bits: int, ones: int) -> None:
    """GPTQModel subtracts 1 from all fields of a word at once: a zero point of 0 wraps to the largest value and borrows."""
    weight = make_weight(Scheme(bits, 32, False), 32, 96)
    assert (weight.zeros == 0).any()
    tensors = GPTQ.encode(weight, torch.float16)
    words = [[slow_formats.signed((word - ones) & 0xFFFFFFFF) for word in row] for row in tensors["qzeros"].tolist()]
    tensors["qzeros"] = torch.tensor(words, dtype=torch.int32)
    assert_same(GPTQ.decode(tensors, weight.scheme, V1), weight)


def test_gptq_v1_underflow_at_3_bits_wraps_in_its_field() -> None:
    weight = make_weight(Scheme(3, 32, False), 32, 96)
    assert (weight.zeros == 0).any()
    tensors = GPTQ.encode(weight, torch.float16)
    stored = [[(z - 1) % 8 for z in column] for column in slow_formats.transposed(weight.zeros.tolist())]
    tensors["qzeros"] = torch.tensor([slow_formats.bitstream(row, 3) for row in stored], dtype=torch.int32)
    assert_same(GPTQ.decode(tensors, weight.scheme, V1), weight)


@pytest.mark.parametrize("missing", ["g_idx", "qzeros"])
def test_what_symmetric_gptq_may_lack(missing: str) -> None:
    weight = make_weight(Scheme(4, 32, True), 32, 96)
    tensors = GPTQ.encode(weight, torch.float16)
    del tensors[missing]
    assert_same(GPTQ.decode(tensors, weight.scheme, V1), weight)


def test_permuted_g_idx_is_refused() -> None:
    weight = make_weight(Scheme(4, 32, True), 32, 96)
    tensors = GPTQ.encode(weight, torch.float16)
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(FormatError, match=r"\Ag_idx is permuted .* quantize the original again .*desc_act off\Z"):
        GPTQ.decode(tensors, weight.scheme, V1)


def test_symmetric_gptq_with_other_zero_points_is_refused() -> None:
    """Engines that trust `sym` would compute other weights than engines that trust `qzeros`."""
    weight = make_weight(Scheme(4, 32, True), 32, 96)
    tensors = GPTQ.encode(weight, torch.float16)
    with pytest.raises(FormatError, match=r"\Aconfig.json says symmetric, but not all zero points are 8; .*\Z"):
        GPTQ.decode(tensors, weight.scheme, V2)


WRONG = [(form, suffix, how) for form in FORMATS.values() for suffix in form.suffixes[1:] for how in ("shape", "dtype")]


@pytest.mark.parametrize(("form", "suffix", "how"), WRONG, ids=lambda value: getattr(value, "name", value))
def test_a_tensor_of_another_shape_or_dtype_is_refused(form: Any, suffix: str, how: str) -> None:
    """Above all shapes that would silently be broadcast or padded."""
    weight = make_weight(Scheme(4, 32, False), 32, 96)
    tensors = form.encode(weight, torch.float16)
    right = tensors[suffix]
    other = torch.int32 if right.is_floating_point() else torch.float32
    tensors[suffix] = right[:1] if how == "shape" else right.to(other)
    with pytest.raises(FormatError, match=rf"\A{suffix} is .*; fetch the model again\Z"):
        form.decode(tensors, weight.scheme, V2)


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_groups_that_do_not_divide_a_stored_row_are_refused(form: Any) -> None:
    weight = make_weight(Scheme(4, 32, False), 32, 96)
    with pytest.raises(FormatError, match=r"\Aits 96 columns are not a multiple of the group size 64; .*\Z"):
        form.decode(form.encode(weight, torch.float16), Scheme(4, 64, False), V2)


def test_a_first_word_too_few_is_refused() -> None:
    """weight_packed, whose rows weight_shape measures."""
    weight = make_weight(Scheme(3, -1, True), 5, 96)
    tensors = CT.encode(weight, torch.float16)
    tensors["weight_packed"] = tensors["weight_packed"][:, :-1]
    with pytest.raises(FormatError, match=r"\Aweight_packed is int32 \[5, 8\], config.json calls for int32 \[5, 9\]; .*\Z"):
        CT.decode(tensors, weight.scheme, {})
