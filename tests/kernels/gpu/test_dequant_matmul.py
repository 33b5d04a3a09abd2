"""The matmul with packed weights against the reference: compiled if there is a GPU, else under Triton's interpreter."""

import pytest
import torch

from helpers.weights import DEVICE, activations, assert_close, sample
from quantkit.kernels.gpu.matmul.dequant_gemm import dequant_gemm
from quantkit.kernels.gpu.matmul.dequant_matmul import dequant_matmul
from quantkit.kernels.gpu.matmul.dequantize import dequantize
from quantkit.kernels.gpu.matmul.gemm_plan import Steps
from quantkit.kernels.layouts.planes import block_columns

FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
SMALL = {"block_n": 64, "warps": 2, "stages": 2}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="too large for the interpreter; needs a GPU")


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), [(1, 576, 64), (3, 384, 128), (5, 320, 16), (2, 1000, -1)])
def test_few_rows(bits: int, dtype: torch.dtype, rows: int, columns: int, group: int) -> None:
    weight = sample(70, columns, bits, group, dtype)
    x = activations(rows, columns, dtype)
    assert_close(dequant_gemm(x, weight.planes, None, {**SMALL, "splits": 1}), x, weight)


@pytest.mark.parametrize("rows", [16, 33, 100, 130])
@pytest.mark.parametrize(("bits", "dtype"), [(4, FLOAT16), (3, BFLOAT16)])
def test_more_rows(bits: int, dtype: torch.dtype, rows: int) -> None:
    weight = sample(130, 512, bits, 128, dtype, symmetric=True)
    x = activations(rows, 512, dtype)
    assert_close(dequant_gemm(x, weight.planes, None, {**SMALL, "splits": 1}), x, weight)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 48, 96, 192])
def test_groups_that_cut_blocks(bits: int, group: int) -> None:
    weight = sample(33, 576, bits, group)
    x = activations(2, 576, FLOAT16)
    assert_close(dequant_gemm(x, weight.planes, None, {**SMALL, "splits": 1}), x, weight)


@pytest.mark.parametrize("splits", [2, 3, 5, 16])
@pytest.mark.parametrize("bias_type", [None, FLOAT16, FLOAT32])
def test_shares_of_the_columns_add_up(splits: int, bias_type: torch.dtype | None) -> None:
    """640 columns are 5 steps: the splits are even, uneven, one step each, and more than there are steps."""
    weight = sample(65, 640, 4, 128, BFLOAT16)
    x = activations(3, 640, BFLOAT16)
    bias = None if bias_type is None else torch.randn(65, device=DEVICE).to(bias_type)
    config = {**SMALL, "splits": splits}
    out = dequant_gemm(x, weight.planes, bias, config)
    assert_close(out, x, weight, bias)
    assert torch.equal(out, dequant_gemm(x, weight.planes, bias, config))


@pytest.mark.parametrize("scales", [FLOAT16, BFLOAT16])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_scales_may_be_of_another_type_than_activations(dtype: torch.dtype, scales: torch.dtype) -> None:
    weight = sample(40, 256, 4, 64, scales)
    assert weight.planes.scale_type == scales
    x = activations(4, 256, dtype)
    assert_close(dequant_matmul(x, weight.planes), x, weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("columns", "group"), [(576, 64), (112, 16), (100, -1)])
def test_dense_copy_is_the_oracles(bits: int, columns: int, group: int) -> None:
    weight = sample(67, columns, bits, group)
    wanted = weight.dense()
    # One product of an integer below 2^8 and a 16-bit scale is exact in float32.
    assert torch.equal(dequantize(weight.planes, FLOAT32), wanted)
    half = dequantize(weight.planes, BFLOAT16).float()
    # One unit in the last place: rounding needs half of it, but the interpreter truncates.
    assert ((half - wanted).abs() <= 2.0**-7 * wanted.abs()).all()


@pytest.mark.parametrize(("rows", "dtype"), [(129, FLOAT16), (129, BFLOAT16), (1, FLOAT32), (200, FLOAT32)])
def test_many_rows_and_float32_go_through_dense_weights(rows: int, dtype: torch.dtype) -> None:
    weight = sample(70, 192, 4, 64)
    x, bias = activations(rows, 192, dtype), torch.randn(70, device=DEVICE)
    assert_close(dequant_matmul(x, weight.planes, bias), x, weight, bias, rounded=dtype != FLOAT32)


def test_rows_apart_and_what_lies_between_them() -> None:
    """x is a slice of wider rows. Neither the rest of the rows nor a NaN in another row reaches a result."""
    wide = torch.full((3, 800), float("nan"), device=DEVICE, dtype=FLOAT16)
    weight = sample(20, 600, 4, -1)
    wide[:2, 100:700] = activations(2, 600, FLOAT16)
    out = dequant_matmul(wide[:, 100:700], weight.planes)
    assert_close(out[:2], wide[:2, 100:700], weight)
    assert out[2].isnan().all()
    assert_close(dequant_matmul(wide[:2, 100:700].T.contiguous().T, weight.planes), wide[:2, 100:700], weight)


def test_no_rows() -> None:
    assert dequant_matmul(torch.empty(0, 64, device=DEVICE, dtype=FLOAT16), sample(20, 64, 4, 64).planes).shape == (0, 20)


def test_wrong_arguments_are_our_bugs() -> None:
    weight = sample(20, 64, 4, 64).planes
    x = torch.zeros(2, 64, device=DEVICE, dtype=FLOAT16)
    for wrong in (x[:, :32], x[0], x.double(), x.long()):
        with pytest.raises(AssertionError):
            dequant_matmul(wrong, weight)
    with pytest.raises(AssertionError):
        dequant_matmul(x, weight, x[0])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("columns", "group"),
    [(16, -1), (100, -1), (64, 16), (576, 48), (576, 64), (576, 192), (1536, 96), (1536, 512), (14336, 128), (14336, -1)],
)
def test_every_column_meets_the_scale_of_its_group(bits: int, columns: int, group: int) -> None:
    width = columns if group == -1 else group
    steps, block = Steps.of(bits, width, columns), block_columns(bits)
    tile = block * steps.words // 16
    assert steps.count * steps.loads * tile == -(-columns // block) * block
    for k in range(0, columns, 16):
        plane = k % block // 16
        # The group that the kernel looks up once for `planes_per_scale` planes.
        used = (k // tile * tile + plane // steps.planes_per_scale * steps.planes_per_scale * 16) // width
        assert used == k // width


@GPU
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "outputs", "columns", "group"), [(1, 49152, 576, 64), (7, 4096, 14336, 128)])
def test_shapes_of_real_models(bits: int, dtype: torch.dtype, rows: int, outputs: int, columns: int, group: int) -> None:
    weight = sample(outputs, columns, bits, group, dtype)
    x = activations(rows, columns, dtype)
    assert_close(dequant_matmul(x, weight.planes), x, weight)
