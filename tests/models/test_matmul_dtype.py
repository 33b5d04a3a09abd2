"""In which dtype a block's matrices multiply."""

import pytest
import torch
from torch import nn

from quantkit.models import matmul_dtype as matmul
from quantkit.models.matmul_dtype import fastest_matmul, matmul_in

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("factor", "chosen"), [(0.5, True), (0.9, False), (8.0, False)])
def test_the_stored_dtype_must_be_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, factor: float, chosen: bool
) -> None:
    monkeypatch.setattr(matmul, "_seconds", lambda kind: 1.0 if kind == torch.float32 else factor)
    assert fastest_matmul(dtype, CPU) == (dtype if chosen else torch.float32)


@pytest.mark.parametrize(("dtype", "device"), [(torch.float32, "cpu"), (torch.bfloat16, "cuda"), (torch.float16, "cuda")])
def test_where_there_is_no_choice_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, device: str
) -> None:
    monkeypatch.setattr(matmul, "_seconds", None)
    assert fastest_matmul(dtype, torch.device(device)) == dtype


def test_measuring_comes_to_an_end() -> None:
    assert fastest_matmul(torch.bfloat16, CPU) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_products_in_float32_are_rounded_once(stored: torch.dtype, bias: bool) -> None:
    layer, inputs = nn.Linear(48, 32, bias=bias, dtype=stored), torch.randn(2, 5, 48, dtype=stored)
    exact = inputs.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    with torch.no_grad(), matmul_in(torch.float32, [layer]):
        assert layer.weight.dtype == torch.float32
        product = layer(inputs)
    assert product.dtype == stored
    # Half a unit in the last place, and a little more where float32 fell on the other side of a tie.
    assert bool(((product.double() - exact).abs() <= 0.51 * torch.finfo(stored).eps * exact.abs() + 1e-6).all())


def test_the_stored_dtype_is_the_layers_own_forward() -> None:
    layer, inputs = nn.Linear(48, 32, dtype=torch.bfloat16), torch.randn(5, 48, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(inputs)
        with matmul_in(torch.bfloat16, [layer]):
            assert torch.equal(layer(inputs), expected)


def test_a_replaced_weight_takes_effect_and_nothing_is_left_behind() -> None:
    layer, inputs = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16), torch.ones(1, 8, dtype=torch.bfloat16)
    with torch.no_grad(), matmul_in(torch.float32, [layer]):
        layer.weight.data = torch.eye(8)
        assert torch.equal(layer(inputs), inputs)
    assert "forward" not in vars(layer)
